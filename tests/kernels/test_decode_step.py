"""A whole decode step in one launch, against the ops of the reference one after the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nanocupy.bench.shapes import SHAPES
from nanocupy.engine.device_plan import DeviceSettings, op_sizes
from nanocupy.engine.runner import RunnerLimits
from nanocupy.ops.cuda_sizes import DeviceTraits, step_launch
from nanocupy.ops.launch_decode_step import (
    MAX_SEQUENCES,
    DecodeStepShape,
    DecodeStepTuning,
    decode_step_launch,
    num_words,
    pace_cycles,
)
from nanocupy.ops.launch_quantized import packed_format
from tests.kernels.decode_step_runs import (
    LARGE_CASES,
    MAX_SHARED,
    NUM_MULTIPROCESSORS,
    SMALL,
    GpuStep,
    Model,
    ShimStep,
    check,
    check_large,
    make,
)
from tests.ops.cases import DTYPES
from tests.shim import build


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def step_backend(request):
    if request.param == "gpu":
        return GpuStep()
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    return ShimStep()


CASES = {
    "one": SimpleNamespace(shape=SMALL, kv_lens=[5]),
    "first token": SimpleNamespace(shape=SMALL, kv_lens=[1]),
    "two, norms of q and k": SimpleNamespace(shape=SMALL, kv_lens=[17, 1], qk_norm=True),
    "biases, an odd vocabulary": SimpleNamespace(
        shape=DecodeStepShape(96, 160, 77, 6, 2, 32), kv_lens=[40], bias=True
    ),
    "a free place": SimpleNamespace(shape=SMALL, kv_lens=[3, 0, 33]),
    "four": SimpleNamespace(
        shape=DecodeStepShape(128, 64, 100, 4, 1, 32), kv_lens=[1, 16, 17, 100]
    ),
    "several parts": SimpleNamespace(shape=SMALL, kv_lens=[300], parts=3),
    "parts of two": SimpleNamespace(shape=SMALL, kv_lens=[260, 60], parts=2),
    "inputs beyond a stage": SimpleNamespace(
        shape=DecodeStepShape(64, 1504, 64, 2, 2, 16), kv_lens=[20]
    ),
    "more items than blocks": SimpleNamespace(
        shape=DecodeStepShape(128, 64, 64, 8, 8, 16), kv_lens=[20, 50]
    ),
    "head size 80": SimpleNamespace(
        shape=DecodeStepShape(64, 64, 64, 4, 2, 80), kv_lens=[50, 7], qk_norm=True
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_its_ops(step_backend, name, dtype) -> None:
    model, tuning = make(CASES[name], dtype)
    check(model, model.launch(step_backend, tuning))


@pytest.mark.parametrize("name", LARGE_CASES)
def test_a_step_of_many_inputs_is_its_ops(step_backend, name) -> None:
    check_large(step_backend, name)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["one", "a free place", "biases, an odd vocabulary"])
def test_a_step_without_a_head_ends_with_the_residual_stream(step_backend, name, layers) -> None:
    model, tuning = make(CASES[name], "bfloat16", has_head=False, layers=layers)
    check(model, model.launch(step_backend, tuning))


def test_launches_follow_each_other(step_backend) -> None:
    """Each finds what the ones before have left, and takes none of it for its own."""
    small = Model(SMALL, DTYPES["bfloat16"], [20, 33])
    launch = decode_step_launch(
        SMALL, 2, num_multiprocessors=NUM_MULTIPROCESSORS, max_shared_bytes=MAX_SHARED
    )
    words = np.zeros(num_words(SMALL, launch, 2), np.uint64), np.zeros(2, np.uint32)
    seen = []
    for seed, kv_lens in enumerate(([20, 33], [21, 34], [7], [22, 1])):
        model = Model(SMALL, DTYPES["bfloat16"], kv_lens, seed=seed)
        check(model, model.launch(step_backend, words=words))
        assert words[1][1] == 0
        seen.append(int(words[1][0]))
    assert seen == sorted(set(seen))
    check(small, small.launch(step_backend, words=words))


def test_moments_go_round(step_backend) -> None:
    """After 2**32 of them they begin again, and none is 0, which stands for the embeddings."""
    launch = decode_step_launch(
        SMALL, 1, num_multiprocessors=NUM_MULTIPROCESSORS, max_shared_bytes=MAX_SHARED
    )
    moments = np.array([2**32 - 24, 0], np.uint32)
    words = np.zeros(num_words(SMALL, launch, 1), np.uint64), moments
    for seed in range(3):
        model = Model(SMALL, DTYPES["bfloat16"], [20 + seed], seed=seed)
        check(model, model.launch(step_backend, words=words))
        assert moments[0] % 8 == 0
    assert moments[0] < 2**10


@pytest.mark.parametrize("order", [0, 1001])
@pytest.mark.parametrize("name", ["one", "four", "several parts", "a free place"])
@pytest.mark.parametrize("num_multiprocessors", [20, 40])
def test_blocks_without_a_part_of_a_product(num_multiprocessors, name, order) -> None:
    """What they have asked for early is theirs to wait for, too."""
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, tuning = make(CASES[name], "bfloat16")
    check(
        model,
        model.launch(ShimStep(order=order), tuning, num_multiprocessors=num_multiprocessors),
    )


@pytest.mark.parametrize("order", [0, 1, 3, 1001])
@pytest.mark.parametrize("ring_stages", [4, 6, 10])
def test_any_even_ring(ring_stages, order) -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, _ = make(CASES["inputs beyond a stage"], "bfloat16")
    check(model, model.launch(ShimStep(order=order), DecodeStepTuning(ring_stages=ring_stages)))


def test_where_every_lane_arrives() -> None:
    """As the kernel is built for a search for races."""
    model, tuning = make(CASES["four"], "bfloat16")
    check(model, model.launch(ShimStep(EVERY_LANE_ARRIVES=1), tuning))


@pytest.mark.parametrize("order", [1, 7])
def test_the_order_of_threads_does_not_matter(order) -> None:
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    model, tuning = make(CASES["several parts"], "bfloat16")
    first, again = (model.launch(ShimStep(order=n), tuning) for n in (0, order))
    assert first[0].tobytes() == again[0].tobytes()


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_fit_an_h100(name) -> None:
    config = SHAPES[name]
    shape = DecodeStepShape(
        config.hidden_size, config.intermediate_size, config.vocab_size, config.num_heads,
        config.num_kv_heads, config.head_size,
    )  # fmt: skip
    for num_sequences in range(1, MAX_SEQUENCES + 1):
        launch = decode_step_launch(
            shape, num_sequences, num_multiprocessors=132, max_shared_bytes=MAX_SHARED
        )
        assert launch is not None
        assert launch.shared_bytes < MAX_SHARED
        assert launch.macros["RING_STAGES"] >= 4
        assert launch.macros["RING_STAGES"] % 2 == 0


def test_weights_come_as_quickly_as_the_card_has_them() -> None:
    h100, h200 = (2 * khz * bits / 8 / 1980e3 for khz, bits in ((2619e3, 5120), (3201e3, 6016)))
    assert [pace_cycles(132, rate) for rate in (h100, h200, 0.0, h100 / 3)] == [
        1200, 750, 1200, 1200,
    ]  # fmt: skip
    paces = [pace_cycles(132, rate) for rate in np.linspace(h100, 3 * h100)]
    assert paces == sorted(paces, reverse=True)
    assert min(paces) == 300
    assert all(pace % 150 == 0 for pace in paces)
    limits = {"num_multiprocessors": 132, "max_shared_bytes": MAX_SHARED}
    # That of an H100 is the kernel's own, and one build the less.
    assert "PACE" not in decode_step_launch(SMALL, 1, **limits).macros
    assert decode_step_launch(SMALL, 1, pace=750, **limits).macros["PACE"] == 750
    for pace, wanted in ((1200, 850), (750, 750)):
        codes = packed_format("int4", 64, 32)
        launch = decode_step_launch(SMALL, 1, weights=codes, has_head=False, pace=pace, **limits)
        assert launch.macros["PACE"] == wanted
    source = (build.KERNELS / "decode_step_weights.cuh").read_text(encoding="utf-8")
    assert "#define PACE 1200\n" in source


def test_a_card_is_asked_how_quick_its_memory_is() -> None:
    config = SHAPES["llama-3.1-8b"]
    sizes = op_sizes(config, DeviceSettings("bfloat16", "bfloat16", "bfloat16"),
                     RunnerLimits(400, 16, 384, 512, 2))  # fmt: skip
    card = DeviceTraits((9, 0), 132, MAX_SHARED, wgmma=True, memory_bytes_per_cycle=2431.5)
    launch = step_launch(sizes, card, 1)
    assert launch is not None
    assert launch.macros["PACE"] == 750


def test_what_the_kernel_cannot_do() -> None:
    limits = {"num_multiprocessors": 132, "max_shared_bytes": MAX_SHARED}
    for shape, count in (
        (SMALL, 0), (SMALL, MAX_SEQUENCES + 1),
        (replace(SMALL, hidden_size=72), 1), (replace(SMALL, ffn_size=100), 1),
        (replace(SMALL, head_size=24), 1), (replace(SMALL, num_heads=18), 1),
        (replace(SMALL, hidden_size=1 << 15), 4),
    ):  # fmt: skip
        assert decode_step_launch(shape, count, **limits) is None
