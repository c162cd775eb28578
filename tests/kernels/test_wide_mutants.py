"""Bugs planted in the products of up to 256 tokens: each must be found by a call that passes
without it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from nanocupy.ops.launch_wide import WideTuning
from tests.kernels.backends import ShimBackend
from tests.kernels.wide_runs import SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("wide_epilogues.cuh", "wide_merge.cuh", "wide.cuh")
SPLIT = replace(SMALL, splits=4)
SHARED = replace(SMALL, sharers=2, splits=2)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found by `op` on weights [outputs, inputs]."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    rows: int = 70
    outputs: int = 152
    inputs: int = 1032
    tuning: WideTuning = SMALL


MUTANTS = [
    Mutant(
        "weights are not waited for",
        "mbarrier_wait(bars->weights_full + weight.stage, weight.parity);",
        "",
    ),
    Mutant(
        "inputs are not waited for",
        "mbarrier_wait(bars->inputs_full + input.stage, input.parity);",
        "",
    ),
    Mutant(
        "a place is filled before it is free",
        "mbarrier_wait(bars->weights_free + place.stage, place.parity ^ 1);",
        "",
    ),
    Mutant(
        "inputs are filled before their place is free",
        "mbarrier_wait(bars->inputs_free + place.stage, place.parity ^ 1);",
        "",
    ),
    Mutant("a place is free before it was read", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    Mutant(
        "the place of the step at work is free",
        "mbarrier_arrive(bars->weights_free + weight_before);",
        "mbarrier_arrive(bars->weights_free + weight.stage);",
        tuning=replace(SMALL, input_stages=3),
    ),
    Mutant("the last products are not waited for", "wgmma_wait<0>();", ""),
    Mutant("sums of what was there", "step > 0 || k > 0);", "1);"),
    Mutant("the first step is lost", "step > 0 || k > 0);", "step > 1 || k > 0);"),
    Mutant(
        "inputs of the wrong step",
        "const int k = (first_step + step) * K_STEP;\n            if constexpr (SHARERS == 1) {",
        "const int k = step * K_STEP;\n            if constexpr (SHARERS == 1) {",
        tuning=SPLIT,
    ),
    Mutant("a rank has a step too few", "(split + 1) >> log2_splits) - steps.first_step;",
           "(split + 1) >> log2_splits) - steps.first_step - (split == 1);", tuning=SPLIT),
    Mutant(
        "rows of up are those of gate",
        "k, matrix.num_outputs + row);",
        "k, row);",
        op="norm_swiglu",
    ),
    Mutant(
        "the ring is read while sums go there",
        "barrier_sync(1, COMPUTE_THREADS);\n    const WideFinish",
        "const WideFinish",
        rows=256,
        tuning=replace(SMALL, out_tile=128, sharers=1),
    ),
    Mutant("sums are added up before they are there",
           "barrier_sync(1, COMPUTE_THREADS);  // own sums are laid out", ""),
    Mutant("sums of others are not waited for", "mbarrier_wait(merge.inbox, 0);", "",
           tuning=SPLIT),
    Mutant("sums go to a ring that is read",
           "warp_sync();\n        cluster_wait();\n        if (lane",
           "warp_sync();\n        if (lane", tuning=SPLIT),
    Mutant("copies do not see what was laid out", "        shared_to_async_fence();\n", "",
           tuning=SPLIT),
    Mutant("sums are sent before all of the warp have laid out",
           "shared_to_async_fence();\n        warp_sync();\n        cluster_wait();\n"
           "        if (lane_id() == 0) merge.send(rows, first_group);",
           "shared_to_async_fence();\n        if (lane_id() == 0) merge.send(rows, first_group);\n"
           "        cluster_wait();", tuning=SPLIT),
    Mutant("a block ends while its sums are sent", "cluster_arrive();  // nothing more",
           "// nothing more", tuning=SPLIT),
    Mutant("nobody waits for the slowest before it ends",
           "if (merge.splits() > 1) {\n        warp_sync();\n        cluster_wait();\n    }", "",
           tuning=SPLIT),
    Mutant(
        "copies to a block that has not started",
        "            if (SHARERS > 1) cluster_wait();\n            if (lane_id() == 0) {",
        "            if (lane_id() == 0) {",
        tuning=SHARED,
    ),
    Mutant("a place is free when one of two blocks has read it", "WARPGROUPS * 4 * SHARERS);",
           "WARPGROUPS * 4);", tuning=SHARED),
    Mutant("half of the tokens twice", "k, share * (TOKENS / SHARERS));", "k, 0);", tuning=SHARED),
    Mutant("halves in the same place", "to + share * (INPUT_BYTES / SHARERS)", "to", tuning=SHARED),
    Mutant("inputs of another split", "<< (split * SHARERS), k,", ", k,", tuning=SHARED),
    Mutant("only one is told that a place is free", "split * SHARERS + i);", "split * SHARERS);",
           tuning=SHARED),
    Mutant("both have the same tile", "/ SHARERS * SHARERS + share;", "/ SHARERS * SHARERS;",
           tuning=SHARED),
    Mutant("sums of another tile", "* SHARERS + share);\n            }",
           "* SHARERS);\n            }", tuning=SHARED),
    Mutant("more is expected than comes", "* (OUT_TILE / 16) * GROUP_BYTES;",
           "* (OUT_TILE / 16) * GROUP_BYTES + 16;", tuning=SPLIT),
    Mutant("less is expected than comes", "* (OUT_TILE / 16) * GROUP_BYTES;",
           "* (OUT_TILE / 16) * GROUP_BYTES - 16;", tuning=SPLIT),
    Mutant("groups of the wrong rank", "group & (splits() - 1)", "(group + 1) & (splits() - 1)",
           rows=64, tuning=SPLIT),
    Mutant("groups of the wrong slot", "(group - to + splits() - 1)", "(group - to + splits())",
           rows=100, tuning=SPLIT),
    Mutant("the place of another source", "from - (from > to)", "from - (from < to)",
           tuning=SPLIT),
    Mutant("sent to the wrong rank", "inbox, to * SHARERS + share",
           "inbox, split * SHARERS + share", tuning=SPLIT),
    Mutant("sent to the other tile", "inbox, to * SHARERS + share", "inbox, to * SHARERS",
           tuning=SHARED),
    Mutant("a group is not sent", "if (count > 0) {", "if (count > 1) {", rows=33, tuning=SPLIT),
    Mutant("one split gets nothing", "for (int i = 1; i < splits(); ++i)",
           "for (int i = 2; i < splits(); ++i)", tuning=SPLIT),
    Mutant("groups without a token are sent", "min(first_group + PART_TOKENS / 8, num_groups)",
           "(first_group + PART_TOKENS / 8)", tuning=SPLIT),
    Mutant("one rank is left out", "source < merge.splits();", "source < merge.splits() - 1;",
           tuning=SPLIT),
    Mutant("tokens of the other pair", "* 8 + pair * 2 + odd", "* 8 + (pair ^ 1) * 2 + odd"),
    Mutant("tokens in the order that they lie", "* 8 + pair * 2 + odd", "* 8 + pair + odd * 4"),
    Mutant("a token too many",
           "if (token + i * tokens >= num_rows) continue;\n            in_order",
           "in_order", rows=71),
    Mutant("an output too many", "if (output >= num_outputs) token = num_rows;", ""),
    Mutant("the upper rows are the lower", "at[i * 32] = values[n][i];",
           "at[i * 32] = values[n][i ^ 2];"),
    Mutant("four outputs are the next four", "sums[i] = half ? sums[4 + i] : first;",
           "sums[i] = first;"),
    Mutant("the same residual for all tokens", "epilogue.fetch(output_of(token + i * tokens)",
           "epilogue.fetch(output_of(token)", op="linear_add", rows=128),
    Mutant("the residual of the tokens before",
           "            fetch(token, tokens, addends);\n        }", "        }",
           op="linear_add", rows=250, tuning=replace(SMALL, sharers=1)),
    Mutant("the bias of the output before", "(bias + output);", "(bias + (output & ~15));"),
    Mutant("gate is not rounded", "rounded<scalar_t>(sums[i] + to_float(gate_biases.data[i]))",
           "(1.02f * (sums[i] + to_float(gate_biases.data[i])))", op="norm_swiglu"),
    Mutant("the bias of up is that of gate", "up_biases = load_biases(bias, num_outputs + output);",
           "up_biases = load_biases(bias, output);", op="norm_swiglu"),
    Mutant("the residual is lost", "to_float(addend.data[i]) + (sums[i]", "(sums[i]",
           op="linear_add"),
    Mutant("warpgroups of the same tokens", "warp / 4 % TOKEN_PARTS", "0 * TOKEN_PARTS", rows=200),
    Mutant("warpgroups of the same rows", "warp / 4 / TOKEN_PARTS, ", "0, ",
           tuning=replace(SMALL, out_tile=128)),
]  # fmt: skip


def sources() -> str:
    text = (KERNELS / "wide.cu").read_text()
    for name in reversed(HEADERS):
        header = (KERNELS / name).read_text().replace("#pragma once", "")
        assert text.count(f'#include "{name}"') == 1
        text = text.replace(f'#include "{name}"', header)
    return text


def check(mutant: Mutant, text: str) -> None:
    backend = ShimBackend(orders=(0, 1, 1005), changed={"wide.cu": text})
    call = make_call(
        mutant.op, DTYPES["bfloat16"], mutant.rows, mutant.outputs, mutant.inputs,
        bias=mutant.op != "lm_head",
    )  # fmt: skip
    check_op(backend.run, mutant.op, call, tuning=mutant.tuning)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    text = sources()
    check(mutant, text)
    assert text.count(mutant.old) == 1, f"{text.count(mutant.old)} places match {mutant.old!r}"
    with pytest.raises((AssertionError, KernelFault)):
        check(mutant, text.replace(mutant.old, mutant.new))
