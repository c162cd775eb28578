"""The numbers and layouts of the ctypes layer are those of CUDA's headers, as g++ reads them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanocupy.cuda import cublas, cublaslt, driver
from nanocupy.cuda.arguments import TensorMap
from nanocupy.cuda.libraries import include_folder

GXX = shutil.which("g++")


def _sizes(
    structure: type[ctypes.Structure], c_name: str, fields: dict[str, str]
) -> dict[str, int]:
    numbers = {f"sizeof({c_name})": ctypes.sizeof(structure)}
    for name, c_field in fields.items():
        numbers[f"offsetof({c_name}, {c_field})"] = getattr(structure, name).offset
    return numbers


DRIVER = {
    **_sizes(
        driver.LaunchConfig,
        "CUlaunchConfig",
        {
            "grid": "gridDimX", "block": "blockDimX", "shared_bytes": "sharedMemBytes",
            "stream": "hStream", "attributes": "attrs", "num_attributes": "numAttrs",
        },
    ),
    **_sizes(driver.LaunchAttribute, "CUlaunchAttribute", {"id": "id", "value": "value"}),
    "sizeof(CUlaunchAttributeValue)": ctypes.sizeof(driver.LaunchAttributeValue),
    "alignof(CUlaunchAttributeValue)": ctypes.alignment(driver.LaunchAttributeValue),
    "offsetof(CUlaunchAttributeValue, clusterDim.x)": 0,
    "sizeof(CUlaunchAttributeValue::clusterDim)": 12,
    "offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed)": 0,
    "sizeof(CUtensorMap)": TensorMap.SIZE_BYTES,
    "(TensorMap_ALIGNMENT % alignof(CUtensorMap))": 0,
    "CU_LAUNCH_ATTRIBUTE_COOPERATIVE": driver.ATTRIBUTE_COOPERATIVE,
    "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": driver.ATTRIBUTE_CLUSTER_DIMENSION,
    "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION":
        driver.ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    **{
        f"CU_TENSOR_MAP_DATA_TYPE_{name.upper()}": driver.TENSOR_MAP_DTYPES[name]
        for name in ("uint8", "uint16", "uint32", "int32", "uint64", "int64", "float16", "float32",
                     "bfloat16")
    },
    **{
        f"CU_TENSOR_MAP_SWIZZLE_{f'{size}B' if size else 'NONE'}": code
        for size, code in driver.TENSOR_MAP_SWIZZLES.items()
    },
    **{
        f"CU_TENSOR_MAP_L2_PROMOTION_{f'L2_{size}B' if size else 'NONE'}": code
        for size, code in driver.TENSOR_MAP_L2_PROMOTIONS.items()
    },
    "CU_TENSOR_MAP_INTERLEAVE_NONE": 0,
    "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE": 0,
}  # fmt: skip

_TYPES = {
    "float32": "CUDA_R_32F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF",
    "int8": "CUDA_R_8I", "int32": "CUDA_R_32I", "float8_e4m3fn": "CUDA_R_8F_E4M3",
    "float8_e5m2": "CUDA_R_8F_E5M2",
}  # fmt: skip
CUBLAS = {
    **{_TYPES[name]: code for name, code in cublas.DATA_TYPES.items()},
    **{f"CUBLAS_STATUS_{name}": code for code, name in cublas.STATUS_NAMES.items()},
    "CUBLAS_OP_N": cublas.OP_N,
    "CUBLAS_OP_T": cublas.OP_T,
    "CUBLAS_COMPUTE_32F": cublas.COMPUTE_32F,
    "CUBLAS_GEMM_DEFAULT": cublas.GEMM_DEFAULT,
    "CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION": cublas.MATH_MODE,
    **_sizes(
        cublaslt.HeuristicResult,
        "cublasLtMatmulHeuristicResult_t",
        {
            "algorithm": "algo", "workspace_bytes": "workspaceSize", "state": "state",
            "waves_count": "wavesCount", "reserved": "reserved",
        },
    ),
    "sizeof(cublasLtMatmulAlgo_t)": ctypes.sizeof(cublaslt.Algorithm),
    "CUBLASLT_MATMUL_DESC_TRANSA": cublaslt.DESC_TRANSA,
    "CUBLASLT_MATMUL_DESC_EPILOGUE": cublaslt.DESC_EPILOGUE,
    "CUBLASLT_MATMUL_DESC_BIAS_POINTER": cublaslt.DESC_BIAS_POINTER,
    "CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE": cublaslt.DESC_BIAS_DATA_TYPE,
    "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES": cublaslt.PREF_MAX_WORKSPACE_BYTES,
    "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK": cublaslt.PREF_REDUCTION_SCHEME_MASK,
    **{
        f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{matrix}_BYTES": code
        for matrix, code in zip("ABCD", cublaslt.PREF_MIN_ALIGNMENT, strict=True)
    },
    "CUBLASLT_EPILOGUE_BIAS": cublaslt.EPILOGUE_BIAS,
    "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt.REDUCTION_SCHEME_COMPUTE_TYPE,
    "sizeof(cudaDataType_t)": 4,
    "sizeof(cublasComputeType_t)": 4,
}  # fmt: skip


def _read_by_gxx(
    tmp_path: Path, headers: tuple[str, ...], expressions: list[str], includes: list[Path]
) -> list[int]:
    if GXX is None:
        pytest.skip("g++ is not installed")
    # The runtime's wheel lacks the compiler's own header; the host does not need what is in it.
    stub = tmp_path / "stub" / "crt" / "host_defines.h"
    if not any((folder / "crt" / "host_defines.h").is_file() for folder in includes):
        stub.parent.mkdir(parents=True)
        stub.write_text(
            "#define __host__\n#define __device__\n#define __device_builtin__\n"
            "#define __cudart_builtin__\n#define CUDARTAPI\n#define __align__(n) alignas(n)\n"
            "#define __builtin_align__(n) alignas(n)\n#define __device_builtin_texture_type__\n"
            "#define __device_builtin_surface_type__\n#define __inline__ inline\n"
            "#define __forceinline__ inline\n#define __specialization_static static\n"
        )
    source = tmp_path / "numbers.cpp"
    lines = [f'std::printf("%lld\\n", static_cast<long long>({text}));' for text in expressions]
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n"
        # What only device code needs of cuda_fp16.h and cuda_bf16.h is in further packages.
        "#define __CUDA_FP16_H__\n#define __CUDA_BF16_H__\nstruct __half; struct __nv_bfloat16;\n"
        + "".join(f"#include <{header}>\n" for header in headers)
        + f"enum {{ TensorMap_ALIGNMENT = {TensorMap.ALIGNMENT_BYTES} }};\n"
        + "int main() {\n" + "\n".join(lines) + "\n}\n"
    )  # fmt: skip
    program = tmp_path / "numbers"
    folders = [f"-I{folder}" for folder in (*includes, tmp_path / "stub")]
    command = [GXX, "-w", "-std=c++17", *folders, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[:3000]
    output = subprocess.run([str(program)], capture_output=True, text=True, timeout=10, check=True)
    return [int(line) for line in output.stdout.split()]


def _headers_with(name: str) -> list[Path]:
    spec = find_spec("nvidia")
    places = [
        header.parent
        for location in (spec.submodule_search_locations or ()) if spec
        for header in Path(location).glob(f"*/include/{name}")
    ]  # fmt: skip
    if Path("/usr/local/cuda/include", name).is_file():
        places.append(Path("/usr/local/cuda/include"))
    if not places:
        pytest.skip(f"{name} is not installed")
    return places[:1]


def test_layouts_of_the_driver(nvrtc: tuple[int, int], tmp_path: Path) -> None:
    found = _read_by_gxx(tmp_path, ("cuda.h",), list(DRIVER), [include_folder(nvrtc)])
    assert dict(zip(DRIVER, found, strict=True)) == DRIVER


def test_layouts_of_cublas(nvrtc: tuple[int, int], tmp_path: Path) -> None:
    includes = [include_folder(nvrtc), *_headers_with("cublasLt.h")]
    headers = ("cublas_v2.h", "cublasLt.h")
    found = _read_by_gxx(tmp_path, headers, list(CUBLAS), includes)
    assert dict(zip(CUBLAS, found, strict=True)) == CUBLAS
