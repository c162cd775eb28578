"""How many drafts each request gets in the next step: as many as pay, none where none do.

A step of B sequences with R drafts takes T(B, R) seconds and gives B tokens and those drafts that
are right. T is measured; how often a request's drafts are right is tracked for each request. Drafts
are taken in the number that gives the most tokens a second, if that is more than without. A request
whose drafts do not pay pauses, each time for longer, and is then tried again; a batch too large for
any drafts is left alone for a while. A new request is expected to do as others did lately. Where
that does not pay and better ones might, a few steps have drafts all the same now and then: else
nobody would ever know. Pure Python: no clock, no arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanocupy.engine.request import Request
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

    def may_try(self, request: Request) -> bool:
        """Whether the request may have drafts now; asked of all that decode, in every step."""
        return True

    def choose(
        self, requests: Sequence[Request], num_running: int, room: int = _ROOMY
    ) -> dict[Request, int]:
        """How many drafts each of these requests shall have, those without left out. room: of a
        step for drafts of all together; what is beyond it is cut off."""
        return dict.fromkeys(requests, self.max_drafts)

    def stepped(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """A step of decodes alone took so long, finding its drafts included."""

    def knows(self, num_seqs: int, num_drafts: int) -> bool:
        """Whether it knows what such steps take, or does not want to."""
        return True

    def verified(self, request: Request, num_drafts: int, num_right: int) -> None:
        """So many of a request's drafts were right; num_drafts = 0: none was found."""

    def forget(self, request: Request) -> None:
        """The request has ended."""


@dataclass
class _Record:
    """What is known of a request's drafts: the share of right ones expected before any was looked
    at; how many were looked at and right, older ones counting less; and its pause, in tokens."""

    expected: float
    num_tried: float = 0.0
    num_right: float = 0.0
    resume_at: int = 0
    next_pause: int = 16


