"""The few calls of CUDA's driver that CuPy does not offer, through ctypes: launches with attributes
(clusters, programmatic dependent launch, cooperative grids) and tensor maps.

Every status is checked, and an error names the call and what it was for. It knows launches, no
kernels. The layouts below are those of cuda.h, CUDA 12 and 13; a test compares them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanocupy.cuda.arguments import Dim, PackedArguments, TensorMap
from nanocupy.cuda.checks import cuda_error
from nanocupy.cuda.probe import load_libcuda
from nanocupy.errors import CudaError, DeviceError

# CUlaunchAttributeID
ATTRIBUTE_COOPERATIVE = 2
ATTRIBUTE_CLUSTER_DIMENSION = 4
ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6

# CUtensorMapDataType, by the names of dtypes
TENSOR_MAP_DTYPES = {
    "uint8": 0, "int8": 0, "float8_e4m3fn": 0, "float8_e5m2": 0, "uint16": 1, "uint32": 2,
    "int32": 3, "uint64": 4, "int64": 5, "float16": 6, "float32": 7, "bfloat16": 9,
}  # fmt: skip
# CUtensorMapSwizzle and CUtensorMapL2promotion, by their bytes
TENSOR_MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
TENSOR_MAP_L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


class LaunchAttributeValue(ctypes.Union):
    """CUlaunchAttributeValue: the members that are used here, and its size."""

    _fields_ = (
        ("pad", ctypes.c_char * 64),
        ("cooperative", ctypes.c_int),
        ("cluster_dim", ctypes.c_uint * 3),
        ("programmatic_stream_serialization", ctypes.c_int),
        ("pointer", ctypes.c_void_p),  # gives the union the alignment it has in C
    )


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", LaunchAttributeValue),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True)
class LaunchOptions:
    """How a launch differs from a plain one.

    cluster           blocks of a cluster, (x, y, z), each a divisor of the grid's; None for none
    overlap_previous  the kernel may start before its predecessor in the stream has ended; it must
                      wait for it itself (programmatic dependent launch)
    cooperative       all blocks are resident at once, so that they may wait for each other
    """

    cluster: tuple[int, int, int] | None = None
    overlap_previous: bool = False
    cooperative: bool = False

    def attributes(self) -> list[LaunchAttribute]:
        found = []
        if self.cluster is not None:
            value = LaunchAttributeValue(cluster_dim=(ctypes.c_uint * 3)(*self.cluster))
            found.append(LaunchAttribute(id=ATTRIBUTE_CLUSTER_DIMENSION, value=value))
        if self.overlap_previous:
            value = LaunchAttributeValue(programmatic_stream_serialization=1)
            found.append(
                LaunchAttribute(id=ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value=value)
            )
        if self.cooperative:
            value = LaunchAttributeValue(cooperative=1)
            found.append(LaunchAttribute(id=ATTRIBUTE_COOPERATIVE, value=value))
        return found


class CudaDriverError(Exception):
    """A CUresult that is not success; `cuda_error` turns it into the line a person reads."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Driver:
    """libcuda, with the signatures of what is called here. Raises DeviceError without a driver."""

    def __init__(self, library: Any = None) -> None:
        try:
            self._library = load_libcuda() if library is None else library
        except OSError:
            raise DeviceError(
                "there is no NVIDIA driver (libcuda is not found); install NVIDIA's driver, or use "
                "the CPU with --device cpu"
            ) from None
        self._launch_kernel = self._function(
            "cuLaunchKernelEx",
            ctypes.POINTER(LaunchConfig),
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
        )

    def _function(self, name: str, *argument_types: Any) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise DeviceError(
                f"the NVIDIA driver has no {name}; update it to one for CUDA 12 or newer"
            ) from None
        function.argtypes, function.restype = argument_types, ctypes.c_int
        return function

    def check(self, status: int, call: str, what: str) -> None:
        """Raise unless `status` is success; `what` says what the call was for."""
        if status == 0:
            return
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            describe = self._function(name, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
            if describe(status, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode("utf-8", "replace"))
        message = ": ".join(texts) or f"CUDA error {status}"
        raise cuda_error(f"{call} of {what}", CudaDriverError(message, status)) from None

    def launch(self, launch: PreparedLaunch, stream_pointer: int) -> None:
        """Start a prepared kernel on a stream."""
        launch.config.stream = stream_pointer or None
        status = self._launch_kernel(
            launch.config_pointer, launch.function, launch.packed.pointers, None
        )
        if status:
            self.check(status, "cuLaunchKernelEx", f"kernel {launch.name}")

    def tensor_map(
        self,
        array: Any,
        box: Sequence[int],
        *,
        swizzle_bytes: int = 128,
        l2_promotion_bytes: int = 256,
        what: str = "tensor map",
    ) -> TensorMap:
        """A map by which the copy engine brings boxes of `array` to shared memory.

        box: as many numbers as the array has dimensions, the array's last dimension last (CUDA
        counts them the other way round). Elements outside the array arrive as zero. Strides may
        have gaps, but not within the last dimension. Raises CudaError.
        """
        sizes, strides, boxes, dtype = _tensor_map_numbers(array, box, what)
        if swizzle_bytes not in TENSOR_MAP_SWIZZLES:
            raise CudaError(f"{what}: a swizzle of {swizzle_bytes} bytes does not exist")
        if swizzle_bytes and boxes[0] * array.itemsize > swizzle_bytes:
            raise CudaError(
                f"{what}: a row of the box has {boxes[0] * array.itemsize} bytes, more than the "
                f"swizzle's {swizzle_bytes}"
            )
        if l2_promotion_bytes not in TENSOR_MAP_L2_PROMOTIONS:
            raise CudaError(f"{what}: an L2 promotion of {l2_promotion_bytes} bytes does not exist")
        rank = len(sizes)
        result = TensorMap(array)
        int32s, int64s = ctypes.c_uint32 * rank, ctypes.c_uint64 * rank
        steps = ctypes.c_uint64 * len(strides)
        encode = self._function(
            "cuTensorMapEncodeTiled",
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        )
        status = encode(
            *(result.address, dtype, rank, array.data.ptr),
            *(int64s(*sizes), steps(*strides), int32s(*boxes), int32s(*[1] * rank)),
            *(0, TENSOR_MAP_SWIZZLES[swizzle_bytes]),
            *(TENSOR_MAP_L2_PROMOTIONS[l2_promotion_bytes], 0),
        )
        self.check(status, "cuTensorMapEncodeTiled", what)
        return result


def _tensor_map_numbers(
    array: Any, box: Sequence[int], what: str
) -> tuple[list[int], list[int], list[int], int]:
    """(sizes, byte strides of all but the first dimension, box, dtype), innermost dimension first.

    Holds the rules of cuTensorMapEncodeTiled that a caller breaks most easily.
    """
    if not 1 <= array.ndim <= 5 or len(box) != array.ndim:
        raise CudaError(f"{what}: an array of {list(array.shape)} and a box of {list(box)}")
    dtype = TENSOR_MAP_DTYPES.get(array.dtype.name)
    if dtype is None:
        raise CudaError(f"{what}: the copy engine does not know {array.dtype.name}")
    if array.strides[-1] != array.itemsize:
        raise CudaError(f"{what}: the last dimension of the array has gaps")
    if array.data.ptr % 16 or any(stride % 16 for stride in array.strides[:-1]):
        raise CudaError(
            f"{what}: address and strides {array.strides} must be multiples of 16 bytes"
        )
    if not all(1 <= n <= 256 for n in box) or not all(1 <= n < 2**32 for n in array.shape):
        raise CudaError(f"{what}: a box of {list(box)} in {list(array.shape)}; a box has 1 to 256")
    if box[-1] * array.itemsize % 16:
        raise CudaError(f"{what}: a row of the box must be a multiple of 16 bytes")
    return list(array.shape[::-1]), list(array.strides[-2::-1]), list(box[::-1]), dtype


class PreparedLaunch:
    """A launch whose every part is laid out already: starting it is one call.

    Keeps its arguments alive, and with them the memory that a captured graph reads.
    """

    def __init__(
        self,
        name: str,
        function: int,
        dims: tuple[Dim, Dim],
        args: Sequence[Any],
        shared_bytes: int,
        options: LaunchOptions,
        keep: Any = None,
    ) -> None:
        """function: a CUfunction; args: as `checked_arguments` gives them; keep: what else must
        outlive the launch, such as the module."""
        self.name = name
        self.function = function
        self.packed = PackedArguments(args)
        self._keep = keep
        attributes = options.attributes()
        self._attributes = (LaunchAttribute * max(len(attributes), 1))(*attributes)
        self.config = LaunchConfig(
            grid=(ctypes.c_uint * 3)(*dims[0]),
            block=(ctypes.c_uint * 3)(*dims[1]),
            shared_bytes=shared_bytes,
            attributes=self._attributes if attributes else None,
            num_attributes=len(attributes),
        )
        self.config_pointer = ctypes.pointer(self.config)
