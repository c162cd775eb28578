"""A checkpoint seen in fewer bits: linear layers rounded to int8, int4 or fp8 when they are read.

Owns which tensors are rounded, in which groups, and the record of what that costs. The rounding is
`nanocupy.quantized`'s and `scale_search`'s; writing the result is an exporter's business, for which
this is a checkpoint like any other.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanocupy.checkpoint import nanoinfer2_layout as layout
from nanocupy.checkpoint.base import Checkpoint, TensorInfo, dequantized
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.exporters.conversion import finite_floats, read_checked
from nanocupy.exporters.scale_search import search_int4
from nanocupy.quantized import (
    KINDS,
    QuantizedForm,
    QuantizedMatrix,
    pack_int4,
    quantize,
    without_zero_scales,
)
from nanocupy.strict_json import shown

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

DEFAULT_GROUP_SIZE = 128
_SMALLEST_GROUP = 8  # below, scales take more room than the codes save
_CHUNK_VALUES = 1 << 16  # rounded in one piece: what a core's cache holds
_DTYPES = {kind: dtype for dtype, kind in layout.KINDS.items()}


@dataclass(frozen=True)
class RoundingError:
    """What rounding a tensor costs: sums over its values.

    nearest   squared errors from each group's smallest and largest value
    written   squared errors of what was written: after the search, where there was one
    weights   squares of the values themselves
    count     how many they are
    """

    nearest: float
    written: float
    weights: float
    count: int

    def __add__(self, other: RoundingError) -> RoundingError:
        return RoundingError(
            self.nearest + other.nearest,
            self.written + other.written,
            self.weights + other.weights,
            self.count + other.count,
        )


class QuantizedView(Checkpoint):
    """`source` with its linear layers in fewer bits.

    kind         "int8", "int4" or "fp8"
    group_size   inputs with one scale; -1: all of a row; None: that of most layers which the source
                 has in this kind already, so that these keep their bits; else -1 for fp8, whose
                 steps are finer around 0 whatever the scale, and 128 for the others, or the largest
                 of 64, 32, 16 and 8 that divides every row
    search       look for the scales of least error (int4)
    lm_head      the LM head, too

    Embedding and LM head else are in 16 bits, norms and biases as they are stored. A layer that the
    source has in this kind and group size keeps its bits; so does, in whatever groups, an LM head
    of this kind, unless `lm_head` wants it in those of the layers. `kept` names them, `layers` all
    that are in few bits. `errors` holds the RoundingError of every layer that was read so far.

    Raises ConfigError for what cannot be; `read_quantized` raises CheckpointError for values that
    are no numbers.
    """

    def __init__(
        self,
        source: Checkpoint,
        kind: str,
        *,
        group_size: int | None = None,
        search: bool = True,
        lm_head: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if lm_head and source.config.tied_lm_head:
            raise ConfigError(
                f"{source.path}: its LM head is the embedding, which stays in 16 bits; leave "
                "--lm-head out"
            )
        self.source = source
        self.kind = kind
        self.search = search and kind == "int4"
        self.path, self.format, self.config = source.path, source.format, source.config
        self.tokenizer_path = getattr(source, "tokenizer_path", None)
        self.chat_template = source.chat_template
        self.generation_defaults = source.generation_defaults
        self.errors: dict[str, RoundingError] = {}
        lengths = {
            name: info.shape[1]
            for name, info in source.tensors.items()
            if len(info.shape) == 2
            and name != "embed.weight"
            and (lm_head or name != "lm_head.weight")
        }
        stored = _stored_forms(source, kind)
        if group_size is None:
            found = {name: form for name, form in stored.items() if name in lengths}
            group_size = _stored_group_size(found, lengths)
        self.group_size = _settled_group_size(lengths, kind, group_size)
        self.kept: Mapping[str, QuantizedForm] = {
            name: form
            for name, form in stored.items()
            if (form.group_size == self._group_of(name) if name in lengths else not lm_head)
        }
        self.layers = tuple(name for name in source.tensors if name in lengths or name in self.kept)
        self.search = self.search and len(self.kept) < len(self.layers)
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._info(info) for name, info in source.tensors.items()
        }
        self.metadata: Mapping[str, Any] = {**source.metadata, "quantized": self._summary()}

    def _summary(self) -> str:
        """What became of the layers, for people."""
        groups = "a group a row" if self.group_size == -1 else f"groups of {self.group_size}"
        search = ", scale search" if self.search else ""
        kept = ""
        if self.kept:
            count = f"{len(self.kept)} of {len(self.layers)}"
            kept = f", {'all' if len(self.kept) == len(self.layers) else count} layers kept"
        return f"{self.kind}, {groups}{search}{kept}"

    def _info(self, info: TensorInfo) -> TensorInfo:
        if info.name in self.layers:
            dtype = _DTYPES[self.kind]
            form = self._form(info.name)
            nbytes = layout.grouped_nbytes(dtype, info.shape, form.group_size, form.has_order)
            return TensorInfo(info.name, info.shape, dtype, nbytes)
        if len(info.shape) == 1:
            dtype = info.dtype if info.dtype in layout.ITEM_BYTES else "float32"
        elif info.dtype in ("float16", "bfloat16"):
            dtype = info.dtype
        else:  # float16 nearly always holds what codes stand for; float32 may well go beyond it
            dtype = "bfloat16" if info.dtype == "float32" else "float16"
        nbytes = math.prod(info.shape) * layout.ITEM_BYTES[dtype]
        return TensorInfo(info.name, info.shape, dtype, nbytes)

    def _group_of(self, name: str) -> int:
        return self.source.tensors[name].shape[1] if self.group_size == -1 else self.group_size

    def _form(self, name: str) -> QuantizedForm:
        """Of one of `layers`."""
        return self.kept.get(name) or QuantizedForm(self.kind, self._group_of(name))

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """Known beforehand; see `Checkpoint`."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)}")
        return self._form(name) if name in self.layers else None

    def read(self, name: str) -> np.ndarray:
        """A rounded layer's values in float32, anything else as the source gives it in floats."""
        matrix = self.read_quantized(name)
        return matrix.dequantize() if matrix else dequantized(self.source.read(name))

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """The layer, rounded now or kept; None for what is in floats."""
        if self.quantized_form(name) is None:
            return None
        group_size = self._group_of(name)
        if name in self.kept:
            stored = self.source.read_quantized(name)
            assert stored is not None
            if stored.kind != "int8":  # NanoInfer 2 has no scales of 0, but in int8
                stored = without_zero_scales(stored)
            squares = sum(_squares(stored.rows(rows)) for rows in stored.row_blocks())
            self.errors[name] = RoundingError(0.0, 0.0, squares, math.prod(stored.shape))
            return stored
        values = dequantized(read_checked(self.source, name))
        what = f"{self.path}: tensor {name}"
        matrix, error = quantized_matrix(values, self.kind, group_size, self.search, what)
        self.errors[name] = error
        return matrix

    @property
    def rounded_twice(self) -> list[str]:
        """Storage types of few bits among the layers that were read so far and rounded anew."""
        found = {self.source.tensors[name].dtype for name in self.errors.keys() - self.kept.keys()}
        return sorted(found - set(layout.ITEM_BYTES))

    def _load_tokenizer(self) -> Tokenizer | None:
        return self.source.tokenizer

    def close(self) -> None:
        self.source.close()


