"""Runs whole decode steps in one launch: weights, caches, arguments, and what must come out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from nanocupy.ops.launch_decode_step import (
    ENTRY,
    FILE,
    LAYER_POINTERS,
    STAGE_INPUTS,
    DecodeStepShape,
    DecodeStepTuning,
    decode_step_launch,
    input_bytes,
    memory_bytes,
    num_words,
)
from nanocupy.ops.launch_quantized import packed_format
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.quantized import quantize
from tests.kernels.backends import CODES, GpuBackend, ShimBackend, assert_close, device_loader
from tests.kernels.gemv_runs import Run
from tests.kernels.quantized_runs import as_stored, pack
from tests.ops.cases import DTYPES

EPS = 1e-5
BLOCK_SIZE = 16
NUM_MULTIPROCESSORS = 5
MAX_SHARED = 227 << 10
MATRICES = ("qkv.weight", "o.weight", "gate_up.weight", "down.weight")
SMALL = DecodeStepShape(64, 96, 200, 4, 2, 16)

# What a thread asks for at once depends on how many inputs there are: cases of many, with a rest.
LARGE_CASES = {
    "a norm of two spans": SimpleNamespace(
        shape=DecodeStepShape(1184, 64, 64, 4, 2, 16), kv_lens=[20], layers=1,
        num_multiprocessors=16,
    ),
    "three, a norm of eight spans": SimpleNamespace(
        shape=DecodeStepShape(576, 96, 64, 4, 2, 16), kv_lens=[20, 7, 3], layers=1,
        num_multiprocessors=20,
    ),
    "two, a norm in turns": SimpleNamespace(
        shape=DecodeStepShape(2080, 96, 64, 4, 2, 16), kv_lens=[20, 7], layers=1,
        num_multiprocessors=32,
    ),
    "four, a norm in turns": SimpleNamespace(
        shape=DecodeStepShape(2080, 96, 64, 4, 2, 16), kv_lens=[20, 7, 3, 9], layers=1,
        num_multiprocessors=48,
    ),
    "sixteen spans": SimpleNamespace(
        shape=DecodeStepShape(64, 8352, 64, 4, 2, 16), kv_lens=[20], layers=1
    ),
    "four of head size 80, several parts": SimpleNamespace(
        shape=DecodeStepShape(64, 64, 64, 16, 4, 80), kv_lens=[500, 3, 40, 300], parts=4
    ),
    "spans of several heads, several parts": SimpleNamespace(
        shape=DecodeStepShape(64, 64, 64, 32, 8, 80), kv_lens=[500, 200], parts=5
    ),
    "attention in tiles, several parts": SimpleNamespace(
        shape=DecodeStepShape(64, 2080, 64, 18, 3, 128), kv_lens=[300, 20], parts=3, tiled=True
    ),
}  # fmt: skip


class Model:
    """Weights, caches and a batch of sequences, as one step finds them.

    storage: (kind, group size) of the layers' matrices, None for 16 bits; has_head: a step goes on
    to the logits, else it ends with the residual stream.
    """

    def __init__(
        self, shape, dtype, kv_lens, *, layers=2, bias=False, qk_norm=False, seed=0, storage=None,
        has_head=True,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.shape, self.dtype, self.kv_lens = shape, dtype, np.array(kv_lens, np.int32)
        self.has_head = has_head and storage is None
        self.form = None
        d, kv = shape.head_size, shape.num_kv_heads
        self.count = count = len(kv_lens)

        def normal(*dims, std=1.0):
            return (rng.standard_normal(dims) * std).astype(dtype)

        def weight(rows, columns):
            return normal(rows, columns, std=columns**-0.5)

        def matrix(rows, columns):
            values = weight(rows, columns)
            if storage is None:
                return values
            form = packed_format(storage[0], columns, storage[1] or columns)
            assert form is not None
            assert self.form in (None, form), "matrices of several forms"
            self.form = form
            codes = quantize(values.astype(np.float32), *storage)
            if storage[0] != "int4":
                return codes
            shift = rng.uniform(-1, 1, codes.scales.shape).astype(np.float32) * codes.scales
            return as_stored(replace(codes, offsets=codes.offsets + shift))

        width = -(-max(*kv_lens, 1) // BLOCK_SIZE) + 1
        blocks = 1 + rng.permutation(count * width).astype(np.int32).reshape(count, width)
        self.block_tables = blocks
        cache = (1 + count * width, kv, BLOCK_SIZE, d)
        self.layers = []
        for _ in range(layers):
            qkv = shape.q_size + 2 * kv * d
            one = {
                "attn_norm.weight": rng.uniform(0.5, 1.5, shape.hidden_size).astype(dtype),
                "qkv.weight": matrix(qkv, shape.hidden_size),
                "qkv.bias": normal(qkv) if bias else None,
                "q_norm.weight": rng.uniform(0.5, 1.5, d).astype(dtype) if qk_norm else None,
                "k_norm.weight": rng.uniform(0.5, 1.5, d).astype(dtype) if qk_norm else None,
                "key_cache": np.full(cache, np.nan, dtype),
                "value_cache": np.full(cache, np.nan, dtype),
                "o.weight": matrix(shape.hidden_size, shape.q_size),
                "o.bias": normal(shape.hidden_size) if bias else None,
                "ffn_norm.weight": rng.uniform(0.5, 1.5, shape.hidden_size).astype(dtype),
                "gate_up.weight": matrix(2 * shape.ffn_size, shape.hidden_size),
                "gate_up.bias": normal(2 * shape.ffn_size) if bias else None,
                "down.weight": matrix(shape.hidden_size, shape.ffn_size),
                "down.bias": normal(shape.hidden_size) if bias else None,
            }
            for b, length in enumerate(kv_lens):  # what was before; the rest is poison
                for p in range(length - 1):
                    at = (blocks[b, p // BLOCK_SIZE], slice(None), p % BLOCK_SIZE)
                    one["key_cache"][at] = normal(kv, d)
                    one["value_cache"][at] = normal(kv, d)
            self.layers.append(one)
        self.final_norm = rng.uniform(0.5, 1.5, shape.hidden_size).astype(dtype)
        self.head = weight(shape.vocab_size, shape.hidden_size)
        self.x = normal(count, shape.hidden_size)
        angles = rng.uniform(0, 6, (count, d // 2))
        self.rope = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        newest = np.maximum(self.kv_lens - 1, 0)
        self.slots = np.where(
            self.kv_lens > 0,
            blocks[np.arange(count), newest // BLOCK_SIZE] * BLOCK_SIZE + newest % BLOCK_SIZE, 0,
        ).astype(np.int32)  # fmt: skip

    def reference(self):
        """(logits, caches) of the step, by the ops in float64 with the interface's roundings;
        without a head the residual stream takes the logits' place."""
        ops, s, n = NumpyOps(np.float64), self.shape, self.count
        x = self.x.copy()
        d, dtype = s.head_size, self.dtype
        caches = []
        for w in self.layers:
            qkv = np.empty((n, s.q_size + 2 * s.num_kv_heads * d), dtype)
            ops.norm_linear(x, w["attn_norm.weight"], EPS, w["qkv.weight"], w["qkv.bias"], qkv)
            attended = np.zeros((n, s.num_heads, d), dtype)
            keys, values = w["key_cache"].copy(), w["value_cache"].copy()
            ops.attend(
                qkv, w["q_norm.weight"], w["k_norm.weight"], EPS, self.rope, self.slots, keys,
                values, None, None, np.arange(n + 1, dtype=np.int32), self.kv_lens,
                self.block_tables, d**-0.5, 1, 0, np.empty_like(attended), attended,
            )  # fmt: skip
            caches.append((keys, values))
            ops.linear_add(attended.reshape(n, -1), w["o.weight"], w["o.bias"], x)
            activated = np.empty((n, s.ffn_size), dtype)
            ops.norm_swiglu(
                x, w["ffn_norm.weight"], EPS, w["gate_up.weight"], w["gate_up.bias"], activated
            )
            ops.linear_add(activated, w["down.weight"], w["down.bias"], x)
        if not self.has_head:
            return x, caches
        logits = np.empty((n, s.vocab_size))
        ops.lm_head(x, np.arange(n, dtype=np.int32), self.final_norm, EPS, self.head, logits)
        return logits, caches

    def on_device(self, run: Run) -> list[dict[str, Any]]:
        """The layers, their matrices packed where they are codes, and then `units`; caches are
        copies. run: launches the kernel that packs."""
        layers = [dict(one) for one in self.layers]
        for one in layers:
            for name in ("key_cache", "value_cache"):
                one[name] = one[name].copy()
            if self.form is not None:
                packed = [
                    pack(run, one[name], name == "gate_up.weight", self.dtype.name)
                    for name in MATRICES
                ]
                one |= {name: codes for name, (codes, _) in zip(MATRICES, packed, strict=True)}
                one["units"] = np.array([unit for _, unit in packed], np.float32)
        return layers

    def plan(self, tuning=None, num_multiprocessors=NUM_MULTIPROCESSORS, max_shared=MAX_SHARED):
        launch = decode_step_launch(
            self.shape, self.count, num_multiprocessors=num_multiprocessors,
            max_shared_bytes=max_shared, weights=self.form, has_head=self.has_head, tuning=tuning,
        )  # fmt: skip
        assert launch is not None
        return launch

    def launch(self, backend, tuning=None, words=None, **card):
        """(logits, caches) of one launch; without a head (residual stream, caches). The caches are
        copies. words: (words, moments) that launches before have left, and this one changes; card:
        as `plan` takes it."""
        s, n, d = self.shape, self.count, self.shape.head_size
        launch = self.plan(tuning, **card)
        if words is None:
            words = np.zeros(num_words(s, launch, n), np.uint64), np.zeros(2, np.uint32)
        poison = {
            "logits": np.full((n, s.vocab_size), np.nan, np.float32),
            "words": words[0],
            "moments": words[1],
        }
        i32 = np.int32
        numbers = (
            np.float32(EPS), np.float32(d**-0.5), i32(len(self.layers)), i32(s.hidden_size),
            i32(s.ffn_size), i32(s.vocab_size), i32(s.num_kv_heads),
            i32(s.num_heads // s.num_kv_heads), i32(BLOCK_SIZE), i32(self.block_tables.shape[1]),
            i32(launch.tile_inputs), i32(launch.max_parts), i32(launch.part_tokens),
        )  # fmt: skip
        macros = {"SCALAR": CODES[self.dtype.name], "HEAD_SIZE": d, **launch.macros}
        return backend.run_step(self, launch, poison, numbers, macros)


class ShimStep:
    """On the shim, pointers in the table are those of the arrays themselves."""

    def __init__(self, order=0, source=None, **macros):
        self.order, self.source, self.macros = order, source, macros

    def run_step(self, model, launch, poison, numbers, macros):
        from tests.shim.driver import host_kernel

        layers = model.on_device(ShimBackend(orders=(0,)).run)
        table = layer_table(layers, lambda array: array.ctypes.data)
        x = model.x.copy()
        head = (model.final_norm, model.head) if model.has_head else (None, None)
        logits = poison["logits"] if model.has_head else None
        kernel = host_kernel(FILE, ENTRY, source=self.source, **macros, **self.macros)
        kernel(
            launch.grid, launch.block, table, *head, model.rope,
            model.slots, model.kv_lens, model.block_tables, x, logits, poison["words"],
            poison["moments"], *numbers,
            shared_bytes=launch.shared_bytes, order=self.order, resident=True,
        )  # fmt: skip
        caches = [(one["key_cache"], one["value_cache"]) for one in layers]
        if model.has_head:
            assert x.tobytes() == model.x.tobytes(), "the embeddings were changed"
        return logits if model.has_head else x, caches


class GpuStep:
    def __init__(self):
        import cupy

        self.cupy, self.loader = cupy, device_loader()

    def run_step(self, model, launch, poison, numbers, macros):
        cupy = self.cupy
        keep = [
            {name: a if a is None or name == "units" else cupy.asarray(a)
             for name, a in one.items()}
            for one in model.on_device(GpuBackend().run)
        ]  # fmt: skip
        table = cupy.asarray(layer_table(keep, lambda array: array.data.ptr))
        inputs = [
            cupy.asarray(a)
            for a in (model.final_norm, model.head, model.rope, model.slots, model.kv_lens,
                      model.block_tables, model.x, *poison.values())
        ]  # fmt: skip
        kernel = self.loader.get(FILE, ENTRY, **macros)
        if not model.has_head:
            inputs[0] = inputs[1] = None
        kernel.launch(launch.grid, (launch.block,), (table, *inputs, *numbers), launch.shared_bytes)
        cupy.cuda.runtime.deviceSynchronize()
        caches = [tuple(cupy.asnumpy(one[n]) for n in ("key_cache", "value_cache")) for one in keep]
        names = ["final_norm", "head", "rope", "slots", "kv_lens", "block_tables", "x", *poison]
        back = dict(zip(names, inputs, strict=True))
        for name in ("words", "moments"):
            poison[name][...] = cupy.asnumpy(back[name])
        return cupy.asnumpy(back["logits" if model.has_head else "x"]), caches


def layer_table(layers: list[dict[str, Any]], address) -> np.ndarray:
    """The table of layers that a launch is given, uint64 [L, 14] or, with units, [L, 16]."""
    rows = []
    for one in layers:
        row = [0 if one[n] is None else address(one[n]) for n in LAYER_POINTERS]
        rows.append([*row, *one["units"].view(np.uint64)] if "units" in one else row)
    return np.array(rows, np.uint64)


def make(case, dtype, **how):
    options = {n: getattr(case, n) for n in ("bias", "qk_norm", "layers") if hasattr(case, n)} | how
    tuning = DecodeStepTuning(max_parts=case.parts) if hasattr(case, "parts") else None
    return Model(case.shape, DTYPES[dtype], case.kv_lens, **options), tuning


def card_of(case, model) -> dict[str, int]:
    """Of a card that brings out what the case is there for: Model.launch's `card`."""
    card = {}
    if hasattr(case, "num_multiprocessors"):
        card["num_multiprocessors"] = case.num_multiprocessors
    if getattr(case, "tiled", False):
        card["max_shared"] = tiled_room(model)
    return card


def tiled_room(model) -> int:
    """Shared memory in which a good ring leaves room for the smallest tile alone."""
    is_int4 = model.form is not None and model.form.kind == "int4"
    tile = STAGE_INPUTS * -(-model.shape.hidden_size // STAGE_INPUTS)
    ring = memory_bytes(model.shape, model.count, 12 if is_int4 else 6, 1, model.form)
    return ring + input_bytes(model.count, tile, model.form) + (4 << 10)


def check_large(step, name, storage=None) -> None:
    case = LARGE_CASES[name]
    model, tuning = make(case, "bfloat16", storage=storage)
    card = card_of(case, model)
    if "max_shared" in card:
        assert model.plan(tuning, **card).tile_inputs < case.shape.q_size
    check(model, model.launch(step, tuning, **card))


def check(model, result, tolerance=3.2e-2):
    """A layer's roundings add up: the tolerance is twice that of one op."""
    logits, caches = result
    wanted, wanted_caches = model.reference()
    used = model.kv_lens > 0
    if model.dtype == np.float16:
        tolerance = 6e-3
    assert_close(logits[used], wanted[used], "logits", None, tolerance)
    for (keys, values), (wanted_keys, wanted_values) in zip(caches, wanted_caches, strict=True):
        for got, expected in ((keys, wanted_keys), (values, wanted_values)):
            got, expected = got.astype(np.float64), expected.astype(np.float64)
            same = np.isnan(got) == np.isnan(expected)
            same[0] = True  # the null block
            assert same.all(), "the cache was written where it must not be"
            known = ~np.isnan(expected)
            known[0] = False
            assert np.abs(got[known] - expected[known]).max(initial=0) < 8 * tolerance
