"""Drafts in a step: which get a place in it, and what is counted of them when they are read.

Drafts take what a step has left, and nobody waits or leaves for one. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nanocupy.engine.request import Request
from nanocupy.engine.step_plan import StepPlan
from nanocupy.memory.kv_memory import KVMemory

Drafts = Mapping[Request, Sequence[int]]


def add_drafts(drafts: Drafts, plan: StepPlan, memory: KVMemory, max_draft_tokens: int) -> None:
    """Let requests of the step guess on, as far as budget and free blocks go. They get blocks for
    all of it, the drafts that will turn out wrong too."""
    left, pool = max_draft_tokens, memory.pool
    for request, ids in drafts.items():
        item = plan.items.get(request.arrival_number)
        if item is None or not item.samples or request.num_pending_tokens:
            continue
        end = request.num_computed_tokens + item.num_tokens
        room = (len(request.block_ids) + pool.num_free) * pool.block_size - end
        # The token after the last draft is the last that it may have.
        wanted = min(len(ids), request.max_total_tokens - request.num_tokens - 1)
        count = min(wanted, plan.budget, left, room)
        if count <= 0:
            continue
        memory.grow(request, end + count)
        plan.items[request.arrival_number] = replace(
            item, num_tokens=item.num_tokens + count, drafts=tuple(ids[:count])
        )
        plan.budget -= count
        left -= count


def count_verified(request: Request, token_ids: Sequence[int]) -> None:
    """A request got these tokens of a step, of which one was counted when that was launched. All
    but the last were drafts that were right, so they are in the cache."""
    request.output_ids += token_ids
    num_right = max(len(token_ids) - 1, 0)
    request.num_tokens += num_right
    request.num_computed_tokens += num_right
