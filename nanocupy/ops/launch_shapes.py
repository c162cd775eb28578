"""How the small kernels are launched: grid, block and shared memory from an op's dimensions.

Plain integers in, `LaunchShape` out; it knows no arrays and no device, so that the CUDA ops and the
tests launch alike. A grid with a zero in it is an empty batch, which is not launched. Letters are
those of `ops.interface`.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
MAX_BLOCK = 1024
MAX_GRID_Y = 65535
MAX_RANKS = 8  # blocks of a cluster on any card that has clusters
# Of kernels_cu/sampling.cu: the tokens that a block ends with, and a bound of its other variables.
SAMPLE_SHARED_BYTES, SAMPLE_STATIC_BYTES = 8 * 2048, 19 << 10


@dataclass(frozen=True)
class LaunchShape:
    """Blocks, threads of a block, dynamic shared memory of a block in bytes, and how many blocks in
    a row (along x) make a cluster: from compute capability 9.0; 1 = none. resident: the blocks wait
    for each other, so all must be there at once."""

    grid: tuple[int, ...]
    block: int
    shared_bytes: int = 0
    cluster: int = 1
    resident: bool = False


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_block(width: int, per_thread: int, most: int = MAX_BLOCK) -> int:
    """Threads for a row of `width` values: whole warps, each thread `per_thread` of them at least,
    at most `most` threads."""
    return max(WARP, min(most, _ceil_div(width, per_thread * WARP) * WARP))


def embed_rows(num_tokens: int, hidden_size: int) -> LaunchShape:
    return LaunchShape((num_tokens,), row_block(hidden_size, 8, 256))


def rope_table(num_tokens: int, head_size: int) -> LaunchShape:
    return LaunchShape((num_tokens,), row_block(head_size // 2, 1, 128))


def rope_write_kv(num_tokens: int, num_heads: int, num_kv_heads: int) -> LaunchShape:
    """A warp for each head of q, k and v; few tokens are spread over more blocks."""
    heads = num_heads + 2 * num_kv_heads
    warps = 8 if num_tokens * heads >= 8 * 1024 else 4
    return LaunchShape((num_tokens, _ceil_div(heads, warps)), warps * WARP)


def rms_norm_rows(num_rows: int, hidden_size: int) -> LaunchShape:
    """With few rows the time is a row's latency: more threads, each with one load."""
    return LaunchShape((num_rows,), row_block(hidden_size, 8, 256 if num_rows >= 256 else 1024))


def add_rows(num_tokens: int, width: int) -> LaunchShape:
    """fill_bias_rows, add_bias_rows, add_residual_rows."""
    return LaunchShape((num_tokens,), row_block(width, 4, 256))


def swiglu_rows(num_tokens: int, intermediate_size: int) -> LaunchShape:
    block = row_block(intermediate_size, 8, 256)
    parts = min(_ceil_div(intermediate_size, block * 8), MAX_GRID_Y)
    return LaunchShape((num_tokens, max(1, parts)), block)


def argmax_parts(num_rows: int, vocab_size: int, num_multiprocessors: int) -> int:
    """Blocks that share a row: enough to fill the device, each with 4096 logits at least."""
    wanted = _ceil_div(2 * num_multiprocessors, max(1, num_rows))
    return max(1, min(wanted, vocab_size // 4096, 1024))


def argmax_rows(num_rows: int, vocab_size: int, parts: int) -> LaunchShape:
    return LaunchShape((num_rows, parts), row_block(_ceil_div(vocab_size, parts), 8, 512))


def penalize_rows(num_rows: int, num_entries: int) -> LaunchShape:
    """num_entries: of all rows together."""
    return LaunchShape((num_rows if num_entries else 0,), 128)


def penalize_slots(num_rows: int, width: int, num_multiprocessors: int) -> LaunchShape:
    """width: words of a slot. Few rows are spread over more blocks, each with 2048 words at
    least."""
    parts = min(_ceil_div(2 * num_multiprocessors, max(1, num_rows)), width // 2048)
    return LaunchShape((num_rows, max(1, parts)), 256)


def sample_rows(
    num_rows: int,
    vocab_size: int,
    num_multiprocessors: int,
    max_shared_bytes: int,
    has_clusters: bool,
    ranks: int | None = None,
) -> LaunchShape:
    """Blocks that fill the device share a row, more where one could not keep its part of it; each
    has 2048 logits at least. ranks: how many share a row, if not that: 1, 2, 4 or 8."""

    def shared_bytes(ranks: int) -> int:
        return SAMPLE_SHARED_BYTES + 16 * _ceil_div(vocab_size, 4 * ranks)

    if ranks is None:
        ranks = 1
        # Of many blocks two run at once, so that one reads while the other computes.
        room = max_shared_bytes // 2 - SAMPLE_STATIC_BYTES
        while (
            has_clusters
            and ranks < MAX_RANKS
            and vocab_size >= 2 * ranks * 2048
            and (2 * ranks * num_rows <= num_multiprocessors or shared_bytes(ranks) > room)
        ):
            ranks *= 2
    shared = shared_bytes(ranks)
    if shared > max_shared_bytes - SAMPLE_STATIC_BYTES:
        shared = SAMPLE_SHARED_BYTES
    most = MAX_BLOCK if num_rows * ranks <= num_multiprocessors else MAX_BLOCK // 2
    block = row_block(_ceil_div(vocab_size, ranks), 4, most)
    return LaunchShape((num_rows * ranks,), block, shared, ranks)


def keeps_logits(sample: LaunchShape) -> bool:
    """Whether blocks of this launch of `sample_rows` have room for their part of a row."""
    return sample.shared_bytes > SAMPLE_SHARED_BYTES


def one_thread_each(count: int) -> LaunchShape:
    """resolve_tokens, apply_updates, count_tokens, set_token_counts, lay_out_drafts,
    accept_drafts."""
    return LaunchShape((_ceil_div(count, 128),), 128)
