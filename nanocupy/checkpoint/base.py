"""What every checkpoint reader gives: config, lazily mapped tensors, tokenizer, template, defaults.

Readers subclass `Checkpoint`. Canonical names and shapes are those of `ModelConfig.tensor_shapes`;
rotary layout is half-split (a reader of an interleaved format permutes on read).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from nanocupy.checkpoint.quantized_checks import scale_problem
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError, TokenizerError
from nanocupy.quantized import QuantizedForm, QuantizedMatrix

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

FLOAT_DTYPES = {  # storage types of floating point, by the names of settings and files
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class GroupedInt8:
    """An int8 matrix with one float32 scale for each `group_size` consecutive elements, row-major.

    values [rows, cols] int8; scales [rows * cols / group_size] float32; w = values * scale.
    """

    values: np.ndarray
    scales: np.ndarray
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> np.ndarray:
        """The matrix in float32, [rows, cols]."""
        groups = self.values.reshape(-1, self.group_size).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales, see verify
            groups *= self.scales.reshape(-1, 1)
        return groups.reshape(self.values.shape)

    def as_matrix(self) -> QuantizedMatrix | None:
        """The same codes and scales, not copied; None for a vector, and where groups straddle
        rows."""
        if self.values.ndim != 2 or self.values.shape[1] % self.group_size:
            return None
        num_rows = len(self.values)
        scales = self.scales.reshape(num_rows, -1)
        return QuantizedMatrix("int8", self.values, scales, None, self.group_size)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as it is stored: canonical name, shape, storage dtype, bytes in the file.

    dtype is the storage's own name: float32, float16, bfloat16, int8, int4 or float8_e4m3 (all
    three in groups), or a GGUF type such as q4_1; `nbytes` counts scales and the like too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings a model's author recommends; None where the checkpoint says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None  # False: the author decodes greedily


class Checkpoint(ABC):
    """An opened model. Opening checks the whole header; tensors are read when asked for.

    Attributes
    path             the file or folder
    format           "nanoinfer-legacy-A" … "-D", "nanoinfer-2", "huggingface" or "gguf"
    config           the architecture, validated
    tensors          canonical name -> TensorInfo, exactly the names of config.tensor_shapes()
    chat_template    Jinja2 source, or None
    generation_defaults   the author's sampling settings
    metadata         free facts for `inspect` (license, source, …), JSON-able
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    chat_template: str | None = None
    generation_defaults: GenerationDefaults = GenerationDefaults()
    metadata: Mapping[str, Any] = {}

    @abstractmethod
    def read(self, name: str) -> np.ndarray | GroupedInt8:
        """The tensor in half-split layout: a view of the mapped file where the stored bytes are
        already that, else a new array (float32 for quantised types). Grouped int8 of NanoInfer
        files comes as `GroupedInt8`, still quantised. Raises CheckpointError for a name not in
        `tensors`."""

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """The tensor as it is quantised in the file, rows in half-split layout; None where it is
        stored in floating point, or in a way that `QuantizedMatrix` does not express: `read` gives
        its values all the same. Raises CheckpointError for a name not in `tensors`, and for codes
        or scales that are no numbers."""
        if name in self.tensors and self.tensors[name].dtype != "int8":
            return None  # known without reading
        tensor = self.read(name)
        if not isinstance(tensor, GroupedInt8):
            return None
        matrix = tensor.as_matrix()
        problem = None if matrix is None else scale_problem("int8", matrix.scales)
        if problem is not None:
            raise CheckpointError(
                f"{self.path}: tensor {name} {problem}; the file is damaged, fetch it again"
            )
        return matrix

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """The form of what `read_quantized` gives, or None where it gives None. Readers know it
        without touching the codes, so that a plan costs no reading; whether the numbers are any,
        only `read_quantized` says. Raises CheckpointError for a name not in `tensors`."""
        matrix = self.read_quantized(name)
        return None if matrix is None else matrix.form

    @abstractmethod
    def _load_tokenizer(self) -> Tokenizer | None: ...

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer the checkpoint carries, built on first use; None where it has none.
        Raises TokenizerError where it is broken."""
        try:
            tokenizer = self._load_tokenizer()
        except TokenizerError as exc:
            # Readers of a file of its own have named that.
            stated = str(exc)
            where = "" if stated.startswith(str(self.path)) else f"{self.path}: tokenizer: "
            raise TokenizerError(f"{where}{stated}") from exc
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} ids but the embedding only "
                f"{self.config.vocab_size} rows; the files belong to different models"
            )
        return tokenizer

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Check the content tensor by tensor: yields (name, None) or (name, what is wrong).

        Readers whose format has checksums check those too. By default every value must be finite.
        """
        for name in self.tensors:
            try:
                tensor = self.read(name)
            except CheckpointError as exc:
                yield name, str(exc).removeprefix(f"{self.path}: ").removeprefix(f"tensor {name} ")
                continue
            if isinstance(tensor, GroupedInt8):
                yield name, scale_problem("int8", tensor.scales)
                continue
            finite = bool(np.isfinite(np.asarray(tensor, dtype=np.float32)).all())
            yield name, None if finite else "holds NaN or infinite values"

    def close(self) -> None:  # noqa: B027 - optional
        """Let go of the mapped file. Arrays that `read` gave may become invalid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def dequantized(tensor: np.ndarray | GroupedInt8) -> np.ndarray:
    """`tensor` as a floating-point array, dequantised where it is grouped int8."""
    return tensor.dequantize() if isinstance(tensor, GroupedInt8) else tensor


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of `config`, in name and shape."""
    expected = config.tensor_shapes()
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} {list(shape)} is missing")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"the config says {list(shape)}"
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name} does not belong to this architecture")


def split_to_interleaved(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of a q/k projection (or bias, or q/k norm) from half-split to interleaved rotary layout.

    tensor [n * head_size, ...]; a copy comes back. Source: NanoInfer and GGUF's llama layout store
    the rotated pairs as rows (2i, 2i + 1) of a head.
    """
    heads = tensor.reshape(-1, 2, head_size // 2, *tensor.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.shape)


def interleaved_to_split(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """The inverse of `split_to_interleaved`; a copy comes back."""
    heads = tensor.reshape(-1, head_size // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.shape)
