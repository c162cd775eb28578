"""Compiles a kernel source to a cubin with NVRTC, for one exact architecture, once.

A cubin lies in the user's cache folder under a name that hashes all it was made of: the source,
every header of ours that it includes, macros, architecture, options and NVRTC's version. It works
without a GPU, for any architecture. It knows nothing of what the kernels do, nor of how they are
launched.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from nanocupy.cuda.libraries import include_folder, nvrtc_version
from nanocupy.cuda.probe import dotted
from nanocupy.errors import CudaError, DeviceError

Macros = Mapping[str, int | str]

# Arithmetic is IEEE 754's, denormals too: the sampler orders logits as the CPU does. Kernels that
# can do with less say so themselves (exp2_approx).
BASE_OPTIONS = ("-std=c++17",)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)

_FORMAT = "1"  # of the cache: changed when what is stored under a key changes meaning
_SHOWN_ERRORS = 6
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Cubin:
    """A compiled module.

    data        the ELF file's bytes
    path        where it lies on disk; None where the cache folder cannot be written
    from_cache  whether the compiler was spared
    log         what the compiler said: warnings, or ptxas' report where an option asks for it
    """

    file: str
    macros: Macros
    arch: str
    data: bytes = field(repr=False)
    path: Path | None
    from_cache: bool
    log: str = ""


class Sources:
    """The kernel sources of one folder: .cu files, and the .cuh headers they share.

    Read once, when asked for; headers reach the compiler from memory, so that what is hashed is
    what is compiled, and a zipped package works too.
    """

    def __init__(self, root: Traversable | None = None) -> None:
        self.root = files("nanocupy.kernels_cu") if root is None else root
        self._headers: dict[str, str] | None = None

    def kernel_files(self) -> list[str]:
        """Names of all .cu files, sorted; with "/" where they lie in folders."""
        return sorted(name for name, _ in _walk(self.root, ".cu"))

    def headers(self) -> dict[str, str]:
        """Text of every header by the name that #include gives it."""
        if self._headers is None:
            found = sorted(_walk(self.root, ".cuh"))
            self._headers = {name: _read(node) for name, node in found}
        return self._headers

    def headers_of(self, source: str) -> dict[str, str]:
        """Of those, the ones that `source` includes, directly or not: what its cubin depends on."""
        known, found, texts = self.headers(), {}, [source]
        while texts:
            for name in _INCLUDE.findall(texts.pop()):
                if name in known and name not in found:
                    found[name] = known[name]
                    texts.append(known[name])
        return dict(sorted(found.items()))

    def source(self, file: str) -> str:
        """Text of one .cu file. Raises CudaError where there is none of that name."""
        node = self.root.joinpath(*file.split("/"))
        if not file.endswith(".cu") or not node.is_file():
            known = ", ".join(self.kernel_files()) or "none"
            raise CudaError(f"there is no kernel file {file!r}; there are: {known}")
        return _read(node)


def _walk(folder: Traversable, suffix: str, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for node in folder.iterdir():
        if node.is_dir():
            if node.name != "__pycache__":
                yield from _walk(node, suffix, f"{prefix}{node.name}/")
        elif node.name.endswith(suffix):
            yield prefix + node.name, node


def _read(node: Traversable) -> str:
    return node.read_bytes().decode("utf-8").replace("\r\n", "\n")


class Compiler:
    """Gives cubins of the files in `sources`, from the cache where they are known.

    cache: the folder for cubins; None compiles anew each time. The default is `cubin_folder()`.
    Safe to use from several threads.
    """

    def __init__(
        self,
        sources: Sources | None = None,
        cache: Path | str | None = "default",
        options: tuple[str, ...] = (),
    ) -> None:
        self.sources = sources or Sources()
        self.cache = cubin_folder() if cache == "default" else Path(cache) if cache else None
        self.options = (*BASE_OPTIONS, *options)
        self.version = nvrtc_version()

    def compile(self, file: str, macros: Macros | None = None, *, arch: str) -> Cubin:
        """The module of `file` under `macros`, for `arch` ("sm_90a", or "90a").

        Raises CudaError with the compiler's lines where the source does not compile.
        """
        macros = dict(sorted((macros or {}).items()))
        arch = arch_name(arch)
        defines = [_define(file, name, value) for name, value in macros.items()]
        source = self.sources.source(file)
        headers = self.sources.headers_of(source)
        key = self._key(file, source, headers, defines, arch)
        cached = self._load(key)
        if cached is not None:
            path, data = cached
            return Cubin(file, macros, arch, data, path, from_cache=True)
        what = describe(file, macros, arch)
        options = [*self.options, *defines, f"-I{include_folder(self.version)}"]
        data, log = compile_source(source, file, arch, options, headers=headers, what=what)
        return Cubin(file, macros, arch, data, self._store(key, data), False, log)

    def compile_all(
        self,
        variants: Iterable[tuple[str, Macros]],
        *,
        arch: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Cubin]:
        """Several modules at once, on all cores: the first start after an update waits for this.
        progress: called with how many are done, and of how many, as they are, in their order."""
        variants = list(variants)
        workers = max(1, min(os.cpu_count() or 1, len(variants), 16))
        cubins: list[Cubin] = []
        with ThreadPoolExecutor(workers) as pool:
            for cubin in pool.map(lambda v: self.compile(v[0], v[1], arch=arch), variants):
                cubins.append(cubin)
                if progress is not None:
                    progress(len(cubins), len(variants))
        return cubins

    # ------------------------------------------------------------------- cache

    def _key(
        self, file: str, source: str, headers: Mapping[str, str], defines: list[str], arch: str
    ) -> str:
        digest = hashlib.sha256()
        fixed = [_FORMAT, dotted(self.version), arch, file, source, *self.options, "|", *defines]
        for text in (*fixed, "|", *(part for item in headers.items() for part in item)):
            encoded = text.encode()
            digest.update(b"%d:" % len(encoded))  # so that no two lists hash alike
            digest.update(encoded)
        return digest.hexdigest()[:40]

    def _load(self, key: str) -> tuple[Path, bytes] | None:
        """The entry of `key`. Its name carries a hash of its content: one that was damaged is
        removed and made again."""
        if self.cache is None:
            return None
        try:
            for path in self.cache.glob(f"{key}-*.cubin"):
                data = path.read_bytes()
                if path.name == _entry_name(key, data) and data.startswith(_ELF):
                    return path, data
                path.unlink()
        except OSError:  # not readable, or another process was quicker: compile
            return None
        return None

    def _store(self, key: str, data: bytes) -> Path | None:
        """Write the entry, whole or not at all; a cache that cannot be written is no error."""
        if self.cache is None:
            return None
        scratch = None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.cache, prefix=".", delete=False) as file:
                scratch = file.name
                file.write(data)
            path = self.cache / _entry_name(key, data)
            os.replace(scratch, path)
        except OSError:
            if scratch is not None:
                with suppress(OSError):
                    os.unlink(scratch)
            return None
        return path


