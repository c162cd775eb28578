"""What a launch refuses and how arguments are laid out; without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from nanocupy.cuda.arguments import PackedArguments, TensorMap, checked_arguments, checked_dims
from nanocupy.cuda.checks import ContextLostError, LaunchLog, cuda_call, cuda_error
from nanocupy.cuda.driver import Driver, LaunchConfig, LaunchOptions, PreparedLaunch
from nanocupy.errors import CapacityError, CudaError, DeviceError

pytest.importorskip("cupy")


@pytest.mark.parametrize("value", [1, 1.0, True, 1j, "x", np.complex64(1), np.zeros(3), [1]])
def test_what_has_no_explicit_type_is_refused(value: Any) -> None:
    with pytest.raises(
        CudaError, match=r"kernel norm: argument 1 is .*give an array of the device"
    ):
        checked_arguments("norm", [np.int32(1), value])


def test_an_array_with_gaps_is_refused(host_array: Any) -> None:
    array = host_array((4, 6))
    assert checked_arguments("norm", [array, array[1:3], array[2, 1:5]]) is not None
    for gaps in (array[:, :3], array.T, array[::2]):
        with pytest.raises(CudaError, match=r"kernel norm: argument 0 float32.* has strides"):
            checked_arguments("norm", [gaps])


def test_none_is_a_null_pointer(host_array: Any) -> None:
    (value,) = checked_arguments("norm", [None])
    assert (value, value.dtype) == (0, np.dtype(np.uint64))


def test_packed_arguments_hold_every_value(host_array: Any) -> None:
    array = host_array((2, 3), np.float16, skip_bytes=16)
    tensor_map = TensorMap(array)
    ctypes.memset(tensor_map.address, 7, 128)
    args = [
        array,
        np.int32(-5),
        np.float32(1.5),
        None,
        np.uint64(2**63),
        np.bool_(True),
        tensor_map,
    ]
    packed = PackedArguments(checked_arguments("k", args))

    def at(index: int, kind: Any) -> Any:
        return ctypes.cast(packed.pointers[index], ctypes.POINTER(kind)).contents

    assert at(0, ctypes.c_uint64).value == array.data.ptr
    assert at(1, ctypes.c_int32).value == -5
    assert at(2, ctypes.c_float).value == 1.5
    assert at(3, ctypes.c_uint64).value == 0
    assert at(4, ctypes.c_uint64).value == 2**63
    assert at(5, ctypes.c_uint8).value == 1
    assert bytes(at(6, ctypes.c_uint8 * 128)) == b"\x07" * 128
    assert len(packed.pointers) == 7
    assert len(PackedArguments([]).pointers) == 1


def test_tensor_maps_are_aligned(host_array: Any) -> None:
    maps = [TensorMap(host_array((2,))) for _ in range(50)]
    assert all(m.address % 64 == 0 and len(m.tobytes()) == 128 for m in maps)


@pytest.mark.parametrize(
    ("grid", "block", "wanted"),
    [
        ((5,), (32,), ((5, 1, 1), (32, 1, 1))),
        ((5, 2, 3), (32, 4), ((5, 2, 3), (32, 4, 1))),
        ((np.int64(5),), (np.int32(64),), ((5, 1, 1), (64, 1, 1))),
        ((2**31 - 1, 65535, 65535), (1024, 1, 1), ((2**31 - 1, 65535, 65535), (1024, 1, 1))),
        ((0,), (32,), None),
        ((5, 0), (32,), None),
    ],
)
def test_grids_and_blocks(grid: Any, block: Any, wanted: Any) -> None:
    assert checked_dims("k", grid, block) == wanted


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((-1,), (32,)), ((1,), (0,)), ((1,), (1025,)), ((1,), (32, 33)), ((1, 65536), (1,)),
        ((2**31,), (1,)), ((), (1,)), ((1, 1, 1, 1), (1,)), ((1.5,), (1,)), ((1,), (1, 1, 65)),
        (("x",), (1,)), (5, (1,)), ((float("nan"),), (1,)), ((1,), (float("inf"),)),
    ],
)  # fmt: skip
def test_impossible_grids_and_blocks(grid: Any, block: Any) -> None:
    with pytest.raises(CudaError, match=r"^kernel k: ") as caught:
        checked_dims("k", grid, block)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ the driver's layer


class FakeDriver:
    """A libcuda that writes down a launch and answers with `status`."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.seen: dict[str, Any] = {}

        def launch(config: Any, function: Any, pointers: Any, extra: Any) -> int:
            got: LaunchConfig = config.contents
            self.seen = {
                "grid": list(got.grid),
                "block": list(got.block),
                "shared": got.shared_bytes,
                "stream": got.stream,
                "function": function,
                "attributes": [
                    (got.attributes[i].id, bytes(got.attributes[i].value)[:12])
                    for i in range(got.num_attributes)
                ],
            }
            return self.status

        def name(status: int, text: Any) -> int:
            text._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS" if status == 700 else b"CUDA_ERROR_X"
            return 0

        for function_name, function in (
            ("cuLaunchKernelEx", launch), ("cuGetErrorName", name), ("cuGetErrorString", name),
        ):  # fmt: skip
            setattr(self, function_name, function)


