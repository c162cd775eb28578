"""Kernels over quantised caches: on the CPU (host shim), and marked gpu on a device.

The cases that all kernels share are in the tests of each. Here is what codes and scales add: every
code through every conversion, rows of any size, what the write leaves, needles in long contexts,
and planted bugs, which must be found.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.ops.kv_codes import dequantize_rows, quantize_rows
from nanocupy.ops.launch_attention_prefill import PrefillTile, default_tile
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels import test_attention_decode as decode
from tests.kernels import test_attention_prefill as prefill
from tests.kernels.backends import ShimBackend, assert_close
from tests.kernels.small_ops import run_rope_write_kv
from tests.ops import cases
from tests.ops.cases import CODES, DTYPES, Call, Case
from tests.shim import build
from tests.shim.driver import HostKernel, KernelFault

KINDS = tuple(CODES)
SIXTEEN = ("float16", "bfloat16")
SMALL = PrefillTile(2, 16, 16, queries_stay=True)
FILES = {"decode": decode.FILE, "prefill": prefill.FILE}
# What none of them says, the kernels' headers: their text stands in the files' for planted bugs.
HEADERS = (
    "attention_decode_codes.cuh", "attention_decode_mma.cuh", "attention_decode.cuh",
    "attention_prefill_tile.cuh", "attention_prefill.cuh", "codes.cuh",
)  # fmt: skip


def attention_case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case("attention", name, cases._attention(*args, **kwargs))


def run_decode(backend: Any, call: Call, force_plain: bool = False, tuning=decode.many_parts):
    launch = decode.launch_for(call, tuning, decode.most_queries(call), force_plain)
    assert launch.entry == decode.PLAIN_AND_MMA[not force_plain]
    macros = {"FORCE_PLAIN": 1} if force_plain else {}
    return decode.run(backend, call, launch, **macros)


def run_prefill(backend: Any, call: Call, tile: PrefillTile | None) -> np.ndarray:
    a = {**call.arguments, "out": call.arguments["out"].copy()}
    prefill.run(backend, Call(a, ("out",)), tile)
    return a["out"]


# ------------------------------------------------------------------------------ decode


AROUND = [(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 130, 300)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (16, 2), (40, 2)])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("codes", KINDS)
def test_decode_of_any_group(backend, codes: str, dtype: str, heads: int, kv_heads: int) -> None:
    case = attention_case(f"{codes}-{heads}-{kv_heads}", AROUND, heads, kv_heads, 64, codes=codes)
    decode.check(backend, case, DTYPES[dtype], entry="attention_decode_mma")


@pytest.mark.parametrize("force_plain", [False, True])
@pytest.mark.parametrize("codes", KINDS)
def test_decode_of_ragged_queries(backend, codes: str, force_plain: bool) -> None:
    """1 to 8 queries: up to 56 rows of a key/value head, several row tiles."""
    case = attention_case(f"{codes}-ragged", decode.RAGGED, 7, 1, 64, codes=codes)
    decode.check(backend, case, DTYPES["bfloat16"], force_plain=force_plain)


@pytest.mark.parametrize(("head_size", "heads"), [(16, 4), (80, 4), (96, 2), (128, 4), (256, 4)])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("codes", KINDS)
def test_decode_of_head_sizes(backend, codes: str, dtype: str, head_size: int, heads: int) -> None:
    sequences = [(3, 70), (8, 17)]
    case = attention_case(f"{codes}-{head_size}", sequences, heads, 1, head_size, codes=codes)
    decode.check(backend, case, DTYPES[dtype], entry="attention_decode_mma")


@pytest.mark.parametrize("block_size", [1, 5, 24, 128])
@pytest.mark.parametrize("codes", KINDS)
def test_decode_of_block_sizes(backend, codes: str, block_size: int) -> None:
    """Scales of neighbours lie anywhere."""
    sequences = [(1, 3 * block_size + 1), (2, 129), (1, 64)]
    case = attention_case(f"{codes}-p{block_size}", sequences, 4, 2, 64, block_size, codes=codes)
    decode.check(backend, case, DTYPES["bfloat16"])


@pytest.mark.parametrize(("warps", "stages"), [(1, 3), (2, 5), (8, 3)])
@pytest.mark.parametrize("codes", KINDS)
def test_decode_shapes_of_blocks(backend, codes: str, warps: int, stages: int) -> None:
    tuning = decode.DecodeTuning(
        num_items=40, least_part_tokens=64, warps=warps, stages=stages, merge_kernel=False
    )
    case = attention_case(f"{codes}-shapes", [(1, 700), (4, 130), (1, 20)], 4, 1, 64, codes=codes)
    decode.check(backend, case, DTYPES["float16"], tuning, entry="attention_decode_mma")


@pytest.mark.parametrize("shared_kb", [64, 99, 163, 227])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_launches_fit_every_card(shared_kb: int, head_size: int) -> None:
    for heads, queries in ((8, 1), (32, 8), (128, 8)):
        launch = decode.launch_attention_decode(
            3, heads, 8, head_size, queries=queries, max_context=1 << 20, scalar=2, cache=3,
            compute_capability=(8, 0), num_multiprocessors=108, max_shared_bytes=shared_kb << 10,
        )  # fmt: skip
        assert launch.entry == "attention_decode_mma"
        assert launch.macros["STAGES"] >= 3
        assert launch.shared_bytes <= shared_kb << 10
    tile = default_tile(head_size)
    static = (8 + 2 * 4) * tile.stages * tile.keys + 32  # offsets, scales, the tile's own numbers
    assert tile.shared_bytes(head_size, quantized=True) + static <= 99 << 10


# ------------------------------------------------------------------------------ prefill


@pytest.mark.parametrize("sequences", [prefill.MIXED, prefill.WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1), (7, 1)])
@pytest.mark.parametrize("codes", KINDS)
def test_prefill_of_ragged_batches(backend, codes, heads, kv_heads, sequences) -> None:
    case = attention_case(f"{codes}-{sequences}", sequences, heads, kv_heads, 64, codes=codes)
    prefill.check(backend, case, "bfloat16", SMALL)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("codes", KINDS)
def test_prefill_of_head_sizes(backend, codes: str, dtype: str, head_size: int) -> None:
    """Every tile's default shape, around its borders."""
    tile = default_tile(head_size)
    sequences = [(1, tile.keys + 1), (tile.rows // 2 + 1, tile.rows + 65), (3, 3)]
    case = attention_case(f"{codes}-{head_size}", sequences, 2, 1, head_size, codes=codes)
    prefill.check(backend, case, dtype, tile)


@pytest.mark.parametrize("tile", [SMALL, prefill.TILES["3-stages"], None])
@pytest.mark.parametrize("block_size", [1, 7, 100])
@pytest.mark.parametrize("codes", KINDS)
def test_prefill_of_block_sizes(backend, codes: str, block_size: int, tile) -> None:
    sequences = [(5, 90), (40, 40), (33, 65)]
    case = attention_case(f"{codes}-p{block_size}", sequences, 2, 1, 64, block_size, codes=codes)
    prefill.check(backend, case, "float16", tile)


# ------------------------------------------------------------------------------ rows of any size


def every_code(codes: str) -> np.ndarray:
    """All codes that a row can have, [256] with repetitions, of the codes' dtype."""
    if codes == "int8":
        return np.clip(np.arange(-128, 128), -127, 127).astype(np.int8)
    bits = np.arange(256, dtype=np.uint8)
    return np.where((bits & 0x7F) == 0x7F, 0, bits).astype(np.uint8)


@pytest.mark.parametrize("path", ["decode", "plain decode", "prefill", "plain prefill"])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("codes", KINDS)
def test_every_code_is_exact(backend, codes: str, dtype: str, path: str) -> None:
    """One position: the result is its value, whatever the score, so that it shows each code."""
    case = attention_case("one", [(1, 1)] * 2, 2, 2, 128, codes=codes)
    call = case.build(DTYPES[dtype])
    a = call.arguments
    shown = np.random.default_rng(0).permutation(every_code(codes)).reshape(2, 128)
    for b in range(2):
        block = a["block_tables"][b, 0]
        a["value_cache"][block, :, 0] = shown if b == 0 else shown[::-1]
        a["value_scales"][block, :, 0] = 1
    if path.endswith("decode"):
        out = run_decode(backend, call, path.startswith("plain"))
    else:
        out = run_prefill(backend, call, None if path.startswith("plain") else SMALL)
    wanted = dequantize_rows(np.stack([shown, shown[::-1]]), np.ones((2, 2)), np.dtype(np.float32))
    assert (out.astype(np.float32) == wanted).all()


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("sizes", ["tiny", "huge", "falling", "rising", "zeros"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_scales_of_every_size(backend, dtype: str, sizes: str, path: str) -> None:
    """Values of which float16 would lose all, in one row or in most; and rows of zeros."""
    case = attention_case(f"sizes-{sizes}", [(1, 300), (2, 90)], 4, 1, 64, codes="int8")
    call = case.build(DTYPES[dtype])
    a = call.arguments
    stored = ~np.isnan(a["value_scales"].astype(np.float32))
    steps = a["value_scales"].astype(np.float32)
    powers = np.full(steps.shape, {"tiny": -12.0, "huge": 8.0}.get(sizes, 0.0))
    for b, kv_len in enumerate(a["kv_lens"]):
        for p in range(kv_len):
            rising = -16 + 20 * p / kv_len
            at = a["block_tables"][b, p // 16], slice(None), p % 16
            if sizes in ("rising", "falling"):
                powers[at] = rising if sizes == "rising" else -12 - rising
            if sizes == "zeros" and p % 3:
                powers[at] = -np.inf
    steps = np.where(stored, steps * np.exp2(powers), np.nan)
    a["value_scales"][...] = steps.astype(a["value_scales"].dtype)
    out = run_decode(backend, call) if path == "decode" else run_prefill(backend, call, SMALL)
    assert_close(out, decode.wanted(call))


@pytest.mark.parametrize("codes", KINDS)
@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
def test_rows_that_are_written(backend, codes: str, dtype: str) -> None:
    """Against NumPy's float32, row by row: of all sizes, zeros, and no numbers."""
    storage, d, count = DTYPES[dtype], 64, 24
    rng = np.random.default_rng(5)
    sizes = np.exp2(np.linspace(-20, 14, count))[:, None]
    qkv = (rng.standard_normal((count, 3 * d)) * sizes).astype(storage)
    qkv[3, d:] = 0
    qkv[5, d + 7], qkv[6, 2 * d + 9] = np.nan, np.inf
    qkv[7, 2 * d :] = np.tile([1, -127, 0.5, 1.5], 16)  # ties, where the scale is 1
    rope = np.zeros((count, 2, d // 2), np.float32)
    rope[:, 0] = 1  # turns nothing
    code, poison = CODES[codes]
    shape = (3, 1, 16, d)
    got = {
        **{f"{name}_cache": np.full(shape, poison, code) for name in ("key", "value")},
        **{f"{name}_scales": np.full(shape[:3], np.nan, cases.SCALE) for name in ("key", "value")},
        "q_out": np.full((count, 1, d), np.nan, storage),
    }
    wanted = {name: array.copy() for name, array in got.items()}
    slots = np.arange(16, 16 + count).astype(np.int32)
    same = {"qkv": qkv, "q_norm": None, "k_norm": None, "eps": 1e-6, "rope": rope, "slots": slots}
    run_rope_write_kv(backend, storage, None, **same, **got)
    NumpyOps().rope_write_kv(**same, **wanted)
    for name in ("key", "value"):
        cache_, scales = (got[f"{name}_{part}"][1:] for part in ("cache", "scales"))
        before, wanted_scales = (wanted[f"{name}_{part}"][1:] for part in ("cache", "scales"))
        assert cache_.tobytes() == before.tobytes()
        np.testing.assert_array_equal(scales.astype(float), wanted_scales.astype(float))
        rows = qkv[:, d if name == "key" else 2 * d :][:, :d].astype(np.float64)
        codes_, steps = cache_.reshape(-1, d)[:count], scales.reshape(-1)[:count]
        values = dequantize_rows(codes_, steps, np.dtype(np.float64))
        finite = np.isfinite(rows).all(axis=1)
        assert np.isnan(values[~finite]).all()
        # Half a step of the row, or of the code itself.
        half = np.broadcast_to(steps.astype(float)[:, None] / 2, rows.shape)
        if codes == "fp8":
            half = np.maximum(half / 2**9, abs(rows) / 2**4)
        errors = abs(values - rows)[finite]
        assert (errors <= half[finite] * 1.001).all()


# ------------------------------------------------------------------------------ needles


def needle(codes: str, tokens: int, at: int, dtype: str = "bfloat16") -> tuple[Call, np.ndarray]:
    """A decode over `tokens` random keys of which one matches the query, and that one's value."""
    rng = np.random.default_rng(tokens + at)
    d, block_size = 64, 16
    blocks = -(-tokens // block_size)
    keys = rng.standard_normal((blocks * block_size, 2, d)).astype(np.float32)
    values = rng.standard_normal((blocks * block_size, 2, d)).astype(np.float32)
    q = rng.standard_normal((1, 4, d)).astype(np.float32)
    # Both heads of a group ask for the same; the match is 4 times what random keys reach.
    q[0, 1], q[0, 3] = q[0, 0], q[0, 2]
    keys[at] = q[0, ::2] * 1.5
    code = CODES[codes][0] if codes else None
    table = 1 + rng.permutation(blocks).astype(np.int32)
    a: dict[str, Any] = {"q": q.astype(DTYPES[dtype])}
    for name, x in (("key", keys), ("value", values)):
        paged = x.reshape(blocks, block_size, 2, d).swapaxes(1, 2)
        shape = (blocks + 1, *paged.shape[1:])
        cache_ = np.zeros(shape, DTYPES[dtype] if code is None else code)
        scales = None if code is None else np.zeros(shape[:3], cases.SCALE)
        if code is None:
            cache_[table] = paged
        else:
            cache_[table], scales[table] = quantize_rows(paged, code)
        a |= {f"{name}_cache": cache_, f"{name}_scales": scales}
    a |= {
        "query_starts": np.array([0, 1], np.int32), "kv_lens": np.array([tokens], np.int32),
        "block_tables": table[None], "scale": 1.0 / np.sqrt(d) * 2, "max_queries": 1,
        "out": np.full((1, 4, d), np.nan).astype(DTYPES[dtype]),
    }  # fmt: skip
    order = ("q", "key_cache", "value_cache", "key_scales", "value_scales", "query_starts",
             "kv_lens", "block_tables", "scale", "max_queries", "out")  # fmt: skip
    return Call({name: a[name] for name in order}, ("out",)), values[at].repeat(2, axis=0)


def finds(out: np.ndarray, value: np.ndarray) -> None:
    """The needle's value is what came out, as far as codes can tell."""
    out = out[0].astype(np.float64)
    assert (abs(out - value).max(axis=1) < 0.25).all()
    for row, wanted in zip(out, value, strict=True):
        assert np.corrcoef(row, wanted)[0, 1] > 0.995


@pytest.mark.parametrize("codes", ["", *KINDS])
@pytest.mark.parametrize("at", [0, 1234, 2999])
def test_numpy_finds_the_needle(codes: str, at: int) -> None:
    call, value = needle(codes, 3000, at, "float32")
    a = call.arguments
    NumpyOps().attention(**a)
    finds(a["out"], value)


@pytest.mark.parametrize("codes", ["", *KINDS])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_kernels_find_the_needle(backend, codes: str, dtype: str) -> None:
    """32 K keys on a device."""
    tokens = 32768 if backend.name == "gpu" else 1500
    for at in (0, tokens // 3, tokens - 1):
        call, value = needle(codes, tokens, at, dtype)
        finds(run_decode(backend, call, tuning=None), value)
        finds(run_prefill(backend, call, default_tile(64)), value)


@pytest.mark.parametrize("codes", KINDS)
def test_long_contexts_lose_nothing(backend, codes: str) -> None:
    """Even weights of many positions: sums of many small products stay as they are in float64."""
    tokens = 32768 if backend.name == "gpu" else 2000
    for dtype in SIXTEEN:
        call, _ = needle(codes, tokens, 7, dtype)
        call.arguments["scale"] = 0.02
        out = run_decode(backend, call, tuning=None)
        assert_close(out, decode.wanted(call))


# ------------------------------------------------------------------------------ planted bugs

DECODE_BUGS = {
    "keys with their values' scales": (
        "lane_id() < STEP_TOKENS ? key_scales : value_scales", "value_scales"),
    "scales of another row": ("scale = scales[row]", "scale = scales[row ^ 1]"),
    "scales behind the end": ("if (token < left) scale =", "scale ="),
    "scales of another position": ("token % 8 / 2 * 8", "(7 - token % 8) / 2 * 8"),
    "last scales never stored": ("if (step >= num_steps) copies.finish();", ""),
    "keys' scales forgotten": ("to_float(steps.data[i]) * scale_log2", "0.02f * scale_log2"),
    "values' scales forgotten": ("own[i] *= value_steps[i];", "own[i] *= 0.02f;"),
    "sums of weights that are scaled": (
        "this->state[m][h].sum += own[i];\n                    own[i] *= value_steps[i];",
        "own[i] *= value_steps[i];\n                    this->state[m][h].sum += own[i];"),
    "queries unsorted": ("        sort_even_odd(low, high);\n", ""),
    "results unsorted": ("at[2] = rows.summed", "at[1] = rows.summed"),
    "even and odd values swapped": (
        "mma_m16n8k16<scalar_t>(sums[0], weights[m], even[0], even[1])",
        "mma_m16n8k16<scalar_t>(sums[0], weights[m], odd[0], odd[1])"),
    "codes of another chunk": (
        "from_row * HEAD_SIZE + chunk * 16", "from_row * HEAD_SIZE + (chunk ^ 1) * 16"),
    "unit never left": ("ValueUnit::NEEDED ? unit.value()", "ValueUnit::NEEDED ? 1.0f"),
    "unit raised without the sums": ("highest) * raised;", "highest);"),
    "sign lost": (
        "0x00ff00ffu, 0x64806480u), 0x64806480u", "0x00ff00ffu, 0x64006400u), 0x64006400u"),
}  # fmt: skip
PREFILL_BUGS = {
    "no barrier behind the codes": ("        block_sync();  // the tile is whole\n", ""),
    "codes of a wrong stage": (
        "widen_keys(widened, stages + stage * STAGE_BYTES)",
        "widen_keys(widened, stages + next * STAGE_BYTES)"),
    "scales of a wrong stage": (
        "scale_columns(scores, steps[stage][0]", "scale_columns(scores, steps[next][0]"),
    "keys with their values' scales": (
        "scale_columns(scores, steps[stage][0]", "scale_columns(scores, steps[stage][1]"),
    "scales of another row": ("row % 8 / 2 * 4", "(7 - row % 8) / 2 * 4"),
    "scales of another head": ("to_float(key_scales[offset / HEAD_SIZE])",
                               "to_float(key_scales[offset / HEAD_SIZE / 2])"),
    "rows without scales": ("if (offset < 0) return", "if (offset < -1) return"),
    "values where keys are": ("unsigned char* target = tile + kind * KEY_BYTES",
                              "unsigned char* target = tile + (1 - kind) * KEY_BYTES"),
    "halves of a piece swapped": ("place(row, piece + 1)) = high", "place(row, piece + 1)) = low"),
    "unit never left": ("inverse *= unit.value();", "inverse *= 1.0f;"),
    "unit raised without the sums": ("factor[m][h] *= raised;", ""),
    "bytes out of order": ("pick_bytes<0x3120>(codes.y, 0)", "codes.y"),
}  # fmt: skip
WRITE_BUGS = {
    "scale of one lane": ("largest = max(largest, shuffle_xor(largest, lanes));", ""),
    "half the head": ("largest = max(largest, bits_of(x.high[r][j]) & 0x7fffffffu);", ""),
    "scale at another row": ("scales[at / HEAD_SIZE]", "scales[(at / HEAD_SIZE) ^ 1]"),
    "scale of keys and values swapped": (
        "is_value ? value_scales : key_scales",
        "is_value ? key_scales : value_scales",
    ),
    "scale not rounded": ("0.0f : rounded<scale_t>(scale)", "0.0f : scale"),
    "cut, not rounded": ("static_cast<int8_t>(rintf(x))", "static_cast<int8_t>(x)"),
    "zeros divided": ("usable ? x.low[r][j] / scale : 0.0f", "x.low[r][j] / scale"),
}


@cache
def whole_source(file: str) -> str:
    """A kernel file with the headers that can be planted in, in its text."""
    source = (Path(build.KERNELS) / file).read_text()
    for _ in range(3):
        for name in HEADERS:
            text = (Path(build.KERNELS) / name).read_text().replace("#pragma once", "")
            include = f'#include "{name}"'
            if include in source:
                first = source.index(include)
                rest = source[first + len(include) :].replace(include, "")
                source = source[:first] + text + rest
    return source


@cache
def planting_call(dtype: str) -> Call:
    """Ragged, in small blocks, values' scales that rise along the context."""
    case = attention_case(
        "planted", [(1, 900), (3, 81), (4, 40), (8, 9)], 8, 2, 32, 8, codes="int8"
    )
    call = case.build(DTYPES[dtype])
    a = call.arguments
    for b, kv_len in enumerate(a["kv_lens"]):
        for p in range(kv_len):
            at = a["block_tables"][b, p // 8], slice(None), p % 8
            a["value_scales"][at] = a["value_scales"][at].astype(np.float32) * 2.0 ** (p // 40 % 9)
    return call


class Changed(ShimBackend):
    """The shim on another text, in orders of the threads that show races."""

    def __init__(self, source: str) -> None:
        super().__init__(orders=(0, 1, 5))
        self.source = source

    def run(self, file, entry, shape, args, written, open_rows=None, **macros) -> None:
        self.changed = {file: self.source}
        super().run(file, entry, shape, args, written, open_rows or {}, **macros)


def planted(file: str, bug: tuple[str, str] | None) -> Changed:
    source = whole_source(file)
    if bug is not None:
        old, new = bug
        assert old in source, "the kernel has changed: plant this bug anew"
        source = source.replace(old, new)
    return Changed(source)


def try_bug(path: str, bug: tuple[str, str] | None) -> None:
    call = planting_call("float16")
    backend = planted(FILES[path], bug)
    if path == "decode":
        tuning = decode.DecodeTuning(
            num_items=30, least_part_tokens=64, warps=2, stages=3, merge_kernel=False
        )
        out = run_decode(backend, call, tuning=tuning)
    else:
        out = run_prefill(backend, call, SMALL)
    assert_close(out, decode.wanted(call))


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize(
    ("path", "bug"),
    [*(("decode", b) for b in DECODE_BUGS), *(("prefill", b) for b in PREFILL_BUGS)],
)  # fmt: skip
def test_planted_bugs_are_found(path: str, bug: str) -> None:
    with pytest.raises((AssertionError, KernelFault)):
        try_bug(path, (DECODE_BUGS if path == "decode" else PREFILL_BUGS)[bug])


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("path", FILES)
def test_without_bugs_the_same_passes(path: str) -> None:
    try_bug(path, None)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", ["none", *WRITE_BUGS])
def test_planted_bugs_of_the_write_are_found(bug: str) -> None:
    texts = [(Path(build.KERNELS) / n).read_text() for n in ("rope.cu", "rope.cuh", "types.cuh")]
    source, rope, types = (text.replace("#pragma once", "") for text in texts)
    types = types.replace('#include "types.cuh"', "")
    rope = rope.replace('#include "types.cuh"', types)
    source = source.replace('#include "rope.cuh"', rope)
    if bug != "none":
        old, new = WRITE_BUGS[bug]
        assert old in source, "the kernel has changed: plant this bug anew"
        source = source.replace(old, new)
    try:
        test_rows_that_are_written(Changed(source), "int8", "float32")
    except (KernelFault, AssertionError):
        assert bug != "none"
    else:
        assert bug == "none", "not found"


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_e4m3_without_its_instruction(dtype: str) -> None:
    """The path of cards that have no conversion of pairs."""
    case = attention_case("no-cvt", [(1, 90), (3, 40)], 4, 1, 64, codes="fp8")
    call = case.build(DTYPES[dtype])
    launch = decode.launch_for(call, decode.many_parts, 8)
    out = decode.run(ShimBackend(), call, launch, HAS_E4M3_PAIRS=0)
    assert_close(out, decode.wanted(call))


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_the_shims_e4m3_is_that_of_ml_dtypes() -> None:
    source = """
#include "types.cuh"
extern "C" __global__ void codes(const float* in, uint8_t* out, float* back) {
    out[threadIdx.x] = float_to_e4m3(in[threadIdx.x]);
    back[threadIdx.x] = e4m3_to_float(out[threadIdx.x]);
}
"""
    kernel = HostKernel(build.build(source, {"SCALAR": 0}), "codes")
    rng = np.random.default_rng(0)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    x = np.concatenate([
        every, (every[1:] + every[:-1]) / 2, rng.standard_normal(300) * 3,
        rng.uniform(-0.04, 0.04, 217),
    ]).astype(np.float32)  # fmt: skip
    x = np.pad(x, (0, 1024 - len(x)))
    codes, back = np.zeros(1024, np.uint8), np.zeros(1024, np.float32)
    kernel(1, 1024, x, codes, back)
    wanted = x.astype(ml_dtypes.float8_e4m3fn)
    assert (back == wanted.astype(np.float32)).all()
    assert (codes == wanted.view(np.uint8)).all()
