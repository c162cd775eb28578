"""How a model's tensors are laid out for running: projections that share an input are one matrix.

Pure description; a backend allocates the parts and fills them from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanocupy.config import ModelConfig

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Weight:
    """One array of the running model.

    name     e.g. "layers.3.qkv.weight"
    shape    rows first; the sources stacked along them
    sources  canonical names of the checkpoint's tensors, in the order of their rows
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


def weight_layout(config: ModelConfig) -> Iterator[Weight]:
    """Every array of the running model, in the order in which a step reads them. A tied LM head
    has none of its own."""
    shapes = config.tensor_shapes()
    first_of = {parts[0]: fused for fused, parts in FUSED.items()}
    inner = {part for parts in FUSED.values() for part in parts[1:]}
    for name, shape in shapes.items():
        prefix, _, rest = name.rpartition(".")
        owner, _, part = prefix.rpartition(".")
        if part in inner:
            continue
        if part in first_of:
            fused = first_of[part]
            sources = tuple(f"{owner}.{p}.{rest}" for p in FUSED[fused])
            rows = sum(shapes[source][0] for source in sources)
            yield Weight(f"{owner}.{fused}.{rest}", (rows, *shape[1:]), sources)
        else:
            yield Weight(name, shape, (name,))
