"""Hugging Face folders: config.json, safetensors (one file, or shards with an index), tokenizer.

Owns the folder's layout and the names of its tensors; `hf_config` owns what the settings mean and
`safetensors_file` the container. Weights are views of the mapped files, never copies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, TensorInfo, check_tensors
from nanocupy.checkpoint.fields import Fields, generation_defaults
from nanocupy.checkpoint.hf_config import model_config
from nanocupy.checkpoint.hf_quantization import quantization_scheme
from nanocupy.checkpoint.hf_quantized import IGNORED_PARTS, PARTS, Place, QuantizedLayer
from nanocupy.checkpoint.safetensors_file import READABLE, SafetensorsFile
from nanocupy.errors import CheckpointError
from nanocupy.quantized import QuantizedForm, QuantizedMatrix
from nanocupy.strict_json import (
    MAX_TOKENIZER_JSON_BYTES,
    read_object,
    read_small_file,
    shown,
)

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_SHARDS = 4096

_TOP_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)\.(weight|bias)")
# Tables that older transformers saved and that follow from the config.
_DERIVED = re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.[a-z_]+")

_DEFAULT_KEYS = {
    name: name
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample")
}


def canonical_name(name: str) -> str | None:
    """nanocupy's name of a transformers tensor; None for one nanocupy does not know."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    part = _LAYER_PARTS.get(match[2]) if match else None
    return f"layers.{match[1]}.{part}.{match[3]}" if match and part else None


class HuggingFaceCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it and the hub serves it; see `Checkpoint`.

    Links inside the folder are followed (the hub's cache consists of them), but a shard is only
    ever a plain file name within it. Raises CheckpointError, ConfigError.
    """

    format = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._files: list[SafetensorsFile] = []
        self._places: dict[str, Place] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}") from None

    def _open(self) -> None:
        config = read_object(self.path / "config.json")
        if config is None:
            gguf = next(self.path.glob("*.gguf"), None)
            if gguf is not None:
                self._fail(f"no config.json in this folder; to read {gguf.name}, name the file")
            self._fail("no config.json in this folder; it is not a Hugging Face model")
        generation = read_object(self.path / "generation_config.json") or {}
        self.config = model_config(config, generation, str(self.path), self._name())
        self.generation_defaults = generation_defaults(
            Fields(f"{self.path}/generation_config.json", generation), _DEFAULT_KEYS
        )
        self.chat_template = self._read_chat_template()

        self.scheme = quantization_scheme(config, str(self.path))
        for stored_name, place in self._take_quantized(self._open_weights()).items():
            name = canonical_name(stored_name)
            if name is None:
                self._fail(
                    f"tensor {shown(stored_name)} in {place[0].path.name} is not part of "
                    f"{self.config.architecture} models"
                )
            if place[1].dtype not in READABLE:
                self._fail(
                    f"tensor {stored_name} in {place[0].path.name} is stored as {place[1].dtype}; "
                    f"nanocupy reads {', '.join(READABLE)}"
                )
            self._places[name] = place
        self._settle_lm_head()
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, stored.shape, READABLE[stored.dtype][0], stored.nbytes)
            for name, (_, stored) in self._places.items()
        } | {
            name: TensorInfo(name, layer.shape, layer.dtype, layer.nbytes)
            for name, layer in self._layers.items()
        }
        check_tensors(self.path, self.config, self.tensors)
        self.tensors = {name: self.tensors[name] for name in self.config.tensor_shapes()}
        self.metadata = self._facts(config)

    def _name(self) -> str:
        """The model's name: the folder's, or in a hub cache the repository's."""
        folder = self.path.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return folder.name

    def _facts(self, config: dict[str, Any]) -> dict[str, Any]:
        facts: dict[str, Any] = {"shards": len(self._files)}
        if self.scheme is not None:
            facts["quantization"] = self.scheme.label
        for key in ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version"):
            if isinstance(config.get(key), (str, list)):
                facts[key] = config[key]
        return facts

    # ---- weights

    def _open_weights(self) -> dict[str, Place]:
        """Every stored tensor but the derived tables, by its stored name."""
        if os.path.lexists(self.path / _WHOLE):
            shards, listed = [_WHOLE], None
        else:
            listed = self._read_index()
            shards = sorted(set(listed.values()))
        found: dict[str, Place] = {}
        for shard in shards:
            if not (self.path / shard).exists():
                source = "the target of a link" if listed is None else f"named by {_INDEX}"
                self._fail(f"{shard}, {source}, is missing; download the model again")
            file = SafetensorsFile(self.path / shard)
            self._files.append(file)
            for name, stored in file.tensors.items():
                if _DERIVED.fullmatch(name):
                    continue
                if name in found:
                    self._fail(
                        f"tensor {shown(name)} is in both {found[name][0].path.name} and {shard}"
                    )
                if listed is not None and listed.get(name) != shard:
                    self._fail(
                        f"tensor {shown(name)} is in {shard}, but {_INDEX} says "
                        f"{shown(listed.get(name))}"
                    )
                found[name] = (file, stored)
        for name, shard in (listed or {}).items():
            if name not in found and not _DERIVED.fullmatch(name):
                self._fail(f"tensor {shown(name)} is not in {shard}, where {_INDEX} says it is")
        return found

    def _read_index(self) -> dict[str, str]:
        index = read_object(self.path / _INDEX)
        if index is None:
            pickled = next(self.path.glob("pytorch_model*.bin"), None)
            if pickled is not None:
                self._fail(
                    f"only {pickled.name}: pickled weights can run code when they are read; "
                    "save the model as safetensors"
                )
            self._fail(f"neither {_WHOLE} nor {_INDEX} in this folder")
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed:
            self._fail(f"{_INDEX}: weight_map is {shown(listed)}; it must name the tensors' files")
        for name, shard in listed.items():
            if (
                not isinstance(shard, str)
                or not shard.endswith(".safetensors")
                or re.search(r"[/\\:\x00-\x1f]", shard)
                or len(shard.encode()) > 255
            ):
                self._fail(
                    f"{_INDEX}: weight_map gives tensor {shown(name)} the file {shown(shard)}; "
                    "only plain .safetensors names within the folder are allowed"
                )
        if len(set(listed.values())) > _MAX_SHARDS:
            self._fail(f"{_INDEX}: more than {_MAX_SHARDS} shards")
        return listed

    def _take_quantized(self, found: dict[str, Place]) -> dict[str, Place]:
        """Make `_layers` of the tensors of quantised layers, and give the others.

        The stored tensors decide which layers are quantised: the config's list of those that are
        not says the same in patterns that every writer means differently.
        """
        self._layers: dict[str, QuantizedLayer] = {}
        if self.scheme is None:
            return found
        parts: dict[str, dict[str, Place]] = {}
        others: dict[str, Place] = {}
        for stored_name, place in found.items():
            module, _, part = stored_name.rpartition(".")
            if part == "weight" and place[1].dtype != "F8_E4M3":
                others[stored_name] = place
            elif part in PARTS[self.scheme.method]:
                parts.setdefault(module, {})[part] = place
            elif part not in IGNORED_PARTS:
                others[stored_name] = place
        shapes = self.config.tensor_shapes()
        for module, of_module in parts.items():
            name = canonical_name(f"{module}.weight")
            if name not in shapes or name == "embed.weight":
                self._fail(
                    f"tensor {shown(f'{module}.{next(iter(of_module))}')} is not part of quantised "
                    f"{self.config.architecture} models"
                )
            if f"{module}.weight" in others:
                self._fail(
                    f"tensor {name} is stored in floating point, but has "
                    f"{' and '.join(of_module)} of a quantised layer beside it"
                )
            where = f"{self.path}: tensor {name}"
            self._layers[name] = QuantizedLayer(self.scheme, shapes[name], of_module, where)
        # AutoGPTQ wrote biases of zeros into every layer, whatever the model has.
        return {
            stored_name: place
            for stored_name, place in others.items()
            if not (
                stored_name.endswith(".bias")
                and canonical_name(stored_name) not in shapes
                and stored_name.removesuffix(".bias") in parts
                and place[1].dtype in READABLE
                and not place[0].read(stored_name).any()
            )
        }

    def _settle_lm_head(self) -> None:
        """A tied head that is stored all the same is dropped, unless it is another matrix.

        transformers 5 compares the two and unties a head that differs, whatever the config says;
        rows spread over the matrix tell the same without reading all of it.
        """
        if not self.config.tied_lm_head or "lm_head.weight" not in self._places:
            return
        head = self._places["lm_head.weight"][1]
        num_rows = self.config.vocab_size
        shape = (num_rows, self.config.hidden_size)
        if "embed.weight" in self._places and head.shape == shape:
            embed = self._places["embed.weight"][1]
            rows = np.linspace(0, num_rows - 1, min(num_rows, 64)).astype(np.int64)
            if embed.shape == shape and not np.array_equal(
                self.read("lm_head.weight")[rows], self.read("embed.weight")[rows]
            ):
                self.config = self.config.with_(tied_lm_head=False)
                return
        del self._places["lm_head.weight"]

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, float32, float16 or bfloat16, or a quantised layer's
        values in float32; see `Checkpoint`."""
        if name in self._layers:
            return self._layers[name].read().dequantize()
        if name not in self._places:
            self._fail(f"no tensor is named {shown(name)}")
        file, stored = self._places[name]
        return file.read(stored.name)

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """A layer of AWQ, GPTQ or FP8 as it is; see `Checkpoint`."""
        if name in self._layers:
            return self._layers[name].read()
        if name not in self._places:
            self._fail(f"no tensor is named {shown(name)}")
        return None

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """Known from the headers and g_idx; see `Checkpoint`. Raises CheckpointError for a g_idx
        that is none."""
        if name in self._layers:
            return self._layers[name].form()
        if name not in self._places:
            self._fail(f"no tensor is named {shown(name)}")
        return None

    def close(self) -> None:
        for file in self._files:
            file.close()

    # ---- text

    def _read_chat_template(self) -> str | None:
        """chat_template.jinja, else the (default) template of tokenizer_config.json."""
        source = self.path / "chat_template.jinja"
        data = read_small_file(source, _MAX_TEMPLATE_BYTES)
        if data is not None:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                raise CheckpointError(f"{source}: not UTF-8 text") from None
        source = self.path / "tokenizer_config.json"
        template = (read_object(source, MAX_TOKENIZER_JSON_BYTES) or {}).get("chat_template")
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template is not None and (
            not isinstance(template, str) or len(template) > _MAX_TEMPLATE_BYTES
        ):
            raise CheckpointError(
                f"{source}: chat_template is {shown(template)}; it must be text of at most "
                f"{_MAX_TEMPLATE_BYTES} characters, or a list of named ones"
            )
        return template

    def _load_tokenizer(self) -> Tokenizer | None:
        from nanocupy.tokenizer import tokenizer_from_hf_folder

        return tokenizer_from_hf_folder(self.path)
