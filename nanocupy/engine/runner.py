"""What executes a schedule. The engine knows runners by this interface alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanocupy.config import ModelConfig
from nanocupy.engine.binding import StepObserver
from nanocupy.engine.results import StepResult
from nanocupy.engine.schedule import Schedule
from nanocupy.memory.host_pool import SwapCosts
from nanocupy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanocupy.cuda.step_stamps import StepStamps


@dataclass(frozen=True)
class RunnerLimits:
    """What a runner is built for, fixed for its life.

    num_blocks counts the null block; block_size is in tokens; max_context is the longest sequence
    in tokens, max_step_tokens the most tokens of one step, max_num_seqs the most sequences.
    num_host_blocks blocks of host memory take what preempted requests had; 0 = none.
    max_drafts are the drafts of one sequence in a step, max_draft_rows those of all sequences: a
    step samples so many rows beyond one a sequence.
    """

    num_blocks: int
    block_size: int
    max_context: int
    max_step_tokens: int
    max_num_seqs: int
    num_host_blocks: int = 0
    max_drafts: int = 0
    max_draft_rows: int = 0

    @property
    def max_rows(self) -> int:
        """Rows that a step may sample."""
        return self.max_num_seqs + self.max_draft_rows


class Runner(ABC):
    """Turns a schedule into a sampled id for each of its rows: one for every request that samples,
    and one more for each draft of it."""

    config: ModelConfig
    limits: RunnerLimits
    device: str  # a name for people: "cpu", "NVIDIA H100"
    # Types of activations, of the residual stream, and of the LM head.
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32")

    observer: StepObserver | None  # sees every op call of a step while it is set
    # Whether a step can be launched while the ids of the one before are not read: the runner puts
    # them in itself, wherever a batch has PENDING_TOKEN.
    can_run_ahead: bool = False
    # Whether requests may ask for log-probabilities; without, the engine refuses those that do.
    has_logprobs: bool = False

    @abstractmethod
    def run(self, schedule: Schedule) -> list[int] | StepResult:
        """Execute one step: the copies of swap_out, those of swap_in, the forward. Returns the ids
        of the schedule's rows, in its order (`Schedule.row_requests`), FAILED_TOKEN for a row whose
        largest logit is NaN or infinite: that request ends, and no other. A schedule with
        `wants_logprobs` gets a StepResult. The requests are left as they are."""

    def launch(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        """Start one step. Returns a function that waits for it and gives what `run` does; it is
        called once, before the step after the next is launched, and with `wants_logprobs` or
        drafts before the next: then no token of the next is pending."""
        result = self.run(schedule)
        return lambda: result

    def counts_tokens(self, params: SamplingParams) -> bool:
        """Whether penalties of requests with these parameters are counted here, so that the host
        need not know the ids of one step before the next."""
        return False

    def swap_costs(self) -> SwapCosts | None:
        """What swapping costs here, measured; None where nothing is known. The rate of prompts is
        a guess, which the engine replaces by what it sees."""
        return None

    def force_acceptance(self, count: Callable[[Sequence[int]], int] | None) -> bool:
        """For benches: from the next step on that does nothing but check drafts of requests that
        decode, have it choose the first count(drafts) drafts of each request; None ends it. Gives
        whether the runner can."""
        return False

    def stamp_steps(self, num_steps: int) -> StepStamps | None:
        """From the next step on, note when each starts and ends on the device, and keep the last
        `num_steps`; 0 ends it. Gives what reads them; None where the device has no clock."""
        return None
