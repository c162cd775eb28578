"""Quantised weights on a real GPU: the logits of the same weights in 16 bits, at every batch size.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.bench.shapes import SHAPES
from nanocupy.checkpoint.base import Checkpoint, TensorInfo
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.weight_formats import plan_weight_formats
from nanocupy.model.quantize import group_size_for, is_layer_matrix
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.engine.test_gpu_engine import FLOAT32, GREEDY, all_logits, device_runner, run
from tests.kernels.backends import TOLERANCES

pytestmark = pytest.mark.gpu


class StoredQuantized(Checkpoint):
    """Random weights of a shape, stored in `kind`; `ordered`: with an order of the inputs;
    short_scales: scales and offsets of 11 bits, which int4 keeps as they are on a device."""

    format = "quantized"

    def __init__(
        self, config, dtype: str, kind: str, *, ordered: bool = False, short_scales: bool = False
    ) -> None:
        self._source = RandomCheckpoint(config, dtype, seed=1)
        self.path, self.config = self._source.path, config
        self.kind, self.ordered, self.short_scales = kind, ordered, short_scales
        self.tensors = {
            name: replace(info, dtype=kind) if is_layer_matrix(name) else info
            for name, info in self._source.tensors.items()
        }
        self._known: dict[str, QuantizedMatrix] = {}
        self._floats: dict[str, np.ndarray] = {}

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        if not is_layer_matrix(name):
            return None
        if name not in self._known:
            values = self._source.read(name).astype(np.float32)
            matrix = quantize(values, self.kind, group_size_for(self.kind, values.shape[1]))
            if self.ordered and ".down." in name:
                order = np.random.default_rng(3).permutation(values.shape[1])
                matrix = replace(matrix, input_order=order.astype(np.int32))
            if self.short_scales:
                offsets = None if matrix.offsets is None else in_11_bits(matrix.offsets)
                matrix = replace(matrix, scales=in_11_bits(matrix.scales), offsets=offsets)
            self._known[name] = matrix
        return self._known[name]

    def read(self, name: str) -> np.ndarray:
        matrix = self.read_quantized(name)
        if matrix is not None:
            return matrix.dequantize()
        if name not in self._floats:
            self._floats[name] = self._source.read(name)
        return self._floats[name]

    def _load_tokenizer(self) -> None:
        return None


def in_11_bits(values: np.ndarray) -> np.ndarray:
    fractions, exponents = np.frexp(values)
    return np.ldexp(np.rint(fractions * 2048) / np.float32(2048), exponents)


@pytest.fixture(scope="module")
def make_device():
    from nanocupy.cuda.device import CudaDevice

    return CudaDevice


def both(make_device, checkpoint: StoredQuantized, dtype: str, **how):
    """Runners of the codes, and of the same weights in the storage type."""
    formats, notes = plan_weight_formats(checkpoint, checkpoint.kind)
    assert not notes
    assert len(formats) == 4 * checkpoint.config.num_layers
    settings = DeviceSettings(dtype, dtype, dtype)
    quantised = replace(settings, quantized=formats)
    return [device_runner(make_device(), checkpoint, s, **how) for s in (quantised, settings)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2.5-0.5b"])
def test_logits_are_those_of_16_bits(make_device, record_error, shape, kind, dtype) -> None:
    config = SHAPES[shape].with_(num_layers=3)
    checkpoint = StoredQuantized(config, dtype, kind, ordered=kind == "int4")
    codes, floats = both(make_device, checkpoint, dtype, num_seqs=600, max_context=640, in_cache=1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 150)
    wanted = all_logits(floats, ids).astype(np.float64)
    for chunk in (1, 7, 16, 32, 50, 150):
        error = all_logits(codes, ids, chunk) - wanted
        of_row = np.sqrt(np.mean(error**2, -1) / np.mean(wanted**2, -1))
        record_error(f"logits of {kind} weights", dtype, of_row.max())
        # Weights are rounded to 16 bits on one side only, and each side rounds what it computes.
        assert of_row.max() < 2 * TOLERANCES[dtype]


def test_many_sequences_decode_as_one_does(make_device) -> None:
    config = SHAPES["qwen3-0.6b"].with_(num_layers=2)
    checkpoint = StoredQuantized(config, "bfloat16", "int4")
    codes, _ = both(make_device, checkpoint, "bfloat16", num_seqs=24)
    prompts = [[(17 * i + j) % 1000 for j in range(5 + i)] for i in range(20)]
    assert all(len(ids) == 64 for ids in run(codes, prompts))


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_float32_decodes_in_graphs_as_the_dequantised_model_does(make_device, kind) -> None:
    """Every product unpacks its matrix, into one workspace that all layers take in turns, so that
    none may begin before that is done, nor the next unpack while it reads."""
    config = SHAPES["smollm2-135m"].with_(num_layers=3)
    checkpoint = StoredQuantized(config, "float32", kind, ordered=kind == "int4", short_scales=True)
    device = make_device()
    formats, _ = plan_weight_formats(checkpoint, kind)
    assert len(formats) == 4 * config.num_layers
    codes = device_runner(device, checkpoint, replace(FLOAT32, quantized=formats), num_seqs=96)
    floats = device_runner(make_device(), checkpoint, FLOAT32, num_seqs=96)
    rng = np.random.default_rng(2)
    for num_rows in (1, 4, 8):
        prompts = [rng.integers(0, config.vocab_size, 3 + i).tolist() for i in range(num_rows)]
        before = device.graphs.counters.replayed
        got, wanted = run(codes, prompts), run(floats, prompts)
        assert device.graphs.counters.replayed > before + 40
        for ids, a, b in zip(prompts, got, wanted, strict=True):
            if a == b:
                continue
            at = next(i for i in range(len(b)) if a[i] != b[i])
            last = np.sort(all_logits(floats, ids + b[:at])[-1])
            gap = (last[-1] - last[-2]) / abs(last).max()
            assert gap < 1e-4, f"token {at} is {a[at]}, not {b[at]}"


def test_random_weights_need_no_host(make_device) -> None:
    for kind in ("int4", "int8", "fp8"):
        checkpoint = RandomCheckpoint(SHAPES["qwen3-0.6b"].with_(num_layers=2), seed=4)
        formats, _ = plan_weight_formats(checkpoint, kind)
        settings = DeviceSettings(quantized=formats)
        runner = device_runner(make_device(), checkpoint, settings)
        ids = np.arange(24)  # logits of each, and the runner is made for those of 32
        assert np.isfinite(all_logits(runner, ids)).all()
        assert isinstance(checkpoint.tensors["layers.0.o.weight"], TensorInfo)


def decode_logits(runner, prompts) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens of every prompt, and the logits [sequences, V] that each step left."""
    import cupy

    engine = LLMEngine(runner.config, runner, run_ahead=False)
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids, GREEDY.with_(max_tokens=24))
    tokens: list[list[int]] = [[] for _ in prompts]
    logits = []
    while engine.has_unfinished:
        outputs = engine.step()
        for output in outputs:
            tokens[int(output.request_id)].append(output.token_id)
        if len(outputs) == len(prompts):
            runner.clock.synchronize("reading the logits")
            logits.append(cupy.asnumpy(runner._main.logits(len(prompts))))
    return tokens, logits


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8", "float"])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.1-8b"])
def test_a_step_in_one_launch_gives_the_logits_of_its_ops(
    make_device, record_error, shape, kind, count
) -> None:
    """Of the same packed codes: what differs is the order of sums."""
    config = SHAPES[shape].with_(num_layers=3, vocab_size=2000, bos_id=None, eos_ids=())
    checkpoint = RandomCheckpoint(config, "bfloat16", seed=5)
    formats, _ = plan_weight_formats(checkpoint, kind)
    settings = DeviceSettings(quantized=formats)
    prompts = [[(31 * i + 7 * n) % 2000 for i in range(150 + 90 * n)] for n in range(count)]
    found = []
    for whole in (False, True):
        device = make_device(whole_steps=whole)
        runner = device_runner(device, checkpoint, settings, num_seqs=2, in_cache=2)
        assert runner.ops.can_step(count) == whole
        before = device.graphs.counters.replayed
        found.append(decode_logits(runner, prompts))
        assert device.graphs.counters.replayed > before + 10
    (tokens, wanted), (got_tokens, got) = found
    # Up to the first token that differs, as two were as likely.
    same = [
        next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
        for a, b in zip(tokens, got_tokens, strict=True)
    ]
    worst_error = 0.0
    for step in range(min(same)):
        a, b = got[step].astype(np.float64), wanted[step].astype(np.float64)
        worst_error = max(worst_error, np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
    record_error(f"logits of a step in one launch, {kind} weights", "bfloat16", worst_error)
    assert min(same) >= 4
    assert worst_error < TOLERANCES["bfloat16"]


def test_a_step_in_one_launch_is_the_same_every_time(make_device) -> None:
    config = SHAPES["llama-3.1-8b"].with_(num_layers=4, vocab_size=2000, bos_id=None, eos_ids=())
    checkpoint = RandomCheckpoint(config, "bfloat16", seed=6)
    for kind in ("int4", "int8"):
        formats, _ = plan_weight_formats(checkpoint, kind)
        settings = DeviceSettings(quantized=formats)
        runner = device_runner(make_device(), checkpoint, settings, num_seqs=2, in_cache=2)
        results = [decode_logits(runner, [list(range(3, 90))]) for _ in range(5)]
        for tokens, logits in results[1:]:
            assert tokens == results[0][0]
            for one, first in zip(logits, results[0][1], strict=True):
                assert one.tobytes() == first.tobytes()