def _stored_forms(source: Checkpoint, kind: str) -> dict[str, QuantizedForm]:
    """The matrices that `source` has in this kind, but for the embedding."""
    forms: dict[str, QuantizedForm] = {}
    for name, info in source.tensors.items():
        if len(info.shape) != 2 or name == "embed.weight" or info.dtype in layout.ITEM_BYTES:
            continue
        form = source.quantized_form(name)
        if form is not None and form.kind == kind:
            forms[name] = form
    return forms


def _stored_group_size(
    forms: Mapping[str, QuantizedForm], lengths: Mapping[str, int]
) -> int | None:
    """The group size that lets most layers keep their bits; None where no layer's can be taken.

    forms: of the layers that are in the wanted kind. lengths: inputs of all layers. A group a row
    only where that keeps every one of them: rows are as long as groups by chance, too.
    """
    if forms and all(form.group_size == lengths[name] for name, form in forms.items()):
        return -1
    counts = Counter(form.group_size for form in forms.values())
    for group_size, _ in counts.most_common():
        divides = all(length % group_size == 0 for length in lengths.values())
        if divides and group_size >= _SMALLEST_GROUP:
            return group_size
    return None


def _settled_group_size(lengths: Mapping[str, int], kind: str, asked: int | None) -> int:
    """The group size that all layers, name -> inputs, are rounded in. Raises ConfigError."""
    odd = next((name for name, length in lengths.items() if length % 2), None)
    if kind == "int4" and odd is not None:
        raise ConfigError(
            f"{odd} has {lengths[odd]} inputs, an odd number, which int4 cannot hold; use int8"
        )
    common = math.gcd(DEFAULT_GROUP_SIZE, *lengths.values())
    if asked is None:
        if kind == "fp8":
            return -1
        if common < _SMALLEST_GROUP:
            raise ConfigError(
                f"no group of {_SMALLEST_GROUP} or more inputs divides every row; use --group-size "
                "-1, one group a row"
            )
        return common
    if asked != -1 and asked < _SMALLEST_GROUP:
        raise ConfigError(
            f"--group-size is {asked}; it must be at least {_SMALLEST_GROUP}, or -1 for a row"
        )
    for name, length in lengths.items():
        if asked != -1 and length % asked:
            use = f"{common} divides all" if common >= _SMALLEST_GROUP else "-1 is a row"
            raise ConfigError(
                f"--group-size is {asked}, which does not divide the {length} inputs of {name}; "
                f"{use}"
            )
    return asked


