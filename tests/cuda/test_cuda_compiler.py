"""The compiler: what it compiles, when it is spared, and what it says; without a GPU."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from nanocupy.cuda import libraries
from nanocupy.cuda.compiler import Compiler, Sources, arch_for, arch_name, cubin_folder
from nanocupy.cuda.libraries import header_version, include_folder, nvrtc_version
from nanocupy.errors import CudaError, DeviceError
from nanocupy.hub.cache import cache_dir
from tests.cuda.variants import VARIANTS, all_builds, plain_builds

pytestmark = pytest.mark.usefixtures("nvrtc")

KERNEL = """
#include "shared/half.cuh"
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
extern "C" __global__ void store(float* out) { out[0] = half_of(N) + __bfloat162float(1.0); }
"""
HEADER = "__device__ float half_of(int n) { return n * 0.5f; }\n"
BUILDS = all_builds() if os.environ.get("NANOCUPY_ALL_VARIANTS") else plain_builds()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sources" / "shared").mkdir(parents=True)
    (tmp_path / "sources" / "kernel.cu").write_text(KERNEL)
    (tmp_path / "sources" / "shared" / "half.cuh").write_text(HEADER)
    return tmp_path / "sources"


def compiler(folder: Path, cache: Path | None, **options: Any) -> Compiler:
    return Compiler(Sources(folder), cache, **options)


@pytest.mark.parametrize("arch", ["75", "80", "86", "89", "90a", "100", "120"])
def test_compiles_for_every_architecture(folder: Path, tmp_path: Path, arch: str) -> None:
    cubin = compiler(folder, tmp_path / "c").compile("kernel.cu", {"N": 3}, arch=arch)
    assert cubin.arch == f"sm_{arch}"
    assert b".text.store\0" in cubin.data
    assert cubin.data[18:20] == b"\xbe\x00"  # ELF: EM_CUDA
    assert cubin.path is not None
    assert cubin.path.read_bytes() == cubin.data


def test_cubins_are_whole_files(folder: Path, tmp_path: Path) -> None:
    """Headers of an ELF file name where its tables lie: all of them must be there."""
    (folder / "one.cu").write_text('extern "C" __global__ void one(int* p) { p[0] = 1; }')
    cubin = Compiler(Sources(folder), tmp_path / "cubins").compile("one.cu", {}, arch="90a").data
    for offset, size in ((32, 54), (40, 58)):
        (start,) = struct.unpack_from("<Q", cubin, offset)
        entry_bytes, count = struct.unpack_from("<HH", cubin, size)
        assert 0 < start + entry_bytes * count <= len(cubin)


def test_the_second_time_comes_from_the_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cubins"
    first = compiler(folder, cache).compile("kernel.cu", {"N": 1}, arch="sm_80")
    again = compiler(folder, cache).compile("kernel.cu", {"N": 1}, arch="80")
    assert (first.from_cache, again.from_cache) == (False, True)
    assert (again.data, again.path) == (first.data, first.path)
    assert [path.name for path in cache.iterdir()] == [first.path.name]  # type: ignore[union-attr]


def test_whatever_goes_in_is_part_of_the_key(folder: Path, tmp_path: Path) -> None:
    def path(macros: dict[str, int], arch: str = "80", **options: Any) -> Path | None:
        made = compiler(folder, tmp_path / "c", **options).compile("kernel.cu", macros, arch=arch)
        assert not made.from_cache
        return made.path

    paths = [path({"N": 1}), path({"N": 2}), path({"N": 1}, "90a"), path({"N": 1, "M": 0})]
    paths.append(path({"N": 1}, options=("-lineinfo",)))
    (folder / "shared" / "half.cuh").write_text(HEADER.replace("0.5f", "0.25f"))
    paths.append(path({"N": 1}))
    (folder / "kernel.cu").write_text(
        KERNEL.replace("#include", '#include "other.cuh"\n#include', 1)
    )
    (folder / "other.cuh").write_text('#include "inner.cuh"\n')
    (folder / "inner.cuh").write_text("// 1\n")
    paths.append(path({"N": 1}))
    (folder / "inner.cuh").write_text("// 2\n")
    paths.append(path({"N": 1}))
    (folder / "kernel.cu").write_text(KERNEL + "\n")
    paths.append(path({"N": 1}))
    assert len({str(p).split("-")[-2] for p in paths}) == len(paths)


def test_a_header_that_is_not_included_changes_nothing(folder: Path, tmp_path: Path) -> None:
    compiler(folder, tmp_path / "c").compile("kernel.cu", {"N": 1}, arch="80")
    (folder / "other.cuh").write_text("#error\n")
    assert compiler(folder, tmp_path / "c").compile("kernel.cu", {"N": 1}, arch="80").from_cache


def test_macros_in_another_order_are_the_same_build(folder: Path, tmp_path: Path) -> None:
    made = compiler(folder, tmp_path / "c")
    made.compile("kernel.cu", {"N": 1, "M": 2}, arch="80")
    assert made.compile("kernel.cu", {"M": 2, "N": 1}, arch="80").from_cache


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"x" * 100, None])
def test_a_damaged_entry_is_made_again(folder: Path, tmp_path: Path, damage: bytes | None) -> None:
    made = compiler(folder, tmp_path / "c")
    first = made.compile("kernel.cu", {"N": 1}, arch="80")
    assert first.path is not None
    flipped = bytearray(first.data)
    flipped[len(flipped) // 2] ^= 1
    first.path.write_bytes(bytes(flipped) if damage is None else damage)
    again = made.compile("kernel.cu", {"N": 1}, arch="80")
    assert not again.from_cache
    assert again.path is not None
    assert again.path.read_bytes() == first.data
    assert made.compile("kernel.cu", {"N": 1}, arch="80").from_cache


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    cubin = compiler(folder, file / "below").compile("kernel.cu", {"N": 1}, arch="80")
    assert cubin.path is None
    assert cubin.data.startswith(b"\x7fELF")
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir()
        closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert compiler(folder, closed).compile("kernel.cu", {"N": 1}, arch="80").path is None


def test_no_cache_at_all(folder: Path) -> None:
    assert compiler(folder, None).compile("kernel.cu", {"N": 1}, arch="80").path is None


def test_several_at_once_are_those_one_by_one(folder: Path, tmp_path: Path) -> None:
    variants = [("kernel.cu", {"N": n}) for n in range(6)]
    together = compiler(folder, tmp_path / "a").compile_all(variants, arch="90a")
    alone = [compiler(folder, None).compile(f, m, arch="90a") for f, m in variants]
    assert [c.data for c in together] == [c.data for c in alone]
    assert compiler(folder, None).compile_all([], arch="90a") == []


def test_an_error_names_file_line_macros_and_architecture(folder: Path) -> None:
    (folder / "bad.cu").write_text('#include "shared/half.cuh"\n__device__ int f() { return x; }\n')
    with pytest.raises(CudaError) as caught:
        compiler(folder, None).compile("bad.cu", {"N": 1, "M": 2}, arch="90a")
    message = str(caught.value)
    assert message.startswith("bad.cu (M=2, N=1) for sm_90a does not compile: bad.cu(2): error: ")
    assert 'identifier "x" is undefined' in message
    assert "\n" not in message
    assert "return x;" in caught.value.__notes__[0]


def test_an_error_in_a_header_names_the_header(folder: Path) -> None:
    (folder / "shared" / "half.cuh").write_text('#error "N is odd"\n')
    with pytest.raises(CudaError, match=r"shared/half\.cuh\(1\)|half\.cuh.*N is odd"):
        compiler(folder, None).compile("kernel.cu", {"N": 1}, arch="80")


def test_many_errors_are_cut_short(folder: Path) -> None:
    lines = "\n".join(f"__device__ int f{i}() {{ return x{i}; }}" for i in range(20))
    (folder / "bad.cu").write_text(lines)
    with pytest.raises(CudaError) as caught:
        compiler(folder, None).compile("bad.cu", arch="80")
    assert str(caught.value).endswith(" | and 14 more")
    assert str(caught.value).count("error:") == 6


@pytest.mark.parametrize(
    ("file", "macros", "arch", "says"),
    [
        ("none.cu", {}, "80", "no kernel file 'none.cu'; there are: kernel.cu"),
        ("shared/half.cuh", {}, "80", "no kernel file"),
        ("kernel.cu", {"N M": 1}, "80", "'N M' is no macro's name"),
        ("kernel.cu", {"N": 1.5}, "80", "macro N must be an int or a string"),
        ("kernel.cu", {"N": True}, "80", "macro N must be an int or a string"),
        ("kernel.cu", {"N": 1}, "compute_80", "is no GPU architecture"),
        ("kernel.cu", {"N": 1}, "11", "does not compile"),
    ],
)
def test_bad_requests(folder: Path, file: str, macros: Any, arch: str, says: str) -> None:
    with pytest.raises(CudaError, match=says):
        compiler(folder, None).compile(file, macros, arch=arch)


def test_the_architecture_of_a_card() -> None:
    assert [arch_for(c) for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_75", "sm_80", "sm_89", "sm_90a", "sm_100", "sm_120",
    ]  # fmt: skip
    assert arch_for((7, 9)) == "sm_75"  # runs what is compiled for a lower minor number
    with pytest.raises(DeviceError, match=r"does not know compute capability 99\.0; install"):
        arch_for((99, 0))
    assert arch_name("90a") == arch_name("sm_90a") == "sm_90a"


def test_the_cache_folder_is_where_everything_else_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for own, xdg in ((str(tmp_path), None), (None, str(tmp_path)), (None, "relative"), (None, "")):
        for name, value in (("NANOCUPY_CACHE_DIR", own), ("XDG_CACHE_HOME", xdg)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert cubin_folder() == cache_dir() / "kernels"


def test_headers_are_chosen_by_version(tmp_path: Path) -> None:
    def folder(name: str, version: int | None) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "cuda_fp16.h").write_text("")
        if version is not None:
            (made / "cuda.h").write_text(f"// x\n#define CUDA_VERSION {version}\n")
        return made

    old, new, none = folder("12.4", 12040), folder("13.0", 13000), folder("none", None)
    exact = folder("12.9", 12090)
    assert header_version(exact) == (12, 9)
    assert header_version(none) is header_version(tmp_path / "missing") is None
    assert include_folder((12, 9), [new, none, old, exact]) == exact
    assert include_folder((12, 8), [new, none, old, exact]) == old
    assert include_folder((13, 1), [old, new]) == new
    with pytest.raises(DeviceError, match=r"no CUDA 13 headers.*12\.4 has 12\.4.*nanocupy\[cuda13"):
        include_folder((13, 0), [old, none])


def test_nvrtc_of_another_major_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import runtime

    other = 25000 - runtime.runtimeGetVersion() // 1000 * 1000
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: other)
    with pytest.raises(DeviceError, match=r"CuPy is built for CUDA \d+ but loads NVRTC \d+\.\d+; "):
        nvrtc_version()


def test_libraries_are_those_cupy_loaded() -> None:
    for name in ("cublas", "cublasLt"):
        try:
            path = libraries.load_library(name)._name
        except DeviceError as exc:
            pytest.skip(str(exc))
        assert f"lib{name}.so" in path
        assert path in Path("/proc/self/maps").read_text()


# ------------------------------------------------------------------------------ our kernels


def test_every_kernel_file_has_variants() -> None:
    assert [v.file for v in VARIANTS] == Sources().kernel_files()


@pytest.mark.parametrize(
    ("variants", "macros", "arch"),
    [
        pytest.param(v, m, a, id="-".join((v.file, a, *(f"{k}{n}" for k, n in m.items()))))
        for v, m, a in BUILDS
    ],
)
def test_kernels_compile(
    request: pytest.FixtureRequest, variants: Any, macros: dict[str, int], arch: str
) -> None:
    """With every entry in the module, and no warning. Kept from run to run, but for what has one:
    what is kept has no log."""
    cache = request.config.cache.mkdir("nanocupy-cubins") if request.config.cache else None
    cubin = Compiler(cache=cache).compile(variants.file, macros, arch=arch)
    if cubin.log and cubin.path is not None:
        cubin.path.unlink()
    for entry in variants.entries:
        assert b".text." + entry.encode() + b"\0" in cubin.data, f"{entry} is missing"
    assert cubin.log == ""


def test_every_entry_of_our_kernels_is_named() -> None:
    import re

    for variants in VARIANTS:
        source = Sources().source(variants.file)
        found = re.findall(
            r'extern "C" __global__ void\s*(?:__launch_bounds__\([^{;]*?\))?\s*(\w+)\s*\(', source
        )
        assert tuple(found) == variants.entries, variants.file
