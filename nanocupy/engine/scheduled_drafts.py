"""Drafts in a step: which get a place in it, and what is counted of them when they are read.

Drafts take what a step has left, and nobody waits or leaves for one. A step that computes more
than one token of a prompt goes without, unless drafts are wanted beside prompts: its time is the
prompt's, drafts would make it longer for all, by what finding them takes and by inputs that come
from the host, and what they cost there tells nothing of what they cost elsewhere. Pure Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanocupy.engine.request import Request
from nanocupy.engine.running import RunningSet
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.engine.step_plan import StepPlan
from nanocupy.memory.kv_memory import KVMemory

Drafts = Mapping[Request, Sequence[int]]


@dataclass(frozen=True)
class WantedDrafts:
    """What a step may have of drafts beside all else.

    counts: how many each request is to have at most, all of its ids being known. propose: asked
    once the step is planned, for no more than it has room for, so that nothing is guessed in vain.
    beside_prompts: whether a step that computes prompts may have drafts too.
    """

    counts: Mapping[Request, int]
    propose: Callable[[Mapping[Request, int]], Drafts]
    beside_prompts: bool


def draft_room(
    wanted: WantedDrafts, plan: StepPlan, running: RunningSet, memory: KVMemory, most: int
) -> dict[Request, int]:
    """How many of the wanted drafts a planned step has room for: within its budget, `most` of all
    requests together, free blocks, and what a request may still get. Who has none is left out."""
    if not wanted.beside_prompts and _has_prompts(plan):
        return {}
    left, num_free, size = min(plan.budget, most), memory.pool.num_free, memory.pool.block_size
    room: dict[Request, int] = {}
    for request, count in wanted.counts.items():
        if not _is_decoded(request, plan, running) or request.num_pending_tokens:
            continue
        end = request.num_computed_tokens + 1
        in_blocks = (len(request.block_ids) + num_free) * size - end
        # The token after the last draft is the last that it may have.
        in_length = request.max_total_tokens - request.num_tokens - 1
        count = min(count, left, in_blocks, in_length)
        if count > 0:
            room[request] = count
            left -= count
            num_free -= memory.blocks_wanted(request, end + count)
    return room


def add_drafts(
    drafts: Drafts, room: Mapping[Request, int], plan: StepPlan, running: RunningSet,
    memory: KVMemory,
) -> None:  # fmt: skip
    """Let requests of the step guess on, as far as there is `room`. They get blocks for all of it,
    the drafts that will turn out wrong too."""
    for request, ids in drafts.items():
        ids = tuple(ids[: room.get(request, 0)])
        if not ids:
            continue
        if request in running.decoding:  # no longer one of those in lockstep
            running.set_apart(request)
            if request in plan.grown:
                plan.grown.remove(request)
        memory.grow(request, request.num_computed_tokens + 1 + len(ids))
        plan.items[request.arrival_number] = ScheduledRequest(request, 1 + len(ids), True, ids)
        plan.budget -= len(ids)


def _has_prompts(plan: StepPlan) -> bool:
    return any(not item.samples or item.num_tokens > 1 for item in plan.items.values())


def _is_decoded(request: Request, plan: StepPlan, running: RunningSet) -> bool:
    """Whether the step computes the request's last token, and no other of it."""
    if request in running.decoding:
        return plan.lockstep
    item = plan.items.get(request.arrival_number)
    return item is not None and item.samples and item.num_tokens == 1


def count_verified(request: Request, token_ids: Sequence[int]) -> None:
    """A request got these tokens of a step, of which one was counted when that was launched. All
    but the last were drafts that were right, so they are in the cache."""
    request.output_ids += token_ids
    num_right = max(len(token_ids) - 1, 0)
    request.num_tokens += num_right
    request.num_computed_tokens += num_right
