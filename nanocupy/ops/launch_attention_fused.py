"""How attention_decode_fused is launched, and up to which context one launch is the better choice.

Pure arithmetic on capacities, as `launch_attention_decode`: the batch's bucket, a bound on the
longest context that the host knows, and what the card has. The kernel is right for every length;
the bound decides only how fast it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanocupy.ops.launch_attention_decode import SCALES_BYTES
from nanocupy.ops.launch_attention_prefill import uses_tensor_cores

FILE = "attention_decode_fused.cu"
ENTRY = "attention_decode_fused"
MAX_CLUSTER = 8  # blocks that every card with clusters can place together
MAX_HEADS_PER_GROUP = 16  # rows of a tensor-core tile
STEP_TOKENS = 16  # as in the kernel
# Positions of a block up to which one launch is taken, by the blocks that there are for each
# multiprocessor at least: of many, the long ones end beside others. With 256 requests, 1024 for all
# gave 19,867 tokens a second of Qwen3-0.6B, 2048 from 3 blocks on 20,605.
BLOCK_TOKENS = ((8, 4096), (3, 2048), (0, 1024))
MAX_QUERIES = 8
# Of several queries of a sequence each reads its context for itself, so only few and short ones are
# fused: those whose blocks the card has at once, up to so many positions of a block (not measured).
BLOCK_TOKENS_OF_QUERIES = 512


@dataclass(frozen=True)
class FusedTuning:
    """What a bench may vary; None leaves the choice to the rules below.

    cluster        blocks that share the context of a sequence and key/value head
    warps, stages  warps of a block, and steps of 16 positions that each has under way at first
    read_early     keys and values are read before the kernel in front has ended
    block_tokens   positions of a block up to which this path is taken
    """

    cluster: int | None = None
    warps: int | None = None
    stages: int | None = None
    read_early: bool = True
    block_tokens: int | None = None


@dataclass(frozen=True)
class FusedLaunch:
    """One launch. `macros` come on top of SCALAR, CACHE and HEAD_SIZE.

    Arguments, in order: qkv, q_norm, k_norm, eps (float32), rope, slots, key_cache, value_cache,
    key_scales, value_scales (null where the cache is not quantised), query_starts, kv_lens,
    block_tables, scale (float32), out, then int32: num_kv_heads, heads of
    each of them, block_size, columns of block_tables.
    """

    macros: dict[str, int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    cluster: int


def can_fuse(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    scalar: int,
    cache: int,
    compute_capability: tuple[int, int],
    force_plain: bool,
) -> bool:
    """Whether the kernel does this model on this card; scalar, cache: type codes of the macros."""
    return (
        compute_capability >= (9, 0)  # below there are no clusters, and it was never measured
        and num_heads // num_kv_heads <= MAX_HEADS_PER_GROUP
        and uses_tensor_cores(head_size, scalar, cache, compute_capability, force_plain)
    )


@dataclass(frozen=True)
class _Block:
    """How a context is shared out: blocks of a cluster, warps of a block, steps of a warp under
    way."""

    cluster: int
    warps: int
    stages: int


def _choose(
    num_items: int, heads_per_group: int, head_size: int, max_kv_len: int,
    num_multiprocessors: int, tuning: FusedTuning,
) -> _Block:  # fmt: skip
    """For num_items sequences and key/value heads. Measured on an H100 at 1 to 256 sequences of 128
    to 1024 positions: best is what has all of a context under way at once, with few blocks beside
    each other on a multiprocessor, which also has the product before and the one behind."""
    few_heads = heads_per_group <= 2  # what a cluster hands round grows with them
    warps = 4 if few_heads else 8
    reach = warps * 2 * STEP_TOKENS  # positions that a block has under way
    room = num_multiprocessors * (2 if few_heads else 1)
    cluster = 1
    while (
        cluster < MAX_CLUSTER and cluster * reach < max_kv_len and 2 * cluster * num_items <= room
    ):
        cluster *= 2
    cluster = tuning.cluster or cluster
    blocks = num_items * cluster
    if blocks > 2 * num_multiprocessors:
        # As many blocks as registers allow; smaller heads leave room for more of each.
        warps, stages = 4, 1 if head_size >= 128 else 2
    elif blocks > num_multiprocessors:
        warps, stages = 4, 3 if cluster == 1 else 2
    else:
        warps, stages = warps if max_kv_len <= cluster * reach else 8, 2
    return _Block(cluster, tuning.warps or warps, tuning.stages or stages)


def fused_contexts(
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_multiprocessors: int,
    tuning: FusedTuning | None = None,
    queries: int = 1,
) -> tuple[int, ...]:
    """The contexts up to which launches differ, rising; beyond the last, one that cuts by length is
    better. All lengths between two of them have the same launch. Empty where none is better."""
    tuning = tuning or FusedTuning()
    items, group = num_sequences * queries * num_kv_heads, num_heads // num_kv_heads
    if queries > 1 and items > num_multiprocessors:
        return ()

    def choice(max_kv_len: int) -> _Block:
        return _choose(items, group, head_size, max_kv_len, num_multiprocessors, tuning)

    cluster = choice(1 << 30).cluster
    blocks = items * cluster // num_multiprocessors
    block_tokens = tuning.block_tokens or next(n for least, n in BLOCK_TOKENS if blocks >= least)
    if queries > 1 and tuning.block_tokens is None:
        block_tokens = BLOCK_TOKENS_OF_QUERIES
    longest = cluster * block_tokens
    steps = [n for n in (128 << i for i in range(10)) if n < longest] + [longest]
    return tuple(
        n for n, after in zip(steps, [*steps[1:], 0], strict=True)
        if not after or choice(n) != choice(after)
    )  # fmt: skip


def launch_attention_fused(
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    max_kv_len: int,
    num_multiprocessors: int,
    max_shared_bytes: int,
    quantized: bool = False,
    tuning: FusedTuning | None = None,
    queries: int = 1,
) -> FusedLaunch:
    """The launch for `num_sequences` sequences of at most `queries` queries each, 1, 2, 4 or 8,
    over a quantised cache 1; right for any length, made for those up to max_kv_len.

    max_shared_bytes: what a block can have. The grid has a zero where there are no sequences.
    """
    tuning = tuning or FusedTuning()
    heads_per_group = num_heads // num_kv_heads
    chosen = _choose(
        num_sequences * queries * num_kv_heads, heads_per_group, head_size, max_kv_len,
        num_multiprocessors, tuning,
    )  # fmt: skip
    cluster, wanted = chosen.cluster, (chosen.warps, chosen.stages)
    for warps, stages in (wanted, (4, 2), (2, 2), (1, 2)):
        shared_bytes = fused_shared_bytes(
            head_size, heads_per_group, warps, stages, cluster, quantized, queries
        )
        if shared_bytes <= max_shared_bytes:
            break
    return FusedLaunch(
        macros={
            "STAGES": stages,
            # Fewer registers, so that three blocks fit on a multiprocessor.
            **({"ROW_HALVES": 1, "MAX_QUERY_VALUES": 0} if heads_per_group <= 8 else {}),
            **({} if tuning.read_early else {"READ_EARLY": 0}),
            **({} if cluster > 1 else {"CLUSTERED": 0}),
            **({"QUERIES": queries} if queries > 1 else {}),
        },
        grid=(num_kv_heads * cluster, num_sequences * queries),
        block=warps * 32,
        shared_bytes=shared_bytes,
        cluster=cluster,
    )


def fused_shared_bytes(
    head_size: int,
    heads_per_group: int,
    warps: int,
    stages: int,
    cluster: int,
    quantized: bool = False,
    queries: int = 1,
) -> int:
    """Queries, each warp's keys and values (of a quantised cache codes and scales), the new keys
    and values, and what is to be merged."""

    def row_bytes(chunks: int) -> int:
        # Chunks are 16 bytes; a row that is not swizzled has an odd number of them.
        return 16 * (chunks if chunks % 8 == 0 else chunks | 1)

    chunks = head_size // 8
    stage = 2 * STEP_TOKENS * row_bytes(chunks // 2 if quantized else chunks)
    if quantized:
        stage += SCALES_BYTES
    tiles = warps * stages * stage + STEP_TOKENS * row_bytes(chunks)
    merged = cluster * warps * heads_per_group * (2 + 8 * -(-chunks // cluster)) * 4
    return tiles + 2 * 2 * head_size * queries + 8 + merged
