"""GGUF files of LLaMA, Qwen2 and Qwen3 models: metadata -> ModelConfig, tensors -> arrays.

Owns what GGUF's keys and tensor names mean, as llama.cpp reads them, and the way back from its
layouts (interleaved rotary rows, quantised blocks). `gguf_file` owns the container and
`gguf_quantized` the blocks that keep their bits; the gguf package decodes all of them to floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ml_dtypes
import numpy as np

from nanocupy.checkpoint.base import Checkpoint, TensorInfo, check_tensors, interleaved_to_split
from nanocupy.checkpoint.fields import Fields, generation_defaults
from nanocupy.checkpoint.gguf_config import model_config
from nanocupy.checkpoint.gguf_file import GGUFFile, StoredTensor
from nanocupy.checkpoint.gguf_quantized import TYPES, quantized_matrix
from nanocupy.checkpoint.quantized_checks import scale_problem
from nanocupy.errors import CheckpointError
from nanocupy.quantized import QuantizedForm, QuantizedMatrix
from nanocupy.strict_json import shown

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

_TOP_NAMES = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "final_norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_PARTS = {
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_ROTATED = re.compile(r"layers\.[0-9]+\.[qk]\.(weight|bias)")

# GGUF's float types -> (nanocupy's name, NumPy dtype); every other type is made of blocks.
_FLOATS: Mapping[str, tuple[str, np.dtype]] = {
    "f32": ("float32", np.dtype("<f4")),
    "f16": ("float16", np.dtype("<f2")),
    "bf16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
}
_SLAB_ELEMENTS = 1 << 15  # decoded at once: the package's temporaries then stay in the cache

_DEFAULT_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_FACTS = (
    "general.name", "general.organization", "general.license", "general.size_label",
    "general.file_type", "general.quantization_version", "general.source.url",
    "general.quantized_by",
)  # fmt: skip


def canonical_name(name: str) -> str | None:
    """nanocupy's name of a GGUF tensor; None for one nanocupy does not know."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    part = _LAYER_PARTS.get(match[2]) if match else None
    return f"layers.{match[1]}.{part}.{match[3]}" if match and part else None


