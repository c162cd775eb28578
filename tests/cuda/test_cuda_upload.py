"""The uploader over a transfer that lands its copies as late as it may."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.cuda.upload import Uploader, flat_chunks
from nanocupy.errors import ConfigError, CudaError


class LateTransfer:
    """Copies at `wait`, not before, and spoils the buffer then: filling one that is under way, or
    not waiting at the end, shows."""

    def __init__(self, buffer_bytes: int, count: int = 2) -> None:
        self.buffers = [np.zeros(buffer_bytes, np.uint8) for _ in range(count)]
        self.under_way: dict[int, tuple[int, np.ndarray, int]] = {}
        self.sent: list[int] = []

    def send(self, index: int, num_bytes: int, destination: Any, offset_bytes: int) -> None:
        assert index not in self.under_way
        self.under_way[index] = (num_bytes, destination, offset_bytes)
        self.sent.append(index)

    def wait(self, index: int) -> None:
        num_bytes, destination, offset = self.under_way.pop(index)
        target = destination.reshape(-1).view(np.uint8)
        target[offset : offset + num_bytes] = self.buffers[index][:num_bytes]
        self.buffers[index][:] = 0xEE


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("source_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (1000,), (37, 41), (3, 5, 7), (0, 4), (), (64, 64)])
def test_everything_arrives_converted(shape: Any, source_dtype: Any, dtype: Any) -> None:
    source = np.random.default_rng(1).standard_normal(shape).astype(source_dtype)
    destination = np.full(shape, np.nan, dtype)
    transfer = LateTransfer(700)  # not a multiple of anything
    seen: list[tuple[int, int]] = []
    total = destination.nbytes * 2
    with Uploader(transfer, total, lambda *pair: seen.append(pair), num_threads=3) as uploader:
        uploader.upload("a", source, destination)
        again = np.full(shape, np.nan, dtype)
        uploader.upload("b", source, again)
    wanted = source.astype(dtype)
    assert destination.tobytes() == wanted.tobytes()
    assert again.tobytes() == wanted.tobytes()
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert not seen or seen[-1] == (total, total)
    assert transfer.sent == [i % 2 for i in range(len(transfer.sent))]


@pytest.mark.parametrize("max_elements", [1, 5, 8, 64, 1000])
def test_arrays_with_gaps_arrive_in_order(max_elements: int) -> None:
    base = np.arange(2 * 6 * 8 * 4).reshape(2, 6, 8, 4)
    for view in (base.transpose(2, 0, 3, 1), base[:, ::2], base[..., 1], base[:, :, :0], base.T,
                 base.reshape(-1)[::3]):  # fmt: skip
        chunks = list(flat_chunks(view, max_elements))
        assert all(chunk.ndim == 1 and chunk.size <= max_elements for chunk in chunks)
        assert np.array_equal(np.concatenate([*chunks, base[:0, 0, 0, 0]]), view.reshape(-1))


def test_a_contiguous_array_is_never_copied() -> None:
    base = np.arange(100)
    assert all(np.shares_memory(chunk, base) for chunk in flat_chunks(base.reshape(10, 10), 7))


def test_8_bit_types_go_as_they_are() -> None:
    source = np.arange(-8, 8).astype(ml_dtypes.float8_e4m3fn)
    destination = np.zeros(16, np.uint8)
    with Uploader(LateTransfer(256)) as uploader:
        uploader.upload("a", source, destination)
    assert destination.tobytes() == source.tobytes()


def test_pieces_in_parallel_are_the_whole() -> None:
    source = np.random.default_rng(2).standard_normal(3_000_001).astype(np.float32)
    destination = np.zeros(source.shape, ml_dtypes.bfloat16)
    with Uploader(LateTransfer(4 << 20), num_threads=4) as uploader:
        uploader.upload("a", source, destination)
    assert destination.tobytes() == source.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("value", [70000.0, -1e9, np.inf])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    source = np.ones(100, np.float32)
    source[63] = value
    destination = np.zeros(100, np.float16)
    message = r"tensor w has values beyond float16 \(65504\); take dtype bfloat16"
    with pytest.raises(ConfigError, match=message), Uploader(LateTransfer(256)) as uploader:
        uploader.upload("w", source, destination)


@pytest.mark.parametrize(
    ("source", "destination", "says"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"tensor w is \[2, 3\], its place on the device \[3"),
        (np.zeros(4, np.int32), np.zeros(4, np.float32), "is int32, its place .* float32"),
        (np.zeros(4, np.float32), np.zeros(4, np.uint8), "is float32, its place .* uint8"),
        (np.zeros((4, 2)), np.zeros((4, 4))[:, :2], "its place on the device has gaps"),
    ],
)
def test_what_does_not_fit_is_refused(source: Any, destination: Any, says: str) -> None:
    with pytest.raises(CudaError, match=says), Uploader(LateTransfer(256)) as uploader:
        uploader.upload("w", source, destination)
