"""A model that no file holds: normal random weights in the shape of a config, for benches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanocupy.checkpoint.base import FLOAT_DTYPES, Checkpoint, TensorInfo
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer


class RandomCheckpoint(Checkpoint):
    """Normal random weights, never zeros: data of all zeros runs faster than real data does.

    Matrices have the standard deviation 1 / sqrt(columns), so that activations keep their size;
    biases 0.1; norms are one. The same config and seed give the same weights. No tokenizer.
    """

    format = "random"

    def __init__(self, config: ModelConfig, dtype: str = "bfloat16", seed: int = 0) -> None:
        """dtype: float32, float16 or bfloat16."""
        self.path = Path(f"{config.name or config.architecture} (random weights)")
        self.config = config
        self.seed = seed
        self.dtype = FLOAT_DTYPES[dtype]
        self.tensors = {
            name: TensorInfo(name, dims, dtype, math.prod(dims) * self.dtype.itemsize)
            for name, dims in config.tensor_shapes().items()
        }
        self._order = {name: number for number, name in enumerate(self.tensors)}

    def deviation(self, name: str) -> float | None:
        """The standard deviation of a tensor's values; None where they are all one."""
        if name.endswith("norm.weight"):
            return None
        return 0.1 if name.endswith(".bias") else self.tensors[name].shape[-1] ** -0.5

    def seed_of(self, name: str) -> int:
        """A seed for this tensor alone."""
        return self.seed << 32 | self._order[name]

    def read(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        dims, deviation = self.tensors[name].shape, self.deviation(name)
        if deviation is None:
            return np.ones(dims, self.dtype)
        values = np.random.default_rng(self.seed_of(name)).standard_normal(dims, np.float32)
        values *= deviation
        return values.astype(self.dtype, copy=False)

    def _load_tokenizer(self) -> Tokenizer | None:
        return None