class GGUFCheckpoint(Checkpoint):
    """A GGUF file; see `Checkpoint`.

    F32, F16 and BF16 tensors come as views of the file (the rotary rows of llama files excepted,
    which are put in half-split order), quantised ones decoded to float32; most of these as codes,
    too.
    Raises CheckpointError, ConfigError.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = GGUFFile(self.path)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}") from None

    def _open(self) -> None:
        keys = self._file.metadata
        fields = Fields(str(self.path), keys)
        if fields.integer("split.count", 1, low=0) > 1:
            self._fail(
                f"part {fields.integer('split.no', 0, low=0) + 1} of {keys['split.count']} of a "
                "split model; merge the parts with llama-gguf-split --merge"
            )
        stored = dict(self._file.tensors)
        rope_factors = stored.pop(_ROPE_FACTORS, None)
        places = {canonical_name(name): tensor for name, tensor in stored.items()}
        shapes = {name: tensor.shape for name, tensor in places.items() if name is not None}
        self.chat_template = fields.text("tokenizer.chat_template")
        # The config comes before complaints about names: it knows why a tensor is not expected.
        self.config = model_config(
            fields, shapes, None if rope_factors is None else self._rope_factors(rope_factors)
        )
        for name in stored:
            if canonical_name(name) is None:
                self._fail(f"tensor {shown(name)} is not part of {self.config.architecture} models")
        self._places: dict[str, StoredTensor] = places
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.shape, _storage_name(tensor), tensor.nbytes)
            for name, tensor in places.items()
        }
        check_tensors(self.path, self.config, self.tensors)
        self.tensors = {name: self.tensors[name] for name in self.config.tensor_shapes()}
        self.generation_defaults = generation_defaults(fields, _DEFAULT_KEYS)
        self.metadata: Mapping[str, Any] = {
            "gguf_version": self._file.version,
            **{key: keys[key] for key in _FACTS if isinstance(keys.get(key), (str, int))},
        }

    def _rope_factors(self, tensor: StoredTensor) -> np.ndarray:
        if tensor.type.name != "f32" or len(tensor.shape) != 1:
            self._fail(f"tensor {_ROPE_FACTORS} is not a vector of F32")
        return self._file.array(tensor, _FLOATS["f32"][1], tensor.shape)

    def read(self, name: str) -> np.ndarray:
        """float32, float16 or bfloat16 in half-split layout; see `Checkpoint`."""
        if name not in self._places:
            self._fail(f"no tensor is named {shown(name)}")
        tensor = self._places[name]
        if tensor.type.name in _FLOATS:
            values = self._file.array(tensor, _FLOATS[tensor.type.name][1], tensor.shape)
            permute = self._is_interleaved(name)
            return interleaved_to_split(values, self.config.head_size) if permute else values
        return _decode(self._blocks(name, tensor), tensor)

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """The codes of every type but Q5_1 and Q5_K as they are; see `Checkpoint`."""
        if self.quantized_form(name) is None:
            return None
        tensor = self._places[name]
        rows = self._blocks(name, tensor)
        blocks = rows.reshape(len(rows), -1, tensor.type.block_bytes)
        matrix = quantized_matrix(blocks, tensor.type.name)
        problem = scale_problem(matrix.kind, matrix.scales, matrix.offsets)
        if problem is not None:
            self._fail(f"tensor {name} {problem}; the file is damaged, fetch it again")
        return matrix

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """Its type says it; see `Checkpoint`."""
        if name not in self._places:
            self._fail(f"no tensor is named {shown(name)}")
        tensor = self._places[name]
        if tensor.type.name not in TYPES or len(tensor.shape) != 2:
            return None
        return TYPES[tensor.type.name][0]

    def _is_interleaved(self, name: str) -> bool:
        """Whether its rows rotate in pairs of neighbours (llama files), not half a head apart."""
        return self.config.architecture == "llama" and _ROTATED.fullmatch(name) is not None

    def _blocks(self, name: str, tensor: StoredTensor) -> np.ndarray:
        """Encoded rows uint8 [..., row_bytes] in half-split order."""
        row_bytes = tensor.shape[-1] // tensor.type.block_size * tensor.type.block_bytes
        blocks = self._file.array(tensor, np.dtype("u1"), (*tensor.shape[:-1], row_bytes))
        if self._is_interleaved(name):
            if blocks.ndim == 1:
                self._fail(f"tensor {name} is a quantised vector; its rows cannot be reordered")
            # Blocks lie along rows, so whole encoded rows can change places: cheaper than floats.
            blocks = interleaved_to_split(blocks, self.config.head_size)
        return blocks

    def close(self) -> None:
        self._file.close()

    def _load_tokenizer(self) -> Tokenizer | None:
        from nanocupy.tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self._file.metadata)


def _storage_name(tensor: StoredTensor) -> str:
    return _FLOATS[tensor.type.name][0] if tensor.type.name in _FLOATS else tensor.type.name


def _decode(blocks: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """Encoded rows uint8 [..., row_bytes] -> float32 of the tensor's shape."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    encoding = tensor.type
    encoded = blocks.reshape(-1, encoding.block_bytes)  # [num_blocks, block_bytes]
    values = np.empty((len(encoded), encoding.block_size), np.float32)
    step = _SLAB_ELEMENTS // encoding.block_size
    # A damaged scale may be infinite, and infinity times zero warns; verify() reports such values.
    with np.errstate(all="ignore"):
        for begin in range(0, len(encoded), step):
            slab = encoded[begin : begin + step]
            # As one long row: the package works row by row, and short rows cost more than blocks.
            decoded = dequantize(slab.reshape(1, -1), GGMLQuantizationType(tensor.type_id))
            values[begin : begin + step] = decoded.reshape(len(slab), encoding.block_size)
    return values.reshape(tensor.shape)
