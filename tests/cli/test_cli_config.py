"""`nanocupy config`, and a file and flags on the commands that run a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanocupy import LLM, cli
from nanocupy.engine.config import SETTINGS, EngineConfig
from nanocupy.errors import ConfigError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.nano"
    config = tiny_config(vocab_size=260, max_context=256, bos_id=256, eos_ids=(258,))
    write_nanoinfer2(TinyCheckpoint(config, tokenizer=byte_tokenizer()), path)
    return path


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """Every configuration that a runner is made with."""
    from nanocupy import llm

    seen: list[EngineConfig] = []
    make_engine = llm.make_engine

    def spy(checkpoint, config, **rest):
        seen.append(config)
        return make_engine(checkpoint, config=config, **rest)

    monkeypatch.setattr(llm, "make_engine", spy)
    return seen


def show(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict]:
    assert cli.main(["config", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("nanocupy: error: ").rstrip("\n")


def changed(config: EngineConfig) -> dict[str, object]:
    return {n: v for n, v in config.to_dict().items() if v != SETTINGS[n].default}


# --------------------------------------------------------------------- nanocupy config


def test_flags_over_file_over_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("chunk_size: 64\nmax_num_seqs: 4\nmax_context: 100\nprefix_cache: false\n")
    flags = ["--chunk-size", "32", "--max-context", "none", "--prefix-cache"]
    shown = show(capsys, "--config", str(file), *flags)
    assert list(shown) == list(SETTINGS)
    got = {name: (s["value"], s["source"]) for name, s in shown.items()}
    assert got["chunk_size"] == (32, "flag")
    assert got["max_context"] == (None, "flag")
    assert got["prefix_cache"] == (True, "flag")
    assert got["max_num_seqs"] == (4, "file")
    rest = set(SETTINGS) - {"chunk_size", "max_context", "prefix_cache", "max_num_seqs"}
    assert all(got[name] == (SETTINGS[name].default, "default") for name in rest)
    assert shown["chunk_size"]["changes_while_running"] is True
    assert shown["host_cache_gb"]["unit"] == "GB"


def test_every_setting_has_a_flag_that_reads_every_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, s in SETTINGS.items():
        if s.kind is bool:
            argv, value = [s.flag.replace("--", "--no-")], False
        elif s.is_text:
            argv, value = [s.flag, "some/name"], "some/name"
        elif s.kind is str:
            argv, value = [s.flag, s.choices[-1]], s.choices[-1]
        else:
            # Within every bound, the limits of other settings included.
            value = {int: 16, float: 0.5}[s.kind]
            value = {"max_chunk_size": 4096, "draft_tokens": 3}.get(name, value)
            argv = [s.flag, str(value)]
        got = show(capsys, *argv)[name]
        assert (got["value"], got["source"]) == (value, "flag")


def test_the_list_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--show"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == out
    for name, s in SETTINGS.items():
        (line,) = (row for row in out.splitlines() if re.match(rf"[* ] {name} ", row))
        assert line.startswith("*") == s.live
        assert s.bounds in line
        assert f" {s.unit}" in line
        assert f"\n      {s.meaning}\n" in out + "\n"
    assert max(map(len, out.splitlines())) <= 96


def test_init_writes_what_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    assert cli.main(["config", "--init", str(file)]) == 0
    capsys.readouterr()
    assert EngineConfig.from_file(file) == EngineConfig()
    text = file.read_text()
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    for s in SETTINGS.values():
        assert f"\n{s.name}: " in text
        assert s.meaning[1:] in comments
        assert s.bounds in comments
    assert "already" in error(capsys, "config", "--init", str(file), "--chunk-size", "9")
    assert file.read_text() == text
    again = tmp_path / "again.yaml"
    argv = ["config", "--init", str(again), "--config", str(file), "--chunk-size", "9"]
    assert cli.main(argv) == 0
    assert EngineConfig.from_file(again) == EngineConfig(chunk_size=9)
    capsys.readouterr()
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "elsewhere.yaml")
    assert "already" in error(capsys, "config", "--init", str(link))
    assert "cannot be written" in error(capsys, "config", "--init", str(tmp_path / "no" / "x"))
    assert "--show" in error(capsys, "config", "--init", str(tmp_path / "y"), "--show")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--chunk-size", "0", "--chunk-size: chunk_size is 0; it must be a whole number from 1 to"),
        ("--chunk-size", "many", "--chunk-size: chunk_size is 'many'; it must be"),
        ("--chunk-size", "9" * 5000, "it must be a whole number"),
        ("--chunk-size", "none", "chunk_size is 'none'"),
        ("--max-context", "1e3", "max_context is '1e3'"),
        ("--cpu-cache-share", "nan", "cpu_cache_share is 'nan'"),
        ("--level-weight", "inf", "level_weight is 'inf'"),
        ("--level-weight", "-1", "level_weight is -1.0; it must be a number from 0 to 1000000"),
        ("--policy", "lifo", "'lifo' is not one of 'fcfs', 'priority'"),
        ("--batch-size", "17", "batch_size is 17, above max_num_seqs, which is 16"),
        ("--config", "/nowhere/engine.yaml", "/nowhere/engine.yaml: no such file"),
    ],
)
def test_wrong_flags(flag: str, value: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "config", flag, value)
    assert says in message
    assert len(message) < 300


def test_wrong_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("chunk_size: 0\n")
    argv = ["config", "--config", str(file)]
    assert error(capsys, *argv).startswith(f"{file}: chunk_size is 0; it must be")
    # A wrong value in the file is wrong even where a flag covers it.
    assert error(capsys, *argv, "--chunk-size", "5").startswith(f"{file}: chunk_size is 0")
    file.write_text("max_num_seqs: 4\n")
    assert error(capsys, *argv, "--batch-size", "5").startswith(
        f"{file} and flags: batch_size is 5"
    )


# --------------------------------------------------------------------- commands and Python


def test_generate_and_chat_take_file_and_flags(
    model: Path, used: list[EngineConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    argv = ["generate", "-m", str(model), "--max-tokens", "2", "--device", "cpu", "Hi"]
    assert cli.main(argv) == 0
    assert changed(used[-1]) == {"device": "cpu", "max_num_seqs": 1}
    file = tmp_path / "engine.json"
    file.write_text('{"chunk_size": 64, "max_num_seqs": 3, "max_context": 90, "device": "auto"}')
    argv += ["--config", str(file), "--chunk-size", "32"]
    assert cli.main(argv) == 0
    expected = {"device": "cpu", "max_num_seqs": 3, "chunk_size": 32, "max_context": 90}
    assert changed(used[-1]) == expected
    assert cli.main([*argv, "--max-context", "none"]) == 0
    assert used[-1].max_context is None
    capsys.readouterr()


def test_a_wrong_setting_is_found_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["generate", "Hi"], ["chat"]):
        argv += ["-m", "/nowhere/model", "--chunk-size", "0"]
        assert "chunk_size is 0" in error(capsys, *argv)


def test_keywords_over_config_in_python(model: Path, used: list[EngineConfig]) -> None:
    config = EngineConfig(device="cpu", max_num_seqs=2, chunk_size=8)
    llm = LLM(model, config=config)
    assert used[-1] == config == llm.engine_config
    LLM(model, config=config, max_num_seqs=4, max_context=64)
    assert used[-1] == config.with_(max_num_seqs=4, max_context=64)
    LLM(model, device="cpu")
    assert changed(used[-1]) == {"device": "cpu"}
    with pytest.raises(ConfigError, match="'max_seqs'; did you mean 'max_num_seqs'"):
        LLM(model, max_seqs=4)
    with pytest.raises(ConfigError, match=r"config is .*; give an EngineConfig"):
        LLM(model, config={"device": "cpu"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        LLM("/nowhere/model", config=config, chunk_size=0)
    assert len(used) == 3


def test_benches_take_file_and_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nanocupy.bench import measure
    from nanocupy.bench.shapes import SHAPES
    from nanocupy.engine import backend

    seen: list[EngineConfig] = []
    make_runner = backend.make_runner
    monkeypatch.setattr(
        backend, "make_runner", lambda c, config, **k: seen.append(config) or make_runner(c, config)
    )
    monkeypatch.setitem(SHAPES, "smollm2-135m", tiny_config(max_context=512))
    monkeypatch.setattr(measure, "DECODE_OUTPUT", 6)
    file = tmp_path / "engine.yaml"
    file.write_text("device: cpu\nblock_size: 8\nchunk_size: 64\n")
    argv = ["bench", "decode", "--batch", "1,3", "--repeats", "1", "--config", str(file)]
    assert cli.main([*argv, "--chunk-size", "256"]) == 0
    assert changed(seen[-1]) == {
        "device": "cpu", "block_size": 8, "chunk_size": 256, "max_context": 134,
        "max_num_seqs": 3, "prefix_cache": False, "dtype": "float32",
    }  # fmt: skip
    capsys.readouterr()
    assert "max_num_seqs is 2; this bench needs 3" in error(capsys, *argv, "--max-num-seqs", "2")
    assert "max_context is 9; this bench needs 134" in error(capsys, *argv, "--max-context", "9")
    assert "with chunk_size 4 the first of 3 sequences" in error(capsys, *argv, "--chunk-size", "4")
