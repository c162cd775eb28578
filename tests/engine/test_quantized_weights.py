"""Models whose weights stay quantised, on the shim's device: the logits of the same weights in
floats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.checkpoint.base import GroupedInt8, TensorInfo
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import ModelConfig
from nanocupy.engine.backend import device_settings, make_runner, with_weight_formats
from nanocupy.engine.batch import build_batch
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.engine.weight_formats import plan_weight_formats, quantized_reader
from nanocupy.errors import CheckpointError
from nanocupy.model.load import load_numpy_weights
from nanocupy.model.weights import weight_layout
from nanocupy.quantized import QuantizedMatrix, quantize
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build
from tests.shim.device import MODERN, OLD, ShimDevice, _ShimUploader

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

CONFIG = tiny_config(
    hidden_size=128, intermediate_size=192, head_size=64, num_heads=2, num_kv_heads=1,
    max_context=96, has_qkv_bias=True, has_mlp_bias=True,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class QuantizedCheckpoint(TinyCheckpoint):
    """The tiny model with its matrices stored quantised; `kinds` by the names of projections,
    (kind, group size)."""

    def __init__(
        self,
        kinds: dict[str, tuple[str, int | None]],
        orders: tuple[str, ...] = (),
        config: ModelConfig = CONFIG,
    ):
        super().__init__(config, seed=3)
        self.kinds, self.orders = kinds, orders
        for name, info in self.tensors.items():
            kind = self._kind(name)
            if kind is not None:
                stored = TensorInfo(name, info.shape, f"{kind[0]} of {kind[1]}", info.nbytes)
                self.tensors = {**self.tensors, name: stored}

    def _kind(self, name):
        parts = name.split(".")
        return self.kinds.get(parts[-2]) if parts[-1] == "weight" else None

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        kind = self._kind(name)
        if kind is None:
            return None
        matrix = quantize(super().read(name), *kind)
        if name.split(".")[-2] in self.orders:
            order = np.random.default_rng(5).permutation(matrix.shape[1]).astype(np.int32)
            matrix = replace(matrix, input_order=order)
        return matrix

    def read(self, name: str) -> np.ndarray:
        matrix = self.read_quantized(name)
        return super().read(name) if matrix is None else matrix.dequantize()


LAYER = ("q", "k", "v", "o", "gate", "up", "down")


def all_of(kind: str, group_size: int | None = 32) -> dict[str, tuple[str, int | None]]:
    return dict.fromkeys(LAYER, (kind, group_size))


def logits(runner, num_tokens: int) -> np.ndarray:
    request = Request("a", [(7 * i + 3) % 48 for i in range(num_tokens)], GREEDY, 0, 90)
    request.block_ids = list(range(2, 3 + num_tokens // 4))
    batch = build_batch(
        [ScheduledRequest(request, num_tokens, True)], block_size=4,
        table_width=getattr(runner, "table_width", None),
    )  # fmt: skip
    return runner.logits(batch).copy()


def on_the_cpu(checkpoint, weight_format) -> dict[str, np.ndarray]:
    quantized, _ = quantized_reader(checkpoint, weight_format)
    return load_numpy_weights(checkpoint, quantized=quantized)


def check(checkpoint, weight_format="auto", traits=MODERN, dtype="float16", wanted_names=None):
    formats, notes = plan_weight_formats(
        checkpoint, weight_format, multiplies_codes=not traits.force_plain
    )
    limits = RunnerLimits(40, 4, 96, 80, 12)
    settings = DeviceSettings(dtype, dtype, dtype, quantized=formats)
    runner = DeviceRunner(CONFIG, ShimDevice(traits), limits, settings)
    runner.upload_weights(checkpoint)
    weights = on_the_cpu(checkpoint, weight_format)
    reference = NumpyRunner(CONFIG, weights, limits)
    for num_tokens in (1, 11, 70):
        got, wanted = logits(runner, num_tokens), logits(reference, num_tokens)
        rms = np.sqrt(np.mean(wanted.astype(np.float64) ** 2, axis=-1, keepdims=True))
        assert (abs(got - wanted) / rms).max() < 0.03
    return formats, notes


@needs_compiler
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_logits_are_those_of_the_dequantised_weights(kind):
    formats, notes = check(QuantizedCheckpoint(all_of(kind, None if kind == "fp8" else 32)))
    assert len(formats) == 4 * CONFIG.num_layers
    assert not notes


@needs_compiler
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantised_at_load(kind):
    formats, _ = check(TinyCheckpoint(CONFIG, seed=3), kind)
    assert {stored.group_size for stored in formats.values()} == {128, 64}


@needs_compiler
def test_old_cards_and_an_lm_head_of_codes():
    kinds = all_of("int8") | {"lm_head": ("int8", 32)}
    formats, _ = check(QuantizedCheckpoint(kinds), "int8", traits=OLD)
    assert formats["lm_head.weight"].is_unpacked
    formats, _ = check(QuantizedCheckpoint(kinds))
    assert not formats["lm_head.weight"].is_unpacked


@needs_compiler
def test_an_order_of_inputs_and_parts_of_different_kinds():
    kinds = all_of("int4") | {"k": ("int8", 32), "o": ("int8", 16)}
    formats, notes = check(QuantizedCheckpoint(kinds, orders=("gate", "up", "down", "o")))
    assert formats["layers.0.down.weight"].has_order
    assert "layers.0.qkv.weight" not in formats
    assert notes == [
        f"layers.0.qkv.weight and {CONFIG.num_layers - 1} more: loaded in floating point, as "
        "its parts are quantised in different ways"
    ]


def test_what_stays_quantised():
    plain = TinyCheckpoint(CONFIG, seed=3)
    assert plan_weight_formats(plain, "auto") == ({}, [])
    assert plan_weight_formats(QuantizedCheckpoint(all_of("int8")), "float") == ({}, [])
    formats, _ = plan_weight_formats(QuantizedCheckpoint(all_of("int8")), "fp8")
    assert {s.kind for s in formats.values()} == {"fp8"}
    assert "lm_head.weight" not in plan_weight_formats(plain, "int4")[0]
    mixed = all_of("int8")
    del mixed["up"]
    formats, notes = plan_weight_formats(QuantizedCheckpoint(mixed), "auto")
    assert "layers.0.gate_up.weight" not in formats
    assert "not all quantised" in notes[0]
    odd = QuantizedCheckpoint(all_of("int8", 8))
    formats, notes = plan_weight_formats(odd, "auto")
    assert not formats
    assert "groups of 8" in notes[0]


@needs_compiler
def test_a_part_with_an_order_among_parts_to_be_rounded_is_rounded_too():
    """One stored as the others are made keeps its codes."""
    kinds = {"q": ("int4", 128), "gate": ("int4", 128)}
    checkpoint = QuantizedCheckpoint(kinds, orders=("q",))
    formats, notes = check(checkpoint, "int4")
    assert formats["layers.0.qkv.weight"].is_made
    assert not formats["layers.0.qkv.weight"].has_order
    assert not notes
    layout = {weight.name: weight for weight in weight_layout(CONFIG)}
    read, _ = quantized_reader(checkpoint, "int4")
    gate_up = read(layout["layers.0.gate_up.weight"])
    stored = checkpoint.read_quantized("layers.0.gate.weight")
    assert np.array_equal(gate_up.codes[: len(stored.codes)], stored.codes)
    assert np.array_equal(gate_up.scales[: len(stored.scales)], stored.scales)


def test_codes_stay_only_where_they_are_multiplied_or_asked_for():
    stored, plain = QuantizedCheckpoint(all_of("int4")), TinyCheckpoint(CONFIG, seed=3)
    formats, notes = plan_weight_formats(stored, "auto", multiplies_codes=False)
    assert not formats
    assert "weight_format int8, int4 or fp8 keeps codes" in notes[0]
    for weight_format in ("auto", "float"):
        nothing = plan_weight_formats(plain, weight_format, multiplies_codes=False)
        assert nothing == ({}, [])
    for checkpoint in (stored, plain):
        formats, notes = plan_weight_formats(checkpoint, "int4", multiplies_codes=False)
        assert len(formats) == 4 * CONFIG.num_layers
        assert ["every product unpacks codes" in note for note in notes] == [True]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_card_keeps_codes_where_it_multiplies_them(dtype):
    config = EngineConfig(dtype=dtype, device="cuda")
    checkpoint = QuantizedCheckpoint(all_of("int4"))
    for capability in ((9, 0), (7, 5)):
        traits = replace(MODERN, compute_capability=capability)
        settings = device_settings(config, capability)
        settings, notes = with_weight_formats(settings, checkpoint, config, traits)
        multiplies = dtype == "float16" and capability >= (8, 0)
        assert bool(settings.quantized) == multiplies
        assert bool(notes) != multiplies


@needs_compiler
def test_parts_of_the_kind_that_was_asked_for_but_of_different_groups_are_rounded_once_more():
    kinds = all_of("int8") | {"k": ("int8", 64), "o": ("int8", 8)}
    formats, notes = check(QuantizedCheckpoint(kinds), "int8")
    groups = {name.split(".")[2]: stored.group_size for name, stored in formats.items()}
    assert groups == {"qkv": 128, "o": 128, "gate_up": 32, "down": 32}
    others = f"and {CONFIG.num_layers - 1} more: rounded to int8 once more, as"
    assert notes == [
        f"layers.0.qkv.weight {others} its parts are quantised in different ways",
        f"layers.0.o.weight {others} no kernel takes groups of 8 of 128 inputs",
    ]


def test_a_cpu_rounds_nothing_that_is_stored_as_it_was_asked_for():
    checkpoint = QuantizedCheckpoint(all_of("int4"), orders=("down",))
    stored, again = on_the_cpu(checkpoint, "float"), on_the_cpu(checkpoint, "int4")
    assert stored.keys() == again.keys()
    assert all(np.array_equal(stored[name], again[name]) for name in stored)
    config = EngineConfig(device="cpu", weight_format="int4", max_num_seqs=1)
    of_engine = make_runner(checkpoint, config).weights
    assert all(np.array_equal(stored[name], of_engine[name]) for name in stored)
    other = on_the_cpu(checkpoint, "int8")
    assert not np.array_equal(stored["layers.0.down.weight"], other["layers.0.down.weight"])


def test_a_cpu_rounds_what_a_card_would_and_leaves_alone_what_it_would_leave():
    """Rows of 36 inputs are in groups for fp8, but no kernel takes them."""
    checkpoint = TinyCheckpoint(tiny_config(intermediate_size=36), seed=3)
    exact, rounded = load_numpy_weights(checkpoint), on_the_cpu(checkpoint, "fp8")
    formats, _ = plan_weight_formats(checkpoint, "fp8")
    assert "layers.0.o.weight" in formats
    assert "layers.0.down.weight" not in formats
    for name, values in exact.items():
        assert np.array_equal(values, rounded[name]) == (name not in formats), name


@needs_compiler
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_progress_ends_at_all_bytes(kind):
    """Orders of inputs and the rows that fill up the last strips of gate and up among them."""
    config = replace(CONFIG, intermediate_size=196)
    kinds = all_of(kind)
    del kinds["down"]
    checkpoint = QuantizedCheckpoint(kinds, orders=("q", "k", "v", "o"), config=config)
    sent: list[int] = []

    class Counting(ShimDevice):
        total = 0

        def uploader(self, total_bytes, progress):
            self.total = total_bytes
            return super().uploader(total_bytes, progress)

    formats, _ = plan_weight_formats(checkpoint, "auto")
    settings = DeviceSettings("float16", "float16", "float16", quantized=formats)
    device = Counting()
    runner = DeviceRunner(config, device, RunnerLimits(40, 4, 96, 80, 12), settings)
    upload = _ShimUploader.upload

    def counted(self, name, source, destination):
        sent.append(destination.nbytes)
        upload(self, name, source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ShimUploader, "upload", counted)
        runner.upload_weights(checkpoint)
    assert sum(sent) == device.total


@needs_compiler
def test_a_layer_that_is_stored_otherwise_is_refused_where_it_cannot_be_seen_beforehand():
    checkpoint = QuantizedCheckpoint(all_of("int4"))
    formats, _ = plan_weight_formats(checkpoint, "auto")
    settings = DeviceSettings("float16", "float16", "float16", quantized=formats)
    runner = DeviceRunner(CONFIG, ShimDevice(), RunnerLimits(40, 4, 96, 80, 12), settings)
    checkpoint.kinds = all_of("int4", 64)
    with pytest.raises(CheckpointError, match="weight_format float"):
        runner.upload_weights(checkpoint)


def test_a_tensor_of_each_kind_is_read_to_plan():
    class Counted(QuantizedCheckpoint):
        asked = 0

        def read_quantized(self, name):
            self.asked += 1
            return super().read_quantized(name)

    checkpoint = Counted(all_of("int8"))
    assert len(plan_weight_formats(checkpoint, "auto")[0]) == 4 * CONFIG.num_layers
    assert checkpoint.asked == len(LAYER)


def test_grouped_int8_stays_quantised_where_groups_are_parts_of_rows():
    class Grouped(TinyCheckpoint):
        group = 32

        def read(self, name):
            tensor = super().read(name)
            if self.tensors[name].dtype != "int8":
                return tensor
            whole = quantize(np.asarray(tensor).reshape(-1, self.group), "int8")
            return GroupedInt8(whole.codes.reshape(tensor.shape), whole.scales.ravel(), self.group)

    checkpoint = Grouped(CONFIG, seed=3)
    name = "layers.0.o.weight"
    assert checkpoint.read_quantized(name) is None
    info = checkpoint.tensors[name]
    checkpoint.tensors = {**checkpoint.tensors, name: TensorInfo(name, info.shape, "int8", 1)}
    matrix = checkpoint.read_quantized(name)
    assert np.array_equal(matrix.dequantize(), checkpoint.read(name).dequantize())
    formats, _ = plan_weight_formats(checkpoint, "auto")
    assert list(formats) == [name]
    checkpoint.group = 256  # of two rows
    assert checkpoint.read_quantized(name) is None


@needs_compiler
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_random_weights_are_made_on_the_device(kind):
    checkpoint = RandomCheckpoint(CONFIG, "float16", seed=1)
    formats, _ = plan_weight_formats(checkpoint, kind)
    settings = DeviceSettings("float16", "float16", "float16", quantized=formats)
    runner = DeviceRunner(CONFIG, ShimDevice(), RunnerLimits(40, 4, 96, 80, 12), settings)
    runner.upload_weights(checkpoint)
    weight = runner.weights["layers.0.gate_up.weight"]
    values = unpacked(runner, weight)
    assert abs(values.std() * CONFIG.hidden_size**0.5 - 1) < 0.05
    assert abs(values.mean()) < 0.1 * values.std()
    assert np.isfinite(logits(runner, 3)).all()
    assert len(np.unique(weight.packed[:, :512].view(np.uint64))) > 100


def unpacked(runner, weight) -> np.ndarray:
    with runner._device.current():
        out = runner.ops._unpacked(weight)
    runner._device.synchronize("a test")
    return np.asarray(out, np.float32)


@needs_compiler
def test_the_kernels_that_steps_need_are_known_beforehand():
    """Layers whose weights are stored in different ways too."""

    class Mixed(QuantizedCheckpoint):
        def _kind(self, name):
            kind = super()._kind(name)
            return ("int8", 64) if kind is not None and name.startswith("layers.1.") else kind

    checkpoint = Mixed(all_of("int4"))
    formats, _ = plan_weight_formats(checkpoint, "auto")
    assert {s.kind for s in formats.values()} == {"int4", "int8"}
    settings = DeviceSettings("bfloat16", "bfloat16", "bfloat16", quantized=formats)
    device = ShimDevice()
    runner = DeviceRunner(CONFIG, device, RunnerLimits(40, 4, 96, 80, 12), settings)
    known = {(file, tuple(sorted(m.items()))) for file, m in runner.kernel_variants()}
    asked: set = set()
    get = device.kernels.get

    def noted(file: str, entry: str, **macros: int):
        asked.add((file, tuple(sorted(macros.items()))))
        return get(file, entry, **macros)

    device.kernels.get = noted
    runner.upload_weights(checkpoint)
    for num_tokens in (1, 64, 80):
        logits(runner, num_tokens)
    assert asked
    assert {m for m in asked if m[0].startswith("quantized")} <= known
