"""What a step that checks drafts reads, and how its sequences move on, beside plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.batch import build_batch, build_sampler_batch
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.request import Request
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.ops import launch_shapes
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.acceptance import count_right
from tests.kernels.small_ops import place_arguments
from tests.kernels.test_penalties import slots_of

I32 = np.int32
BLOCK, COLUMNS = 4, 9
ROW_FIELDS = (
    "token_ids", "positions", "slots", "rope_lens", "kv_lens", "sample_rows", "seeds", "counters",
    "temperature", "top_k", "top_p", "min_p",
)  # fmt: skip
PLACE_FIELDS = ("token_ids", "positions", "kv_lens", "slots", "rope_lens", "counters")


def decoding(count: int, num_places: int, seed: int = 0):
    """Requests in a decode state of more places, and drafts for some of them."""
    rng = np.random.default_rng(seed)
    state = DecodeState(num_places, COLUMNS, BLOCK)
    blocks = iter(rng.permutation(np.arange(1, num_places * COLUMNS + 1)).tolist())
    items = []
    for number in range(count):
        length = int(rng.integers(1, COLUMNS * BLOCK - 8))
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7])), top_k=int(rng.choice([-1, 9])), top_p=0.75,
            min_p=0.25,
        )  # fmt: skip
        request = Request(
            str(number), rng.integers(0, 90, length).tolist(), params, int(rng.integers(1 << 60)),
            COLUMNS * BLOCK, sample_index=number % 3,
        )  # fmt: skip
        request.num_computed_tokens = length - 1
        request.block_ids = [next(blocks) for _ in range(-(-(length + 7) // BLOCK))]
        drafts = tuple(rng.integers(0, 90, int(rng.integers(0, 8)) * (number % 3 > 0)).tolist())
        items.append(ScheduledRequest(request, 1 + len(drafts), True, drafts))
    state.updates([item.request for item in items])
    return state, Schedule(tuple(items))


def rows_of(state: DecodeState, schedule: Schedule, num_tokens: int):
    """row_places, drafts [num_tokens], query_starts: what the host sends."""
    places = state.places_of([item.request for item in schedule])
    counts = np.zeros(state.max_num_seqs, I32)
    counts[places] = [item.num_rows for item in schedule]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(I32)
    row_places, drafts = np.full((2, num_tokens), -1, I32)
    for item, place in zip(schedule, places, strict=True):
        row_places[starts[place] : starts[place + 1]] = place
        drafts[starts[place] + 1 : starts[place + 1]] = item.drafts
    return row_places, drafts, starts


def fields(state: DecodeState):
    return {
        name: state.view(state.words, name, state.max_num_seqs).copy()
        for name in state.field_names
    }  # fmt: skip


@pytest.mark.parametrize(("count", "num_places"), [(1, 1), (5, 8), (40, 64)])
@pytest.mark.parametrize("has_rope_lens", [True, False])
def test_the_inputs_are_those_of_a_batch_that_the_host_lays_out(
    backend, count, num_places, has_rope_lens
):
    state, schedule = decoding(count, num_places)
    total = sum(item.num_rows for item in schedule)
    num_tokens = total + 3
    row_places, drafts, starts = rows_of(state, schedule, num_tokens)
    have = fields(state)
    for request, place in zip(schedule.sampling, state.places_of(schedule.sampling), strict=True):
        have["token_ids"][place] = request.prompt_ids[-1]
    sizes = {"kv_lens": (num_places,), "counters": (num_tokens, 2)}
    types = {"seeds": np.uint64, "counters": np.uint32}
    types |= dict.fromkeys(("temperature", "top_p", "min_p"), np.float32)
    out = {n: np.full(sizes.get(n, (num_tokens,)), 77, types.get(n, I32)) for n in ROW_FIELDS}
    moved = {name: have[name] for name in PLACE_FIELDS}
    if not has_rope_lens:
        moved["rope_lens"] = None
    places = place_arguments(block_tables=have["block_tables"], **moved, block_size=BLOCK)
    args = (
        row_places, drafts, starts, *places,
        *(have[n] for n in ("seeds", "temperature", "top_k", "top_p", "min_p")),
        *out.values(), I32(num_tokens), I32(num_places),
    )  # fmt: skip
    first = 3 + len(places) + 5
    shape = launch_shapes.one_thread_each(max(num_tokens, num_places))
    written = tuple(range(first, first + len(out)))
    backend.run("drafts.cu", "lay_out_drafts", shape, args, written, SCALAR=0)

    in_places = dict(zip(schedule.sampling, state.places_of(schedule.sampling), strict=True))
    ordered = Schedule(tuple(sorted(schedule.requests, key=lambda s: in_places[s.request])))
    batch = build_batch(ordered, block_size=BLOCK)
    sampler = build_sampler_batch(ordered.row_requests, ordered.row_drafts)
    for name in ("token_ids", "positions", "slots"):
        np.testing.assert_array_equal(out[name][:total], getattr(batch, name), err_msg=name)
    if has_rope_lens:
        np.testing.assert_array_equal(out["rope_lens"][:total], batch.rope_lens)
    for name, values in vars(sampler).items():
        np.testing.assert_array_equal(out[name][:total], values, err_msg=name)
    np.testing.assert_array_equal(out["sample_rows"], np.arange(num_tokens))
    wanted = np.zeros(num_places, I32)
    wanted[sorted(in_places.values())] = batch.kv_lens
    np.testing.assert_array_equal(out["kv_lens"], wanted)
    padding = {"top_k": -1, "top_p": 1.0, "rope_lens": 1}
    for name in set(ROW_FIELDS) - {"sample_rows", "kv_lens"}:
        assert (out[name][total:] == padding.get(name, 0)).all(), name


def test_drafts_are_made_right(backend):
    """Those that are marked, of any row; what stands behind the last row is nobody's."""
    rng = np.random.default_rng(7)
    num_rows = 70
    sampled, drafts = rng.integers(0, 90, (2, num_rows)).astype(I32)
    forced = rng.choice([-1, 0, 1], num_rows).astype(I32)
    wanted = sampled.copy()
    for t in range(1, num_rows):
        if forced[t] == 1:
            wanted[t - 1] = drafts[t]
    assert (wanted != sampled).any()
    shape = launch_shapes.one_thread_each(num_rows)
    args = (sampled, drafts, forced, I32(num_rows))
    backend.run("drafts.cu", "force_drafts", shape, args, (0,), SCALAR=0)
    np.testing.assert_array_equal(sampled, wanted)


