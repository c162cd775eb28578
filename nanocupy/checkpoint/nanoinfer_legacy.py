"""Reads NanoInfer's legacy files (A, B, C) and llama2.c's versions 1 and 2 (D).

Owns telling the layouts apart, the settings that the files leave to the kind of model, and the
change from interleaved to half-split rotary rows. The order of the bytes is in `legacy_layouts`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from nanocupy.checkpoint import legacy_layouts as legacy
from nanocupy.checkpoint.base import Checkpoint, GroupedInt8, TensorInfo, interleaved_to_split
from nanocupy.checkpoint.legacy_layouts import Dimensions, Kind
from nanocupy.checkpoint.mapped_file import MappedFile
from nanocupy.checkpoint.quantized_checks import scale_problem
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.quantized import QuantizedForm
from nanocupy.strict_json import shown

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

_ROTARY_PARTS = ("q.weight", "k.weight", "q_norm.weight", "k_norm.weight")
_MAX_ROTARY_VALUE = 1.0 + 1e-3  # cos and sin, rounded
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class _Placed:
    """A tensor of the file: where it starts, and whether it is int8 with scales."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int
    quantised: bool


class LegacyCheckpoint(Checkpoint):
    """A legacy file. A, B and C are told apart by exact file size, D by its magic number.

    layout          "A", "B", "C" or "D", where the size leaves a doubt
    kind            "llama2", "llama3" or "qwen3": whose rotary base, scaling, epsilon and ids
                    apply, as the file has none; guessed where not given, and the guess and its
                    reason are in `metadata`. Ids beyond the vocabulary are left out.
    tokenizer_path  the tokenizer's file; a legacy file carries none

    `read` gives float32 (views of the file, except q and k, which are permuted) or GroupedInt8; q
    and k whose groups straddle rows cannot be permuted as they are and come dequantised, float32.
    Raises CheckpointError where the file fits no layout, or two.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        layout: str | None = None,
        kind: str | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.tokenizer_path = None if tokenizer_path is None else Path(tokenizer_path)
        if layout is not None and layout not in (*legacy.SIZED_LAYOUTS, "D"):
            self._fail(f"--format is {shown(layout)}; it must be A, B, C or D")
        if kind is not None and kind not in legacy.KINDS:
            self._fail(f"--kind is {shown(kind)}; it must be one of {', '.join(legacy.KINDS)}")
        self._file = MappedFile(self.path)
        try:
            self._open(layout, kind)
        except BaseException:
            self._file.close()
            raise

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def _open(self, layout: str | None, kind: str | None) -> None:
        header = bytes(
            self._file.bytes(0, min(self._file.size, legacy.LLAMA2C_HEADER_BYTES), "header")
        )
        if int.from_bytes(header[:4], "little") == legacy.LLAMA2C_MAGIC or layout == "D":
            self.layout, self._dims = self._llama2c(header, layout)
        else:
            self.layout, self._dims = self._by_size(header, layout)
        self.format = f"nanoinfer-legacy-{self.layout[0]}"
        kind, reason = self._choose_kind(kind)
        self.config = self._make_config(legacy.KINDS[kind])
        metadata = {"layout": self.layout, "kind": kind, "kind_reason": reason}
        if self.layout in legacy.QUANTISED_LAYOUTS:
            metadata["group_size"] = str(self._dims.group_size)
        self.metadata = metadata
        self._placed = self._place()
        self._rope_tables = self._placed.pop(legacy.ROPE_TABLES, None)
        self.tensors = {
            name: TensorInfo(
                name,
                self._placed[name].shape,
                "int8" if self._placed[name].quantised else "float32",
                self._placed[name].nbytes,
            )
            for name in self.config.tensor_shapes()
        }

    def _llama2c(self, header: bytes, layout: str | None) -> tuple[str, Dimensions]:
        if layout not in (None, "D"):
            self._fail(f"--format is {layout} but the file starts with llama2.c's magic; it is D")
        if int.from_bytes(header[:4], "little") != legacy.LLAMA2C_MAGIC:
            self._fail(
                f"magic is {header[:4].hex()}; layout D starts with "
                f"{legacy.LLAMA2C_MAGIC.to_bytes(4, 'little').hex()}"
            )
        version = int.from_bytes(header[4:8], "little")
        if version not in (1, 2):
            self._fail(f"version is {version}; of llama2.c's files 1 and 2 are read")
        found = f"D{version}"
        dims = legacy.parse_header(found, header)
        if isinstance(dims, str):
            self._fail(f"llama2.c header, version {version}: {dims}")
        expected = legacy.file_bytes(found, dims)
        if expected != self._file.size:
            self._fail(
                f"llama2.c header, version {version}: its dimensions give {expected} bytes but "
                f"the file has {self._file.size}; it is truncated, padded or damaged"
            )
        return found, dims

    def _by_size(self, header: bytes, layout: str | None) -> tuple[str, Dimensions]:
        found: dict[str, Dimensions] = {}
        findings = []
        for candidate in (layout,) if layout else legacy.SIZED_LAYOUTS:
            dims = legacy.parse_header(candidate, header)
            if isinstance(dims, str):
                findings.append(f"layout {candidate} is ruled out ({dims})")
                continue
            expected = legacy.file_bytes(candidate, dims)
            findings.append(f"layout {candidate} would have {expected} bytes")
            if expected == self._file.size:
                found[candidate] = dims
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            self._fail(
                f"the file's {self._file.size} bytes fit the legacy layouts "
                f"{' and '.join(found)} alike; name the right one with --format"
            )
        advice = "" if layout else ", or name the layout with --format to see what is wrong"
        self._fail(
            "neither NanoInfer 2 nor GGUF, and as a legacy NanoInfer file its "
            f"{self._file.size} bytes fit no layout: {'; '.join(findings)}; it is truncated, "
            f"damaged or of another kind{advice}"
        )

    def _choose_kind(self, kind: str | None) -> tuple[str, str]:
        if kind is not None:
            if (kind == "qwen3") != (self.layout == "C"):
                holds = "q and k norms" if self.layout == "C" else "no q and k norms"
                self._fail(f"--kind is {kind} but layout {self.layout} holds {holds}")
            return kind, "named by the caller"
        if self.layout == "C":
            return "qwen3", "layout C is Qwen3's"
        if self._dims.vocab == legacy.LLAMA3_VOCAB_SIZE:
            return "llama3", f"a vocabulary of {legacy.LLAMA3_VOCAB_SIZE} is LLaMA 3's"
        return "llama2", f"the vocabulary of {self._dims.vocab} is not LLaMA 3's"

    def _make_config(self, kind: Kind) -> ModelConfig:
        dims = self._dims
        try:
            return ModelConfig(
                architecture=kind.architecture,  # type: ignore[arg-type]
                vocab_size=dims.vocab,
                hidden_size=dims.hidden,
                intermediate_size=dims.inter,
                num_layers=dims.layers,
                num_heads=dims.heads,
                num_kv_heads=dims.kv_heads,
                head_size=dims.head_size,
                max_context=dims.context,
                rms_norm_eps=kind.rms_norm_eps,
                rope_theta=kind.rope_theta,
                rope_scaling=kind.rope_scaling,
                tied_lm_head=dims.tied,
                has_qk_norm=kind.architecture == "qwen3",
                # A small model that takes over a family's settings has not its special ids.
                bos_id=kind.bos_id if kind.bos_id < dims.vocab else None,
                eos_ids=tuple(i for i in kind.eos_ids if i < dims.vocab),
            )
        except ConfigError as exc:
            raise CheckpointError(f"{self.path}: {exc}") from exc

    def _place(self) -> dict[str, _Placed]:
        placed = {}
        offset = legacy.HEADER_BYTES[self.layout]
        for run in legacy.runs(self.layout, self._dims):
            nbytes = run.nbytes(self._dims.group_size)
            for name in run.names():
                placed[name] = _Placed(run.shape, offset, nbytes, run.quantised)
                offset += nbytes
        return placed

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        """The tensor, half-split; see the class. Raises CheckpointError for an unknown name."""
        placed = self._placed.get(name)
        if placed is None:
            self._fail(f"there is no tensor {shown(name)}")
        head_size = self._dims.head_size
        rotary = name.partition(".")[2].partition(".")[2] in _ROTARY_PARTS
        if not placed.quantised:
            array = self._file.array(placed.offset, "<f4", placed.shape, f"tensor {name}")
            return interleaved_to_split(array, head_size) if rotary else array
        tensor = self._grouped(name, placed)
        if not rotary:
            return tensor
        rows, cols = placed.shape
        if cols % tensor.group_size:
            return interleaved_to_split(tensor.dequantize(), head_size)
        return GroupedInt8(
            interleaved_to_split(tensor.values, head_size),
            interleaved_to_split(tensor.scales.reshape(rows, -1), head_size).reshape(-1),
            tensor.group_size,
        )

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """Of the file's group size, where it divides the rows; see `Checkpoint`."""
        placed = self._placed.get(name)
        if placed is None:
            self._fail(f"there is no tensor {shown(name)}")
        group_size = self._dims.group_size
        if not placed.quantised or len(placed.shape) != 2 or placed.shape[1] % group_size:
            return None
        return QuantizedForm("int8", group_size)

    def _grouped(self, name: str, placed: _Placed) -> GroupedInt8:
        """A quantised tensor as it lies in the file, not permuted."""
        rows, cols = placed.shape
        group_size = self._dims.group_size
        values = self._file.array(placed.offset, np.int8, placed.shape, f"tensor {name}")
        scales = self._file.array(
            placed.offset + rows * cols,
            "<f4",
            (rows * cols // group_size,),
            f"scales of tensor {name}",
        )
        return GroupedInt8(values, scales, group_size)

    def _load_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer_path is None:
            return None
        from nanocupy.tokenizer import load_tokenizer_file

        return load_tokenizer_file(self.tokenizer_path)

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """As `Checkpoint.verify`; also that no int8 value is -128, and that layout A's tables of
        cos and sin, which nothing here uses, hold such values."""
        for name, placed in self._placed.items():
            if placed.quantised:
                tensor = self._grouped(name, placed)
                problem = scale_problem("int8", tensor.scales)
                if problem is None and tensor.values.min() < -127:
                    problem = "holds the int8 value -128, which no quantiser of this format writes"
                yield name, problem
            else:
                yield name, self._float_problem(placed, f"tensor {name}", np.inf)
        if self._rope_tables is not None:
            yield (
                legacy.ROPE_TABLES,
                self._float_problem(self._rope_tables, legacy.ROPE_TABLES, _MAX_ROTARY_VALUE),
            )

    def _float_problem(self, placed: _Placed, what: str, bound: float) -> str | None:
        values = self._file.array(placed.offset, "<f4", (placed.nbytes // 4,), what)
        for start in range(0, values.size, _CHUNK_VALUES):
            chunk = np.abs(values[start : start + _CHUNK_VALUES])
            if not np.isfinite(chunk).all():
                return "holds NaN or infinite values"
            if chunk.max() > bound:
                return "holds values above 1, which no cos or sin is"
        return None

    def close(self) -> None:
        self._file.close()
