"""`nanocupy warmup`: kernels compiled where there is no GPU, found again, and refused clearly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES, random_checkpoint
from nanocupy.cuda.cards import capability_of, common_cards
from nanocupy.cuda.compiler import Compiler, cubin_folder
from nanocupy.engine import device_kernels
from nanocupy.engine.device_kernels import Outline, kernel_variants
from nanocupy.engine.device_plan import DeviceSettings, draft_limits, op_sizes
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.weight_formats import plan_weight_formats
from nanocupy.errors import ConfigError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, workspace_plan
from nanocupy.ops.kernel_variants import VariantCollector
from tests.checkpoint.hf_folders import write_folder
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

HALF = DeviceSettings("bfloat16", "bfloat16", "bfloat16")


@pytest.fixture
def few_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a model that needs two small modules."""
    try:
        from nanocupy.cuda.libraries import nvrtc_version

        nvrtc_version()
    except Exception as exc:
        pytest.skip(f"no NVRTC: {exc}")
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "cache"))
    all_variants = kernel_variants

    def few(*args, **options):
        return [v for v in all_variants(*args, **options) if v[0] in ("embed.cu", "norm.cu")]

    monkeypatch.setattr(device_kernels, "kernel_variants", few)


def test_kernels_are_compiled_once(few_kernels: None, capsys: pytest.CaptureFixture[str]) -> None:
    for compiled, found in ((2, 0), (0, 2)):
        assert cli.main(["warmup", "--shape", "qwen3-0.6b", "--arch", "sm_90a"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"sm_90a: {compiled} kernel modules compiled, {found} were there, ")
        assert out.endswith(f" s; in {cubin_folder()}\n")
        assert out.count("\n") == 1
        assert "compiling kernels for sm_90a: 2, done" in err
    assert len(list(cubin_folder().glob("*.cubin"))) == 2


def test_several_architectures_and_a_dtype(
    few_kernels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "warmup",
        "--shape",
        "qwen3-0.6b",
        "--arch",
        "75",
        "--arch",
        "8.0",
        "--dtype",
        "float16",
    ]
    assert cli.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "sm_75: 2 kernel modules compiled",
        "sm_80: 2 kernel modules compiled",
    ]


def test_a_cache_that_cannot_be_written_is_an_error(
    few_kernels: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "file"))
    assert cli.main(["warmup", "--shape", "qwen3-0.6b", "--arch", "sm_80"]) == 2
    assert "cannot be written; set NANOCUPY_CACHE_DIR" in capsys.readouterr().err


