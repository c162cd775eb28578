"""A whole decode step in one launch with weights that are codes, against the ops of the reference.

Sizes leave a rest everywhere: inputs in a chunk, chunks in a stage, stages in a unit and a tile,
rows in a block. A step of codes ends with the residual stream; the head is a launch of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nanocupy.bench.shapes import SHAPES
from nanocupy.ops.launch_decode_step import (
    BEST_SEQUENCES,
    MAX_SEQUENCES,
    DecodeStepShape,
    DecodeStepTuning,
    decode_step_launch,
    num_words,
    stage_bytes,
    table_words,
)
from nanocupy.ops.launch_quantized import PackedFormat, packed_format
from tests.kernels.decode_step_runs import (
    LARGE_CASES,
    MAX_SHARED,
    SMALL,
    ShimStep,
    check,
    check_large,
    make,
    tiled_room,
)
from tests.kernels.test_decode_step import step_backend
from tests.shim import build

__all__ = ["step_backend"]  # a fixture

LONG = DecodeStepShape(64, 4512, 64, 4, 2, 16)  # five stages, the last one short
WIDE = DecodeStepShape(640, 2304, 64, 4, 1, 64)  # chunks that are whole, groups of 128
CASES = {
    "one": SimpleNamespace(shape=SMALL, kv_lens=[5]),
    "first token": SimpleNamespace(shape=SMALL, kv_lens=[1]),
    "two, norms of q and k": SimpleNamespace(shape=SMALL, kv_lens=[17, 1], qk_norm=True),
    "biases": SimpleNamespace(
        shape=DecodeStepShape(96, 160, 77, 6, 2, 32), kv_lens=[40], bias=True
    ),
    "a free place": SimpleNamespace(shape=SMALL, kv_lens=[3, 0, 33]),
    "four": SimpleNamespace(
        shape=DecodeStepShape(128, 64, 100, 4, 1, 32), kv_lens=[1, 16, 17, 100]
    ),
    "several parts": SimpleNamespace(shape=SMALL, kv_lens=[300], parts=3),
    "inputs beyond a stage": SimpleNamespace(shape=LONG, kv_lens=[20]),
    "two, inputs beyond a stage": SimpleNamespace(shape=LONG, kv_lens=[20, 7], bias=True),
    "whole chunks": SimpleNamespace(shape=WIDE, kv_lens=[20]),
    "head size 80": SimpleNamespace(
        shape=DecodeStepShape(64, 64, 64, 4, 2, 80), kv_lens=[50, 7], qk_norm=True
    ),
}
TILED = SimpleNamespace(
    shape=DecodeStepShape(64, 14432, 64, 4, 2, 16), kv_lens=[9, 3, 1, 30], tiled=True
)
# kind, inputs of a group (None: a row), type
STORAGES = [
    ("int4", 32, "bfloat16"), ("int4", 16, "float16"), ("int4", None, "bfloat16"),
    ("int8", 32, "float16"), ("int8", 16, "bfloat16"), ("int8", None, "bfloat16"),
    ("fp8", None, "bfloat16"), ("fp8", 32, "float16"),
]  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_its_ops(step_backend, name, storage) -> None:
    *form, dtype = storage
    model, tuning = make(CASES[name], dtype, storage=tuple(form))
    check(model, model.launch(step_backend, tuning))


@pytest.mark.parametrize("name", LARGE_CASES)
def test_a_step_of_many_inputs_is_its_ops(step_backend, name) -> None:
    check_large(step_backend, name, ("int4", 32))


@pytest.mark.parametrize("storage", [("int4", 128), ("int4", 64), ("int8", 128), ("int8", 64)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("layers", [1, 3])
def test_large_groups(step_backend, storage, layers) -> None:
    model, _ = make(CASES["whole chunks"], "bfloat16", storage=storage, layers=layers)
    check(model, model.launch(step_backend))


@pytest.mark.parametrize("storage", [("int4", 32), ("int8", 32), None], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_inputs_in_tiles(step_backend, storage, count) -> None:
    case = SimpleNamespace(shape=TILED.shape, kv_lens=TILED.kv_lens[:count])
    model, _ = make(case, "bfloat16", storage=storage)
    room = tiled_room(model)
    assert model.plan(max_shared=room).tile_inputs < case.shape.ffn_size
    check(model, model.launch(step_backend, max_shared=room))


@pytest.mark.parametrize("order", [0, 1001])
@pytest.mark.parametrize("name", ["one", "four", "several parts", "a free place"])
@pytest.mark.parametrize("num_multiprocessors", [2, 3, 20])
def test_blocks_with_all_some_and_no_part_of_a_product(num_multiprocessors, name, order) -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, tuning = make(CASES[name], "bfloat16", storage=("int4", 32))
    step = ShimStep(order=order)
    check(model, model.launch(step, tuning, num_multiprocessors=num_multiprocessors))


@pytest.mark.parametrize("order", [0, 1, 3, 1001])
@pytest.mark.parametrize("ring_stages", [4, 6, 10])
@pytest.mark.parametrize("storage", [("int4", 32), ("int8", 32)], ids=str)
def test_any_even_ring(storage, ring_stages, order) -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, _ = make(CASES["inputs beyond a stage"], "bfloat16", storage=storage)
    check(model, model.launch(ShimStep(order=order), DecodeStepTuning(ring_stages=ring_stages)))


@pytest.mark.parametrize("name", ["several parts", "two, inputs beyond a stage"])
def test_the_order_of_threads_does_not_matter(name) -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, tuning = make(CASES[name], "bfloat16", storage=("int4", 32))
    first, *others = (model.launch(ShimStep(order=n), tuning) for n in (0, 1, 7))
    for again in others:
        assert first[0].tobytes() == again[0].tobytes()


def test_launches_follow_each_other(step_backend) -> None:
    """Each finds what the ones before have left, and takes none of it for its own."""
    words = None
    for seed, kv_lens in enumerate(([20, 33], [21, 34], [7], [22, 1])):
        case = SimpleNamespace(shape=SMALL, kv_lens=kv_lens)
        model, _ = make(case, "bfloat16", storage=("int4", 32), seed=seed)
        if words is None:
            size = num_words(SMALL, model.plan(), 2)
            words = np.zeros(size, np.uint64), np.zeros(2, np.uint32)
        check(model, model.launch(step_backend, words=words))
        assert words[1][1] == 0


def test_the_residual_stream_of_infinite_inputs_is_infinite_in_its_token_alone() -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    case = SimpleNamespace(shape=SMALL, kv_lens=[5, 6])
    model, _ = make(case, "bfloat16", storage=("int4", 32))
    wanted = model.launch(ShimStep())[0]
    model.x[0, 3] = np.inf
    got = model.launch(ShimStep())[0]
    assert got[1].tobytes() == wanted[1].tobytes()
    assert not np.isfinite(got[0].astype(np.float32)).any()


# ------------------------------------------------------------------------------ the plan

FORMS = [
    PackedFormat(kind, group) for kind in ("int4", "int8", "fp8") for group in (16, 32, 64, 128)
]


def shape_of(name: str) -> DecodeStepShape:
    c = SHAPES[name]
    return DecodeStepShape(
        c.hidden_size, c.intermediate_size, c.vocab_size, c.num_heads, c.num_kv_heads, c.head_size
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_fit_an_h100(name, form) -> None:
    for num_sequences in range(1, MAX_SEQUENCES + 1):
        launch = decode_step_launch(
            shape_of(name), num_sequences, num_multiprocessors=132, max_shared_bytes=MAX_SHARED,
            weights=form, has_head=False,
        )  # fmt: skip
        # Stages are larger with small groups, so not every room holds a ring of them.
        assert launch is not None or num_sequences > BEST_SEQUENCES or form.group < 64
        if launch is None:
            continue
        assert launch.shared_bytes < MAX_SHARED
        assert launch.macros["RING_STAGES"] >= 4
        assert launch.macros["RING_STAGES"] % 2 == 0
        assert launch.macros.items() >= form.macros.items()
        assert launch.tile_inputs % 1024 == 0


def test_sizes_of_a_stage_and_of_a_row_of_the_table() -> None:
    for form in (*FORMS, None):
        least = 8 if form is not None and form.kind == "int4" else 16
        assert least << 10 <= stage_bytes(form) <= least * 3 << 9
        assert stage_bytes(form) % 128 == 0  # every stage is aligned
        assert table_words(form) % 2 == 0
    assert table_words(PackedFormat("int4", 128)) == table_words(None) + 2


@pytest.mark.parametrize(("count", "most"), [(1, 256), (2, 128), (4, 64)])
def test_strips_of_more_rows_than_a_block_can_finish(count, most) -> None:
    """A block keeps its values of the residual stream: a thread one."""
    form = packed_format("int4", 4096, 128)
    for rows, fits in ((most, True), (most + 32, False)):
        shape = DecodeStepShape(rows * 4, 64, 64, 2, 2, 16)
        launch = decode_step_launch(
            shape, count, num_multiprocessors=4, max_shared_bytes=MAX_SHARED, weights=form,
            has_head=False,
        )  # fmt: skip
        assert (launch is not None) == fits
