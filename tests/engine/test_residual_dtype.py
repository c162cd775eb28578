"""A residual stream wider than the other activations, on the shim's device."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.backend import device_settings, make_runner
from nanocupy.engine.batch import build_batch
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.errors import ConfigError
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build
from tests.shim.device import MODERN, ShimDevice

CONFIG = tiny_config(
    hidden_size=128, intermediate_size=192, head_size=64, num_heads=2, num_kv_heads=1,
    num_layers=4, max_context=96,
)  # fmt: skip
LIMITS = RunnerLimits(40, 4, 96, 80, 12)


def logits(runner, num_tokens: int) -> np.ndarray:
    params = SamplingParams(temperature=0, max_tokens=4)
    request = Request("a", [(7 * i + 3) % 48 for i in range(num_tokens)], params, 0, 90)
    request.block_ids = list(range(2, 3 + num_tokens // 4))
    batch = build_batch(
        [ScheduledRequest(request, num_tokens, True)], block_size=4,
        table_width=getattr(runner, "table_width", None),
    )  # fmt: skip
    return np.array(runner.logits(batch), np.float64)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("num_tokens", [1, 6, 20, 70])
def test_a_wide_residual_stream_is_nearer_to_float32(num_tokens: int) -> None:
    """By every way of the products: few rows, tensor cores, cuBLAS. The model's own weights are
    rounded to bfloat16 beforehand, so that all that differs is what is rounded on the way; the LM
    head's input is, with either."""
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    rounded = {
        name: weight.astype("bfloat16").astype(np.float32)
        for name, weight in load_numpy_weights(checkpoint).items()
    }
    wanted = logits(NumpyRunner(CONFIG, rounded, LIMITS), num_tokens)
    errors = {}
    for residual in ("bfloat16", "float32"):
        settings = DeviceSettings("bfloat16", residual, "bfloat16")
        runner = DeviceRunner(CONFIG, ShimDevice(MODERN), LIMITS, settings)
        runner.upload_weights(checkpoint)
        errors[residual] = np.sqrt(np.mean((logits(runner, num_tokens) - wanted) ** 2))
    assert errors["float32"] < 0.95 * errors["bfloat16"]
    assert errors["bfloat16"] < 0.1 * wanted.std()


def test_what_goes_together() -> None:
    settings = device_settings(EngineConfig(residual_dtype="float32"), (9, 0))
    assert (settings.dtype, settings.residual_dtype) == ("bfloat16", "float32")
    assert device_settings(EngineConfig(), (7, 5)).residual_dtype == "float16"
    with pytest.raises(ConfigError, match="residual_dtype is float16 and dtype bfloat16"):
        device_settings(EngineConfig(dtype="bfloat16", residual_dtype="float16"), (9, 0))
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    with pytest.raises(ConfigError, match="residual_dtype is bfloat16; the CPU"):
        make_runner(checkpoint, EngineConfig(device="cpu", residual_dtype="bfloat16"))
