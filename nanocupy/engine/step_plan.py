"""A step while the scheduler makes it, and what it counts of all steps. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanocupy.engine.request import Request
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.memory.kv_memory import BlockPair


@dataclass
class SchedulerCounters:
    """How often since the start."""

    num_steps: int = 0
    num_swapped_out: int = 0
    num_recomputed: int = 0
    num_resumed: int = 0


@dataclass
class StepPlan:
    """A step in the making. lockstep: all that decode are in it, beside `items`."""

    budget: int
    now: float
    lockstep: bool = False
    items: dict[int, ScheduledRequest] = field(default_factory=dict)  # by arrival number
    swap_out: list[BlockPair] = field(default_factory=list)
    swap_in: list[BlockPair] = field(default_factory=list)
    host_block_ids: list[int] = field(default_factory=list)  # free when swap_in is done
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    filling: set[int] = field(default_factory=set)  # hashes of the blocks this step computes
    grown: list[Request] = field(default_factory=list)  # of those in lockstep, who got a block
