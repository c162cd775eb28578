"""A tied model as one whose LM head has a copy of the embedding to itself: for two types."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, GroupedInt8
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import EMBEDDING, LM_HEAD
from nanocupy.quantized import QuantizedForm, QuantizedMatrix

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with `lm_head.weight` as a tensor of its own; random weights of a tied model
    become random weights of an untied one. A model that is not tied is given back."""
    config = checkpoint.config
    if not config.tied_lm_head:
        return checkpoint
    if isinstance(checkpoint, RandomCheckpoint):
        config = config.with_(tied_lm_head=False)
        return RandomCheckpoint(config, checkpoint.dtype.name, checkpoint.seed)
    return _Untied(checkpoint)


class _Untied(Checkpoint):
    """Looks through to a tied checkpoint, which stays the one to be closed."""

    def __init__(self, tied: Checkpoint) -> None:
        self._tied = tied
        self.path, self.format = tied.path, tied.format
        self.config = tied.config.with_(tied_lm_head=False)
        self.tensors = {
            **tied.tensors, LM_HEAD: replace(tied.tensors[EMBEDDING], name=LM_HEAD)
        }  # fmt: skip
        self.chat_template = tied.chat_template
        self.generation_defaults = tied.generation_defaults
        self.metadata = tied.metadata

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        return self._tied.read(_stored_name(name))

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        return self._tied.read_quantized(_stored_name(name))

    def quantized_form(self, name: str) -> QuantizedForm | None:
        return self._tied.quantized_form(_stored_name(name))

    def _load_tokenizer(self) -> Tokenizer | None:
        return self._tied.tokenizer


def _stored_name(name: str) -> str:
    return EMBEDDING if name == LM_HEAD else name
