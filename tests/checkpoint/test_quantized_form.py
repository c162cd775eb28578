"""`quantized_form` says what `read_quantized` will give, in every format, and reads no codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from nanocupy.checkpoint import Checkpoint, open_checkpoint
from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.errors import CheckpointError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView
from nanocupy.quantized import QuantizedForm
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.legacy_files import layout_b
from tests.checkpoint.nanoinfer2_files import CODES, Tensor, honest
from tests.checkpoint.quantized_folders import quantized_folder
from tests.checkpoint.test_hf_quantized import FORMS, row_layer
from tests.checkpoint.test_nanoinfer_2_quantized import FORMS as NANO_FORMS
from tests.checkpoint.test_nanoinfer_2_quantized import Packed
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config


def folder(form: str) -> Callable[[Path], Checkpoint]:
    def make(path: Path) -> Checkpoint:
        settings, layer, _ = FORMS[form]
        layer = row_layer(layer) if isinstance(layer, str) else layer
        quantized_folder(path, settings, layer, skip=("layers.0.self_attn.q",))
        return open_checkpoint(path)

    return make


def gguf_file(type_id: Type) -> Callable[[Path], Checkpoint]:
    def make(path: Path) -> Checkpoint:
        config = tiny_config(hidden_size=256, intermediate_size=256, head_size=64, num_layers=1)
        return open_checkpoint(
            write_gguf(path / "m.gguf", TinyCheckpoint(config), matrix_type=type_id)
        )

    return make


def nanoinfer2(dtype: str, with_order: bool) -> Callable[[Path], Checkpoint]:
    def make(path: Path) -> Checkpoint:
        (path / "m.nano").write_bytes(Packed(dtype, with_order=with_order).file().pack())
        return open_checkpoint(path / "m.nano")

    return make


def int8_of(group_size: int) -> Callable[[Path], Checkpoint]:
    """96 inputs: groups of 64 straddle the rows."""

    def make(path: Path) -> Checkpoint:
        model = TinyCheckpoint(tiny_config(hidden_size=96, head_size=24), int8_group=group_size)
        write_nanoinfer2(model, path / "m.nano")
        return open_checkpoint(path / "m.nano")

    return make


def int8_vector(path: Path) -> Checkpoint:
    file = honest(TinyCheckpoint(tiny_config(num_layers=1), dtype="bfloat16"))
    at = next(i for i, t in enumerate(file.tensors) if t.name == b"final_norm.weight")
    data = bytes(range(32)).ljust(256, b"\0") + b"\0\0\x80\x3f" * 2
    file.tensors[at] = Tensor(
        b"final_norm.weight", CODES["int8"], group_size=16, data=data, shape=(32,)
    )
    (path / "m.nano").write_bytes(file.pack())
    return open_checkpoint(path / "m.nano")


def legacy(group_size: int) -> Callable[[Path], Checkpoint]:
    def make(path: Path) -> Checkpoint:
        model = TinyCheckpoint(
            tiny_config(hidden_size=96, head_size=24, intermediate_size=128, num_layers=1)
        )
        (path / "m.bin").write_bytes(layout_b(model, group_size))
        return open_checkpoint(path / "m.bin")

    return make


def view(of: Callable[[Path], Checkpoint], kind: str) -> Callable[[Path], Checkpoint]:
    return lambda path: QuantizedView(of(path), kind)


def plain(path: Path) -> Checkpoint:
    return RandomCheckpoint(tiny_config())


SOURCES: dict[str, Callable[[Path], Checkpoint]] = {
    "random": plain,
    "NanoInfer 2 int8": int8_of(32),
    "NanoInfer 2 int8 that straddles": int8_of(64),
    "NanoInfer 2 int8 vector": int8_vector,
    "legacy": legacy(32),
    "legacy that straddles": legacy(64),
    "view of floats": view(plain, "fp8"),
    "view of kept codes": view(folder("gptq act-order"), "int4"),
    "view of other codes": view(folder("gptq act-order"), "int8"),
    **{f"folder {form}": folder(form) for form in FORMS},
    **{
        f"GGUF {type_id.name}": gguf_file(type_id)
        for type_id in (
            Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q6_K, Type.BF16
        )
    },
    **{f"NanoInfer 2 {form}": nanoinfer2(*form) for form in NANO_FORMS},
}  # fmt: skip

NO_CODES = {"random", "NanoInfer 2 int8 vector", "GGUF Q5_1", "GGUF BF16"}


@pytest.mark.parametrize("source", SOURCES)
def test_the_form_is_that_of_what_is_read(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SOURCES[source](tmp_path) as checkpoint:
        wanted: dict[str, Any] = {}
        for name in checkpoint.tensors:
            matrix = checkpoint.read_quantized(name)
            wanted[name] = matrix and QuantizedForm(
                matrix.kind, matrix.group_size, matrix.input_order is not None
            )
        for reads in ("read", "read_quantized"):

            def never(*_: object) -> None:
                raise AssertionError("codes are read")

            if not isinstance(checkpoint, RandomCheckpoint):
                monkeypatch.setattr(checkpoint, reads, never)
        assert {name: checkpoint.quantized_form(name) for name in wanted} == wanted
        assert any(wanted.values()) == (source not in NO_CODES)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="x"):
            checkpoint.quantized_form("x")


def test_an_order_of_none_is_named(tmp_path: Path) -> None:
    settings, make, _ = FORMS["gptq act-order"]

    def damage(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 99

    quantized_folder(tmp_path, settings, make, change=damage)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.quantized_form("layers.0.up.weight") == QuantizedForm("int4", 16, True)
    with pytest.raises(CheckpointError, match=r"layers.1.up.weight has a g_idx of 99"):
        checkpoint.quantized_form("layers.1.up.weight")
