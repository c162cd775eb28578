"""A model whose values leave float16 for one token: that request ends, and says what to do."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.answer import no_numbers
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.results import FAILED_TOKEN
from nanocupy.engine.runner import RunnerLimits
from nanocupy.ops.cuda_sizes import DeviceTraits
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build
from tests.shim.device import MODERN, ShimDevice

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1}
CONFIG = tiny_config(head_size=64, max_context=96, **SIZES)
WHOLE = tiny_config(head_size=32, max_context=96, **SIZES)
ONE_LAUNCH = DeviceTraits((9, 0), 3, 227 << 10)
HOT = 47  # the token whose values grow too large
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={HOT: -100.0})
PROMPTS = {str(n): np.random.default_rng(n).integers(0, 47, 3 + 9 * n).tolist() for n in range(4)}


class HotCheckpoint(TinyCheckpoint):
    """Every weight is far below 65504. Yet one token's embedding lies in a direction in which the
    first layer's FFN gives the residual stream (`where` residual), or its gate (`where` ffn), some
    10^5."""

    def __init__(self, config, where: str) -> None:
        super().__init__(config, seed=3)
        hidden, inner = config.hidden_size, config.intermediate_size
        arrays = {name: array.copy() for name, array in self.arrays.items()}
        embed, up = arrays["embed.weight"], arrays["layers.0.up.weight"]
        gate, down = arrays["layers.0.gate.weight"], arrays["layers.0.down.weight"]
        # All other tokens have nothing along the last direction, of which the hot one has all.
        for name, array in arrays.items():
            if name in ("embed.weight", "layers.0.gate.weight", "layers.0.up.weight"):
                array[:, hidden - 1] = 0
            if name in ("layers.0.o.weight",):
                array[hidden - 1] = 0
        embed[HOT] = 0
        embed[HOT, hidden - 1] = 10
        big = 300.0 if where == "ffn" else 25.0
        gate[inner - 1] = up[inner - 1] = 0
        gate[inner - 1, hidden - 1] = up[inner - 1, hidden - 1] = big
        down[:, inner - 1] = 0
        down[3, inner - 1] = 0.1 if where == "ffn" else 10.0
        self.arrays = arrays


def run(config, where, dtype, residual, traits, names, *, temperature=0.0, run_ahead=True):
    settings = DeviceSettings(dtype, residual, dtype)
    runner = DeviceRunner(config, ShimDevice(traits), RunnerLimits(80, 4, 96, 32, 6), settings)
    runner.upload_weights(HotCheckpoint(config, where))
    engine = LLMEngine(config, runner, run_ahead=run_ahead)
    prompts = {**PROMPTS, "hot": [*PROMPTS["2"], HOT, 5], "hot last": [1, HOT]}
    for name in names:
        params = GREEDY.with_(temperature=temperature if name.startswith("hot") else 0.0)
        engine.add_request(name, prompts[name], params)
    outputs: dict[str, list] = {name: [] for name in names}
    with np.errstate(all="ignore"):  # what is to overflow does
        while engine.has_unfinished:
            for output in engine.step():
                outputs[output.request_id].append((output.token_id, output.finish_reason))
    return outputs, runner


ALL = [*PROMPTS, "hot", "hot last"]


@pytest.mark.parametrize("where", ["residual", "ffn"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_who_overflows_ends_and_nobody_else(where: str, temperature: float) -> None:
    how = CONFIG, where, "float16", "float16", MODERN
    outputs, runner = run(*how, ALL, temperature=temperature)
    for name in ("hot", "hot last"):
        assert outputs.pop(name) == [(FAILED_TOKEN, "error")]
    alone: dict[str, list] = {}
    for name in PROMPTS:
        alone |= run(*how, [name])[0]
    assert outputs == alone
    assert {len(tokens) for tokens in outputs.values()} == {6}
    error = str(no_numbers("request hot", *runner.dtypes))
    assert "\n" not in error
    assert error.startswith("request hot: the model computes NaN or infinite logits: ")
    assert error.endswith("take dtype bfloat16, or residual_dtype float32")


def test_a_head_in_float16_under_bfloat16() -> None:
    """What its norm gives is beyond float16, and nothing else is."""
    settings = DeviceSettings("bfloat16", "bfloat16", "bfloat16", lm_head_dtype="float16")
    runner = DeviceRunner(CONFIG, ShimDevice(MODERN), RunnerLimits(80, 4, 96, 32, 6), settings)
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    norm = checkpoint.arrays["final_norm.weight"]
    checkpoint.arrays["final_norm.weight"] = np.full_like(norm, 6e4)
    runner.upload_weights(checkpoint)
    engine = LLMEngine(CONFIG, runner)
    engine.add_request("it", [1, 2, 3], GREEDY)
    with np.errstate(all="ignore"):
        (output,) = engine.step()
    assert output.finish_reason == "error"
    assert str(no_numbers("", *runner.dtypes)).endswith("; take lm_head_dtype bfloat16")


@pytest.mark.parametrize(
    ("where", "dtype", "residual", "mends"),
    [
        ("residual", "bfloat16", "bfloat16", True), ("residual", "float16", "float32", True),
        ("ffn", "bfloat16", "bfloat16", True), ("ffn", "float16", "float32", False),
    ],
)  # fmt: skip
def test_what_the_line_says_mends_it(where: str, dtype: str, residual: str, mends: bool) -> None:
    """What overflows inside a layer, a wider residual stream does not mend, and is not offered to
    those who have it."""
    outputs, runner = run(CONFIG, where, dtype, residual, MODERN, ["hot", "0"])
    assert ("error" in [reason for _, reason in outputs["hot"]]) == (not mends)
    assert len(outputs["0"]) == 6
    if not mends:
        assert str(no_numbers("", *runner.dtypes)).endswith("take dtype bfloat16")


def test_in_one_launch() -> None:
    """Of two sequences that decode together in one launch, one is led to say the hot token."""
    settings = DeviceSettings("float16", "float16", "float16")
    found = {}
    for names in (["0", "hot"], ["0"]):
        device = ShimDevice(ONE_LAUNCH)
        runner = DeviceRunner(WHOLE, device, RunnerLimits(80, 4, 96, 32, 6), settings)
        runner.upload_weights(HotCheckpoint(WHOLE, "residual"))
        engine = LLMEngine(WHOLE, runner, run_ahead=True)
        hot = GREEDY.with_(logit_bias={HOT: 100.0})
        for name in names:
            engine.add_request(name, PROMPTS["0"], hot if name == "hot" else GREEDY)
        outputs: dict[str, list] = {name: [] for name in names}
        with np.errstate(all="ignore"):
            while engine.has_unfinished:
                for output in engine.step():
                    outputs[output.request_id].append((output.token_id, output.finish_reason))
        assert "decode_step" in device.kernels.launched
        found[len(names)] = outputs
    assert found[2]["hot"] == [(HOT, None), (FAILED_TOKEN, "error")]
    assert found[2]["0"] == found[1]["0"]
