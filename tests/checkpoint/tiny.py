"""Tiny models in memory: any ModelConfig becomes a `Checkpoint` of seeded random tensors."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanocupy.checkpoint.base import Checkpoint, GenerationDefaults, GroupedInt8, TensorInfo
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError
from nanocupy.tokenizer.base import Tokenizer

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A LLaMA of two layers, 4 query and 2 KV heads of 8, untied; `changes` replace fields."""
    values: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "max_context": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_id": 1,
        "eos_ids": (2,),
    }
    return ModelConfig(**(values | changes))


class TinyCheckpoint(Checkpoint):
    """Random tensors of `config`, the same for the same seed, name and shape.

    dtype       storage of matrices (float32, float16, bfloat16), vectors follow
                `vector_dtype` or else the same
    int8_group  where given, matrices are `GroupedInt8` with this group size
    """

    format = "huggingface"

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: str = "float32",
        vector_dtype: str | None = None,
        int8_group: int | None = None,
        tokenizer: Tokenizer | None = None,
        chat_template: str | None = None,
        generation_defaults: GenerationDefaults | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path("tiny-in-memory")
        self.config = config
        self.chat_template = chat_template
        self.generation_defaults = generation_defaults or GenerationDefaults()
        self.metadata = metadata or {}
        self._tokenizer_given = tokenizer
        self.arrays: dict[str, np.ndarray | GroupedInt8] = {}
        tensors = {}
        for name, shape in config.tensor_shapes().items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            storage = dtype if len(shape) == 2 else vector_dtype or dtype
            if len(shape) == 2:
                values = rng.standard_normal(shape) / np.sqrt(shape[1])
            elif name.endswith("norm.weight"):
                values = 1.0 + 0.2 * rng.standard_normal(shape)
            else:
                values = 0.3 * rng.standard_normal(shape)
            array: np.ndarray | GroupedInt8 = values.astype(np.float32).astype(DTYPES[storage])
            nbytes = array.nbytes
            if int8_group is not None and len(shape) == 2:
                array = random_int8(rng, shape, int8_group)
                storage, nbytes = "int8", array.values.nbytes + array.scales.nbytes
            self.arrays[name] = array
            tensors[name] = TensorInfo(name, shape, storage, nbytes)
        self.tensors = tensors

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        if name not in self.arrays:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self.arrays[name]

    def _load_tokenizer(self) -> Tokenizer | None:
        return self._tokenizer_given


def random_int8(rng: np.random.Generator, shape: tuple[int, ...], group_size: int) -> GroupedInt8:
    """Any int8 values in [-127, 127] with positive float32 scales."""
    count = int(np.prod(shape))
    values = rng.integers(-127, 128, shape, dtype=np.int8)
    scales = rng.uniform(1e-3, 2e-3, count // group_size).astype(np.float32)
    return GroupedInt8(values, scales, group_size)
