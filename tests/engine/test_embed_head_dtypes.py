"""An embedding and an LM head of types of their own, on NumPy and on the shim's device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.checkpoint.base import FLOAT_DTYPES
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.checkpoint.untied import untied
from nanocupy.engine.backend import device_model, device_settings, make_runner
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_plan import buffer_specs
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.errors import ConfigError
from nanocupy.model.load import load_numpy_weights
from nanocupy.ops.cuda_sizes import step_launch
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine.device_runs import GREEDY, generate
from tests.engine.test_quantized_weights import CONFIG, QuantizedCheckpoint, logits
from tests.shim import build
from tests.shim.device import MODERN, ShimDevice

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
LIMITS = RunnerLimits(60, 4, 96, 80, 12)
TIED = CONFIG.with_(tied_lm_head=True)
PAIRS = [
    ("auto", "float32"), ("float32", "auto"), ("float16", "float32"), ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"), ("bfloat16", "float16"),
]  # fmt: skip


def on_the_shim(checkpoint, config: EngineConfig, traits=MODERN) -> DeviceRunner:
    checkpoint, settings, _ = device_model(checkpoint, config, traits)
    runner = DeviceRunner(checkpoint.config, ShimDevice(traits), LIMITS, settings)
    runner.upload_weights(checkpoint)
    return runner


def by_hand(checkpoint, embed: str, head: str) -> NumpyRunner:
    """The model in float32 whose two matrices were rounded beforehand; `auto`: not at all."""
    checkpoint = untied(checkpoint)
    weights = load_numpy_weights(checkpoint)

    def rounded(name: str, dtype: str) -> None:
        if dtype != "auto":
            weights[name] = weights[name].astype(FLOAT_DTYPES[dtype]).astype(np.float32)

    rounded("embed.weight", embed)
    rounded("lm_head.weight", head)
    rounded("final_norm.weight", head)
    return NumpyRunner(checkpoint.config, weights, LIMITS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("embed", "head"), PAIRS)
def test_the_cpu_multiplies_the_rounded_matrices(embed: str, head: str, tied: bool) -> None:
    """What is left are the normed rows, which such a head rounds too."""
    checkpoint = TinyCheckpoint(TIED if tied else CONFIG, seed=3)
    config = EngineConfig(device="cpu", embed_dtype=embed, lm_head_dtype=head, block_size=4)
    runner = make_runner(checkpoint, config)
    is_two = len({d.replace("auto", "float32") for d in (embed, head)}) == 2
    names = {"embed.weight": embed, "lm_head.weight": head, "final_norm.weight": head}
    for name, dtype in names.items():
        if name in runner.weights:
            assert runner.weights[name].dtype.name == ("float32" if dtype == "auto" else dtype)
    assert ("lm_head.weight" in runner.weights) == (not tied or is_two)
    got, wanted = logits(runner, 20), logits(by_hand(checkpoint, embed, head), 20)
    limit = {"float16": 2e-3, "bfloat16": 1.6e-2}.get(head, 0)
    assert abs(got - wanted).max() <= limit * wanted.std()


@needs_compiler
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("embed", "head"), PAIRS)
def test_the_device_gives_what_the_cpu_gives(dtype: str, embed: str, head: str, tied: bool) -> None:
    checkpoint = TinyCheckpoint(TIED if tied else CONFIG, seed=3)
    config = EngineConfig(dtype=dtype, embed_dtype=embed, lm_head_dtype=head)
    runner = on_the_shim(checkpoint, config)
    resolved = [dtype if d == "auto" else d for d in (embed, head)]
    own = "lm_head.weight" if "lm_head.weight" in runner.weights else "embed.weight"
    found = [runner.weights[name].dtype.name for name in ("embed.weight", own)]
    assert found == resolved
    reference = EngineConfig(
        device="cpu", embed_dtype=resolved[0], lm_head_dtype=resolved[1], block_size=4
    )
    wanted = logits(make_runner(checkpoint, reference), 20)
    got = logits(runner, 20)
    # In bfloat16 all that lies between the two matrices is rounded too.
    limit = 2e-3 if dtype == "float32" and resolved[1] != "bfloat16" else 3e-2
    assert abs(got - wanted).max() <= limit * abs(wanted).max()


@needs_compiler
@pytest.mark.parametrize(("embed", "head"), [("float16", "float32"), ("float32", "bfloat16")])
def test_alone_and_in_a_batch_alike(embed: str, head: str) -> None:
    """By each way of the head's product: few rows, and many."""
    checkpoint = TinyCheckpoint(TIED, seed=3)
    config = EngineConfig(dtype="float32", embed_dtype=embed, lm_head_dtype=head)
    rng = np.random.default_rng(1)
    prompts = {
        str(i): (0, rng.integers(0, 48, 2 + i).tolist(), GREEDY.with_(max_tokens=5))
        for i in range(12)
    }
    together = generate(on_the_shim(checkpoint, config), prompts, run_ahead=True)
    alone: dict[str, list[int]] = {}
    for name, request in prompts.items():
        alone |= generate(on_the_shim(checkpoint, config), {name: request})
    assert together == alone