@pytest.mark.parametrize(("count", "num_places"), [(1, 1), (6, 8), (40, 64)])
def test_places_move_on_by_what_was_right(backend, count, num_places):
    rng = np.random.default_rng(3)
    state, schedule = decoding(count, num_places, seed=4)
    num_tokens = sum(item.num_rows for item in schedule) + 2
    row_places, drafts, starts = rows_of(state, schedule, num_tokens)
    have = fields(state)
    sampled = rng.integers(0, 90, num_tokens).astype(I32)
    for t in range(num_tokens - 1):  # most drafts are right
        if rng.random() < 0.7 and row_places[t + 1] == row_places[t]:
            sampled[t] = drafts[t + 1]
    sampled[starts[state.places_of(schedule.sampling[-1:])[0]]] = -1
    moved = {name: have[name] for name in PLACE_FIELDS}
    places = place_arguments(block_tables=have["block_tables"], **moved, block_size=BLOCK)
    args = (sampled, drafts, starts, *places, I32(num_places))
    written = tuple(range(4, 4 + 6))
    shape = launch_shapes.one_thread_each(num_places)
    before = {name: array.copy() for name, array in have.items()}
    backend.run("drafts.cu", "accept_drafts", shape, args, written, SCALAR=0)

    where, counts = state.places_of(schedule.sampling), []
    for item, place in zip(schedule, where, strict=True):
        chosen = sampled[starts[place] : starts[place + 1]].tolist()
        counts.append(1 + count_right(item.drafts, chosen))
        assert have["token_ids"][place] == max(chosen[counts[-1] - 1], 0)
    assert len(set(counts)) > 1 or count == 1
    state.move_on(where, np.array(counts, I32))
    for name in set(PLACE_FIELDS) - {"token_ids"}:
        np.testing.assert_array_equal(have[name], fields(state)[name], err_msg=name)
    free = np.setdiff1d(np.arange(num_places), where)
    for name in PLACE_FIELDS:
        np.testing.assert_array_equal(have[name][free], before[name][free], err_msg=name)
    # The host's rule says what a plain loop says.
    for item, place, n in zip(schedule, where, counts, strict=True):
        position = item.request.num_computed_tokens + n
        block = item.request.block_ids[position // BLOCK]
        assert have["positions"][place] == position
        assert have["slots"][place] == block * BLOCK + position % BLOCK
        assert have["counters"][place, 0] == item.request.num_tokens + n


def test_a_sequence_at_the_end_of_its_table_stays(backend):
    tables = np.array([[3]], I32)
    have = {
        "token_ids": np.array([5], I32), "positions": np.array([2], I32),
        "kv_lens": np.array([3], I32), "slots": np.array([14], I32),
        "rope_lens": np.array([3], I32), "counters": np.array([[3, 0]], np.uint32),
    }  # fmt: skip
    places = place_arguments(block_tables=tables, **have, block_size=BLOCK)
    sampled, drafts = np.array([7, 8], I32), np.array([-1, 7], I32)
    args = (sampled, drafts, np.array([0, 2], I32), *places, I32(1))
    shape = launch_shapes.one_thread_each(1)
    backend.run("drafts.cu", "accept_drafts", shape, args, tuple(range(4, 10)), SCALAR=0)
    assert have["token_ids"][0] == 8
    assert have["slots"][0] == 0  # of the null block
    assert (have["positions"][0], have["kv_lens"][0], have["counters"][0, 0]) == (2, 3, 3)


@pytest.mark.parametrize(("vocab", "multiprocessors"), [(37, 6), (5000, 6), (20001, 132)])
def test_penalties_of_rows_count_the_drafts_before_them(backend, vocab, multiprocessors):
    """Beside lists in which a row's drafts are output too; drafts that come twice, that were drawn
    before, that stand in the prompt, have a bias or are banned."""
    rng = np.random.default_rng(vocab)
    records, counts, lists = slots_of(rng, vocab, 12, 60)
    num_places = 9
    slots = rng.permutation(12)[:num_places].astype(I32)
    slots[2] = 0
    num_rows = rng.integers(0, 9, num_places)
    num_rows[:2] = 8, 1
    starts = np.concatenate([[0], np.cumsum(num_rows)]).astype(I32)
    total = starts[-1] + 2
    row_places = np.full(total, -1, I32)
    row_places[: total - 2] = np.repeat(np.arange(num_places), num_rows)
    drafts = rng.integers(0, vocab, total).astype(I32)
    drafts[::3] = drafts[1]  # some are equal
    for place in range(num_places):  # and some are known to the slot
        seen = np.flatnonzero(lists[slots[place]].get("counts", np.zeros(1)))
        if len(seen) and num_rows[place] > 2:
            drafts[starts[place] + 2] = seen[0]
    logits = (rng.standard_normal((total, vocab)) * 3).astype("f4")
    wanted = logits.copy()
    for t, place in enumerate(row_places):
        if place < 0 or not slots[place]:
            continue
        said, number = lists[slots[place]], t - starts[place]
        before = drafts[starts[place] + 1 : t + 1]
        record = records[slots[place]]
        drawn, context, bias = (said[name].copy() for name in ("counts", "context", "bias"))
        if record[6]:
            np.add.at(drawn, before, 1)
            context = context | (drawn > 0)
        banned = bias == -np.inf
        if banned.any() and record[2] <= number:  # enough came meanwhile
            plain_bias = np.zeros(vocab, "f4")
            entries = record[8 : 8 + 2 * record[0] : 2]
            plain_bias[entries] = record.view("f4")[9 : 9 + 2 * record[0] : 2]
            bias = plain_bias
        NumpyOps(np.float32).penalize(
            wanted[t : t + 1], np.array([0, vocab]), np.arange(vocab), drawn, context, bias,
            *said["rates"][:, None],
        )  # fmt: skip
    shape = launch_shapes.penalize_slots(int(total), counts.shape[1], multiprocessors)
    args = (
        logits, row_places, drafts, starts, slots, records, counts, I32(vocab),
        I32(records.shape[1]), I32(counts.shape[1]),
    )  # fmt: skip
    backend.run("penalties.cu", "penalize_draft_rows", shape, args, (0,), SCALAR=0)
    for t in range(total):
        finite = np.isfinite(wanted[t])
        np.testing.assert_array_equal(finite, np.isfinite(logits[t]), err_msg=str(t))
        np.testing.assert_allclose(logits[t][finite], wanted[t][finite], rtol=1e-5, atol=1e-5)


def test_what_was_right_is_counted(backend):
    rng = np.random.default_rng(5)
    vocab, num_places = 40, 8
    records, counts, _ = slots_of(rng, vocab, 12, 20)
    counts[3, 7] = 0x7FFF  # as many as are told
    slots = np.array([1, 0, 2, 3, 4, 5, 6, 7], I32)
    num_rows = np.array([8, 4, 1, 3, 5, 0, 2, 6])
    starts = np.concatenate([[0], np.cumsum(num_rows)]).astype(I32)
    drafts = rng.integers(0, vocab, starts[-1]).astype(I32)
    sampled = np.append(drafts[1:], 0).astype(I32)  # all are right
    sampled[starts[4] + 2] = (sampled[starts[4] + 2] + 1) % vocab  # but the third here
    sampled[starts[7] + 1] = -1  # and a row without a token
    sampled[starts[3]] = drafts[starts[3] + 1] = 7
    wanted_records, wanted = records.copy(), counts.copy()
    for place in range(num_places):
        slot, rows = slots[place], range(starts[place], starts[place + 1])
        if not slot or not rows:
            continue
        right = count_right(drafts[rows.start + 1 : rows.stop], sampled[rows.start : rows.stop])
        for token in sampled[rows.start : rows.start + right + 1]:
            wanted_records[slot, 2] = max(0, wanted_records[slot, 2] - 1)
            word = wanted[slot, token]
            if token >= 0 and records[slot, 6] and word & 0x7FFF < 0x7FFF:
                wanted[slot, token] += 1
    args = (
        sampled, drafts, starts, slots, records, counts, I32(num_places), I32(records.shape[1]),
        I32(counts.shape[1]),
    )  # fmt: skip
    shape = launch_shapes.one_thread_each(num_places)
    backend.run("penalties.cu", "count_accepted", shape, args, (4, 5), SCALAR=0)
    np.testing.assert_array_equal(records, wanted_records)
    np.testing.assert_array_equal(counts, wanted)
