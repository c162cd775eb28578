"""`python -m benchmarks.engine` on the CPU: what it measures, and the records it leaves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import engine, records
from benchmarks.ceilings import Ceilings
from nanocupy.bench import idle, measure, speculative
from nanocupy.bench.measure import Measurement
from nanocupy.bench.shapes import SHAPES
from nanocupy.errors import ConfigError
from tests.checkpoint.tiny import tiny_config

CEILINGS = Ceilings(bytes_per_s=2e9, flops_per_s=4e12)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(SHAPES, "smollm2-135m", tiny_config(vocab_size=300, max_context=512))
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for module in (measure, idle, speculative):
        monkeypatch.setattr(module, "DECODE_OUTPUT", 5)
    return tmp_path


def run(*argv: str) -> None:
    shape = ("--shape", "smollm2-135m", "--dtype", "float32", "--device", "cpu")
    args = engine.parse([*argv, *shape])
    engine.run_startup(args) if args.what == "startup" else engine.run(args, CEILINGS)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ceilings_are_the_floor_in_the_result_s_unit() -> None:
    reads = Measurement("a", "ms", (4.0,), 2_000_000, 1000)
    assert engine.ceiling_of(reads, CEILINGS) == pytest.approx(1.0)
    computes = Measurement("a", "ms", (4.0,), 2_000, 8 * 10**9)
    assert engine.ceiling_of(computes, CEILINGS) == pytest.approx(2.0)
    rate = Measurement("a", "tok/s", (100.0,), 4 * 10**9, 0)
    assert engine.ceiling_of(rate, CEILINGS, 500) == pytest.approx(250.0)


def test_every_bench_leaves_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("decode", "--batch", "1,2", "--repeats", "2", "--set", "block_size=8")
    one, two = lines(folder / "decode.jsonl")
    assert [one["name"], two["name"]] == [f"decode/smollm2-135m/float32/b{n}" for n in (1, 2)]
    assert one["settings"] == {"block_size": 8}
    assert one["ceiling"] == pytest.approx(one["bytes"] / 2e6, abs=1e-4)
    assert one["share"] == pytest.approx(one["ceiling"] / one["value"], rel=0.02, abs=1e-4)
    assert one["host_step_us"] >= one["host_parts_us"]["launch"]
    assert one["gpu_idle_share"] is None
    assert (one["device"], one["dtype"]) == ("cpu", "float32")
    assert (one["read_gb_per_s"], one["product_tflops"]) == (2.0, 4.0)
    run("prefill", "--tokens", "20,40")
    assert [r["unit"] for r in lines(folder / "prefill.jsonl")] == ["ms", "ms"]
    run("throughput", "--requests", "3", "--min-len", "4", "--max-len", "9", "--repeats", "1")
    (busy,) = lines(folder / "throughput.jsonl")
    assert busy["name"] == "throughput/3x4-9/smollm2-135m/float32"
    assert busy["share"] == pytest.approx(busy["value"] / busy["ceiling"], rel=0.02, abs=1e-4)
    run("speculative", "--acceptance", "0.5", "--repeats", "1", "--batch", "2")
    off, guessed = lines(folder / "speculative.jsonl")
    start_of_name = "speculative/smollm2-135m/free/float32/b2"
    assert [off["name"], guessed["name"]] == [f"{start_of_name}/off", f"{start_of_name}/k5/a0.5"]
    assert guessed["x_off"] == pytest.approx(guessed["value"] / off["value"], rel=0.02, abs=1e-3)
    seconds = max(off["bytes"] / 2e9, off["flops"] / 4e12)
    assert off["ceiling"] == pytest.approx(2 / seconds, rel=1e-3)
    draft = ("--draft-shape", "smollm2-135m", "--adaptive")
    run("speculative", "--acceptance", "0", "--repeats", "1", *draft)
    last = lines(folder / "speculative.jsonl")[-1]
    assert last["name"] == "speculative/smollm2-135m/draft/float32/b1/adaptive/a0"
    run("startup", "--repeats", "1")
    (start,) = lines(folder / "startup.jsonl")
    assert start["name"] == "startup/smollm2-135m/float32"
    assert "ceiling" not in start
    assert start["value"] >= start["parts"]["import"] > 0
    out = capsys.readouterr().out
    assert out.count("\n") == 10
    assert "prefill/smollm2-135m/float32/t40" in out


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        engine.parse(["decode", "--set", "blok_size=8"])
    with pytest.raises(ConfigError, match="block_size is 0"):
        engine.parse(["decode", "--set", "block_size=0"])
    with pytest.raises(SystemExit):
        engine.parse(["walk"])


@pytest.mark.parametrize("shares", ["1.1", "0.5,-0.1", "nan", "x", "0.5,"])
def test_shares_of_right_guesses_are_from_0_to_1(shares, capsys) -> None:
    """Before anything is loaded, and in one line."""
    with pytest.raises(SystemExit) as raised:
        engine.main(["speculative", f"--acceptance={shares}"])
    assert raised.value.code == (
        f"benchmarks.engine: --acceptance is {shares!r}; it must be numbers from 0 to 1, as in "
        "0,0.8"
    )
    assert engine.parse(["speculative", "--acceptance", "0,1"]).acceptance == [0.0, 1.0]


def test_the_commit_of_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A "+" where a kernel or the package differs from the commit, and only there."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for name in ("nanocupy", "kernels_cu", "benchmarks/records", "docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    monkeypatch.delenv("NANOCUPY_COMMIT", raising=False)
    monkeypatch.setattr(records, "FOLDER", tmp_path / "benchmarks" / "records")
    (tmp_path / "docs" / "file").write_text("2")
    assert records._commit() == head
    (tmp_path / "kernels_cu" / "file").write_text("2")
    assert records._commit() == head + "+"
    monkeypatch.setenv("NANOCUPY_COMMIT", "abc1234")
    assert records._commit() == "abc1234"
