"""One quantised layer of a Hugging Face folder: its stored tensors -> QuantizedMatrix.

Owns how AWQ and GPTQ pack codes and zeros into int32 words, and which scales an FP8 layer may have.
What a folder's settings mean is `hf_quantization`'s; files are `safetensors_file`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from nanocupy.checkpoint.hf_quantization import Scheme
from nanocupy.checkpoint.quantized_checks import check_numbers
from nanocupy.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from nanocupy.errors import CheckpointError
from nanocupy.quantized import QuantizedForm, QuantizedMatrix, without_zero_scales

Place = tuple[SafetensorsFile, StoredTensor]

# The ends of the names of a layer's tensors. Scales of activations are not needed, as products are
# computed in 16 bits or more, nor are shapes, which the config gives.
PARTS: Mapping[str, frozenset[str]] = {
    "awq": frozenset({"qweight", "qzeros", "scales"}),
    "gptq": frozenset({"qweight", "qzeros", "scales", "g_idx"}),
    "fp8": frozenset({"weight", "weight_scale", "weight_scale_inv"}),
    "packed": frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"}),
}
IGNORED_PARTS = frozenset(
    {
        "input_scale",
        "activation_scale",
        "output_scale",
        "q_scale",
        "k_scale",
        "v_scale",
        "weight_shape",
    }
)

_SCALE_DTYPES = ("F16", "BF16", "F32")
# Which output of eight the four bits i of an AWQ word belong to.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ROWS_AT_ONCE = 256  # unpacked in one piece


class QuantizedLayer:
    """dtype    "int4", "int8" or "float8_e4m3"
    nbytes   of the stored tensors

    shape: [outputs N, inputs K], what the model's config wants; `where` names the folder and the
    tensor in errors. The constructor checks every tensor's type and shape, `read` the contents.
    Both raise CheckpointError.
    """

    def __init__(
        self, scheme: Scheme, shape: tuple[int, ...], parts: Mapping[str, Place], where: str
    ) -> None:
        self._scheme = scheme
        self._parts = parts
        self._where = where
        if len(shape) != 2:
            self._fail("is quantised, but no matrix")
        self.shape = shape[0], shape[1]
        self.group_size = scheme.group_size or shape[1]
        self.nbytes = sum(stored.nbytes for _, stored in parts.values())
        if scheme.method == "fp8":
            self.dtype = "float8_e4m3"
            self._check_fp8()
        else:
            self.dtype = f"int{scheme.bits}"
            self._check_packed()

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._where} {reason}") from None

    def _check_part(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        if part not in self._parts:
            self._fail(f"has no {part}, which {self._scheme.label} needs; fetch the model again")
        stored = self._parts[part][1]
        if stored.dtype not in dtypes:
            self._fail(f"has {part} stored as {stored.dtype}; it must be {' or '.join(dtypes)}")
        if stored.shape != shape:
            self._fail(
                f"has {part} of shape {list(stored.shape)}; a matrix {list(self.shape)} in "
                f"{self._scheme.label} has {list(shape)}"
            )

    def _check_packed(self) -> None:
        num_rows, num_inputs = self.shape
        if num_inputs % self.group_size:
            self._fail(
                f"has {num_inputs} inputs, which groups of {self.group_size} do not divide; "
                "quantise the model in another group_size"
            )
        in_word, method = 32 // self._scheme.bits, self._scheme.method
        packed = num_rows if method == "awq" else num_inputs
        zeros = "weight_zero_point" if method == "packed" else "qzeros"
        has_zeros = zeros in self._parts or self._scheme.needs_zeros  # packed along the rows
        if (has_zeros and num_rows % in_word) or packed % in_word or num_inputs % 2:
            self._fail(f"is {list(self.shape)}: {in_word} codes to a word do not fill it")
        num_groups = num_inputs // self.group_size
        if method == "packed":
            self._check_part("weight_packed", ("I32",), (num_rows, num_inputs // in_word))
            self._check_part("weight_scale", _SCALE_DTYPES, (num_rows, num_groups))
            if has_zeros:
                self._check_part("weight_zero_point", ("I32",), (num_rows // in_word, num_groups))
            if "weight_g_idx" in self._parts or self._scheme.needs_order:
                self._check_part("weight_g_idx", ("I32",), (num_inputs,))
            return
        if method == "awq":
            words = (num_inputs, num_rows // in_word)
        else:
            words = (num_inputs // in_word, num_rows)
        self._check_part("qweight", ("I32",), words)
        self._check_part("scales", _SCALE_DTYPES, (num_groups, num_rows))
        if has_zeros:
            self._check_part("qzeros", ("I32",), (num_groups, num_rows // in_word))
        if "g_idx" in self._parts or self._scheme.needs_order:
            self._check_part("g_idx", ("I32",), (num_inputs,))

    def _check_fp8(self) -> None:
        num_rows, num_inputs = self.shape
        self._check_part("weight", ("F8_E4M3",), self.shape)
        names = [part for part in self._parts if part != "weight"]
        if len(names) != 1:
            self._fail(
                f"has {' and '.join(names) or 'neither weight_scale nor weight_scale_inv'}; float8 "
                "values need one of weight_scale and weight_scale_inv"
            )
        self._scale_name = names[0]
        stored = self._parts[self._scale_name][1].shape
        block = self._scheme.block
        if block is not None:
            if num_inputs % block[1]:
                self._fail(
                    f"has {num_inputs} inputs, which blocks of {block[1]} do not divide: not "
                    "supported; use the model's float16 or bfloat16 weights"
                )
            self.group_size = block[1]
            wanted = (-(-num_rows // block[0]), num_inputs // block[1])
        elif len(stored) <= 2 and all(size == 1 for size in stored):
            wanted = stored
        else:
            wanted = (num_rows, 1) if len(stored) == 2 else (num_rows,)
        self._check_part(self._scale_name, _SCALE_DTYPES, wanted)

    def read(self) -> QuantizedMatrix:
        """The matrix; CheckpointError where its numbers are none that it can have. Scales of 0,
        which float16 leaves of tiny ones, become 1 with codes of 0."""
        reader = {
            "fp8": self._read_fp8,
            "awq": self._read_awq,
            "gptq": self._read_gptq,
            "packed": self._read_packed,
        }[self._scheme.method]
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales: refused below
            matrix = reader()
        check_numbers(
            matrix.kind,
            matrix.codes,
            matrix.scales,
            matrix.offsets,
            matrix.input_order,
            self._where,
            zero_scales=True,
        )
        return without_zero_scales(matrix)

    def form(self) -> QuantizedForm:
        """Of what `read` gives. Looks at the groups of inputs, where there are any, never at codes;
        CheckpointError where these are none."""
        method = self._scheme.method
        if method == "fp8":
            return QuantizedForm("fp8", self.group_size)
        order = self._order("weight_g_idx" if method == "packed" else "g_idx")
        return QuantizedForm(self.dtype, self.group_size, order is not None)

    def _array(self, part: str) -> np.ndarray:
        file, stored = self._parts[part]
        return (
            file.codes(stored.name)
            if stored.dtype in ("I32", "F8_E4M3")
            else file.read(stored.name)
        )

    def _scales(self) -> np.ndarray:
        """float32 [N, groups]."""
        return np.ascontiguousarray(self._array("scales").astype(np.float32).T)

    def _read_awq(self) -> QuantizedMatrix:
        num_rows, num_inputs = self.shape
        words = self._array("qweight")  # [K, N / 8]
        codes = np.empty((num_rows // 8, 8, num_inputs // 2), np.uint8)
        step = _ROWS_AT_ONCE // 8
        for start in range(0, num_rows // 8, step):
            _repack_awq(words[:, start : start + step], codes[start : start + step])
        codes = codes.reshape(num_rows, -1)
        scales = self._scales()
        zeros = np.float32(8)  # the middle of the codes, where the file has no zeros
        if "qzeros" in self._parts:
            zeros = _awq_unpacked(self._array("qzeros")).astype(np.float32)
        return QuantizedMatrix("int4", codes, scales, -zeros * scales, self.group_size)

    def _read_gptq(self) -> QuantizedMatrix:
        bits = self._scheme.bits
        words = self._array("qweight")  # [K * bits / 32, N]
        zeros = np.ascontiguousarray(self._array("qzeros")).view(np.uint8)  # [groups, …]
        if bits == 4:
            zeros = _nibbles(zeros)
        if self._scheme.zeros_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
        scales, order = self._scales(), self._order("g_idx")
        # Little-endian words hold their first code lowest: a row of them is a row of bytes.
        codes = words.T.copy().view(np.uint8) if order is None else self._sorted(words, order)
        return self._matrix(codes, scales, zeros.T, order)

    def _read_packed(self) -> QuantizedMatrix:
        words = self._array("weight_packed")  # [N, K * bits / 32]
        order = self._order("weight_g_idx")
        codes = words.view(np.uint8) if order is None else self._sorted(words.T, order)
        scales = self._array("weight_scale").astype(np.float32)
        zeros: np.ndarray = np.full((1, 1), 1 << (self._scheme.bits - 1), np.uint8)
        if "weight_zero_point" in self._parts:
            zeros = self._array("weight_zero_point").T.copy().view(np.uint8)
            zeros = (_nibbles(zeros) if self._scheme.bits == 4 else zeros).T
        return self._matrix(codes, scales, zeros, order)

    def _matrix(
        self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, order: np.ndarray | None
    ) -> QuantizedMatrix:
        """Of codes as bytes [N, …], scales and zeros [N, groups]."""
        if self._scheme.bits == 4:
            offsets = -zeros.astype(np.float32) * scales
            return QuantizedMatrix("int4", codes, scales, offsets, self.group_size, order)
        if (zeros != 128).any():
            self._fail("has 8-bit codes whose zero is not 128: not supported (not symmetric)")
        signed = (codes ^ np.uint8(128)).view(np.int8)
        return QuantizedMatrix("int8", signed, scales, None, self.group_size, order)

    def _sorted(self, words: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Words [K * bits / 32, N] -> codes as bytes [N, …], inputs in `order`."""
        bits = self._scheme.bits
        codes = np.empty((self.shape[0], self.shape[1] * bits // 8), np.uint8)
        for start in range(0, len(codes), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            codes[rows] = _sorted_inputs(words[:, rows], bits, order)
        return codes

    def _order(self, part: str) -> np.ndarray | None:
        """The inputs sorted by their groups, int32 [K]; None where they lie so already. part: the
        tensor that has each input's group."""
        if part not in self._parts:
            return None
        groups = self._array(part).view(np.int32)
        num_groups = len(groups) // self.group_size
        if groups.min() < 0 or groups.max() >= num_groups:
            wrong = groups.min() if groups.min() < 0 else groups.max()
            self._fail(f"has a {part} of {wrong}; there are the groups 0 to {num_groups - 1}")
        counts = np.bincount(groups, minlength=num_groups)
        if (counts != self.group_size).any():
            group = int(np.argmax(counts != self.group_size))
            self._fail(
                f"has {counts[group]} inputs in group {group} by {part}; groups of other than "
                f"{self.group_size} are not supported"
            )
        order = np.argsort(groups, kind="stable").astype(np.int32)
        return None if np.array_equal(order, np.arange(len(order))) else order

    def _read_fp8(self) -> QuantizedMatrix:
        num_rows = self.shape[0]
        codes = self._array("weight")
        stored = self._array(self._scale_name).astype(np.float32)
        if self._scheme.block is not None:
            # Not np.repeat: a config may name blocks of a million rows for a matrix of eight.
            scales = stored[np.arange(num_rows) // self._scheme.block[0]]
        else:
            scales = np.broadcast_to(stored.reshape(-1, 1), (num_rows, 1))
        return QuantizedMatrix("fp8", codes, np.ascontiguousarray(scales), None, self.group_size)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """uint8 [R, C], two codes to a byte, the first in the low bits -> uint8 [R, 2 C]."""
    return np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)


def _awq_unpacked(words: np.ndarray) -> np.ndarray:
    """uint32 [M, C], eight codes to a word -> uint8 [8 C, M]."""
    codes = np.empty((words.shape[1], 8, words.shape[0]), np.uint8)
    for i, output in enumerate(_AWQ_ORDER):
        codes[:, output] = ((words >> np.uint32(4 * i)) & np.uint32(15)).T
    return codes.reshape(-1, words.shape[0])


def _repack_awq(words: np.ndarray, out: np.ndarray) -> None:
    """uint32 [K, C], eight outputs to a word -> uint8 [C, 8, K / 2], two inputs to a byte."""
    data = np.ascontiguousarray(words).view(np.uint8)  # [K, 4 C]
    even, odd = data[0::2], data[1::2]
    low = (even & 15 | odd << 4).reshape(len(even), -1, 4)
    high = (even >> 4 | odd & 0xF0).reshape(low.shape)
    for byte in range(4):
        out[:, _AWQ_ORDER[2 * byte]] = low[:, :, byte].T
        out[:, _AWQ_ORDER[2 * byte + 1]] = high[:, :, byte].T


def _sorted_inputs(words: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """uint32 [K * bits / 32, C], inputs packed in their own order -> uint8 [C, K * bits / 8], in
    `order`."""
    in_word, mask = 32 // bits, np.uint32((1 << bits) - 1)
    inputs = np.empty((len(words), in_word, words.shape[1]), np.uint8)
    for i in range(in_word):
        inputs[:, i] = words >> np.uint32(bits * i) & mask
    inputs = inputs.reshape(-1, words.shape[1])[order]  # [K, C]
    return (inputs if bits == 8 else inputs[0::2] | inputs[1::2] << 4).T
