"""What the engine asks for drafts: a proposer, a policy, and counters of what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanocupy.engine.request import Request, RequestState
from nanocupy.engine.running import RunningSet
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.engine.scheduled_drafts import Drafts, WantedDrafts
from nanocupy.speculation.acceptance import CountRight, count_right
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer


@dataclass
class SpeculationCounters:
    """Since the start: steps with drafts; of all sequences in these that had any, the forwards,
    drafts, right drafts and tokens; how often a guess was looked for and none found."""

    num_steps: int = 0
    num_forwards: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    num_missed: int = 0

    @property
    def num_tokens(self) -> int:
        """Each forward gives the right drafts and the token after them."""
        return self.num_forwards + self.num_accepted

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were right."""
        return self.num_accepted / max(1, self.num_proposed)

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / max(1, self.num_forwards)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "steps": self.num_steps,
            "forwards": self.num_forwards,
            "proposed": self.num_proposed,
            "accepted": self.num_accepted,
            "missed": self.num_missed,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
        }

    def summary(self) -> str:
        """ "proposed 40, accepted 31 (78 %), 3.6 tokens a forward over 12 forwards"."""
        return (
            f"proposed {self.num_proposed}, accepted {self.num_accepted} "
            f"({100 * self.acceptance:.0f} %), {self.tokens_per_forward:.1f} tokens a forward over "
            f"{self.num_forwards} forwards"
        )


class Speculator:
    """Drafts for the requests of one engine. count_right: how many drafts count; benches put
    another rule in place of the one that keeps the model's own output."""

    def __init__(
        self, proposer: Proposer, policy: DraftPolicy, count_right: CountRight = count_right
    ) -> None:
        self.proposer = proposer
        self.policy = policy
        self.count_right = count_right
        self.counters = SpeculationCounters()
        self.reads_at_once = False  # whether a step is to be read in the call that launches it
        self._has_failed = False  # whether the last search for drafts did
        self._was_plain = False  # the last step: of decodes alone, launched before its ids mattered
        self._has_waited = False  # for all ids, before the step that is read next or the last one
        self._is_untimed = False  # the step that was read last: nobody knows what it took
        self._num_running = 0  # when drafts were last wanted
        self._was_reading = False  # the proposer, before the step that is read next

    def configure(self, max_step_tokens: int) -> None:
        """Steps of the engine have so many tokens at most from now on."""
        self.proposer.max_step_tokens = max_step_tokens

    def wanted(self, running: RunningSet, room: int) -> dict[Request, int]:
        """How many drafts requests shall have in the next step, in which there is room for so many
        if nobody comes. Where it is not empty, the ids of all steps must be read, and the scheduler
        be told."""
        if self._has_failed:  # whatever it was, the next step comes without drafts
            self._has_failed = False
            return {}
        policy, num_running = self.policy, len(running)
        self._num_running = num_running
        num_decoding = len(running.decoding)
        if num_decoding < (1 if policy.beside_prompts else max(1, num_running)):
            return {}
        if not policy.is_open(num_running):
            return {}
        found = [
            request
            for request in running.decoding
            if not request.wants_logprobs
            and request.num_tokens + 1 < request.max_total_tokens
            and self.proposer.is_promising(request)
        ]
        return policy.choose(found, num_running, room) if found else {}

    def asking(self, counts: Mapping[Request, int]) -> WantedDrafts:
        """What the scheduler is told of those of `wanted` that still decode, all ids being read."""
        self._was_plain, self._has_waited = False, True
        # What is to be read at once already was paid for.
        self.reads_at_once = self._is_untimed and (
            self.reads_at_once or self.policy.may_wait(self._num_running, sum(counts.values()))
        )
        return WantedDrafts(counts, self.propose, self.policy.beside_prompts)

    def propose(self, room: Mapping[Request, int]) -> Drafts:
        """Drafts of requests that decode, all of their ids being known, and no more of each than
        there is room for."""
        self._has_failed = True
        drafts = self.proposer.propose(room)
        self._has_failed = False
        for request in room:
            if request not in drafts:
                self.counters.num_missed += 1
                self.policy.verified(request, 0, 0)
        self._was_reading = self.proposer.was_reading
        return drafts

    def verify(self, schedule: Schedule, token_ids: Sequence[int]) -> list[Sequence[int]]:
        """What each request that samples got of a step with drafts: those of its drafts that were
        right, and the token after them. token_ids: of the schedule's rows."""
        found: list[Sequence[int]] = []
        row = 0
        for item in schedule:
            chosen, row = token_ids[row : row + item.num_rows], row + item.num_rows
            if item.drafts and item.request.state is not RequestState.FINISHED:
                num_right = self._num_right(item, chosen)
                chosen = [*item.drafts[:num_right], chosen[num_right]]
            if item.samples:
                found.append(chosen)
        return found

    def _num_right(self, item: ScheduledRequest, chosen: Sequence[int]) -> int:
        drafts, counters = item.drafts, self.counters
        num_right = self.count_right(drafts, chosen)
        counters.num_forwards += 1
        counters.num_proposed += len(drafts)
        counters.num_accepted += num_right
        self.policy.verified(item.request, len(drafts), num_right)
        return num_right

    def stepped(self, schedule: Schedule, seconds: float | None) -> None:
        """A step was read; seconds it took of the engine's own, None where nobody knows: then one
        is read at once, where the policy wants to know that much."""
        num_drafts = sum(len(item.drafts) for item in schedule) if schedule.has_drafts else 0
        num_seqs = len(schedule.requests)
        self.counters.num_steps += num_drafts > 0
        is_known = seconds is not None
        is_swap = bool(schedule.swap_out or schedule.swap_in)
        is_decode = schedule.num_tokens - num_drafts == num_seqs
        if is_decode and is_swap and num_drafts:  # drafts lose what they are expected to
            self.policy.stepped(num_seqs, num_drafts, None)
        is_decode = is_decode and not is_swap
        # After a step that was waited for, the next one did not run beside the host's work; and a
        # proposer that had to read first took longer.
        is_usual = not self._was_reading if num_drafts else self._was_plain
        self._was_reading = False
        if is_decode:
            self.policy.stepped(num_seqs, num_drafts, seconds, is_usual=is_usual)
        if is_decode and not num_drafts and self._has_waited and seconds is not None:
            self.policy.resumed(num_seqs, seconds)
        self._has_waited = num_drafts > 0
        self._is_untimed = is_decode and not is_known
        # The one that is read at once may be under way already.
        self.reads_at_once = self._is_untimed and (
            self.reads_at_once or self.policy.may_wait(num_seqs, 0)
        )
        self._was_plain = is_decode and not num_drafts

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self.proposer.forget(request)
        self.policy.forget(request)
