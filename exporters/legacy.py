"""Writes the legacy NanoInfer layouts A, B, C and llama2.c's versions 1 and 2.

Owns the question whether a layout can express a model, the tables and int8 groups that the layouts
want, and the change to interleaved rotary rows. The layouts themselves are in
`nanocupy.checkpoint.legacy_layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanocupy.checkpoint import legacy_layouts as legacy
from nanocupy.checkpoint.base import Checkpoint, GroupedInt8, dequantized, split_to_interleaved
from nanocupy.checkpoint.legacy_layouts import Dimensions, Kind, Run
from nanocupy.config import ModelConfig, RopeScaling
from nanocupy.errors import CheckpointError
from nanocupy.exporters.conversion import (
    CHUNK_VALUES,
    Progress,
    converted,
    quantised,
    read_checked,
)
from nanocupy.exporters.output_file import output_file

GROUP_SIZE = 64
_SMALLEST_GROUP = 8  # below, the scales take more room than the values save
_ROTARY_PARTS = ("q", "k", "q_norm", "k_norm")


def write_legacy(
    checkpoint: Checkpoint, out: Path, *, layout: str, progress: Progress | None = None
) -> list[str]:
    """Write `checkpoint` as the legacy file `out`, which appears whole or not at all.

    layout     A (LLaMA float32), B (LLaMA int8 in groups of 64), C (Qwen3 float32), D1 or D2
               (llama2.c float32, int8). B and D2 halve the group until it divides every row.
    progress   called with (bytes written, all bytes) after each tensor

    Returns what a reader of the file cannot know, a sentence each. Raises CheckpointError with the
    reason where the layout cannot express the model, and as `write_nanoinfer2` does.
    """
    kind, dims = plan(checkpoint.config, layout)
    runs = legacy.runs(layout, dims)
    file_bytes = legacy.file_bytes(layout, dims)
    with output_file(Path(out), checkpoint) as file:
        file.write(legacy.pack_header(layout, dims))
        for run in runs:
            for name in run.names():
                if name == legacy.ROPE_TABLES:
                    _write_rope_tables(file, checkpoint.config)
                else:
                    _write_tensor(file, checkpoint, name, run, dims)
                if progress is not None:
                    progress(file.tell(), file_bytes)
        assert file.tell() == file_bytes
        file.seek(0)
        start = file.read(legacy.LLAMA2C_HEADER_BYTES)
    return _notes(checkpoint.config, layout, kind, dims, start)


def plan(config: ModelConfig, layout: str) -> tuple[str, Dimensions]:
    """The kind of model a reader must assume, and the header's counts.

    Raises CheckpointError with the reason where `layout` cannot express `config`.
    """
    if layout not in legacy.LAYOUTS:
        raise CheckpointError(
            f"legacy layout is {layout!r}; it must be one of {', '.join(legacy.LAYOUTS)}"
        )

    def refuse(reason: str) -> None:
        raise CheckpointError(
            f"legacy layout {layout} cannot hold this model: {reason}; leave --legacy out to "
            "write a NanoInfer 2 file"
        )

    for flag, what in (
        ("has_qkv_bias", "QKV bias"),
        ("has_o_bias", "an output bias"),
        ("has_mlp_bias", "MLP biases"),
    ):
        if getattr(config, flag):
            refuse(f"it has {what}, for which the layout has no room")
    if config.has_qk_norm != (layout == "C"):
        refuse(
            "it has q and k norms, which only layout C holds"
            if config.has_qk_norm
            else "it has no q and k norms, which layout C's readers expect"
        )
    if layout != "C" and config.q_size != config.hidden_size:
        refuse(
            f"its head size {config.head_size} is not hidden size {config.hidden_size} / "
            f"{config.num_heads} heads, which is what the layout's readers compute"
        )
    kind = next((name for name, k in legacy.KINDS.items() if _implies(k, config)), None)
    if kind is None:
        refuse(
            f"its rope theta {config.rope_theta:g}, rope scaling {_described(config.rope_scaling)} "
            f"and epsilon {config.rms_norm_eps:g} are not in the file, and no kind that a reader "
            f"could assume ({', '.join(legacy.KINDS)}) has them"
        )
    group_size = 0
    if layout in legacy.QUANTISED_LAYOUTS:
        group_size = math.gcd(GROUP_SIZE, config.hidden_size, config.intermediate_size)
        if group_size < _SMALLEST_GROUP:
            refuse(
                f"no group of {_SMALLEST_GROUP} or more int8 values divides rows of "
                f"{config.hidden_size} and {config.intermediate_size}"
            )
    return kind, Dimensions(
        hidden=config.hidden_size,
        inter=config.intermediate_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        vocab=config.vocab_size,
        context=config.max_context,
        tied=config.tied_lm_head and layout != "C",
        group_size=group_size,
    )


def _implies(kind: Kind, config: ModelConfig) -> bool:
    """Whether `kind` has the settings of `config`, up to the rounding of float32 (GGUF's)."""

    def close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-6)

    ours, theirs = kind.rope_scaling, config.rope_scaling
    return (
        (kind.architecture == "qwen3") == config.has_qk_norm
        and close(kind.rope_theta, config.rope_theta)
        and close(kind.rms_norm_eps, config.rms_norm_eps)
        and ours.kind == theirs.kind
        and (
            ours.kind == "none"
            or (
                ours.original_context == theirs.original_context
                and close(ours.factor, theirs.factor)
                and close(ours.low_freq_factor, theirs.low_freq_factor)
                and close(ours.high_freq_factor, theirs.high_freq_factor)
            )
        )
    )