def _entry_name(key: str, data: bytes) -> str:
    return f"{key}-{hashlib.sha256(data).hexdigest()[:24]}.cubin"


def cubin_folder() -> Path | None:
    """Where cubins are kept: "kernels" in nanocupy's cache folder, which the environment variables
    NANOCUPY_CACHE_DIR and XDG_CACHE_HOME move. None where no home folder is known."""
    own, xdg = os.environ.get("NANOCUPY_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute() / "kernels"
    if xdg and os.path.isabs(xdg):
        return Path(xdg) / "nanocupy" / "kernels"
    try:
        return Path.home() / ".cache" / "nanocupy" / "kernels"
    except RuntimeError:
        return None


def compile_source(
    source: str,
    name: str,
    arch: str,
    options: Iterable[str],
    *,
    headers: Mapping[str, str] | None = None,
    what: str = "",
) -> tuple[bytes, str]:
    """(cubin, compiler's log) of one source text. Raises CudaError; `what` names it there."""
    from cupy.cuda import nvrtc

    texts = tuple(text.encode() for text in (headers or {}).values())
    names = tuple(name.encode() for name in headers or {})
    arguments = (f"--gpu-architecture={arch_name(arch)}", *options)
    program = nvrtc.createProgram(source, name, texts, names)
    try:
        nvrtc.compileProgram(program, arguments)
        return _whole_elf(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as exc:
        log = nvrtc.getProgramLog(program)
        error = CudaError(f"{what or name} does not compile: {_error_lines(log) or exc}")
        error.add_note(log)  # all of it, for a person who works on the kernel
        raise error from None
    finally:
        nvrtc.destroyProgram(program)


def _error_lines(log: str) -> str:
    """The log's errors, each with its file and line, on one line."""
    lines = [" ".join(line.split())[:300] for line in log.splitlines()]
    errors = [line for line in lines if re.search(r"\berror\b", line) and "detected in" not in line]
    more = f" | and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
    return " | ".join(errors[:_SHOWN_ERRORS]) + more


def describe(file: str, macros: Macros, arch: str) -> str:
    """ "attention.cu (HEAD_SIZE=64, SCALAR=2) for sm_90a": how errors name a module."""
    listed = ", ".join(f"{name}={value}" for name, value in sorted(macros.items()))
    return f"{file} ({listed}) for {arch}" if listed else f"{file} for {arch}"


def arch_name(arch: str) -> str:
    """ "sm_90a" of "90a" or "sm_90a"."""
    short = arch.removeprefix("sm_")
    if not re.fullmatch(r"\d{2,3}[af]?", short):
        raise CudaError(f"{arch!r} is no GPU architecture; write one like sm_80 or sm_90a")
    return f"sm_{short}"


def arch_for(compute_capability: tuple[int, int]) -> str:
    """The architecture to compile for on a card: 9.0 with its own instructions (sm_90a), others by
    their number, or the newest below of the same major that NVRTC knows, which they run as well.

    Raises DeviceError where NVRTC is too old for the card.
    """
    from cupy.cuda import nvrtc

    major, minor = compute_capability
    supported = set(nvrtc.getSupportedArchs())
    fitting = [m for m in range(min(minor, 9), -1, -1) if major * 10 + m in supported]
    if not fitting:
        raise DeviceError(
            f"NVRTC {dotted(nvrtc_version())} does not know compute capability {major}.{minor}; "
            "install a newer CUDA toolkit and a CuPy for it"
        )
    if (major, fitting[0]) == (9, 0):
        return "sm_90a"
    return f"sm_{major}{fitting[0]}"


def _define(file: str, name: str, value: int | str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise CudaError(f"{file}: {name!r} is no macro's name")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise CudaError(f"{file}: macro {name} must be an int or a string, not {value!r}")
    return f"-D{name}={value}"


def _whole_elf(cubin: bytes) -> bytes:
    """`cubin` with the last byte that CuPy takes for a string's end and cuts off (seen in 14.2).

    An ELF file's header says where its tables end; what is missing of them is at most that zero.
    """
    tables = struct.unpack_from("<QQ", cubin, 32), struct.unpack_from("<HHHH", cubin, 54)
    (segments, sections), (segment_size, num_segments, section_size, num_sections) = tables
    end = max(segments + segment_size * num_segments, sections + section_size * num_sections)
    return cubin + b"\0" if len(cubin) == end - 1 else cubin
