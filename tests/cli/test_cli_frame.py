"""How the command line begins and ends: help, errors, signals, pipes, encodings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import click
import pytest

import nanocupy
from nanocupy import cli
from nanocupy.errors import CheckpointError, CudaError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Gives a function that makes `nanocupy probe` run the given body."""

    def install(body) -> None:
        made = click.Command("probe", callback=body)
        module = type(sys)("probe_module")
        module.probe = made  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_module:probe", "A test's own."))

    return install


def run(*args: str, code: str = "", **options) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", code] if code else [sys.executable, "-m", "nanocupy"]
    return subprocess.run([*program, *args], capture_output=True, text=True, cwd=ROOT, **options)


def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from nanocupy.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'rich', 'tiktoken', 'sentencepiece', 'jinja2', 'safetensors',"
        " 'gguf', 'yaml', 'importlib.metadata', 'cupy') if m in sys.modules],"
        " [m for m in sys.modules if m.startswith('nanocupy.cli.')])"
    )
    result = run(code=code)
    assert result.returncode == 0, result.stderr
    *help_lines, imported = result.stdout.splitlines()
    assert imported == "[] []"
    for name, (_, line) in cli.COMMANDS.items():
        assert any(name in row and line[:20] in row for row in help_lines)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_of_the_table_exists_and_has_help(name: str) -> None:
    module, _, attribute = cli.COMMANDS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command)
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: nanocupy {name}")


def test_help_is_quick() -> None:
    """The bound users feel is 0.3 s; the best of three keeps a busy machine from failing it."""
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        run("--help")
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.3


def test_the_three_spellings_are_one_program() -> None:
    by_module = run("--help").stdout
    by_file = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "--help"], capture_output=True, text=True, cwd="/"
    )
    assert by_file.stdout == by_module
    assert run("--version").stdout == f"nanocupy {nanocupy.__version__}\n"
    assert run().stdout == by_module


def test_cli_py_finds_the_whole_package_where_nothing_is_installed(tmp_path: Path) -> None:
    """With the editable install's finder out of the way, exporters/ is found all the same."""
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]);"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "runpy.run_path(sys.argv[1] + '/cli.py');"
        "import nanocupy.exporters, nanocupy.kernels_cu; print(nanocupy.exporters.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip() == str(ROOT / "exporters" / "__init__.py"), result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["genrate"], "did you mean 'generate'?"),
        (["zzz"], "no command 'zzz'"),
        (["--nonsense"], "--nonsense"),
        (["pull"], "NAME"),
        (["pull", "a", "b"], "nanocupy pull --help"),
        (["inspect", "x.gguf", "--format", "Z"], "'Z'"),
    ],
)
def test_usage_errors_are_one_line(args: list[str], words: str) -> None:
    result = run(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("nanocupy: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def _raiser(exc: BaseException):
    def body() -> None:
        raise exc

    return body


@pytest.mark.parametrize(
    ("exc", "code", "words"),
    [
        (CheckpointError("x.nano: too short"), 2, "x.nano: too short"),
        (CudaError("cuMemAlloc failed"), 1, "cuMemAlloc failed"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "ZeroDivisionError: division by zero; run again",
        ),
        (MemoryError(), 1, "out of memory"),
        (FileNotFoundError(2, "No such file or directory", "p.txt"), 1, "p.txt: No such file"),
        (click.UsageError("bad"), 2, "bad"),
        (click.FileError("f", "hint"), 2, "hint"),
        (CheckpointError("two\nlines \x1b[31mred\u202e"), 2, r"two lines \x1b[31mred\u202e"),
        (CheckpointError("lone \ud800"), 2, r"lone \ud800"),
    ],
)
def test_errors_are_one_line(command, capfd, exc: Exception, code: int, words: str) -> None:
    command(_raiser(exc))
    assert cli.main(["probe"]) == code
    stderr = capfd.readouterr().err
    assert stderr.count("\n") == 1
    assert words in stderr
    assert cli.main(["--debug", "probe"]) == code
    assert "Traceback" in capfd.readouterr().err


def test_ctrl_c_and_exit_codes_are_quiet(command, capfd) -> None:
    command(_raiser(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    command(lambda: 7)
    assert cli.main(["probe"]) == 7
    command(lambda: None)
    assert cli.main(["probe"]) == 0
    assert capfd.readouterr().err == ""


_RUN_BODY = """
import sys, types, click
from nanocupy import cli
def body():
    BODY
m = types.ModuleType("m"); m.c = click.Command("c", callback=body); sys.modules["m"] = m
cli.COMMANDS["c"] = ("m:c", "")
sys.exit(cli.main(["c"]))
"""


def test_a_reader_that_leaves_is_no_error() -> None:
    code = _RUN_BODY.replace("BODY", "[print('line', i) for i in range(100000)]")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "nanocupy", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "nanocupy: error: No space left on device\n"


def test_a_terminal_that_cannot_show_a_character_does_not_crash() -> None:
    code = _RUN_BODY.replace("BODY", "print('caf\\u00e9 \\u4f60 \\ud800')")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run(code=code, env=env)
    assert (result.returncode, result.stdout) == (0, "caf? ? ?\n"), result.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_being_ended_cleans_up(tmp_path: Path, signum: signal.Signals) -> None:
    mark = tmp_path / "cleaned"
    body = (
        "import time\n    try:\n        print('up', flush=True); time.sleep(30)\n"
        f"    finally:\n        open({str(mark)!r}, 'w').close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", _RUN_BODY.replace("BODY", body)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert stderr == b""
    assert mark.exists()
