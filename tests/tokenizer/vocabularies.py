"""The real vocabularies that tests read, and `tokenizers` oracles built from the same data.

Vocabularies lie in Python packages as plain files; those are found without importing the packages
(importing them needs much that is not installed).
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanocupy.tokenizer import byte_text

RESOURCES = {
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
}


def resource(name: str) -> Path:
    """The file of a vocabulary; skips the test where its package is not installed."""
    package, relative = RESOURCES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} (for its {relative}) is not installed")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        pytest.skip(f"the package {package} no longer carries {relative}")
    return path


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Metadata as plain Python values, by the gguf package (independent of our own reader)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@lru_cache
def split_by_rank(ranks: tuple[bytes, ...]) -> tuple[tuple[str, str], ...]:
    """The merge list of a rank vocabulary: how rank merging spells each token just before the
    last merge (what Hugging Face's converters do)."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = []
    for rank, token in enumerate(ranks):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(
                ((rank_of.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))),
            )
            if best[0] >= rank:
                break
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        if len(parts) == 2:
            merges.append((byte_text.to_text(parts[0]), byte_text.to_text(parts[1])))
    return tuple(merges)


def every_cut(ranks: tuple[bytes, ...]) -> list[tuple[str, str]]:
    """The merge list that names each cut of each token, as LLaMA 3's tokenizer.json has it."""
    known = set(ranks)
    return [
        (byte_text.to_text(token[:cut]), byte_text.to_text(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
