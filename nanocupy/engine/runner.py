"""What executes a schedule. The engine knows runners by this interface alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from nanocupy.config import ModelConfig
from nanocupy.engine.binding import StepObserver
from nanocupy.engine.scheduler import ScheduledRequest


@dataclass(frozen=True)
class RunnerLimits:
    """What a runner is built for, fixed for its life.

    num_blocks counts the null block; block_size is in tokens; max_context is the longest sequence
    in tokens, max_step_tokens the most tokens of one step, max_num_seqs the most sequences.
    """

    num_blocks: int
    block_size: int
    max_context: int
    max_step_tokens: int
    max_num_seqs: int


class Runner(ABC):
    """Turns a schedule into one sampled id for each of its requests that samples."""

    config: ModelConfig
    limits: RunnerLimits
    device: str  # a name for people: "cpu", "NVIDIA H100"

    observer: StepObserver | None  # sees every op call of a step while it is set

    @abstractmethod
    def bytes_by_owner(self) -> dict[str, int]:
        """Memory of the device by what it is for: weights, kv cache, activations, …"""

    @abstractmethod
    def run(self, schedule: Sequence[ScheduledRequest]) -> list[int]:
        """Execute one step. Returns the ids of the requests that sample, in the schedule's order.
        The requests themselves are left as they are."""