def quantized_matrix(
    values: np.ndarray, kind: str, group_size: int, search: bool, what: str
) -> tuple[QuantizedMatrix, RoundingError]:
    """`values` [R, K] rounded, row by row in pieces that fit a core's cache, and what it cost.

    Raises CheckpointError, with `what`, for values that are no numbers.
    """
    num_rows, num_inputs = values.shape
    width = num_inputs // 2 if kind == "int4" else num_inputs
    codes = np.empty((num_rows, width), np.int8 if kind == "int8" else np.uint8)
    scales = np.empty((num_rows, num_inputs // group_size), np.float32)
    offsets = np.empty_like(scales) if kind == "int4" else None

    def round_rows(rows: slice) -> RoundingError:
        floats = finite_floats(values[rows], what)
        with np.errstate(over="ignore", invalid="ignore"):
            part = quantize(floats, kind, group_size)
            nearest = written = _squared_error(floats, part)
            if search:
                part = _searched(floats, part)
                written = _squared_error(floats, part)
        if not np.isfinite(part.scales).all():
            largest = np.abs(floats).max()
            raise CheckpointError(f"{what} holds {largest:g}, too large to be rounded to {kind}")
        codes[rows], scales[rows] = part.codes, part.scales
        if offsets is not None:
            offsets[rows] = part.offsets
        return RoundingError(nearest, written, float(np.vdot(floats, floats)), floats.size)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # NumPy lets go of the interpreter
        errors = list(pool.map(round_rows, _pieces(num_rows, num_inputs)))
    total = RoundingError(0.0, 0.0, 0.0, 0)
    for error in errors:
        total += error
    return QuantizedMatrix(kind, codes, scales, offsets, group_size), total


def _pieces(num_rows: int, num_inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // num_inputs)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _squared_error(values: np.ndarray, matrix: QuantizedMatrix) -> float:
    difference = matrix.dequantize()
    difference -= values
    return float(np.vdot(difference, difference))


def _squares(matrix: QuantizedMatrix) -> float:
    values = matrix.dequantize()
    return float(np.vdot(values, values))


def _searched(values: np.ndarray, start: QuantizedMatrix) -> QuantizedMatrix:
    assert start.offsets is not None
    groups = values.reshape(-1, start.group_size)
    codes, scales, offsets = search_int4(
        groups, start.scales.reshape(-1), start.offsets.reshape(-1)
    )
    shape = start.scales.shape
    return QuantizedMatrix(
        "int4",
        pack_int4(codes.reshape(values.shape)),
        scales.reshape(shape),
        offsets.reshape(shape),
        start.group_size,
    )
