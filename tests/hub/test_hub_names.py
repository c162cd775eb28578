"""From a name to a path: what exists, what is an alias, and what a user may have meant."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.hub import pull_model, resolve_model
from nanocupy.hub.cache import cache_dir, model_lock, scratch_folder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_an_existing_path_is_itself() -> None:
    for name in ("smollm2-135m", "model.gguf"):
        Path(name).write_bytes(b"")
        assert resolve_model(name) == Path(name)
    Path("owner/name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(Path("owner")) == Path("owner")


@pytest.mark.parametrize(
    "name",
    ["./x", "/nowhere/x", "x.gguf", "X.NANO", "a/b/c", "~/nowhere-at-all", "models/x"],
)
def test_what_looks_like_a_path_is_not_asked_from_a_hub(name: str) -> None:
    Path("models").mkdir()
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve_model(name, progress=False)


def test_a_misspelt_file_gets_the_near_one() -> None:
    Path("models").mkdir()
    Path("models/tiny.nano").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"did you mean models/tiny\.nano\?"):
        resolve_model("models/tinny.nano", progress=False)


@pytest.mark.parametrize("name", ["smollm2-135", "smollm2", "SmolLM-135M"])
def test_a_misspelt_alias_gets_the_near_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'smollm2-135m'\?"):
        resolve_model(name, progress=False)


@pytest.mark.parametrize("name", ["nonsense", "a b", "x" * 5000, "x\0y", "\ud800"])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m"):
        resolve_model(name, progress=False)


def test_pulling_what_is_here_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is here already"):
        pull_model(str(tmp_path))


def test_an_empty_name_is_no_name_for_this_folder() -> None:
    with pytest.raises(ConfigError, match="empty"):
        resolve_model("")


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("NANOCUPY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "nanocupy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "nanocupy"


def test_a_cache_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_bytes(b"")
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", "file/below")
    with pytest.raises(ConfigError, match="NANOCUPY_CACHE_DIR"), model_lock("x"):
        pass


def _hold(name: str, log: Path) -> None:
    with model_lock(name, progress=False):
        with log.open("a") as file:
            file.write("in ")
        time.sleep(0.05)
        with log.open("a") as file:
            file.write("out ")


def test_only_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    """The lock belongs to an open file, so threads stand in for processes."""
    log = tmp_path / "log"
    threads = [threading.Thread(target=_hold, args=("a/b", log)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text().split() == ["in", "out"] * 4


def test_scratch_is_removed_also_when_left_by_a_kill(tmp_path: Path) -> None:
    left_over = tmp_path / ".scratch-m-killed"
    left_over.mkdir()
    (tmp_path / ".scratch-other-busy").mkdir()

    def interrupted() -> None:
        with scratch_folder(tmp_path, "m") as folder:
            (folder / "x").write_bytes(b"x")
            assert not left_over.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.glob(".scratch*")] == [".scratch-other-busy"]
