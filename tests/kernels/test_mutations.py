"""Planted bugs: each must make at least one check fail, or the checks are worth little.

A bug is a change of a kernel's text (or of a header's, put in its place), built and run on the
shim. The attention kernels' own bugs are beside their tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.kernels import (
    test_decode_state,
    test_drafts,
    test_penalties,
    test_sampling_kernels,
)
from tests.kernels.backends import ShimBackend
from tests.kernels.small_ops import check_case
from tests.ops.cases import CASES, DTYPES
from tests.shim import build
from tests.shim.driver import KernelFault, host_kernel

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


def of_cases(op: str, storage: str = "bfloat16", *names: str) -> Callable[[Any], None]:
    """The shared cases of an op, or those of them that are named."""

    def run(backend: Any) -> None:
        for case in CASES:
            if case.op == op and (not names or case.name in names):
                check_case(backend, case, DTYPES[storage])

    return run


def of_product(backend: Any) -> None:
    """The shim's own product, in three orders of the threads."""
    rng = np.random.default_rng(0)
    for m, n, k in ((70, 65, 136), (64, 64, 32)):
        a = rng.standard_normal((m, k)).astype(np.float16)
        b = rng.standard_normal((n, k)).astype(np.float16)
        kernel = host_kernel(
            build.SHIM / "gemm.cu", "tiled_gemm", source=backend.changed["gemm.cu"], SCALAR=1
        )
        for order in (0, 1, 7):
            c = np.full((m, n), np.nan, np.float32)
            grid = (-(-n // 64), -(-m // 64))
            kernel(grid, 128, a, b, c, m, n, k, shared_bytes=20480, order=order)
            wanted = a.astype(float) @ b.astype(float).T
            np.testing.assert_allclose(c, wanted, atol=1e-4)


def of_reductions(backend: Any) -> None:
    """Sums one behind the other, for blocks of several warps."""
    source = backend.changed["reduce.cu"]
    for threads in (64, 96, 1024):
        for order in (0, 1, 7):
            values, out = np.arange(threads, dtype=np.int32), np.zeros(threads, np.int32)
            host_kernel("reduce.cu", "sums", source=source, SCALAR=0)(
                1, threads, values, out, order=order
            )
            assert (out == values.sum() + 5 * threads).all()


REDUCE_PROBE = """
#include "types.cuh"
#include "reduce.cuh"
extern "C" __global__ void sums(const int32_t* in, int32_t* out) {
    const int32_t first = block_sum(in[threadIdx.x]);
    out[threadIdx.x] = first + block_sum(5);
}
"""


def of_penalties(backend: Any) -> None:
    for vocab, rows in ((37, 9), (5000, 3)):
        test_penalties.test_penalize_slots(backend, vocab, rows, 6)


def of_counts(backend: Any) -> None:
    test_penalties.test_count_tokens(backend, 31)


def of_argmax(backend: Any) -> None:
    for vocab, parts in ((31, 1), (4097, 3)):
        test_sampling_kernels.test_argmax(backend, vocab, parts)


def of_large_samples(backend: Any) -> None:
    for options in ({}, {"top_k": 40, "top_p": 0.95}):
        test_sampling_kernels.test_sampling_a_large_vocabulary(backend, 1, options)


def of_philox(backend: Any) -> None:
    for ranks in (1, 4):
        test_sampling_kernels.test_philox_is_the_hosts(backend, ranks)


def of_teams(backend: Any) -> None:
    for vocab in (29, 5001):
        test_sampling_kernels.test_blocks_of_a_row_change_no_token(backend, vocab)


def of_many_candidates(backend: Any) -> None:
    test_sampling_kernels.test_blocks_of_a_row_change_no_token(backend, 20000)


def of_places(backend: Any) -> None:
    for how in (("argmax", 3), ("sample", 4)):
        test_decode_state.test_places_move_on(backend, how)


def of_laid_out(backend: Any) -> None:
    test_drafts.test_the_inputs_are_those_of_a_batch_that_the_host_lays_out(backend, 5, 8, True)


def of_accepted(backend: Any) -> None:
    test_drafts.test_places_move_on_by_what_was_right(backend, 40, 64)
    test_drafts.test_a_sequence_at_the_end_of_its_table_stays(backend)


def of_draft_penalties(backend: Any) -> None:
    for vocab, multiprocessors in ((37, 6), (5000, 6)):
        test_drafts.test_penalties_of_rows_count_the_drafts_before_them(
            backend, vocab, multiprocessors
        )
    test_drafts.test_what_was_right_is_counted(backend)


@dataclass(frozen=True)
class Bug:
    """`old` in the text of `file` becomes `new`; `check` runs what must notice."""

    name: str
    file: str
    old: str
    new: str
    check: Callable[[Any], None]
    header: str | None = None  # the bug is in this header


ROPE = of_cases("rope_write_kv", "bfloat16", "h8-g2-d128-norms", "padding", "many-blocks")
SAMPLE = of_cases("sample", "float32")
BUGS = (
    Bug("missing-wait", "gemm.cu", "cp_async_wait<1>();", "", of_product),
    Bug("wait-for-one-too-few", "gemm.cu", "cp_async_wait<1>();", "cp_async_wait<2>();",
        of_product),
    Bug("missing-barrier-before-use", "gemm.cu", "block_sync();  // the tile is there", "",
        of_product),
    Bug("missing-barrier-after-use", "gemm.cu", "block_sync();  // the tile may", "// may",
        of_product),
    Bug("divergent-barrier", "gemm.cu", "block_sync();  // the tile may",
        "if (warp != 1) block_sync();  // may", of_product),
    Bug("wrong-stage", "gemm.cu", "stage = s % 2", "stage = (s + 1) % 2", of_product),
    Bug("wrong-fragment-row", "gemm.cu", "lane % 8 + lane / 16 * 8", "lane % 16", of_product),
    Bug("mask-of-width-off-by-one", "gemm.cu", "k + column < K", "k + column <= K", of_product),
    Bug("mask-of-rows-off-by-one", "gemm.cu", "if (row < M &&", "if (row <= M &&", of_product),
    Bug("missing-closing-barrier", "reduce.cu", "    block_sync();\n    return value;",
        "    return value;", of_reductions, "reduce.cuh"),
    Bug("missing-middle-barrier", "reduce.cu", "partial[warp_id()] = value;\n    block_sync();",
        "partial[warp_id()] = value;", of_reductions, "reduce.cuh"),
    Bug("idle-lanes-counted", "reduce.cu", "lane_id() < num_warps() ? partial[lane_id()]",
        "lane_id() <= num_warps() ? partial[lane_id()]", of_reductions, "reduce.cuh"),
    Bug("row-overrun", "embed.cu", "i < D; i += blockDim.x)", "i <= D; i += blockDim.x)",
        of_cases("embed")),
    Bug("blocks-and-rows-swapped", "rope.cu", "block = slot / block_size",
        "block = slot % block_size", ROPE, "rope.cuh"),
    Bug("wrong-kv-head", "rope.cu", "(head - H) % G", "(head - H) / 2", ROPE),
    Bug("values-rotated", "rope.cu", "is_value = head >= H + G", "is_value = head > H + G", ROPE),
    Bug("turned-the-other-way", "rope.cu", "angles.low[r][j], -(high", "angles.low[r][j], (high",
        ROPE, "rope.cuh"),
    Bug("norm-of-half-a-head", "rope.cu", "squares = fmaf(x.high[r][j], x.high[r][j], squares);",
        "", ROPE, "rope.cuh"),
    Bug("eps-dropped", "norm.cu", "/ D + eps", "/ D", of_cases("norm_linear", "float32")),
    Bug("rows-not-gathered", "norm.cu", "rows != nullptr ? rows[blockIdx.x]",
        "rows != nullptr ? blockIdx.x", of_cases("lm_head")),
    Bug("bias-of-up-taken-from-gate", "activation.cu", "up += to_float(bias[F + i])",
        "up += to_float(bias[i])", of_cases("norm_swiglu")),
    Bug("residual-forgotten", "activation.cu", "to_float(residual[row + i]) + sum", "sum",
        of_cases("linear_add")),
    Bug("highest-of-a-tie", "sampling.cu", "(0xffffffffu - static_cast<uint32_t>(index))",
        "static_cast<uint32_t>(index)", of_argmax, "sampling.cuh"),
    Bug("last-of-a-thread-s-tie", "sampling.cu", "order <= best", "order < best", of_argmax,
        "sampling.cuh"),
    Bug("merged-one-too-early", "sampling.cu", "arrival, 0) != last", "arrival, 0) != last - 1",
        of_argmax),
    Bug("arrivals-left-behind", "sampling.cu", "atomic_count_to(arrivals + s, last)",
        "atomic_add(arrivals + s, 1u)", of_argmax),
    Bug("top-k-keeps-one-more", "sampling.cu", "target(run.total) - 1;", "target(run.total);",
        SAMPLE),
    Bug("bins-not-cleared-in-time", "sampling.cu", "found.bin = -1;\n    block_sync();",
        "found.bin = -1;", of_large_samples),
    Bug("bins-read-too-early", "sampling.cu", "if (ranks == 1) {\n            block_sync();\n"
        "            return;", "if (ranks == 1) {\n            return;", of_large_samples,
        "sampling.cuh"),
    Bug("bin-found-too-late", "sampling.cu", "block_sync();\n    const Crossing",
        "const Crossing", of_large_samples),
    Bug("bin-reset-too-early", "sampling.cu", "block_sync();  // before it is set again", "",
        of_large_samples),
    Bug("draw-forgets-warps-before", "sampling.cu",
        "warp_sum(lane_id() < warp_id() ? of_warp : 0)", "0", of_philox, "sampling.cuh"),
    Bug("draw-forgets-blocks-before", "sampling.cu",
        "if (r < team.rank) run.before += totals[r];", "", of_philox, "sampling.cuh"),
    Bug("draw-of-a-block-s-own-sum", "sampling.cu", "run.total += totals[r];",
        "run.total = totals[team.rank];", of_philox, "sampling.cuh"),
    Bug("values-read-while-others-write", "sampling.cu", "values[turn++ % 2]", "values[0]",
        of_teams, "sampling.cuh"),
    Bug("blocks-do-not-wait-for-bins", "sampling.cu",
        "cluster_sync();\n        const int part", "const int part", of_teams, "sampling.cuh"),
    Bug("blocks-do-not-wait-for-sums", "sampling.cu",
        "numbers + i, r, sum);\n        }\n        cluster_sync();",
        "numbers + i, r, sum);\n        }\n        block_sync();", of_teams, "sampling.cuh"),
    Bug("bins-of-one-block-lost", "sampling.cu", "if (r < ranks) sum", "if (r < ranks - 1) sum",
        of_teams, "sampling.cuh"),
    Bug("no-wait-for-blocks-to-start", "sampling.cu", "if (team.ranks > 1) cluster_wait();",
        "if (team.ranks > 64) cluster_wait();", of_teams),
    Bug("no-wait-for-candidates", "sampling.cu", "team.wait();\n    return", "return", of_teams),
    Bug("candidates-of-blocks-on-each-other", "sampling.cu", "static_cast<int>(run.before);\n",
        "0;\n", of_teams),
    Bug("candidates-of-the-last-bin-lost", "sampling.cu", "row.bin_of(x) <= last",
        "row.bin_of(x) < last", of_teams),
    Bug("too-many-candidates", "sampling.cu", "run.total > MAX_CANDIDATES",
        "run.total > 2 * MAX_CANDIDATES", of_many_candidates),
    Bug("carry-lost", "sampling.cu", "(before + low < before ? 1 : 0)", "0", of_teams),
    Bug("bin-s-bound-too-high", "sampling.cu", "static_cast<float>(crossing.bin + 2)",
        "static_cast<float>(crossing.bin)", of_teams),
    Bug("digit-starts-anew", "sampling.cu", "left = digit.left;", "", of_teams),
    Bug("ids-of-the-part", "sampling.cu", "ids == nullptr ? first_id + i", "ids == nullptr ? i",
        of_teams),
    Bug("counter-words-swapped", "sampling.cu",
        "position = counters[2 * s], index = counters[2 * s + 1]",
        "position = counters[2 * s + 1], index = counters[2 * s]", SAMPLE),
    Bug("penalty-before-bias", "sampling.cu", "row[token_ids[e]] + bias[e];",
        "row[token_ids[e]];", of_cases("penalize")),
    Bug("penalised-before-the-bias-is-there", "penalties.cu", "block_sync();  // a token",
        "// a token", of_penalties),
    Bug("bias-of-the-next-part-too", "penalties.cu", "token < end) row[token] +=",
        "token <= end) row[token] +=", of_penalties),
    Bug("prompt-counts-as-output", "penalties.cu", "words.data[i] & MOST", "words.data[i]",
        of_penalties),
    Bug("ban-forever", "penalties.cu", "record[BAN_LEFT] -= 1", "record[BAN_LEFT] -= 0",
        of_counts),
    Bug("block-table-row-and-column-swapped", "sampling.cu",
        "static_cast<int64_t>(b) * places.table_width + column",
        "static_cast<int64_t>(column) * places.table_width + b", of_places, "decode_state.cuh"),
    Bug("table-end-off-by-one", "sampling.cu", "column < places.table_width",
        "column <= places.table_width", of_places, "decode_state.cuh"),
    Bug("free-places-move", "sampling.cu", "if (kv_len == 0) return;\n        places.token_ids",
        "places.token_ids", of_places, "decode_state.cuh"),
    Bug("all-ranks-move-on", "sampling.cu", "if (team.rank == 0 && threadIdx.x == 0)",
        "if (threadIdx.x == team.rank)", of_places),
    Bug("a-draft-beside-its-row", "drafts.cu", "sampled[row] == drafts[row + 1]",
        "sampled[row] == drafts[row]", of_accepted),
    Bug("one-draft-of-the-next-place", "drafts.cu", "while (row + 1 < last &&",
        "while (row < last &&", of_accepted),
    Bug("the-token-after-is-forgotten", "drafts.cu", "row - first + 1;", "row - first;",
        of_accepted),
    Bug("the-end-of-the-table", "drafts.cu", "const bool has_room = column < M",
        "const bool has_room = column <= M", of_accepted),
    Bug("a-draft-for-the-own-token", "drafts.cu", "number == 0 ? token_ids[b] : drafts[t]",
        "drafts[t]", of_laid_out),
    Bug("all-rows-at-one-position", "drafts.cu", "positions[b] + number", "positions[b]",
        of_laid_out),
    Bug("one-draw-for-all-rows", "drafts.cu", "counters[2 * b] + number", "counters[2 * b]",
        of_laid_out),
    Bug("lengths-without-drafts", "drafts.cu", "positions[t] + count", "positions[t] + 1",
        of_laid_out),
    Bug("equal-drafts-count-once", "penalties.cu", "& MOST) + count, MOST)",
        "& MOST) + 1, MOST)", of_draft_penalties),
    Bug("equal-drafts-are-penalised-twice", "penalties.cu", "is_first &= m >= n;", "",
        of_draft_penalties),
    Bug("a-draft-is-penalised-as-seen-too", "penalties.cu", "if (!is_draft) penalize",
        "penalize", of_draft_penalties),
    Bug("a-ban-forgets-drafts", "penalties.cu", "record[BAN_LEFT] <= num_before",
        "record[BAN_LEFT] == 0", of_draft_penalties),
    Bug("what-was-wrong-is-counted", "penalties.cu", "|| token != drafts[row + 1]", "",
        of_draft_penalties),
    Bug("a-count-without-end", "penalties.cu", "token >= 0 && (seen[token] & MOST) < MOST",
        "token >= 0", of_draft_penalties),
    Bug("padding-has-a-slot", "drafts.cu", "b >= 0 && column < M", "column < M", of_laid_out),
)  # fmt: skip


def text_of(file: str) -> str:
    """The text of a kernel file."""
    if file == "reduce.cu":
        return REDUCE_PROBE
    return (build.SHIM if file == "gemm.cu" else build.KERNELS).joinpath(file).read_text()


def with_header(source: str, header: str, text: str) -> str:
    """`source` with `header` written out in place of its include."""
    changed, count = re.subn(
        rf'#include "{re.escape(header)}"', lambda _: text.replace("#pragma once", ""), source
    )
    assert count == 1
    return changed


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    whole = text_of(bug.file) if bug.header is None else text_of(bug.header)
    assert whole.count(bug.old) >= 1, "the text to change is gone: keep the bug up to date"
    changed = whole.replace(bug.old, bug.new, 1)
    if bug.header is not None:
        changed = with_header(text_of(bug.file), bug.header, changed)
    with pytest.raises((AssertionError, KernelFault)):
        bug.check(ShimBackend(changed={bug.file: changed}))


@pytest.mark.parametrize("file", sorted({bug.file for bug in BUGS}))
def test_without_a_bug_the_same_checks_pass(file: str) -> None:
    source = text_of(file)
    for header in {bug.header for bug in BUGS if bug.file == file} - {None}:
        source = with_header(source, header, text_of(header))
    for check in {bug.check for bug in BUGS if bug.file == file}:
        check(ShimBackend(changed={file: source}))