def test_a_draft_model_s_kernels_are_among_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All that its runner asks for as it starts beside the model's, and nothing where nothing
    guesses."""
    pytest.importorskip("cupy")
    draft = tiny_config(
        head_size=64, num_heads=2, num_kv_heads=1, hidden_size=64, intermediate_size=192,
        max_context=512,
    )  # fmt: skip
    write_nanoinfer2(TinyCheckpoint(draft), tmp_path / "draft.nano")
    compiled: list[set] = []

    def compile_all(self: Compiler, variants: Any, **options: Any) -> list:
        compiled.append({(file, tuple(sorted(macros.items()))) for file, macros in variants})
        return []

    monkeypatch.setattr(Compiler, "compile_all", compile_all)
    argv = ["warmup", "--shape", "qwen3-0.6b", "--arch", "sm_90a", "--max-num-seqs", "4"]
    named = ["--draft-model", str(tmp_path / "draft.nano")]
    for more in ([], named, [*named, "--speculate", "off"], ["--speculate", "ngram"]):
        assert cli.main([*argv, *more]) == 0
        capsys.readouterr()
    plain, both, off, ngram = compiled
    assert plain == off < ngram < both
    limits = RunnerLimits(2, 16, SHAPES["qwen3-0.6b"].max_context, 2048, 4, 0, 5, 20)
    for card in common_cards((9, 0)):
        for file, macros in kernel_variants(draft, HALF, draft_limits(limits, draft), card):
            assert (file, tuple(sorted(macros.items()))) in both
    assert cli.main([*argv, "--draft-model", "nowhere.nano"]) == 2
    assert "nowhere.nano: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --model or --shape"),
        (["--shape", "qwen3-8b", "-m", "x"], "give either --model or --shape"),
        (
            ["--shape", "qwen3-8b", "--arch", "sm_33"],
            "architecture 'sm_33' is not known; known: sm",
        ),
        (["--shape", "qwen3-8b", "--device", "cpu"], "device is cpu"),
        (["--shape", "qwen3-8b", "--arch", "80", "--max-context", "99999"], "max_context is 99999"),
        (["-m", "no/such/file.gguf", "--arch", "sm_80"], "no/such/file.gguf"),
    ],
)
def test_mistakes_are_told(args, message, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cupy")
    assert cli.main(["warmup", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_run_on_a_gpu_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cupy")
    folder = write_folder(tmp_path / "model")
    assert cli.main(["warmup", "-m", str(folder), "--arch", "sm_80"]) == 2
    assert "head size 8: the kernels are made for 64, 80" in capsys.readouterr().err


def test_without_a_gpu_an_architecture_must_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["warmup", "--shape", "qwen3-8b"]) == 2
    assert "give --arch, as in --arch sm_90a" in capsys.readouterr().err


def test_architectures_have_many_spellings() -> None:
    assert {capability_of(a) for a in ("sm_90a", "sm_90", "90", "90a", "9.0")} == {(9, 0)}
    assert capability_of("sm_120") == (12, 0)
    for bad in ("", "sm_", "hopper", "sm_9", "13.37"):
        with pytest.raises(ConfigError, match="is not known"):
            capability_of(bad)
    assert all(card.wgmma for card in common_cards((9, 0)))
    assert not any(card.wgmma for card in common_cards((12, 0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_card_needs_is_among_what_is_compiled(shape: str) -> None:
    """What an engine asks for as it starts, whatever its batch, is there after a warm-up with the
    default settings."""

    def keys(num_seqs: int, card: DeviceTraits, **options: bool) -> set:
        limits = RunnerLimits(2, 16, SHAPES[shape].max_context, 2048, num_seqs)
        found = kernel_variants(SHAPES[shape], HALF, limits, card, **options)
        return {(file, tuple(sorted(macros.items()))) for file, macros in found}

    for card in (*common_cards((9, 0)), *common_cards((8, 9))):
        warm = keys(256, card, every_size=True)
        files = {file for file, _ in warm}
        assert {"gemv.cu", "sampling.cu", "penalties.cu", "rope.cu", "embed.cu"} <= files
        assert ("attention_prefill_hopper.cu" in files) == card.wgmma
        assert ("tall.cu" in files) == card.wgmma
        rooms = {dict(macros)["TOKENS"] for file, macros in keys(256, card) if file == "wide.cu"}
        assert bool(rooms) == card.wgmma
        for num_seqs in (1, 32, 256):
            assert keys(num_seqs, card) <= warm


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.1-8b"])
def test_the_same_with_quantised_weights(shape: str, kind: str) -> None:
    formats, notes = plan_weight_formats(random_checkpoint(shape), kind)
    assert not notes
    settings = replace(HALF, quantized=formats)
    for card in (*common_cards((9, 0)), *common_cards((8, 9)), *common_cards((7, 5))):
        found = {}
        for num_seqs in (1, 32, 256):
            limits = RunnerLimits(2, 16, SHAPES[shape].max_context, 2048, num_seqs)
            variants = kernel_variants(SHAPES[shape], settings, limits, card, every_size=True)
            found[num_seqs] = {(f, tuple(sorted(m.items()))) for f, m in variants}
        files = {file for file, _ in found[256]}
        assert ("quantized.cu" in files) == (card.compute_capability >= (8, 0))
        assert "quantized_pack.cu" in files
        # As every matrix is stored alike, a step is one launch where one of 16 bits would be.
        assert ("decode_step.cu" in files) == (card.compute_capability >= (9, 0))
        assert found[1] | found[32] <= found[256]
        assert sum(file == "quantized.cu" for file, _ in found[256]) <= 24


def test_a_start_has_the_products_of_rows_that_are_sampled_beside_prompts() -> None:
    """Not only those of decodes alone, which may be one launch: else a step would wait for the
    compiler. Rows are rounded up to 1, 4, 16."""
    shape = SHAPES["qwen3-0.6b"]
    limits = RunnerLimits(2, 16, 4096, 2048, 256)
    sizes = op_sizes(shape, HALF, limits)
    for card in (*common_cards((9, 0)), *common_cards((8, 9))):
        needed = VariantCollector()
        plan = workspace_plan(sizes, card).items()
        spaces = {name: Outline(*size) for name, (size, _) in plan}
        ops = CudaOps(needed, lambda *args: None, spaces, sizes, card)
        width, vocab = shape.hidden_size, shape.vocab_size
        for num in (1, 4, 16, 64, 256):
            x, out = Outline(2048, width), Outline(num, vocab)
            ops.lm_head(x, Outline(num), Outline(width), 1e-6, Outline(vocab, width), out)
        known = kernel_variants(shape, HALF, limits, card)
        assert all(variant in known for variant in needed.variants)