@needs_compiler
def test_a_float32_head_is_nearer_to_float32() -> None:
    """Beside a bfloat16 one over the same layers and the same residual stream of 32 bits."""
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    rounded = by_hand(checkpoint, "auto", "auto")
    rounded.weights = {  # all that both have in bfloat16 alike
        name: weight if name in ("lm_head.weight", "final_norm.weight")
        else weight.astype("bfloat16").astype(np.float32)
        for name, weight in rounded.weights.items()
    }  # fmt: skip
    wanted = logits(rounded, 70)
    errors = {}
    for head in ("bfloat16", "float32"):
        config = EngineConfig(dtype="bfloat16", residual_dtype="float32", lm_head_dtype=head)
        errors[head] = np.sqrt(np.mean((logits(on_the_shim(checkpoint, config), 70) - wanted) ** 2))
    assert errors["float32"] < 0.97 * errors["bfloat16"]


def test_the_plan_has_two_copies_of_a_tied_matrix() -> None:
    matrix = TIED.vocab_size * TIED.hidden_size
    found = {}
    for embed, head in (("auto", "auto"), ("float32", "float32"), ("auto", "float32")):
        config = EngineConfig(dtype="bfloat16", embed_dtype=embed, lm_head_dtype=head)
        model, settings, _ = device_model(TinyCheckpoint(TIED, seed=3), config, MODERN)
        specs = buffer_specs(model.config, ShimDevice(), settings, LIMITS)
        names = {spec.name: spec for spec in specs if spec.owner == "weights"}
        found[embed, head] = sum(spec.num_bytes for spec in names.values())
        assert ("weight.lm_head.weight" in names) == (embed != head)
    norm = 2 * TIED.hidden_size  # the bytes that the head's norm has more, in 32 bits
    one = found["auto", "auto"]
    assert found["float32", "float32"] == one + 2 * matrix + norm
    assert found["auto", "float32"] == one + 4 * matrix + norm


def test_an_untied_model_is_the_same_model() -> None:
    tied = TinyCheckpoint(TIED, seed=3)
    model = untied(tied)
    assert set(model.tensors) == set(model.config.tensor_shapes()) == {
        *tied.tensors, "lm_head.weight"
    }  # fmt: skip
    assert model.read("lm_head.weight") is tied.read("embed.weight")
    assert untied(model) is model
    random = untied(RandomCheckpoint(TIED, "float16", seed=4))
    assert isinstance(random, RandomCheckpoint)
    assert random.dtype == np.float16
    assert set(random.tensors) == set(model.tensors)
    quantized = QuantizedCheckpoint({"embed": ("int8", 32)}, config=TIED)
    wanted = quantized.read_quantized("embed.weight")
    found = untied(quantized).read_quantized("lm_head.weight")
    assert np.array_equal(found.codes, wanted.codes)


def test_a_head_in_codes_stays_so_unless_a_type_is_asked_for() -> None:
    checkpoint = QuantizedCheckpoint({"lm_head": ("int8", 32)})
    for head, stays in (("auto", True), ("bfloat16", False), ("float32", False)):
        config = EngineConfig(dtype="bfloat16", lm_head_dtype=head)
        _, settings, _ = device_model(checkpoint, config, MODERN)
        assert ("lm_head.weight" in settings.quantized) == stays


