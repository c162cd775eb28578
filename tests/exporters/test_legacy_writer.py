"""Legacy files as they are written equal those packed by plain loops, byte for byte."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import GroupedInt8, dequantized
from nanocupy.checkpoint.legacy_layouts import KINDS, parse_rope_scaling
from nanocupy.config import ModelConfig, RopeScaling
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.exporters.legacy import write_legacy
from tests.checkpoint import legacy_files
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

QWEN3 = {"architecture": "qwen3", "has_qk_norm": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN3 |= {"bos_id": None, "eos_ids": ()}


def written(path: Path, model: TinyCheckpoint, layout: str) -> bytes:
    write_legacy(model, path, layout=layout)
    return path.read_bytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_layouts_byte_for_byte(tmp_path: Path, tied: bool, dtype: str) -> None:
    model = TinyCheckpoint(tiny_config(tied_lm_head=tied), dtype=dtype)
    assert written(tmp_path / "d.bin", model, "D1") == legacy_files.layout_d(model, 1)
    qwen = TinyCheckpoint(tiny_config(tied_lm_head=tied, head_size=12, **QWEN3), dtype=dtype)
    assert written(tmp_path / "c.bin", qwen, "C") == legacy_files.layout_c(qwen)
    got, want = written(tmp_path / "a.bin", model, "A"), legacy_files.layout_a(model)
    assert len(got) == len(want)
    assert got[:28] == want[:28]
    # The tables of cos and sin may differ in the last bit.
    np.testing.assert_allclose(
        np.frombuffer(got[28:], "<f4"), np.frombuffer(want[28:], "<f4"), rtol=0, atol=1e-6
    )
    start = 28 + 4 * sum(
        np.prod(s) for n, s in model.config.tensor_shapes().items() if n[:2] != "lm"
    )
    assert got[:start] == want[:start]


@pytest.mark.parametrize("tied", [False, True])
def test_int8_layouts_byte_for_byte(tmp_path: Path, tied: bool) -> None:
    # Rows of 96 and 64: groups of 64 halve to 32.
    config = tiny_config(tied_lm_head=tied, hidden_size=96, head_size=24)
    model = TinyCheckpoint(config)
    model.arrays["layers.0.gate.weight"][0, :32] = 0  # type: ignore[index]
    assert written(tmp_path / "b.bin", model, "B") == legacy_files.layout_b(model, 32)
    assert written(tmp_path / "d.bin", model, "D2") == legacy_files.layout_d(model, 2, 32)
    wide = TinyCheckpoint(tiny_config(hidden_size=64, head_size=16, tied_lm_head=tied))
    assert written(tmp_path / "b.bin", wide, "B") == legacy_files.layout_b(wide, 64)


def test_int8_sources_keep_their_very_bits(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, head_size=16)
    model = TinyCheckpoint(config, int8_group=64)
    write_legacy(model, tmp_path / "d.bin", layout="D2")
    opened = open_checkpoint(tmp_path / "d.bin")
    for name in ("layers.1.q.weight", "layers.0.down.weight", "embed.weight"):
        got, want = opened.read(name), model.read(name)
        assert isinstance(got, GroupedInt8)
        assert isinstance(want, GroupedInt8)
        np.testing.assert_array_equal(got.values, want.values)
        np.testing.assert_array_equal(got.scales, want.scales)


@pytest.mark.parametrize("layout", ["A", "D1", "C", "B", "D2"])
def test_round_trip(tmp_path: Path, layout: str) -> None:
    changes = QWEN3 if layout == "C" else {}
    model = TinyCheckpoint(tiny_config(tied_lm_head=layout == "C", **changes))
    write_legacy(model, tmp_path / "m.bin", layout=layout)
    with open_checkpoint(tmp_path / "m.bin") as opened:
        assert opened.config == model.config.with_(tied_lm_head=False)
        for name in model.tensors:
            want = dequantized(model.read(name))
            tolerance = np.abs(want).max() / 250 if layout in "BD2" else 0
            np.testing.assert_allclose(dequantized(opened.read(name)), want, rtol=0, atol=tolerance)
        if layout == "C":  # written out, as the layout has no tied head
            np.testing.assert_array_equal(opened.read("lm_head.weight"), model.read("embed.weight"))
        assert [problem for _, problem in opened.verify() if problem] == []
    assert os.listdir(tmp_path) == ["m.bin"]


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (tiny_config(has_qkv_bias=True), "A", "it has QKV bias"),
        (tiny_config(has_o_bias=True), "D1", "an output bias"),
        (tiny_config(has_mlp_bias=True), "B", "MLP biases"),
        (tiny_config(**QWEN3), "A", "only layout C holds"),
        (tiny_config(), "C", "it has no q and k norms"),
        (tiny_config(head_size=16), "A", "head size 16 is not hidden size 32 / 4"),
        (tiny_config(rope_theta=1e5), "A", "rope theta 100000"),
        (tiny_config(rms_norm_eps=1e-6), "A", "epsilon 1e-06"),
        (tiny_config(**(QWEN3 | {"rms_norm_eps": 1e-5})), "C", "epsilon 1e-05"),
        (tiny_config(rope_scaling=RopeScaling("linear", 2.0)), "A", "linear by 2"),
        (tiny_config(rope_theta=5e5), "A", "rope scaling none"),
        (
            tiny_config(rope_theta=5e5, rope_scaling=parse_rope_scaling("llama3:8")),
            "A",
            "llama3 by 8",
        ),
        (tiny_config(intermediate_size=60), "D2", "no group of 8 or more"),
        (tiny_config(), "E", "legacy layout is 'E'"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(
    tmp_path: Path, config: ModelConfig, layout: str, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        write_legacy(TinyCheckpoint(config), tmp_path / "m.bin", layout=layout)
    assert os.listdir(tmp_path) == []


def test_notes_say_what_a_reader_must_be_told(tmp_path: Path) -> None:
    scaling = KINDS["llama3"].rope_scaling
    model = TinyCheckpoint(tiny_config(rope_theta=5e5, rope_scaling=scaling))
    notes = write_legacy(model, tmp_path / "m.bin", layout="A")
    assert any("--kind llama3" in note for note in notes)
    assert any("128000 and 128001, 128009" in note for note in notes)
    opened = open_checkpoint(tmp_path / "m.bin", legacy_kind="llama3")
    assert opened.config.rope_scaling == scaling


def test_llama3_tables_are_scaled(tmp_path: Path) -> None:
    """Source of the rule: LLaMA 3.1's reference code, wavelength by wavelength."""
    scaling = KINDS["llama3"].rope_scaling
    config = tiny_config(
        rope_theta=5e5, rope_scaling=scaling, hidden_size=256, head_size=64, tied_lm_head=True
    )
    data = written(tmp_path / "m.bin", TinyCheckpoint(config), "A")
    half, context = 32, config.max_context
    sines = struct.unpack(f"<{context * half}f", data[-4 * context * half :])
    for i in range(half):
        frequency = 5e5 ** (-2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 32
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 32 + smooth * frequency
        assert sines[50 * half + i] == pytest.approx(np.sin(50 * frequency), abs=1e-6)


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    write_legacy(TinyCheckpoint(tiny_config()), path, layout="A")
    with (
        open_checkpoint(path) as opened,
        pytest.raises(CheckpointError, match="is what would be exported"),
    ):
        write_legacy(opened, path, layout="B")


def test_values_beyond_float_are_refused(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    model.arrays["layers.0.o.weight"][0, 0] = np.nan  # type: ignore[index]
    for layout in ("A", "B"):
        with pytest.raises(CheckpointError, match=r"layers.0.o.weight holds NaN"):
            write_legacy(model, tmp_path / "m.bin", layout=layout)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "llama3", "llama3:x", "yarn:4", "linear:nan", "llama3:0"])
def test_unknown_rope_scalings_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rope_scaling(text)