def test_a_launch_with_all_attributes() -> None:
    fake = FakeDriver()
    options = LaunchOptions(cluster=(2, 1, 1), overlap_previous=True, cooperative=True)
    launch = PreparedLaunch("k", 99, ((4, 1, 1), (64, 1, 1)), [np.int32(3)], 1000, options)
    Driver(fake).launch(launch, 1234)
    assert fake.seen == {
        "grid": [4, 1, 1], "block": [64, 1, 1], "shared": 1000, "stream": 1234, "function": 99,
        "attributes": [
            (4, bytes(np.array([2, 1, 1], np.uint32))),
            (6, bytes(np.array([1, 0, 0], np.uint32))),
            (2, bytes(np.array([1, 0, 0], np.uint32))),
        ],
    }  # fmt: skip
    plain = PreparedLaunch("k", 99, ((4, 1, 1), (64, 1, 1)), [], 0, LaunchOptions())
    Driver(fake).launch(plain, 0)
    assert (fake.seen["attributes"], fake.seen["stream"]) == ([], None)


def test_a_refused_launch_names_the_kernel() -> None:
    launch = PreparedLaunch("norm_rows", 9, ((1, 1, 1), (1, 1, 1)), [], 0, LaunchOptions())
    with pytest.raises(CudaError, match="cuLaunchKernelEx of kernel norm_rows failed: CUDA_ERR"):
        Driver(FakeDriver(1)).launch(launch, 0)
    with pytest.raises(ContextLostError, match="norm_rows: a kernel read or wrote outside its mem"):
        Driver(FakeDriver(700)).launch(launch, 0)
    with pytest.raises(DeviceError, match="has no cuLaunchKernelEx; update it"):
        Driver(object())


@pytest.mark.parametrize(
    ("shape", "dtype", "box", "options", "says"),
    [
        ((64, 64), np.float64, (8, 8), {}, "does not know float64"),
        ((64, 64), np.float32, (8,), {}, "a box of"),
        ((64, 64), np.float32, (8, 512), {}, "a box has 1 to 256"),
        ((64, 63), np.float32, (8, 8), {}, "multiples of 16 bytes"),
        ((64, 64), np.float32, (8, 64), {}, "more than the swizzle's 128"),
        ((64, 64), np.float32, (8, 3), {}, "a row of the box must be a multiple of 16"),
        ((64, 64), np.float32, (8, 8), {"swizzle_bytes": 48}, "a swizzle of 48"),
        ((64, 64), np.float32, (8, 8), {"l2_promotion_bytes": 1}, "an L2 promotion of 1"),
    ],
)
def test_tensor_maps_that_cannot_be(
    host_array: Any, shape: Any, dtype: Any, box: Any, options: Any, says: str
) -> None:
    with pytest.raises(CudaError, match=f"^tensor map: .*{says}"):
        Driver(FakeDriver()).tensor_map(host_array(shape, dtype), box, **options)


def test_a_tensor_map_counts_dimensions_the_other_way_round(host_array: Any) -> None:
    fake = FakeDriver()
    seen: dict[str, Any] = {}

    def encode(address: int, dtype: int, rank: int, pointer: int, *rest: Any) -> int:
        sizes, strides, box, steps, *codes = rest
        seen.update(dtype=dtype, rank=rank, pointer=pointer, sizes=list(sizes), box=list(box))
        seen.update(strides=list(strides), steps=list(steps), codes=codes)
        return 0

    fake.cuTensorMapEncodeTiled = encode  # type: ignore[attr-defined]
    array = host_array((3, 10, 64), np.float16)
    Driver(fake).tensor_map(array[:, :5], (1, 4, 64))
    assert seen == {
        "dtype": 6, "rank": 3, "pointer": array.data.ptr, "sizes": [64, 5, 3],
        "strides": [128, 1280], "box": [64, 4, 1], "steps": [1, 1, 1], "codes": [0, 3, 3, 0],
    }  # fmt: skip


# ------------------------------------------------------------------------------ error lines


class CUDARuntimeError(RuntimeError):  # CuPy's has this name
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def test_error_lines() -> None:
    log = LaunchLog(2)
    for name in ("a", "b", "c"):
        log.note(name)
    with pytest.raises(ContextLostError) as caught, cuda_call("waiting for step 7", log):
        raise CUDARuntimeError(700, "cudaErrorIllegalAddress: an illegal\nmemory access")
    assert str(caught.value) == (
        "waiting for step 7: a kernel read or wrote outside its memory "
        "(cudaErrorIllegalAddress: an illegal memory access); launched last: b, c"
    )
    assert isinstance(caught.value.__cause__, CUDARuntimeError)
    with pytest.raises(CapacityError, match=r"cudaMalloc: the GPU's memory is full .*close other"):
        raise cuda_error("cudaMalloc", CUDARuntimeError(2, "cudaErrorMemoryAllocation"))
    with pytest.raises(CudaError, match=r"x: not allowed while a graph is captured"):
        raise cuda_error("x", CUDARuntimeError(900, "cudaErrorStreamCaptureUnsupported"))
    with pytest.raises(CudaError, match=r"^x failed: ValueError$"):
        raise cuda_error("x", ValueError())
    inner = CapacityError("says enough")
    with pytest.raises(CapacityError, match=r"^says enough$"), cuda_call("outer"):
        raise cuda_error("outer", inner)
    with pytest.raises(KeyError), cuda_call("not a CUDA error"):
        raise KeyError
