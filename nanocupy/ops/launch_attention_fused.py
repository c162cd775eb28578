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
_SHORT_WARPS = 4


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
    block_tokens: int = 1024


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


def cluster_blocks(
    num_sequences: int, num_kv_heads: int, num_multiprocessors: int, tuning: FusedTuning
) -> int:
    """Blocks of a cluster: as many as two for every multiprocessor leave to each."""
    if tuning.cluster is not None:
        return tuning.cluster
    cluster = MAX_CLUSTER
    while cluster > 1 and num_sequences * num_kv_heads * cluster > 2 * num_multiprocessors:
        cluster //= 2
    return cluster


def fused_contexts(
    num_sequences: int,
    num_kv_heads: int,
    num_multiprocessors: int,
    tuning: FusedTuning | None = None,
) -> tuple[int, ...]:
    """The contexts up to which launches differ, rising; beyond the last, one that cuts by length is
    better. All lengths between two of them have the same launch."""
    tuning = tuning or FusedTuning()
    cluster = cluster_blocks(num_sequences, num_kv_heads, num_multiprocessors, tuning)
    longest = cluster * tuning.block_tokens
    short = cluster * _SHORT_WARPS * STEP_TOKENS
    return (short, longest) if cluster > 2 and short < longest else (longest,)


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
) -> FusedLaunch:
    """The launch for `num_sequences` sequences of at most one query each; right for any length,
    made for those up to max_kv_len.

    max_shared_bytes: what a block can have. The grid has a zero where there are no sequences.
    """
    tuning = tuning or FusedTuning()
    cluster = cluster_blocks(num_sequences, num_kv_heads, num_multiprocessors, tuning)
    heads_per_group = num_heads // num_kv_heads
    bounds = fused_contexts(num_sequences, num_kv_heads, num_multiprocessors, tuning)
    if len(bounds) > 1 and max_kv_len <= bounds[0]:
        # Every warp has one step at most; what a block does not take, the products beside it have.
        warps, stages = _SHORT_WARPS, 1
    elif num_sequences * num_kv_heads * cluster <= num_multiprocessors:
        warps, stages = 8, 2
    else:
        warps, stages = 4, 2  # three blocks on a multiprocessor
    wanted = (tuning.warps or warps, tuning.stages or stages)
    for warps, stages in (wanted, (4, 2), (2, 2), (1, 2)):
        shared_bytes = fused_shared_bytes(
            head_size, heads_per_group, warps, stages, cluster, quantized
        )
        if shared_bytes <= max_shared_bytes:
            break
    return FusedLaunch(
        macros={
            "STAGES": stages,
            # Fewer registers, so that three blocks fit on a multiprocessor.
            **({"ROW_HALVES": 1, "MAX_QUERY_VALUES": 0} if heads_per_group <= 8 else {}),
            **({} if tuning.read_early else {"READ_EARLY": 0}),
        },
        grid=(num_kv_heads * cluster, num_sequences),
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
) -> int:
    """Queries, each warp's keys and values (of a quantised cache codes and scales), the new key
    and value, and what is to be merged."""

    def row_bytes(chunks: int) -> int:
        # Chunks are 16 bytes; a row that is not swizzled has an odd number of them.
        return 16 * (chunks if chunks % 8 == 0 else chunks | 1)

    chunks = head_size // 8
    stage = 2 * STEP_TOKENS * row_bytes(chunks // 2 if quantized else chunks)
    if quantized:
        stage += SCALES_BYTES
    tiles = warps * stages * stage + STEP_TOKENS * row_bytes(chunks)
    merged = cluster * warps * heads_per_group * (2 + 8 * -(-chunks // cluster)) * 4
    return tiles + 2 * 2 * head_size + 8 + merged
