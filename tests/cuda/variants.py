"""Which builds of every kernel file must compile, for which architectures.

A new kernel file gets a row here; the tests fail for a file without one. The first set of macros is
compiled for every architecture by the plain suite, each of the others for one of them in turn
(for all with NANOCUPY_ALL_VARIANTS=1).
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
INT8, E4M3 = 3, 4  # of caches alone
ARCHITECTURES = ("75", "80", "86", "89", "90a", "100", "120")
HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Variants:
    """A file, its `__global__` entries, and sets of macros."""

    file: str
    entries: tuple[str, ...]
    macro_sets: tuple[dict[str, int], ...]


def _scalars(**macros: int) -> tuple[dict[str, int], ...]:
    return tuple({"SCALAR": scalar, **macros} for scalar in (BFLOAT16, FLOAT16, FLOAT32))


def _heads(**macros: int) -> tuple[dict[str, int], ...]:
    """Every head size, and every scalar type, but not every pair of them."""
    scalars = (BFLOAT16, FLOAT16, FLOAT32, BFLOAT16, BFLOAT16)
    return tuple(
        {"SCALAR": scalar, "HEAD_SIZE": head_size, **macros}
        for scalar, head_size in zip(scalars, (128, 64, 96, 80, 256), strict=True)
    )


def _caches(**macros: int) -> tuple[dict[str, int], ...]:
    """Both quantised caches, under every scalar type."""
    pairs = ((BFLOAT16, INT8, 128), (FLOAT16, E4M3, 80), (FLOAT32, INT8, 96), (BFLOAT16, E4M3, 256),
             (FLOAT16, INT8, 64), (FLOAT32, E4M3, 64))  # fmt: skip
    return tuple(
        {"SCALAR": scalar, "CACHE": cache, "HEAD_SIZE": head_size, **macros}
        for scalar, cache, head_size in pairs
    )


VARIANTS = (
    Variants(
        "activation.cu",
        ("fill_bias_rows", "add_bias_rows", "add_residual_rows", "swiglu_rows"),
        (*_scalars(), {"SCALAR": BFLOAT16, "PRODUCT": FLOAT32, "RESIDUAL": FLOAT32}),
    ),
    Variants(
        "attention_decode.cu",
        ("attention_decode", "attention_decode_mma", "attention_decode_merge"),
        (
            *_heads(QUERIES=1),
            {"SCALAR": BFLOAT16, "HEAD_SIZE": 128, "QUERIES": 8},
            {"SCALAR": FLOAT32, "HEAD_SIZE": 64, "QUERIES": 4},
            *_caches(),
            {"SCALAR": BFLOAT16, "CACHE": E4M3, "HEAD_SIZE": 128, "QUERIES": 8, "ROW_TILES": 2},
        ),
    ),
    Variants(
        "attention_decode_fused.cu",
        ("attention_decode_fused",),
        (
            *_heads(),
            {"SCALAR": BFLOAT16, "HEAD_SIZE": 128, "STAGES": 2, "READ_EARLY": 0},
            {"SCALAR": BFLOAT16, "HEAD_SIZE": 128, "STAGES": 2, "ROW_HALVES": 1, "QUERIES": 8},
            *_caches(STAGES=2),
            {"SCALAR": BFLOAT16, "CACHE": INT8, "HEAD_SIZE": 128, "STAGES": 1, "ROW_HALVES": 1},
            {
                "SCALAR": BFLOAT16,
                "HEAD_SIZE": 128,
                "STAGES": 3,
                "ROW_HALVES": 1,
                "MAX_QUERY_VALUES": 0,
                "CLUSTERED": 0,
            },
            {
                "SCALAR": FLOAT16,
                "CACHE": E4M3,
                "HEAD_SIZE": 64,
                "STAGES": 2,
                "ROW_HALVES": 1,
                "CLUSTERED": 0,
            },
        ),
    ),
    Variants("attention_prefill.cu", ("attention_prefill",), (*_heads(), *_caches())),
    Variants(
        "attention_prefill_hopper.cu",
        ("attention_prefill_wgmma",),
        (
            *_heads(),
            {"SCALAR": FLOAT16, "HEAD_SIZE": 64, "FORCE_PLAIN": 1},
        ),
    ),
    Variants("attention_prefill_plain.cu", ("attention_prefill_plain",), (*_heads(), *_caches())),
    Variants(
        "decode_state.cu",
        ("resolve_tokens", "apply_updates"),
        ({"SCALAR": BFLOAT16},),
    ),
    Variants(
        "decode_step.cu",
        ("decode_step",),
        (
            *(
                {**macros, "SEQUENCES": sequences}
                for macros, sequences in zip(_heads(), (1, 4, 2, 3, 1), strict=True)
            ),
            *(
                {"SCALAR": scalar, "HEAD_SIZE": 128, "SEQUENCES": sequences, **macros}
                for scalar, sequences, macros in (
                    (BFLOAT16, 1, {"WEIGHT_KIND": 1}),
                    (FLOAT16, 2, {"WEIGHT_KIND": 0, "GROUP": 32}),
                    (BFLOAT16, 3, {"WEIGHT_KIND": 2}),
                    (FLOAT16, 4, {"WEIGHT_KIND": 1, "GROUP": 16}),
                    (BFLOAT16, 1, {"HAS_HEAD": 0}),
                )
            ),
        ),
    ),
    Variants(
        "drafts.cu",
        ("lay_out_drafts", "force_drafts", "accept_drafts"),
        ({"SCALAR": FLOAT32},),
    ),
    Variants(
        "embed.cu",
        ("embed_rows",),
        (
            *_scalars(),
            {"SCALAR": FLOAT16, "RESIDUAL": FLOAT32},
            {"SCALAR": FLOAT32, "RESIDUAL": BFLOAT16},
        ),
    ),
    Variants(
        "gemv.cu",
        ("norm_linear_rows", "linear_add_rows", "norm_swiglu_rows", "lm_head_rows"),
        (
            *({"SCALAR": BFLOAT16, "ROWS": rows} for rows in (1, 8, 2, 5)),
            {"SCALAR": FLOAT16, "ROWS": 4, "RESIDUAL": FLOAT32},
            {"SCALAR": FLOAT32, "ROWS": 1},
            {"SCALAR": FLOAT32, "ROWS": 8},
            {"SCALAR": FLOAT32, "ROWS": 2, "RESIDUAL": BFLOAT16},
        ),
    ),
    Variants(
        "norm.cu",
        ("rms_norm_rows",),
        (
            *_scalars(),
            {"SCALAR": BFLOAT16, "RESIDUAL": FLOAT32},
            {"SCALAR": FLOAT32, "RESIDUAL": BFLOAT16},
        ),
    ),
    Variants(
        "penalties.cu",
        (
            "penalize_slots",
            "count_tokens",
            "set_token_counts",
            "penalize_draft_rows",
            "count_accepted",
        ),
        ({"SCALAR": FLOAT32},),
    ),
    Variants(
        "quantized.cu",
        (
            "quantized_linear",
            "quantized_linear_add",
            "quantized_swiglu",
            "quantized_logits",
        ),
        (
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 1, "TOKENS": 8, "STRIPS": 2, "STAGES": 6},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 0, "TOKENS": 8, "NORM_INPUTS": 1},
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 1,
                "TOKENS": 8,
                "STRIPS": 2,
                "STAGES": 8,
                "WHOLE": 1,
            },
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 2, "TOKENS": 16, "MIN_BLOCKS": 1, "WHOLE": 1},
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 2, "TOKENS": 32, "MIN_BLOCKS": 1},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 1, "GROUP": 32, "TOKENS": 16, "MIN_BLOCKS": 1},
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 0,
                "GROUP": 16,
                "TOKENS": 8,
                "NORM_INPUTS": 1,
                "RESIDUAL": FLOAT32,
            },
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 2, "TOKENS": 8, "FORCE_PLAIN": 1},
            {"SCALAR": FLOAT32, "WEIGHT_KIND": 1, "TOKENS": 8},
        ),
    ),
    Variants(
        "quantized_pack.cu",
        ("pack_quantized", "dequantize_rows", "fill_quantized", "gather_inputs"),
        tuple(
            {"SCALAR": scalar, "WEIGHT_KIND": kind, "GROUP": group}
            for scalar, kind, group in (
                (BFLOAT16, 1, 128),
                (FLOAT16, 0, 32),
                (FLOAT32, 2, 128),
                (FLOAT32, 1, 16),
            )
        ),
    ),
    Variants(
        "quantized_stream.cu",
        (
            "quantized_stream_linear",
            "quantized_stream_linear_add",
            "quantized_stream_swiglu",
            "quantized_stream_logits",
        ),
        (
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 1,
                "TOKENS": 32,
                "OUT_TILE": 448,
                "WARPS_N": 14,
                "STRIPS": 2,
                "STAGES": 3,
            },
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 1,
                "TOKENS": 16,
                "OUT_TILE": 224,
                "WARPS_N": 7,
                "WARPS_K": 2,
                "STRIPS": 2,
            },
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 0, "TOKENS": 32, "OUT_TILE": 448, "WARPS_N": 14},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 0, "TOKENS": 32, "WARPS_K": 2, "GROUP": 16},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 1, "TOKENS": 16, "GROUP": 32, "RESIDUAL": FLOAT32},
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 2, "TOKENS": 32, "STAGES": 2, "MIN_BLOCKS": 2},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 2, "TOKENS": 16, "FORCE_PLAIN": 1},
            {"SCALAR": FLOAT32, "WEIGHT_KIND": 1, "TOKENS": 16},
        ),
    ),
    Variants(
        "quantized_wide.cu",
        (
            "quantized_wide_linear",
            "quantized_wide_linear_add",
            "quantized_wide_swiglu",
            "quantized_wide_logits",
        ),
        (
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 1,
                "TOKENS": 32,
                "OUT_TILE": 256,
                "WARPGROUPS": 4,
                "STAGES": 2,
                "INPUT_STAGES": 7,
            },
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 1, "TOKENS": 64, "OUT_TILE": 256, "GROUP": 64},
            {
                "SCALAR": BFLOAT16,
                "WEIGHT_KIND": 0,
                "TOKENS": 48,
                "OUT_TILE": 192,
                "WARPGROUPS": 3,
                "RESIDUAL": FLOAT32,
            },
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 2, "TOKENS": 16, "GROUP": 32, "WARPGROUPS": 1},
            {"SCALAR": BFLOAT16, "WEIGHT_KIND": 1, "TOKENS": 32, "FORCE_PLAIN": 1},
            {"SCALAR": FLOAT16, "WEIGHT_KIND": 1, "TOKENS": 32},
        ),
    ),
    Variants("random.cu", ("fill_normal",), _scalars()),
    Variants("rope.cu", ("rope_table", "rope_write_kv"), (*_heads(), *_caches())),
    Variants(
        "sampling.cu",
        ("penalize_rows", "argmax_rows", "sample_rows"),
        ({"SCALAR": FLOAT32},),
    ),
    Variants(
        "skinny.cu",
        ("skinny_linear", "skinny_linear_add", "skinny_swiglu", "skinny_logits"),
        (
            {"SCALAR": BFLOAT16, "TOKENS": 32},
            {"SCALAR": BFLOAT16, "TOKENS": 64, "OUT_TILE": 128, "WARPS_N": 8, "WARPS_K": 1},
            {"SCALAR": FLOAT16, "TOKENS": 16, "RESIDUAL": FLOAT32, "INPUTS_STAY": 1},
            {"SCALAR": FLOAT16, "TOKENS": 64, "OUT_TILE": 48, "WARPS_N": 3, "K_STEP": 64},
            {"SCALAR": BFLOAT16, "TOKENS": 64, "INPUTS_STAY": 1, "NORM_INPUTS": 1},
            {"SCALAR": BFLOAT16, "TOKENS": 8, "NORM_INPUTS": 1, "INPUTS_STAY": 1},
            {
                "SCALAR": FLOAT16,
                "TOKENS": 8,
                "OUT_TILE": 32,
                "WARPS_N": 2,
                "WARPS_K": 4,
                "K_STEP": 64,
            },
            {"SCALAR": FLOAT32, "TOKENS": 16},
        ),
    ),
    Variants("stamp.cu", ("stamp_step",), ({"SCALAR": BFLOAT16},)),
    Variants(
        "tall.cu",
        ("tall_swiglu",),
        (
            {"SCALAR": BFLOAT16},
            {"SCALAR": FLOAT16, "SHARERS": 4, "STAGES": 3},
            {"SCALAR": BFLOAT16, "SHARERS": 1, "FORCE_PLAIN": 1},
            {"SCALAR": FLOAT32},
        ),
    ),
    Variants(
        "wide.cu",
        ("wide_linear", "wide_linear_add", "wide_swiglu", "wide_logits"),
        (
            {"SCALAR": BFLOAT16, "TOKENS": 128},
            {"SCALAR": FLOAT16, "TOKENS": 64, "OUT_TILE": 256},
            {"SCALAR": BFLOAT16, "TOKENS": 192, "OUT_TILE": 64, "RESIDUAL": FLOAT32, "SHARERS": 2},
            {"SCALAR": FLOAT16, "TOKENS": 256, "FORCE_PLAIN": 1},
            {"SCALAR": FLOAT32, "TOKENS": 128, "OUT_TILE": 192},
        ),
    ),
)


def plain_builds() -> list[tuple[Variants, dict[str, int], str]]:
    """What the plain suite compiles: (variants, macros, architecture)."""
    builds, turn = [], 0
    for variants in VARIANTS:
        builds += [(variants, variants.macro_sets[0], arch) for arch in ARCHITECTURES]
        for macros in variants.macro_sets[1:]:
            builds.append((variants, macros, ARCHITECTURES[turn % len(ARCHITECTURES)]))
            turn += 1
    return builds


def all_builds() -> list[tuple[Variants, dict[str, int], str]]:
    """Every set of macros for every architecture."""
    return [
        (variants, macros, arch)
        for variants in VARIANTS
        for macros in variants.macro_sets
        for arch in ARCHITECTURES
    ]