def _described(scaling: RopeScaling) -> str:
    return scaling.kind if scaling.kind == "none" else f"{scaling.kind} by {scaling.factor:g}"


def _write_tensor(
    file: BinaryIO, checkpoint: Checkpoint, name: str, run: Run, dims: Dimensions
) -> None:
    source = name
    if name == "lm_head.weight" and checkpoint.config.tied_lm_head:
        source = "embed.weight"  # layout C has no way to say that they are one
    tensor = read_checked(checkpoint, source)
    what = f"{checkpoint.path}: tensor {source}"
    rotary = name.split(".")[-2] in _ROTARY_PARTS
    if not run.quantised:
        array = dequantized(tensor)
        if rotary:
            array = split_to_interleaved(array, dims.head_size)
        for piece in converted(array, "float32", what):
            file.write(piece)
        return
    if not (isinstance(tensor, GroupedInt8) and tensor.group_size == dims.group_size):
        tensor = quantised(dequantized(tensor), dims.group_size, what)
    values, scales = tensor.values, tensor.scales
    if rotary:  # whole groups move with their rows
        values = split_to_interleaved(values, dims.head_size)
        by_row = scales.reshape(values.shape[0], -1)
        scales = split_to_interleaved(by_row, dims.head_size)
    file.write(np.ascontiguousarray(values))
    for piece in converted(scales, "float32", what):
        file.write(piece)


def _write_rope_tables(file: BinaryIO, config: ModelConfig) -> None:
    """Layout A's cos and sin, [max_context, head_size / 2] float32 each. nanocupy ignores them;
    llama2.c's first readers expect them."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)
    if config.rope_scaling.kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
    for function in (np.cos, np.sin):
        for angles in _angles(frequencies, config.max_context):
            file.write(function(angles).astype("<f4"))


def _angles(frequencies: np.ndarray, context: int) -> Iterator[np.ndarray]:
    step = max(CHUNK_VALUES // frequencies.size, 1)
    for start in range(0, context, step):
        yield np.outer(np.arange(start, min(start + step, context)), frequencies)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """LLaMA 3.1's rule: waves longer than the trained context / low are stretched, those shorter
    than / high are kept, and between the two it is a straight line in turns per context."""
    assert scaling.original_context is not None
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _notes(
    config: ModelConfig, layout: str, kind: str, dims: Dimensions, start: bytes
) -> list[str]:
    """What a reader of the file, which begins with `start`, must be told or will get wrong."""
    notes = ["a legacy file carries no tokenizer; name one with --tokenizer"]
    guessed = "llama3" if dims.vocab == legacy.LLAMA3_VOCAB_SIZE else "llama2"
    if layout != "C" and kind != guessed:
        notes.append(f"it will be taken for {guessed}; open it with --kind {kind}")
    implied = legacy.KINDS[kind]
    if (config.bos_id, config.eos_ids) != (implied.bos_id, implied.eos_ids):
        notes.append(
            f"it carries no bos and eos ids; readers assume {kind}'s, {implied.bos_id} and "
            f"{', '.join(map(str, implied.eos_ids))}"
        )
    if layout in legacy.SIZED_LAYOUTS:
        size = legacy.file_bytes(layout, dims)
        for other in legacy.SIZED_LAYOUTS:
            misread = legacy.parse_header(other, start)
            if (
                other != layout
                and isinstance(misread, Dimensions)
                and legacy.file_bytes(other, misread) == size
            ):
                notes.append(
                    f"by its size it could be layout {other} too; open it with --format {layout}"
                )
    return notes
