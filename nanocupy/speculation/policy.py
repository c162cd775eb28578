"""How many drafts each request gets in the next step: as many as pay, none where none do.

A step of B sequences with R drafts takes T(B, R) seconds and gives B tokens and those drafts that
are right. T is measured; how often a request's drafts are right is tracked for each request, and
for all together, which is what is expected of one of which nothing is known, or not for long.
Drafts are taken in the number that gives the most tokens a second, if that is more than without.

Where none are expected to pay, a few are tried all the same: else nobody would know when they do.
What drafts cost and bring is accounted for (`budget`): while more was lost than may be, there are
none, whatever is expected of them. So tries that fail are far apart, and one that is right is soon
followed by others. A batch for which even the best drafts would cost too much is left alone for
long. Pure Python: no clock, no arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanocupy.engine.request import Request
from nanocupy.speculation.budget import DraftBudget
from nanocupy.speculation.costs import StepCosts, bucket

_ROOMY = 1 << 20  # drafts of a step, more than there ever are


class DraftPolicy:
    """Says how many drafts are wanted, and is told what came of them. This one always wants the
    same number for everyone.

    beside_prompts: whether there may be drafts in a step that computes prompts too.
    """

    beside_prompts = True

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts

    def is_open(self, num_running: int) -> bool:
        """Whether drafts may pay in a step of so many sequences; asked first, once a step."""
        return True

    def choose(
        self, requests: Sequence[Request], num_running: int, room: int = _ROOMY
    ) -> dict[Request, int]:
        """How many drafts each of these requests shall have, those without left out. room: of a
        step for drafts of all together; what is beyond it is cut off."""
        return dict.fromkeys(requests, self.max_drafts)

    def stepped(
        self, num_seqs: int, num_drafts: int, seconds: float | None, *, is_usual: bool = True
    ) -> None:
        """A step of decodes alone took so long, finding its drafts included; None: nobody knows.
        is_usual: whether that is what such steps take."""

    def resumed(self, num_seqs: int, seconds: float) -> None:
        """That step had none, and took so long because drafts were looked for in vain, or were in
        the one before: the device had to wait for the host."""

    def may_wait(self, num_seqs: int, num_drafts: int) -> bool:
        """Whether a step like this one is to be read in the call that launches it, as nobody knows
        what it takes otherwise. That may take as long as another step."""
        return False

    def verified(self, request: Request, num_drafts: int, num_right: int) -> None:
        """So many of a request's drafts were right, in the step of which `stepped` told last;
        num_drafts = 0: none was found."""

    def forget(self, request: Request) -> None:
        """The request has ended."""


@dataclass
class _Record:
    """How many drafts were looked at and right, older ones counting less; of a request, when it had
    so many tokens."""

    num_tried: float = 0.0
    num_right: float = 0.0
    num_tokens: int = 0

    def add(self, num_tried: float, num_right: int, fade: float) -> None:
        self.num_tried = self.num_tried * fade + num_tried
        self.num_right = self.num_right * fade + num_right


class AdaptiveDrafts(DraftPolicy):
    """See the module. max_drafts: of a request in a step; max_rows: of all together; try_all_alone:
    whether tries of a request that runs alone are of all its drafts: where these cost little more
    than a few, and each form of step is captured when it first comes, fewer forms are met."""

    beside_prompts = False  # what they cost there is not measured
    MARGIN = 1.02  # drafts must be better by this
    HOPE = 0.5  # of drafts to be right, before any was seen
    FADE = 0.95  # what is known of a request's drafts, with each token; and of all, with each look
    LEVELS = 32  # of how often drafts are right
    LEAST_SHARE = 0.1  # a draft that is right less often is not asked for
    # A try: so many drafts of a request and of all; more of a request where they lose no more than
    # so many times as much.
    TRY_DRAFTS, TRY_ROWS, TRY_LOSS = 2, 32, 1.5
    BEST = 0.9  # share of right drafts that no batch is expected to exceed
    CLOSED_STEPS = 2048  # for which one is left alone where even that would not pay
    REST_STEPS = 8  # in which nobody asks again, where the budget does not allow what is wanted
    # What is charged, in steps without drafts. A step that takes longer than so many times what its
    # kind does was disturbed, or was the first of its form; so is one after drafts. And about what
    # it takes to read a step at once, beside a caller who takes long.
    MOST_LONGER, MOST_RESUMED, WAITING = 1.5, 1.0, 0.8
    # So seldom steps without drafts are made, so that their time stays known, and so many; sooner
    # where that time is of one step alone, which may have been disturbed.
    REFRESH_STEPS, UNSURE_STEPS, REFRESH_LENGTH = 512, 16, 5

    def __init__(
        self, max_drafts: int, max_rows: int = _ROOMY, *, try_all_alone: bool = False
    ) -> None:
        super().__init__(max_drafts)
        self._max_rows = max_rows
        self._try_alone = max_drafts if try_all_alone else min(self.TRY_DRAFTS, max_drafts)
        self.costs = StepCosts()
        self.budget = DraftBudget()
        self._sizes = sorted({n for n in (1, 2, 3, 5, 7) if n < max_drafts} | {max_drafts})
        self._records: dict[Request, _Record] = {}
        self._of_all = _Record()  # all requests together
        self._num_asked = 0  # steps in which drafts were thought of
        self._rests_until = 0  # in such steps
        self._closed: dict[int, int] = {}  # by bucket: until when
        self._num_drafted = 0  # steps with drafts since the last refresh
        self._num_refreshed = 0  # steps of the refresh under way
        self._num_seqs = 1  # of the step that was read last

    def is_open(self, num_running: int) -> bool:
        self._num_asked += 1
        self.costs.moved(num_running)
        if self._num_asked < self._rests_until or not self.budget.is_open:
            return False
        if self._num_refreshed or self._num_drafted >= self._refresh_steps(num_running):
            self._num_refreshed += 1
            if self._num_refreshed <= self.REFRESH_LENGTH:
                return False
            self._num_refreshed = self._num_drafted = 0
        until = self._closed.get(bucket(num_running))
        if until is not None:
            if self._num_asked < until:
                return False
            del self._closed[bucket(num_running)]
            self.costs.forget_drafts(num_running)
        return True

    def choose(
        self, requests: Sequence[Request], num_running: int, room: int = _ROOMY
    ) -> dict[Request, int]:
        room = min(room, self._max_rows)
        plain = self.costs.seconds(num_running, 0)
        if plain is None or not requests:
            return {}  # steps without drafts are measured first
        # Requests whose drafts are right about as often get as many.
        levels = [int(self.LEVELS * self._share(request) + 0.5) for request in requests]
        best = self._best(Counter(levels), num_running, plain, room)
        if best is not None:
            wanted = {r: best[n] for r, n in zip(requests, levels, strict=True) if best[n]}
        elif self._is_hopeless(num_running, plain, room):
            self._closed[bucket(num_running)] = self._num_asked + self.CLOSED_STEPS
            return {}
        else:
            wanted = self._try(requests, num_running, plain, room)
        total = min(room, sum(wanted.values()))
        seconds = self.costs.estimate(num_running, total) or plain  # the first one must be seen
        if not self.budget.allows(seconds / plain - 1):
            self._rests_until = self._num_asked + self.REST_STEPS
            return {}
        self._num_drafted += 1
        if best is None:
            self.budget.halve_credit()
        return wanted

    def stepped(
        self, num_seqs: int, num_drafts: int, seconds: float | None, *, is_usual: bool = True
    ) -> None:
        self.costs.add(num_seqs, num_drafts, seconds if is_usual else None)
        self._num_seqs = num_seqs
        self.budget.limit_credit(num_seqs)
        self.budget.passed()
        plain = self.costs.seconds(num_seqs, 0)
        if num_drafts and plain is not None:
            self._charge(num_seqs, num_drafts, seconds, plain)

    def resumed(self, num_seqs: int, seconds: float) -> None:
        plain = self.costs.seconds(num_seqs, 0)
        if plain is not None:
            self.budget.lost(min(max(0.0, seconds / plain - 1), self.MOST_RESUMED))

    def may_wait(self, num_seqs: int, num_drafts: int) -> bool:
        costs, is_refresh = self.costs, self._num_refreshed > 0 and not num_drafts
        is_wanted = not costs.has_seen(num_seqs, num_drafts) and self.budget.allows(self.WAITING)
        if not is_wanted and not (is_refresh and not costs.is_sure(num_seqs)):
            return False
        self.budget.lost(self.WAITING)
        return True

    def verified(self, request: Request, num_drafts: int, num_right: int) -> None:
        self.budget.gained(num_right / self._num_seqs)
        num_tried = max(min(num_right + 1, num_drafts), 0.5)
        record = self._records.setdefault(request, _Record())
        record.add(num_tried, num_right, self._left(request, record))
        record.num_tokens = request.num_tokens
        self._of_all.add(num_tried, num_right, self.FADE)

    def _charge(self, num_seqs: int, num_drafts: int, seconds: float | None, plain: float) -> None:
        """What a step with drafts lost."""
        known = self.costs.seconds(num_seqs, num_drafts)
        usual = self.costs.estimate(num_seqs, num_drafts)
        most = self.MOST_LONGER * (usual or self.MOST_LONGER * plain)
        if known is None and usual is not None and seconds is not None and seconds > most:
            seconds = usual  # it was captured
        self.budget.lost(max(0.0, min(seconds or usual or most, most) / plain - 1))

    def _refresh_steps(self, num_seqs: int) -> int:
        return self.REFRESH_STEPS if self.costs.is_sure(num_seqs) else self.UNSURE_STEPS

    def forget(self, request: Request) -> None:
        self._records.pop(request, None)

    def _left(self, request: Request, record: _Record) -> float:
        """What its record still counts, so many tokens later."""
        return self.FADE ** max(0, request.num_tokens - record.num_tokens)

    def _share(self, request: Request) -> float:
        """How likely a draft is right where those before it are: what is known of the request, and
        as much as one draft would tell of what is known of all."""
        of_all, record = self._of_all, self._records.get(request)
        share = (of_all.num_right + self.HOPE) / (of_all.num_tried + 1)
        if record is None:
            return share
        left = self._left(request, record)
        return (record.num_right * left + share) / (record.num_tried * left + 1)

    def _best(
        self, levels: Mapping[int, int], num_running: int, plain_s: float, room: int
    ) -> dict[int, int] | None:
        """The number of drafts for each level that gives the most tokens a second; None where none
        is better than without, as far as is known. levels: how many requests each has."""
        best, best_rate = None, self.MARGIN * num_running / plain_s
        for size in self._sizes:
            counts = {level: self._count(level / self.LEVELS, size) for level in levels}
            total = sum(levels[level] * count for level, count in counts.items())
            seconds = self.costs.estimate(num_running, min(total, room)) if total else None
            if seconds is None:
                break
            gain = sum(
                levels[level] * sum((level / self.LEVELS) ** n for n in range(1, count + 1))
                for level, count in counts.items()
            )
            gain *= min(1.0, room / total)  # a step takes no more
            rate = (num_running + gain) / seconds
            if rate > best_rate:
                best, best_rate = counts, rate
        return best

    def _count(self, share: float, most: int) -> int:
        """Drafts of a request, the last of which is still right often enough."""
        count, chance = 0, share
        while count < most and chance >= self.LEAST_SHARE:
            count += 1
            chance *= share
        return count

    def _is_hopeless(self, num_running: int, plain_s: float, room: int) -> bool:
        """Whether drafts would cost too much even if they were the best there are, and of all: how
        many have some now says nothing of the steps to come."""
        best = {int(self.LEVELS * self.BEST): num_running}
        return (
            self.costs.knows_drafts(num_running)
            and self._best(best, num_running, plain_s, room) is None
        )

    def _try(
        self, requests: Sequence[Request], num_running: int, plain_s: float, room: int
    ) -> dict[Request, int]:
        """A few drafts of the first: who has had some is sorted in behind the others."""
        size = self._try_alone if num_running == 1 else min(self.TRY_DRAFTS, self.max_drafts)
        count = min(len(requests), max(1, min(room, self.TRY_ROWS) // size))
        few_s = self.costs.estimate(num_running, size * count)
        if few_s is not None:
            most_s = plain_s + self.TRY_LOSS * (few_s - plain_s)
            fitting = [n for n in self._sizes if n > size and n * count <= room]
            for number in fitting:
                if (self.costs.estimate(num_running, number * count) or few_s) <= most_s:
                    size = number
        return dict.fromkeys(requests[:count], size)
