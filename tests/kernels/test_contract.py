"""Every kernel says what it is in the same form, is launched by the ops, and has a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanocupy.ops.interface import Ops
from nanocupy.ops.numpy_ops import NumpyOps

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels_cu"
ENTRY = re.compile(
    r'((?:^//[^\n]*\n)+)(?:^#[^\n]*\n)*extern "C" __global__ void\s*'
    r"(?:__launch_bounds__\([^{;]*?\))?\s*(\w+)\s*\(",
    re.MULTILINE,
)
ENTRIES = {
    name: (path, comment)
    for path in sorted(KERNELS.glob("*.cu"))
    for comment, name in ENTRY.findall(path.read_text())
}
# Kernels that read before the wait what no kernel in flight writes: weights, older cache blocks.
READ_BEFORE = (
    "gemv.cu", "norm.cu", "skinny.cu", "attention_decode_fused.cu", "attention_prefill_hopper.cu",
    "decode_step.cu", "quantized.cu", "quantized_stream.cu", "quantized_wide.cu",
    "wide.cu",
)  # fmt: skip
# Where PTX and intrinsics stand.
INTRINSICS = (
    "device.cuh",
    "cluster.cuh",
    "small_numbers.cuh",
    "bulk_copy.cuh",
    "weight_copy.cuh",
    "hopper.cuh",
    "tile_products.cuh",
    "tall_products.cuh",
    "code_products.cuh",
)
# What has no op in the interface: where its meaning is written instead.
ELSEWHERE = {
    "lay_out_drafts": "engine.batch.build_batch",
    "force_drafts": "engine.runner.Runner.force_acceptance",
    "accept_drafts": "speculation.acceptance.count_right",
    "apply_updates": "engine.decode_state.DecodeState.updates",
    "count_accepted": "engine.request.Request.output_counts",
    "count_tokens": "engine.request.Request.output_counts",
    "set_token_counts": "engine.device_penalties.PenaltySlots",
    "resolve_tokens": "engine.decode_state.DecodeState.updates",
    "fill_quantized": "philox of ops.philox",
    "fill_normal": "Box and Muller 1958",
    "stamp_step": "cuda.step_stamps.StepStamps.read",
}


def test_every_entry_has_a_head_comment() -> None:
    named = re.compile(
        r'extern "C" __global__ void\s*(?:__launch_bounds__\([^{;]*?\))?\s*(\w+)\s*\('
    )
    found = [n for path in sorted(KERNELS.glob("*.cu")) for n in named.findall(path.read_text())]
    assert sorted(found) == sorted(ENTRIES)
    assert len(found) == len(set(found)), "two kernels of one name"


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_head_comment_has_every_part(entry: str) -> None:
    _, comment = ENTRIES[entry]
    assert re.search(rf"^// {entry}: \S", comment, re.MULTILINE), "name: what it does"
    assert re.search(r"^// grid[ :,]", comment, re.MULTILINE), "grid and block"
    assert "block" in comment
    assert re.search(r"^// COST: \S", comment, re.MULTILINE)
    (reference,) = re.findall(r"^// REF: (.+)$", comment, re.MULTILINE)
    if entry in ELSEWHERE:
        assert reference.startswith(ELSEWHERE[entry])
        return
    for op in re.findall(r"numpy_ops\.(\w+)", reference):
        assert op in Ops.__abstractmethods__
        assert callable(getattr(NumpyOps, op))
    assert "numpy_ops." in reference


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_launched_and_tested(entry: str) -> None:
    ops = "".join(path.read_text() for path in (ROOT / "nanocupy" / "ops").glob("*.py"))
    engine = "".join(path.read_text() for path in (ROOT / "nanocupy" / "engine").glob("*.py"))
    cuda = (ROOT / "nanocupy" / "cuda" / "step_stamps.py").read_text()
    waiting = {"add_bias_rows"}  # for quantised products to come
    assert f'"{entry}"' in ops + engine + cuda or entry in waiting, "no op launches it"
    path, _ = ENTRIES[entry]
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "kernels").glob("*.py"))
    launcher = f"launch_{path.stem.removesuffix('_plain')}"
    assert path.name in tests or launcher in tests, f"no test launches {path.name}"


def test_every_entry_bounds_its_threads() -> None:
    """Or the compiler may use more registers than a block of the size that is launched can have;
    the host shim would not see it."""
    bounded = re.compile(r"__global__ void\s*__launch_bounds__\([^{;]*?\)\s*(\w+)\s*\(")
    found = [n for path in KERNELS.glob("*.cu") for n in bounded.findall(path.read_text())]
    assert sorted(found) == sorted(ENTRIES)


def test_kernels_use_no_intrinsic_of_their_own() -> None:
    """PTX and intrinsics stand in device.cuh and its parts, where the host shim has their twins,
    as in bulk_copy.cuh, tile_products.cuh and tall_products.cuh, and for what runs on 9.0a alone in
    hopper.cuh."""
    forbidden = re.compile(r"\basm\b|__shfl|__syncthreads|__syncwarp|__ballot|atomic[A-Z]|__ldg")
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        if path.name not in INTRINSICS:
            code = re.sub(r"//[^\n]*", "", path.read_text())
            assert not forbidden.search(code), f"{path.name}: {forbidden.search(code)}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_waits_for_the_kernel_before(entry: str) -> None:
    """Launches overlap: what a kernel reads may not be there before it has waited. Nor may the
    compiler read it earlier, as it could through a const pointer that nothing else aliases."""
    path, _ = ENTRIES[entry]
    code = re.sub(r"//[^\n]*", "", path.read_text())
    start = re.search(rf"__global__ void[^{{;]*?\b{entry}\s*\(([^{{]*)\{{", code)
    assert start is not None
    assert "__restrict__" not in start.group(1)
    body = code[start.end() :].split("\n}\n", 1)[0]
    if path.name in READ_BEFORE:
        headers = "".join(h.read_text() for h in KERNELS.glob(f"{path.stem}*.cuh"))
        assert "grid_dependency_wait();" in body or "grid_dependency_wait();" in headers
        return
    statements = [line.strip() for line in body.splitlines() if line.strip()]
    statements = [line for line in statements if not line.startswith(("#", "constexpr", "static_"))]
    assert "grid_dependency_wait();" in statements[:2], "something comes before the wait"