class AdaptiveDrafts(DraftPolicy):
    """See the module. max_drafts: of a request in a step; max_rows: of all together."""

    beside_prompts = False  # what they cost there is not measured
    MARGIN = 1.02  # drafts must be better by this
    HOPEFUL_MARGIN = 1.25  # and by this, where they may cost more than what is counted on
    # What a step with drafts takes beside one without, before any is measured; such a step is made
    # with few drafts.
    FIRST_GUESS, FIRST_DRAFTS = 1.25, 2
    HOPE = 0.5  # of drafts to be right, where nothing speaks against it, and after a pause
    MOST_EXPECTED = 0.75  # so that one whose drafts are never right is found out
    DECAY_OF_ALL = 0.98  # as DECAY, for what a new request is expected to do
    # Steps with FIRST_DRAFTS each, where nothing is expected to pay; then none for so many steps,
    # twice as many each time, until drafts have paid.
    PROBE_STEPS, PROBE_PAUSE, LONGEST_PROBE_PAUSE = 3, 64, 2048
    BEST = 0.9  # share of right drafts that no batch is expected to exceed
    LEVELS = 32  # of how often drafts are right
    DECAY = 0.85  # what earlier drafts count when newer ones are told
    LEAST_SHARE = 0.1  # a draft that is right less often is not asked for
    LONGEST_PAUSE = 512  # tokens
    # For which a batch is left alone, twice as long each time.
    CLOSED_STEPS, MOST_CLOSED_STEPS = 256, 8192
    PAID_STEPS = 256  # with drafts, after which that begins anew
    # So seldom steps without drafts are made, so that their time stays known, and so many.
    REFRESH_STEPS, REFRESH_LENGTH = 512, 5

    def __init__(self, max_drafts: int, max_rows: int = _ROOMY) -> None:
        super().__init__(max_drafts)
        self._max_rows = max_rows
        self.costs = StepCosts()
        self._sizes = sorted({n for n in (1, 2, 3, 5, 7) if n < max_drafts} | {max_drafts})
        self._records: dict[Request, _Record] = {}
        self._num_asked = 0  # steps in which drafts were thought of
        self._closed: dict[int, tuple[int, int]] = {}  # by bucket: until when, for how long
        self._num_paid: Counter[int] = Counter()  # by bucket: steps with drafts since it was closed
        self._num_drafted = 0  # steps with drafts since the last refresh
        self._of_all = _Record(self.HOPE)  # all requests together
        self._num_probes = 0  # steps that this probe has left
        self._probe_at, self._probe_pause = 0, self.PROBE_PAUSE  # in steps

    def is_open(self, num_running: int) -> bool:
        self._num_asked += 1
        if self._num_drafted >= self.REFRESH_STEPS:
            self._num_drafted += 1
            if self._num_drafted <= self.REFRESH_STEPS + self.REFRESH_LENGTH:
                return False
            self._num_drafted = 0
        until, length = self._closed.get(bucket(num_running), (0, 0))
        if self._num_asked < until:
            return False
        if until:
            self._closed[bucket(num_running)] = 0, length
            self.costs.forget_drafts(num_running)
        return True

    def may_try(self, request: Request) -> bool:
        record = self._records.get(request)
        return record is None or request.num_tokens >= record.resume_at

    def choose(
        self, requests: Sequence[Request], num_running: int, room: int = _ROOMY
    ) -> dict[Request, int]:
        room = min(room, self._max_rows)
        plain = self.costs.seconds(num_running, 0)
        if plain is None or not requests:
            return {}  # steps without drafts are measured first
        # Requests whose drafts are right about as often get as many.
        levels = [
            int(self.LEVELS * self._share(self._record(request)) + 0.5) for request in requests
        ]
        wanted = self._best(Counter(levels), num_running, plain, room)
        if wanted is not None:
            self._probe_pause = self.PROBE_PAUSE
            self._count_paid(bucket(num_running))
        else:  # where the first draft costs most, more may pay: nobody knows before they are tried
            wanted = self._best(Counter(levels), num_running, plain, room, hopeful=True)
        if wanted is not None:
            self._num_drafted += 1
            chosen = zip(requests, levels, strict=True)
            return {request: wanted[level] for request, level in chosen if wanted[level]}
        best = Counter({int(self.LEVELS * self.BEST): len(requests)})
        if self._best(best, num_running, plain, room) is None:
            self._close(num_running)
        elif self._probes():
            count = min(self.FIRST_DRAFTS, self.max_drafts)
            return dict.fromkeys(requests[: max(1, room // count)], count)
        else:
            for request in requests:
                self._pause(request)
        return {}

    def stepped(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        self.costs.add(num_seqs, num_drafts, seconds)

    def knows(self, num_seqs: int, num_drafts: int) -> bool:
        return self.costs.seconds(num_seqs, num_drafts) is not None

    def verified(self, request: Request, num_drafts: int, num_right: int) -> None:
        record = self._record(request)
        num_tried = max(min(num_right + 1, num_drafts), 0.5)
        for known, decay in ((record, self.DECAY), (self._of_all, self.DECAY_OF_ALL)):
            known.num_tried = known.num_tried * decay + num_tried
            known.num_right = known.num_right * decay + num_right
        if self._share(record) > self.HOPE:
            record.next_pause = _Record.next_pause

    def forget(self, request: Request) -> None:
        self._records.pop(request, None)

    def _record(self, request: Request) -> _Record:
        record = self._records.get(request)
        if record is None:
            record = self._records[request] = _Record(self._expected())
        return record

    def _expected(self) -> float:
        """The share of a request of which nothing is known, by what others did lately."""
        return min(self.MOST_EXPECTED, self._share(self._of_all))

    def _share(self, record: _Record) -> float:
        """How likely a draft is right where those before it are."""
        return (record.num_right + record.expected) / (record.num_tried + 1)

    def _best(
        self,
        levels: Mapping[int, int],
        num_running: int,
        plain_s: float,
        room: int,
        *,
        hopeful: bool = False,
    ) -> dict[int, int] | None:
        """The number of drafts for each level that gives the most tokens a second; None where none
        is better than without. levels: how many requests each has; hopeful: as in StepCosts."""
        margin = self.HOPEFUL_MARGIN if hopeful else self.MARGIN
        best, best_rate = None, margin * num_running / plain_s
        for size in self._sizes:
            counts = {level: self._count(level / self.LEVELS, size) for level in levels}
            total = sum(levels[level] * count for level, count in counts.items())
            if not total:
                break
            gain = sum(
                levels[level] * sum((level / self.LEVELS) ** n for n in range(1, count + 1))
                for level, count in counts.items()
            )
            gain *= min(1.0, room / total)  # a step takes no more
            seconds = self.costs.estimate(num_running, min(total, room), hopeful=hopeful)
            if seconds is None:
                if size > self.FIRST_DRAFTS:
                    break
                seconds = self.FIRST_GUESS * plain_s
            rate = (num_running + gain) / seconds
            if rate > best_rate:
                best, best_rate = counts, rate
        return best

    def _count_paid(self, batch: int) -> None:
        self._num_paid[batch] += 1
        if self._num_paid[batch] >= self.PAID_STEPS:
            self._closed.pop(batch, None)

    def _close(self, num_running: int) -> None:
        """Leave batches of this size alone for a while; then their times are measured anew."""
        _, length = self._closed.get(bucket(num_running), (0, 0))
        length = min(2 * length or self.CLOSED_STEPS, self.MOST_CLOSED_STEPS)
        self._closed[bucket(num_running)] = self._num_asked + length, length
        self._num_paid[bucket(num_running)] = 0

    def _count(self, share: float, most: int) -> int:
        """Drafts of a request, the last of which is still right often enough."""
        count, chance = 0, share
        while count < most and chance >= self.LEAST_SHARE:
            count += 1
            chance *= share
        return count

    def _probes(self) -> bool:
        """Whether a step has drafts though they are not expected to pay."""
        if self._num_probes <= 0 and self._num_asked >= self._probe_at:
            self._num_probes = self.PROBE_STEPS
            self._probe_at = self._num_asked + self._probe_pause
            self._probe_pause = min(2 * self._probe_pause, self.LONGEST_PROBE_PAUSE)
        self._num_probes -= 1
        return self._num_probes >= 0

    def _pause(self, request: Request) -> None:
        """Leave the request alone for a while; then it is tried with new hope, if it did no better
        than that."""
        record = self._record(request)
        record.resume_at = request.num_tokens + record.next_pause
        record.next_pause = min(2 * record.next_pause, self.LONGEST_PAUSE)
        if self._share(record) < self.HOPE:
            record.expected = max(self.HOPE, self._expected())
            record.num_tried = record.num_right = 0.0
