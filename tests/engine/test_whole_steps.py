"""Decode steps of few sequences as one launch, on the host shim: the ops' own tokens and logits, of
weights in 16 bits and of quantised ones."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.device_kernels import kernel_variants
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.weight_formats import plan_weight_formats
from nanocupy.ops.cuda_sizes import DeviceTraits
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine.test_quantized_weights import QuantizedCheckpoint, all_of
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
LIMITS = RunnerLimits(80, 4, 96, 32, 12)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def generate(
    config, whole: bool, dtype: str, prompts, params=GREEDY, run_ahead=True, checkpoint=None,
    logits=None,
):  # fmt: skip
    """Tokens of each prompt, and what was launched. logits: where those of every step go."""
    device = ShimDevice(DeviceTraits(*CARD, whole_steps=whole))
    checkpoint = checkpoint or TinyCheckpoint(config, seed=3)
    formats, _ = plan_weight_formats(checkpoint, "auto")
    settings = DeviceSettings(dtype, dtype, dtype, quantized=formats)
    runner = DeviceRunner(config, device, LIMITS, settings)
    runner.upload_weights(checkpoint)
    engine = LLMEngine(config, runner, run_ahead=run_ahead)
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids, params.with_(max_tokens=4 + number))
    outputs: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        if logits is not None:
            device.synchronize("reading the logits")
            logits.append(np.array(runner._main.logits(len(prompts))))
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


# ------------------------------------------------------------------------------ quantised weights

ONE_FORM = {
    "int4": all_of("int4", 32),
    "int8": all_of("int8", 16),
    "fp8, a scale a row": all_of("fp8", None),
    "int4 and a head of int8": all_of("int4", 16) | {"lm_head": ("int8", 32)},
    "16 bits and a head of int8": {"lm_head": ("int8", 32)},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kinds", ONE_FORM)
@pytest.mark.parametrize("count", [1, 2])
def test_codes_in_one_launch_give_what_the_ops_give(name, kinds, count) -> None:
    config = CONFIGS[name]
    if config.tied_lm_head and "lm_head" in ONE_FORM[kinds]:
        pytest.skip("the head is the embedding")
    checkpoint = QuantizedCheckpoint(ONE_FORM[kinds], config=config)
    prompts = [[5, 17, 40, 3, 9], [8]][:count]
    found = []
    for whole in (False, True):
        logits: list[np.ndarray] = []
        tokens, device = generate(
            config, whole, "float16", prompts, run_ahead=False, checkpoint=checkpoint,
            logits=logits,
        )  # fmt: skip
        found.append((tokens, logits))
        assert ("decode_step" in device.kernels.launched) == whole
        assert ("quantized_logits" in device.kernels.launched) == ("lm_head" in ONE_FORM[kinds])
    (tokens, wanted), (got_tokens, got) = found
    assert got_tokens == tokens
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        rms = np.sqrt(np.mean(b.astype(np.float64) ** 2))
        assert abs(a - b).max() < 0.01 * rms, f"step {step}"


# (kinds, projections with an order of inputs)
SEVERAL_FORMS = {
    "two kinds": (all_of("int4", 32) | {"down": ("int8", 32)}, ()),
    "two groups": (all_of("int4", 32) | {"o": ("int4", 16)}, ()),
    "one matrix in 16 bits": ({n: k for n, k in all_of("int8").items() if n != "down"}, ()),
    "an order of inputs": (all_of("int4", 32), ("down",)),
}


@pytest.mark.parametrize("name", SEVERAL_FORMS)
def test_matrices_of_several_forms_go_one_by_one(name) -> None:
    checkpoint = QuantizedCheckpoint(*SEVERAL_FORMS[name], config=CONFIGS["llama"])
    _, device = generate(checkpoint.config, True, "float16", [[1, 2, 3]], checkpoint=checkpoint)
    assert "decode_step" not in device.kernels.launched
    assert "quantized_swiglu" in device.kernels.launched


@pytest.mark.parametrize("name", [*ONE_FORM, *SEVERAL_FORMS])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_compiled_beforehand(name, whole) -> None:
    config = tiny_config(**SIZES | {"head_size": 64})
    kinds = SEVERAL_FORMS.get(name) or (ONE_FORM[name],)
    checkpoint = QuantizedCheckpoint(*kinds, config=config)
    formats, _ = plan_weight_formats(checkpoint, "auto")
    settings = DeviceSettings("float16", "float16", "float16", quantized=formats)
    traits = DeviceTraits(*CARD, whole_steps=whole)
    variants = kernel_variants(config, settings, LIMITS, traits)
    steps = [macros for file, macros in variants if file == "decode_step.cu"]
    assert len(steps) == (2 if whole and name in ONE_FORM else 0)
    for macros in steps:
        assert ("WEIGHT_KIND" in macros) == (name != "16 bits and a head of int8")


@pytest.mark.parametrize(
    ("kinds", "head_dtype"),
    [
        ({}, None),
        ({}, "float32"),
        (ONE_FORM["int4 and a head of int8"], None),
        (ONE_FORM["16 bits and a head of int8"], None),
    ],
    ids=["floats", "a head of float32", "codes", "a head of codes"],
)
def test_what_runs_was_compiled_beforehand(kinds, head_dtype) -> None:
    """Whatever 1, 2 and 11 sequences launch, loading included, is one of the variants."""
    config = tiny_config(**SIZES | {"head_size": 64})
    checkpoint = QuantizedCheckpoint(kinds, config=config)
    formats, _ = plan_weight_formats(checkpoint, "auto")
    settings = DeviceSettings(
        "bfloat16", "bfloat16", "bfloat16", quantized=formats, lm_head_dtype=head_dtype
    )
    device = ShimDevice(DeviceTraits(*CARD))
    wanted, get = set(), device.kernels.get

    def noted(file: str, entry: str, **macros: int):
        wanted.add((file, tuple(sorted(macros.items()))))
        return get(file, entry, **macros)

    device.kernels.get = noted
    runner = DeviceRunner(config, device, LIMITS, settings)
    runner.upload_weights(checkpoint)
    for count in (1, 2, 11):
        engine = LLMEngine(config, runner, run_ahead=True, prefix_cache=False)
        for number in range(count):
            ids = [3 + number] * (5 + number)
            engine.add_request(str(number), ids, GREEDY.with_(max_tokens=4))
        while engine.has_unfinished:
            engine.step()
    assert "decode_step" in device.kernels.launched
    variants = kernel_variants(config, settings, LIMITS, device.traits, every_size=True)
    assert wanted - {(file, tuple(sorted(macros.items()))) for file, macros in variants} == set()
