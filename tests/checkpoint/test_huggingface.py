"""Hugging Face folders that are sound: every tensor, setting and text found where it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nanocupy.checkpoint import GenerationDefaults, open_checkpoint
from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint
from nanocupy.errors import CheckpointError
from tests.checkpoint.hf_folders import llama_config, llama_tensors, write_folder
from tests.model import reference_models

# Spelled out on its own, not taken from the reader.
TRANSFORMERS_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"self_attn.{part}" for part in ("q_norm", "k_norm")},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def transformers_name(name: str) -> str:
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{TRANSFORMERS_NAMES[part]}.{kind}"


@pytest.mark.parametrize("model", reference_models.MODELS)
def test_every_tensor_of_every_reference_model(model: str, tmp_path: Path) -> None:
    reference_models.write_folder(model, tmp_path)
    stored = reference_models.weights(reference_models.MODELS[model])
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "huggingface"
        assert list(checkpoint.tensors) == list(checkpoint.config.tensor_shapes())
        for name, info in checkpoint.tensors.items():
            expected = stored.pop(transformers_name(name))
            tensor = checkpoint.read(name)
            np.testing.assert_array_equal(tensor, expected, err_msg=name)
            assert (info.shape, info.dtype) == (expected.shape, "float32")
            assert info.nbytes == expected.nbytes
        assert not stored  # nothing in the file was left unread
        assert all(fault is None for _, fault in checkpoint.verify())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float32, "float32"), (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")],
)
def test_storage_types_come_as_views_of_the_file(dtype, name: str, tmp_path: Path) -> None:
    tensors = llama_tensors(dtype)
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, tensors=tensors))
    tensor = checkpoint.read("layers.1.down.weight")
    assert tensor.dtype == np.dtype(dtype)
    assert not tensor.flags.writeable
    assert not tensor.flags.owndata
    np.testing.assert_array_equal(tensor, tensors["model.layers.1.mlp.down_proj.weight"])
    assert {info.dtype for info in checkpoint.tensors.values()} == {name}
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == sum(
        t.nbytes for t in tensors.values()
    )


@pytest.mark.parametrize("num_shards", [2, 7])
def test_shards_equal_one_file(num_shards: int, tmp_path: Path) -> None:
    whole = HuggingFaceCheckpoint(write_folder(tmp_path / "whole"))
    parts = HuggingFaceCheckpoint(write_folder(tmp_path / "parts", num_shards=num_shards))
    assert parts.metadata["shards"] == num_shards
    assert parts.tensors == whole.tensors
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))


def test_hub_cache_of_links(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", num_shards=2)
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.config.name == "acme/tiny"
    np.testing.assert_array_equal(
        checkpoint.read("embed.weight"), llama_tensors()["model.embed_tokens.weight"]
    )


def test_tied_head_that_is_stored_is_dropped(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = llama_config(tie_word_embeddings=True)
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, config, tensors))
    assert checkpoint.config.tied_lm_head
    assert "lm_head.weight" not in checkpoint.tensors


def test_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    """As transformers 5 has it; test_transformers_agrees_on_a_differing_head asks transformers."""
    config = llama_config(tie_word_embeddings=True)
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, config))
    assert not checkpoint.config.tied_lm_head
    assert "lm_head.weight" in checkpoint.tensors


def test_derived_tables_are_passed_over(tmp_path: Path) -> None:
    tensors = llama_tensors()
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4)  # float64
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, tensors=tensors))
    assert list(checkpoint.tensors) == list(checkpoint.config.tensor_shapes())


def test_generation_defaults_and_stop_ids(tmp_path: Path) -> None:
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0,
        "repetition_penalty": 1.1,
        "eos_token_id": [2, 5, 7],
    }
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, generation_config__json=generation))
    assert checkpoint.generation_defaults == GenerationDefaults(0.6, 20, 0.95, 0.0, 1.1, True)
    assert checkpoint.config.eos_ids == (2, 5, 7)
    (tmp_path / "generation_config.json").write_text('{"top_k": 0, "temperature": null}')
    assert HuggingFaceCheckpoint(tmp_path).generation_defaults == GenerationDefaults(top_k=-1)
    (tmp_path / "generation_config.json").unlink()
    assert HuggingFaceCheckpoint(tmp_path).generation_defaults == GenerationDefaults()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config__json": {"chat_template": None}}, None),
        ({"tokenizer_config__json": {"chat_template": "{{ é }}"}}, "{{ é }}"),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "a"},
                        {"name": "default", "template": "b"},
                    ]
                }
            },
            "b",
        ),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "a"}]}}, None),
        (
            {"tokenizer_config__json": {"chat_template": "a"}, "chat_template__jinja": "b\n"},
            "b\n",
        ),
    ],
)
def test_chat_template(files: dict, expected: str | None, tmp_path: Path) -> None:
    assert HuggingFaceCheckpoint(write_folder(tmp_path, **files)).chat_template == expected


def test_unknown_name_and_closed_file(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path))
    with pytest.raises(CheckpointError, match="no tensor is named 'layers_9'"):
        checkpoint.read("layers_9")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("embed.weight")


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nanocupy.checkpoint.safetensors_file.SafetensorsFile.read",
        lambda *_: pytest.fail("a tensor was read"),
    )
    HuggingFaceCheckpoint(write_folder(tmp_path, num_shards=2))


# ---- transformers as the writer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"head_dim": 16}),
        ("Mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("Qwen3", {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1}),
    ],
)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_folders_that_transformers_saves(
    kind: str, options: dict, shard_size: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind + "Config")(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    state = model.state_dict()
    for name in checkpoint.tensors:
        expected = state[transformers_name(name)].float().numpy()
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected)
    assert checkpoint.config.tied_lm_head == config.tie_word_embeddings
    assert checkpoint.config.has_o_bias == options.get("attention_bias", False)


def test_transformers_agrees_on_a_differing_head(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = llama_config(tie_word_embeddings=True)
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    head = model.state_dict()["lm_head.weight"].float().numpy()
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)


def test_facts_are_json(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(
        write_folder(tmp_path / "My-Model", llama_config(dtype="float32"))
    )
    assert json.loads(json.dumps(checkpoint.metadata))["dtype"] == "float32"
    assert checkpoint.config.name == "My-Model"
