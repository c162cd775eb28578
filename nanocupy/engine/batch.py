"""A schedule as flat arrays: what a runner puts before the forward. Host side, NumPy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nanocupy.engine.request import Request
from nanocupy.engine.schedule import ScheduledRequest


@dataclass(frozen=True)
class ForwardBatch:
    """The inputs of `model.forward.decoder_forward`, by the same names; all int32.

    token_ids, positions, slots, rope_lens [T]; query_starts [B + 1]; kv_lens [B];
    block_tables [B, M], zero beyond a sequence's own blocks; sample_rows [S].
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    rope_lens: np.ndarray
    query_starts: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    sample_rows: np.ndarray


def build_batch(
    schedule: Collection[ScheduledRequest], *, block_size: int, table_width: int | None = None
) -> ForwardBatch:
    """Lay the schedule's requests one behind the other, in its order, each one's drafts behind its
    tokens. A token that was not read yet, always the last of its request, has the id PENDING_TOKEN.

    table_width: columns of the block tables; None = as many as the longest sequence has blocks.
    """
    if table_width is None:
        table_width = max((len(s.request.block_ids) for s in schedule), default=0)
    num_tokens = [s.num_tokens for s in schedule]
    starts = np.array([s.request.num_computed_tokens for s in schedule], np.int32)
    query_starts = np.zeros(len(schedule) + 1, np.int32)
    np.cumsum(num_tokens, out=query_starts[1:])
    token_ids: list[int] = []
    block_tables = np.zeros((len(schedule), table_width), np.int32)
    for b, item in enumerate(schedule):
        first = item.request.num_computed_tokens
        last = first + item.num_tokens - len(item.drafts)
        token_ids += item.request.token_slice(first, last)
        token_ids += item.drafts
        block_tables[b, : len(item.request.block_ids)] = item.request.block_ids
    sequence = np.repeat(np.arange(len(schedule)), num_tokens)
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - query_starts[:-1])[sequence]
    blocks = block_tables[sequence, positions // block_size]
    prompt_lens = np.array([s.request.num_prompt_tokens for s in schedule], np.int32)
    return ForwardBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        # Dynamic NTK: a prompt token turns by the prompt's length, a generated one by its own.
        rope_lens=np.maximum(prompt_lens[sequence], positions + 1),
        query_starts=query_starts,
        kv_lens=starts + np.array(num_tokens, np.int32),
        block_tables=block_tables,
        sample_rows=_sample_rows(schedule, query_starts),
    )


def _sample_rows(schedule: Collection[ScheduledRequest], query_starts: np.ndarray) -> np.ndarray:
    """The tokens of the batch after which one is chosen, int32 [S]: of each request that samples
    its last token and all drafts."""
    ends = query_starts[1:]
    if not any(item.drafts for item in schedule):
        return (ends - 1)[[item.samples for item in schedule]]
    rows = [
        np.arange(end - item.num_rows, end, dtype=np.int32)
        for end, item in zip(ends, schedule, strict=True)
    ]
    return np.concatenate(rows)


@dataclass(frozen=True)
class SamplerBatch:
    """The parameters of the sampled rows, as the ops `penalize` and `sample` take them."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray
    counters: np.ndarray


@dataclass(frozen=True)
class PenaltyBatch:
    """The penalised entries of the sampled rows, as the op `penalize` takes them."""

    entry_starts: np.ndarray
    token_ids: np.ndarray
    output_counts: np.ndarray
    in_context: np.ndarray
    bias: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray


def build_sampler_batch(
    requests: Sequence[Request], drafts: Sequence[Sequence[int]] = ()
) -> SamplerBatch:
    """Parameters of the rows that are sampled, in the order of the rows. drafts: what each row
    takes for granted beyond its request's tokens; none where there are none at all.

    A token is drawn by its position, so it is the same whether drafts stood before it or tokens.
    """
    params = [r.params for r in requests]
    positions = [r.num_tokens for r in requests]
    if drafts:
        positions = [n + len(ids) for n, ids in zip(positions, drafts, strict=True)]
    return SamplerBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([r.seed for r in requests], np.uint64),
        counters=np.array([positions, [r.sample_index for r in requests]], np.uint32).T.copy(),
    )


def build_penalty_batch(
    requests: Sequence[Request],
    banned: Sequence[int],
    leave_out: Callable[[Request], bool] = lambda request: False,
    drafts: Sequence[Sequence[int]] = (),
) -> PenaltyBatch | None:
    """Entries of every row with penalties, a bias, or banned ids; None where no row has any.

    banned: ids a row must not yield while it is short of its min_tokens (the ends of text).
    leave_out: whose rows are to have no entries.
    drafts: what each row takes for granted beyond its request's output; as `build_sampler_batch`.
    """
    if not any(request.changes_logits for request in requests):
        return None
    starts = [0]
    token_ids: list[int] = []
    counts: list[int] = []
    in_context: list[bool] = []
    bias: list[float] = []
    for request, guessed in zip(requests, drafts or [()] * len(requests), strict=True):
        p = request.params
        if request.changes_logits and leave_out(request):
            starts.append(len(token_ids))
            continue
        entries: dict[int, float] = dict(p.logit_bias)
        output_counts = request.output_counts
        if guessed:
            output_counts = output_counts + Counter(guessed)
        context: set[int] = set()
        if p.repetition_penalty != 1:
            context = set(request.prompt_ids)
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            context |= output_counts.keys()
        if request.num_output_tokens + len(guessed) < p.min_tokens:
            entries |= dict.fromkeys([*banned, *p.stop_token_ids], -np.inf)
        entries = dict.fromkeys(context, 0.0) | entries
        token_ids += entries
        bias += entries.values()
        counts += [output_counts[t] for t in entries]
        in_context += [t in context for t in entries]
        starts.append(len(token_ids))
    if not token_ids:
        return None
    params = [r.params for r in requests]
    return PenaltyBatch(
        entry_starts=np.array(starts, np.int32),
        token_ids=np.array(token_ids, np.int32),
        output_counts=np.array(counts, np.int32),
        in_context=np.array(in_context, bool),
        bias=np.array(bias, np.float32),
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
    )


def split_penalties(
    penalties: PenaltyBatch | None, max_entries: int
) -> Iterator[tuple[slice, PenaltyBatch]]:
    """The rows that have entries, as runs of rows with at most `max_entries` of them together (a
    row with more is a run of its own)."""
    if penalties is None:
        return
    starts = penalties.entry_starts
    num_rows = len(starts) - 1
    first = 0
    while first < num_rows:
        last = int(np.searchsorted(starts, starts[first] + max_entries, side="right")) - 1
        last = min(max(last, first + 1), num_rows)
        entries, rows = slice(starts[first], starts[last]), slice(first, last)
        if starts[last] > starts[first]:
            yield (
                rows,
                PenaltyBatch(
                    entry_starts=starts[first : last + 1] - starts[first],
                    **{n: getattr(penalties, n)[entries] for n in _ENTRY_FIELDS},
                    **{n: getattr(penalties, n)[rows] for n in _ROW_FIELDS},
                ),
            )
        first = last


_ENTRY_FIELDS = ("token_ids", "output_counts", "in_context", "bias")
_ROW_FIELDS = ("repetition", "presence", "frequency")
