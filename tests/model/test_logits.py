"""The model on NumPy against transformers: logits, greedy texts, formats, chunks and batches.

The tolerance is that of the fixtures: |error| <= 2e-4 * (|reference| + rms of the row). What must
be wrong (the negative controls) is wrong tenfold, else a fixture would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nanocupy.checkpoint import GroupedInt8, open_checkpoint
from nanocupy.config import ModelConfig, RopeScaling
from nanocupy.errors import CheckpointError
from nanocupy.exporters.legacy import write_legacy
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView
from tests.model.driving import (
    CONTEXT,
    FIXTURES,
    LoadedModel,
    Reference,
    every_row,
    generated,
    load,
    references,
)
from tests.model.reference_models import (
    MODELS,
    NUM_GENERATED,
    prompts,
    weights_sha256,
    write_folder,
)

TOLERANCE = 2e-4
ALL = sorted(MODELS)

# The legacy layouts that can express a model, and the kind that a reader must be told.
LEGACY = {
    "llama": ("ABD", "llama2"),
    "llama-mqa-tied": ("ABD", "llama2"),
    "llama-llama3": ("ABD", "llama3"),
    "qwen3": ("C", "qwen3"),
}


class Models:
    """The reference models as folders and loaded, each made once."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._loaded: dict[str, LoadedModel] = {}

    def folder(self, name: str) -> Path:
        path = self.base / name
        return path if path.exists() else write_folder(name, path)

    def __getitem__(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            # Not closed: weights may be views of the file.
            self._loaded[name] = load(open_checkpoint(self.folder(name)))
        return self._loaded[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


# ------------------------------------------------------------------------- the fixtures themselves


@pytest.mark.parametrize("name", ALL)
def test_fixture_was_made_of_these_weights(name: str) -> None:
    record = json.loads((FIXTURES / "logits.json").read_text())["models"]
    assert sorted(record) == ALL
    assert record[name]["weights_sha256"] == weights_sha256(MODELS[name])
    assert [r.prompt for r in references(name)] == [p.tolist() for p in prompts(MODELS[name])]
    assert min(record[name]["logit_std"]) >= 1
    for reference in references(name):
        assert len(reference.greedy) == NUM_GENERATED
        assert reference.error(_rebuilt(reference)) == 0


def _rebuilt(reference: Reference) -> np.ndarray:
    """The reference's own logits where they are kept, zeros elsewhere."""
    logits = np.zeros((len(reference.tokens), reference.whole.shape[1]))
    logits[:, reference.columns] = reference.sampled
    logits[[len(reference.prompt) - 1, -1]] = reference.whole
    return logits


# ------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers(models: Models, name: str, dtype: type) -> None:
    for reference in references(name):
        (logits,) = every_row(models[name].runner(dtype), [reference])
        assert reference.error(logits) <= TOLERANCE
        chosen = logits[len(reference.prompt) - 1 :].argmax(axis=-1)
        assert chosen.tolist() == reference.greedy


@pytest.mark.parametrize("name", ALL)
def test_greedy_texts_equal_transformers(models: Models, name: str) -> None:
    for reference in references(name):
        assert generated(models[name].engine(), [reference.prompt]) == [reference.greedy]


# ------------------------------------------------------------------------- negative controls


def _negatives(name: str) -> Iterator[tuple[str, Callable[[ModelConfig], ModelConfig]]]:
    """What can be got wrong about the model: a label, and the config that has it wrong."""
    raw = MODELS[name].config
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"

    def scaled(**changes) -> Callable[[ModelConfig], ModelConfig]:
        def change(config: ModelConfig) -> ModelConfig:
            values = vars(config.rope_scaling) | changes
            return config.with_(rope_scaling=RopeScaling(**values))

        return change

    yield "base", lambda c: c.with_(rope_theta=c.rope_theta * 3)
    if kind != "default":
        yield "scaling", lambda c: c.with_(rope_scaling=RopeScaling())
        yield "factor", scaled(factor=1.5)
    if kind == "dynamic":
        yield "context", scaled(original_context=64)
    if kind == "llama3":
        yield "original", scaled(original_context=rope["original_max_position_embeddings"] // 4)
        yield "ramp", scaled(low_freq_factor=1.0, high_freq_factor=1.001)
    if kind == "yarn":
        yield "attention-factor", scaled(attention_factor=1.0)
        yield "betas", scaled(beta_fast=12.0, beta_slow=2.0)
        yield "truncate", scaled(truncate=not rope.get("truncate", True))
    if raw.get("attention_bias") or raw["model_type"] == "qwen2":
        yield "qkv-bias", lambda c: c.with_(has_qkv_bias=False)
    if raw.get("attention_bias"):
        yield "o-bias", lambda c: c.with_(has_o_bias=False)
    if raw.get("mlp_bias"):
        yield "mlp-bias", lambda c: c.with_(has_mlp_bias=False)
    if raw["model_type"] == "qwen3":
        yield "qk-norm", lambda c: c.with_(has_qk_norm=False)
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        yield "layers", lambda c: c.with_(num_layers=c.num_layers - 1)


@pytest.mark.parametrize(
    ("name", "label", "change"),
    [(name, *negative) for name in ALL for negative in _negatives(name)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_negative_control_misses_tenfold(
    models: Models, name: str, label: str, change: Callable[[ModelConfig], ModelConfig]
) -> None:
    right = models[name]
    wrong = LoadedModel(change(right.config), right.weights)
    reference = references(name)[-1]
    (logits,) = every_row(wrong.runner(), [reference])
    assert reference.error(logits) > 10 * TOLERANCE


# ------------------------------------------------------------------------- through other formats


@pytest.mark.parametrize("name", ALL)
def test_same_through_nanoinfer2(models: Models, name: str, tmp_path: Path) -> None:
    with open_checkpoint(models.folder(name)) as source:
        write_nanoinfer2(source, tmp_path / "model.nano")
    with open_checkpoint(tmp_path / "model.nano") as checkpoint:
        assert checkpoint.format == "nanoinfer-2"
        _check_same(models[name], load(checkpoint), name)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "D1" if x == "D" else x) for name, (xs, _) in LEGACY.items() for x in xs if x != "B"],
)
def test_same_through_legacy_float32(
    models: Models, name: str, layout: str, tmp_path: Path
) -> None:
    with open_checkpoint(models.folder(name)) as source:
        write_legacy(source, tmp_path / "model.bin", layout=layout)
    with open_checkpoint(tmp_path / "model.bin", legacy_kind=LEGACY[name][1]) as checkpoint:
        assert checkpoint.format == f"nanoinfer-legacy-{layout[0]}"
        _check_same(models[name], load(checkpoint), name)


def _check_same(original: LoadedModel, copy: LoadedModel, name: str) -> None:
    """Float32 to float32: weights equal bit for bit, and so logits and texts."""
    assert copy.weights.keys() == original.weights.keys()
    for key, weight in original.weights.items():
        np.testing.assert_array_equal(copy.weights[key], weight, err_msg=key)
    for reference in references(name):
        (logits,) = every_row(copy.runner(), [reference])
        assert reference.error(logits) <= TOLERANCE
        assert generated(copy.engine(), [reference.prompt]) == [reference.greedy]


@pytest.mark.parametrize("layout", ["B", "D2"])
@pytest.mark.parametrize("name", [name for name, (xs, _) in LEGACY.items() if "B" in xs])
def test_legacy_int8_is_within_quantisation(
    models: Models, name: str, layout: str, tmp_path: Path
) -> None:
    original = models[name]
    with open_checkpoint(models.folder(name)) as source:
        write_legacy(source, tmp_path / "model.bin", layout=layout)
        with open_checkpoint(tmp_path / "model.bin", legacy_kind=LEGACY[name][1]) as checkpoint:
            num_quantised = 0
            for tensor in checkpoint.tensors:
                exact, stored = source.read(tensor), checkpoint.read(tensor)
                if isinstance(stored, GroupedInt8):
                    num_quantised += 1
                    groups = exact.reshape(-1, stored.group_size)
                    step = abs(groups).max(axis=1, keepdims=True) / 127
                    error = abs(stored.dequantize().reshape(groups.shape) - groups)
                    assert (error <= step * 0.5001).all(), tensor
                else:
                    np.testing.assert_array_equal(stored, exact, err_msg=tensor)
            assert num_quantised >= 7 * original.config.num_layers
            copy = load(checkpoint)
    for reference in references(name):
        (logits,) = every_row(copy.runner(), [reference])
        # About half a percent of every weight: visible in the logits, and far from another model.
        assert TOLERANCE < reference.error(logits) < 0.2


# How far fewer bits may move logits, as a share of their own size: half as much again as they do
# here. Random weights forgive least.
QUANTISED = {"int8": 0.03, "fp8": 0.15, "int4": 0.3}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fewer_bits_are_within_quantisation(
    models: Models, name: str, kind: str, tmp_path: Path
) -> None:
    with open_checkpoint(models.folder(name)) as source:
        write_nanoinfer2(QuantizedView(source, kind), tmp_path / "m.nano")
    with open_checkpoint(tmp_path / "m.nano") as checkpoint:
        assert checkpoint.read_quantized("layers.0.q.weight") is not None
        copy = load(checkpoint)
    exact = np.concatenate(every_row(models[name].runner(), references(name)))
    logits = np.concatenate(every_row(copy.runner(), references(name)))
    error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
    assert TOLERANCE < error < QUANTISED[kind]


@pytest.mark.parametrize("name", [name for name in ALL if name not in LEGACY])
def test_legacy_refuses_what_it_cannot_express(models: Models, name: str, tmp_path: Path) -> None:
    with open_checkpoint(models.folder(name)) as source:
        for layout in ("A", "B", "C", "D1", "D2"):
            with pytest.raises(CheckpointError, match="layout"):
                write_legacy(source, tmp_path / "model.bin", layout=layout)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- chunks and batches


@pytest.mark.parametrize("chunk_size", [1, 7, 16, CONTEXT])
@pytest.mark.parametrize("name", ALL)
def test_chunked_prefill_equals_one_shot(models: Models, name: str, chunk_size: int) -> None:
    for reference in references(name):
        for block_size in (16, 5):
            runner = models[name].runner(block_size=block_size)
            (logits,) = every_row(runner, [reference], chunk_size)
            assert reference.error(logits) <= TOLERANCE
        engine = models[name].engine(max_step_tokens=chunk_size)
        assert generated(engine, [reference.prompt]) == [reference.greedy]


@pytest.mark.parametrize("name", ALL)
def test_batched_equals_alone(models: Models, name: str) -> None:
    batch_of = references(name)
    for chunk_size in (9, CONTEXT):
        for reference, logits in zip(
            batch_of, every_row(models[name].runner(), batch_of, chunk_size), strict=True
        ):
            assert reference.error(logits) <= TOLERANCE
    greedy = [reference.greedy for reference in batch_of]
    texts = generated(models[name].engine(), [reference.prompt for reference in batch_of])
    assert texts == greedy


@pytest.mark.parametrize("name", ALL)
def test_preempted_equals_alone(models: Models, name: str) -> None:
    """A cache too small for all at once: whoever is sent back is computed again, to the same."""
    batch_of = references(name)
    # The longest request fits with one block to spare, so that the others must give way.
    num_blocks = 2 + -(-(max(len(r.prompt) for r in batch_of) + NUM_GENERATED) // 16)
    engine = models[name].engine(num_blocks=num_blocks, max_step_tokens=32)
    preempted = []
    original = engine.scheduler._preempt
    engine.scheduler._preempt = lambda *args: (preempted.append(args[0]), original(*args))
    texts = generated(engine, [reference.prompt for reference in batch_of])
    assert texts == [reference.greedy for reference in batch_of]
    assert preempted
