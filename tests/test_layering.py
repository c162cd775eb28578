"""Who may import whom: the layers of the design, held by reading every import of the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARRAY_LIBRARIES = {"numpy", "cupy", "ml_dtypes", "torch", "scipy", "jax"}
SOURCES = sorted(
    path
    for pattern in ("nanocupy/**/*.py", "exporters/**/*.py", "kernels_cu/**/*.py", "cli.py")
    for path in ROOT.glob(pattern)
)


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, full module name) of every import in the file, also those within functions; not those
    for type checkers alone."""
    found: list[tuple[int, str]] = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                walk(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            found.append((node.lineno, str(node.args[0].value)))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return (
        name in ("import_module", "__import__")
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
    )


def offenders(paths: Iterator[Path], forbidden: set[str]) -> list[str]:
    """Imports of a forbidden module (or a part of one) in `paths`, as file:line: module."""
    found = []
    for path in paths:
        for line, module in imports_of(path):
            if any(module == name or module.startswith(name + ".") for name in forbidden):
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


def below(*folders: str) -> Iterator[Path]:
    starts = tuple(str(ROOT / folder) for folder in folders)
    return (path for path in SOURCES if str(path).startswith(starts))


def test_the_check_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b\nfrom c import d\nfrom . import e\ndef f():\n    import g as h\n"
        "import importlib\nimportlib.import_module('i.j')\n__import__('k')\n"
        "if TYPE_CHECKING:\n    import hidden\nelse:\n    import m\n"
    )
    assert {name for _, name in imports_of(file)} == {
        "a.b", "c.d", "..e", "g", "importlib", "i.j", "k", "m",
    }  # fmt: skip


def test_scheduler_and_memory_know_no_arrays() -> None:
    above = {"nanocupy.model", "nanocupy.ops", "nanocupy.cuda", "nanocupy.checkpoint"}
    pure = (
        "scheduler", "schedule", "running", "in_flight", "step_plan", "policy", "waiting",
        "request",
    )  # fmt: skip
    engine = (f"nanocupy/engine/{name}" for name in pure)
    paths = below("nanocupy/memory/", "nanocupy/speculation/", *engine)
    assert offenders(paths, ARRAY_LIBRARIES | above) == []


def test_cupy_stays_in_its_place() -> None:
    paths = (p for p in SOURCES if not p.relative_to(ROOT).as_posix().startswith("nanocupy/cuda/"))
    assert offenders(paths, {"cupy", "cupyx", "cupy_backends", "cuda"}) == []


def test_nobody_imports_the_oracles() -> None:
    oracles = {"torch", "transformers", "tokenizers", "huggingface_hub", "xgrammar"}
    assert offenders(iter(SOURCES), oracles) == []


def test_the_packaged_folders_have_one_name() -> None:
    """`import exporters` would load the same code twice, under two names."""
    tests = [
        p for folder in ("tests", "benchmarks", "scripts") for p in (ROOT / folder).rglob("*.py")
    ]
    assert offenders(iter([*SOURCES, *tests]), {"exporters", "kernels_cu"}) == []


def test_lower_layers_do_not_know_the_upper_ones() -> None:
    fetching = ("resolve_model", "pull_model", "cache", "http", "huggingface", "starter")
    upper = {"nanocupy.cli", "nanocupy.llm", *(f"nanocupy.hub.{name}" for name in fetching)}
    lower = below(
        "nanocupy/checkpoint/", "nanocupy/tokenizer/", "nanocupy/model/", "nanocupy/ops/",
        "nanocupy/memory/", "nanocupy/engine/", "nanocupy/cuda/", "nanocupy/speculation/",
        "exporters/",
    )  # fmt: skip
    assert offenders(lower, upper) == []
    files = below("nanocupy/checkpoint/", "nanocupy/tokenizer/", "exporters/")
    assert offenders(files, {"nanocupy.engine", "nanocupy.model", "nanocupy.ops"}) == []
    ops = below("nanocupy/ops/")
    assert offenders(ops, {"nanocupy.engine", "nanocupy.model", "nanocupy.checkpoint"}) == []
    model = below("nanocupy/model/")
    assert offenders(model, {"nanocupy.engine"}) == []


@pytest.mark.parametrize("module", ["nanocupy", "nanocupy.cli", "nanocupy.errors", "nanocupy.cuda"])
def test_a_light_import_stays_light(module: str) -> None:
    heavy = (
        *("numpy", "ml_dtypes", "tiktoken", "sentencepiece", "rich", "jinja2", "safetensors"),
        *("gguf", "yaml", "regex", "requests", "cupy", "importlib.metadata"),
    )
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_gpu_hash_follows_contents_and_nothing_else(tmp_path: Path) -> None:
    spec = spec_from_file_location("gpu_hash", ROOT / "scripts" / "gpu_hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("kernels_cu/a.cu", "kernels_cu/sub/b.cuh", "nanocupy/engine/runner.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"// {name}\n")
    first = module.gpu_hash(tmp_path)
    (tmp_path / "nanocupy/engine/scheduler.py").write_text("x")
    (tmp_path / "kernels_cu/__pycache__").mkdir()
    (tmp_path / "kernels_cu/__pycache__/a.pyc").write_text("x")
    (tmp_path / "kernels_cu/a.cu").write_bytes(b"// kernels_cu/a.cu\r\n")
    assert module.gpu_hash(tmp_path) == first
    (tmp_path / "kernels_cu/sub/b.cuh").write_text("// changed\n")
    changed = module.gpu_hash(tmp_path)
    assert changed != first
    (tmp_path / "kernels_cu/sub/b.cuh").rename(tmp_path / "kernels_cu/sub/c.cuh")
    assert module.gpu_hash(tmp_path) not in (first, changed)
    printed = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_hash.py")], capture_output=True, text=True
    )
    assert printed.stdout.strip() == module.gpu_hash(ROOT)
    assert any(path.parent == ROOT / "nanocupy" / "ops" for path in module.gpu_sources(ROOT))


def test_no_two_files_of_tests_have_one_name() -> None:
    """The folders are no packages, so pytest may import a file by its bare name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