def test_a_step_is_one_launch_only_with_a_residual_stream_of_its_type() -> None:
    card = replace(MODERN, compute_capability=(9, 0), max_shared_bytes=227 << 10)
    for changes, is_one in (
        ({}, True), ({"embed_dtype": "float32"}, True), ({"residual_dtype": "float32"}, False)
    ):  # fmt: skip
        config = EngineConfig(dtype="bfloat16", **changes)
        model = TinyCheckpoint(tiny_config(head_size=64, hidden_size=64), seed=3)
        runner_sizes = on_the_shim(model, config, card)._sizes
        assert (step_launch(runner_sizes, card, 1) is not None) == is_one


@needs_compiler
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["float32", "float16"])
def test_behind_the_one_launch_a_head_of_another_type(head: str, tied: bool) -> None:
    """Tokens and logits are those of the ops one by one."""
    config = tiny_config(head_size=64, hidden_size=64, tied_lm_head=tied)
    found = []
    for whole in (True, False):
        card = replace(MODERN, max_shared_bytes=227 << 10, whole_steps=whole)
        settings = EngineConfig(dtype="bfloat16", lm_head_dtype=head)
        runner = on_the_shim(TinyCheckpoint(config, seed=3), settings, card)
        prompts = {str(i): (0, [3 + i, 5, 7], GREEDY.with_(max_tokens=5)) for i in range(2)}
        tokens = generate(runner, prompts, run_ahead=True)
        launched = runner._device.kernels.launched
        assert ("decode_step" in launched) == whole
        found.append((tokens, np.array(runner._main.logits(2))))
    (tokens, got), (wanted_tokens, wanted) = found
    assert tokens == wanted_tokens
    assert abs(got - wanted).max() < 0.02 * wanted.std()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("shim", marks=needs_compiler)])
@pytest.mark.parametrize(
    ("tensor", "setting"),
    [
        ("embed.weight", "embed_dtype"),
        ("lm_head.weight", "lm_head_dtype"),
        ("final_norm.weight", "lm_head_dtype"),
    ],
)
def test_values_beyond_float16_are_named(backend: str, tensor: str, setting: str) -> None:
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    checkpoint.arrays[tensor] = checkpoint.arrays[tensor].copy()
    checkpoint.arrays[tensor].flat[2] = 7e4
    config = EngineConfig(device="auto", **{setting: "float16"})
    message = rf"^tensor {tensor} has values beyond float16 \(65504\); take {setting} bfloat16"
    if backend == "cpu":
        make, config = make_runner, config.with_(device="cpu")
    else:
        make, config = on_the_shim, config.with_(dtype="bfloat16")
    with pytest.raises(ConfigError, match=message):
        make(checkpoint, config)
    make(checkpoint, config.with_(**{setting: "bfloat16"}))


@needs_compiler
def test_a_tied_matrix_beyond_float16_takes_two_settings_which_the_line_names() -> None:
    checkpoint = TinyCheckpoint(TIED, seed=3)
    checkpoint.arrays["embed.weight"] = checkpoint.arrays["embed.weight"].copy()
    checkpoint.arrays["embed.weight"][1, 2] = 7e4
    with pytest.raises(ConfigError, match="take embed_dtype bfloat16, and lm_head_dtype too where"):
        on_the_shim(checkpoint, EngineConfig(dtype="float16"))
    both = {"embed_dtype": "bfloat16", "lm_head_dtype": "bfloat16"}
    on_the_shim(checkpoint, EngineConfig(dtype="float16", **both))


def test_auto_follows_dtype() -> None:
    settings = device_settings(EngineConfig(dtype="float16"), (9, 0))
    names = ("embed.weight", "lm_head.weight", "final_norm.weight", "layers.0.q.weight")
    assert {settings.weight_dtype(name) for name in names} == {"float16"}
    settings = device_settings(EngineConfig(embed_dtype="float32"), (9, 0))
    assert [settings.weight_dtype(n) for n in names] == ["float32", *["bfloat16"] * 3]
