"""Decode steps of few sequences as one launch, on the host shim: the ops' own tokens and logits."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.runner import RunnerLimits
from nanocupy.ops.cuda_sizes import DeviceTraits
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build
from tests.shim.device import ShimDevice

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

SIZES = {"head_size": 32, "num_heads": 2, "num_kv_heads": 1, "hidden_size": 64,
         "intermediate_size": 96, "max_context": 96}  # fmt: skip
CONFIGS = {
    "llama": tiny_config(**SIZES),
    "qwen2": tiny_config(architecture="qwen2", has_qkv_bias=True, tied_lm_head=True, **SIZES),
    "qwen3": tiny_config(architecture="qwen3", has_qk_norm=True, **SIZES),
}
CARD = ((9, 0), 3, 227 << 10)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def generate(config, whole: bool, dtype: str, prompts, params=GREEDY, run_ahead=True):
    """Tokens of each prompt, and what was launched."""
    device = ShimDevice(DeviceTraits(*CARD, whole_steps=whole))
    settings = DeviceSettings(dtype, dtype, dtype)
    checkpoint = TinyCheckpoint(config, seed=3)
    runner = DeviceRunner(config, device, RunnerLimits(80, 4, 96, 32, 12), settings)
    runner.upload_weights(checkpoint)
    engine = LLMEngine(config, runner, run_ahead=run_ahead)
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids, params.with_(max_tokens=4 + number))
    outputs: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
    return outputs, device


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_launch_gives_what_the_ops_give(name, count) -> None:
    rng = np.random.default_rng(count)
    prompts = [rng.integers(0, 48, rng.integers(1, 30)).tolist() for _ in range(count)]
    ops, _ = generate(CONFIGS[name], False, "float16", prompts)
    whole, device = generate(CONFIGS[name], True, "float16", prompts)
    assert whole == ops
    assert "decode_step" in device.kernels.launched


def test_not_in_float32() -> None:
    _, device = generate(CONFIGS["llama"], True, "float32", [[1, 2, 3]])
    assert "decode_step" not in device.kernels.launched
