"""A smaller model as proposer: it decodes a few tokens ahead of the model, with a cache of its own.

For every request it keeps a sequence of its own, the mirror, whose last tokens are its guesses of
last time. Before it guesses again the mirror takes in what really came, and what its cache holds
beyond the first wrong guess no longer counts; what is long, as a prompt is, a chunk at a time, one
before each step of the model. Its guesses are drawn as the model draws, with the request's
temperature, cuts, seed and positions, so with the very same random numbers; penalties are left to
the model. Knows runners and schedules, no arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from nanocupy.engine.request import Request
from nanocupy.engine.results import StepResult
from nanocupy.engine.runner import Runner
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.memory.block_pool import BlockPool
from nanocupy.memory.kv_memory import KVMemory
from nanocupy.speculation.proposer import Proposer

_MOST_GUESSES = 64  # of a turn, far above what is asked for
_FEW_TOKENS = 2  # that a mirror lacks in most steps: a right last guess, and the token after it


class DraftModelProposer(Proposer):
    """runner: of the draft model; vocab_size: of the model, which takes no other ids."""

    name = "draft"

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        self.runner = runner
        limits = runner.limits
        self._vocab_size = min(vocab_size, runner.config.vocab_size)
        self._memory = KVMemory(BlockPool(limits.num_blocks, limits.block_size))
        capacity = (limits.num_blocks - 1) * limits.block_size
        self._max_context = min(limits.max_context, capacity)
        # Those used last are last: who comes and finds no block takes those of the first.
        self._mirrors: dict[Request, Request] = {}
        self._unfit: set[Request] = set()  # they have ids that the draft model does not know
        self._unread: deque[tuple[Callable[[], list[int] | StepResult], list[Request]]] = deque()

    def is_promising(self, request: Request) -> bool:
        return request not in self._unfit and request.num_tokens + 1 < self._max_context

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        drafting: dict[Request, int] = {}  # mirror -> guesses to make
        owners: dict[Request, Request] = {}
        limits = self.runner.limits
        try:
            while self._unread:  # of a turn that was interrupted
                self._unread.popleft()[0]()
            for request, count in list(wanted.items())[: limits.max_num_seqs]:
                count = min(count, self._max_context - request.num_tokens)
                mirror = self._mirror(request) if count > 0 else None
                if mirror is None or not self._has_room(mirror, count, owners.values()):
                    continue
                drafting[mirror], owners[mirror] = count, request
            behind = self._catch_up(list(drafting))
            ready = {m: count for m, count in drafting.items() if m not in behind}
            if ready:
                self._guess(ready)
        except BaseException:
            for request in owners.values():  # who knows what their caches hold
                self.forget(request)
            raise
        assert not self._unread, "a step is left that nobody reads"
        found: dict[Request, Sequence[int]] = {}
        for mirror, request in owners.items():
            if mirror in behind:
                found[request] = ()
                continue
            drafts = mirror.output_ids[len(request.output_ids) :]
            bad = (n for n, id_ in enumerate(drafts) if not 0 <= id_ < self._vocab_size)
            good = drafts[: next(bad, len(drafts))]
            if good:
                found[request] = good
        return found

    def forget(self, request: Request) -> None:
        self._unfit.discard(request)
        mirror = self._mirrors.pop(request, None)
        if mirror is not None:
            self._memory.drop(mirror)

    def check_integrity(self) -> None:
        """Assert that every block is one mirror's, or free."""
        self._memory.check_integrity(self._mirrors.values(), ())

    # ----------------------------------------------------------------- mirrors

    def _mirror(self, request: Request) -> Request | None:
        """The request's mirror, with all tokens that there are and no others; None where the draft
        model cannot read them."""
        mirror = self._mirrors.pop(request, None)
        if mirror is not None:  # now the last that was asked for
            self._mirrors[request] = mirror
        else:
            if max(request.prompt_ids) >= self.runner.config.vocab_size:
                self._unfit.add(request)
                return None
            mirror = self._mirrors[request] = self._new_mirror(request)
        first = self._first_wrong(mirror.output_ids, request.output_ids)
        new_ids = request.output_ids[first:]
        if new_ids and max(new_ids) >= self.runner.config.vocab_size:
            self.forget(request)
            self._unfit.add(request)
            return None
        # A guess is sampled before it is computed: of all right but the last, that one's position
        # is the next to be computed, as the runner has it, but with another token.
        mirror.num_rewinds += first < len(mirror.output_ids)
        mirror.output_ids[first:] = new_ids
        mirror.num_tokens = mirror.num_known_tokens
        num_right = request.num_prompt_tokens + first
        # The last token is always computed: what comes after it is asked.
        mirror.num_computed_tokens = min(
            mirror.num_computed_tokens, num_right, mirror.num_tokens - 1
        )
        return mirror

    def _new_mirror(self, request: Request) -> Request:
        p = request.params
        params = p.with_(
            n=1, max_tokens=None, min_tokens=0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, logit_bias={}, stop=(), stop_token_ids=(), logprobs=None,
            prompt_logprobs=None,
        )  # fmt: skip
        return Request(
            request.request_id, request.prompt_ids, params, request.seed, self._max_context,
            rope_base=request.rope_base, sample_index=request.sample_index,
        )  # fmt: skip

    @staticmethod
    def _first_wrong(guessed: Sequence[int], output: Sequence[int]) -> int:
        """Where the two differ first; all before the guesses of last time is equal."""
        first = max(0, min(len(guessed), len(output)) - _MOST_GUESSES)
        while first < min(len(guessed), len(output)) and guessed[first] == output[first]:
            first += 1
        return first

    def _has_room(self, mirror: Request, count: int, keeping: Collection[Request]) -> bool:
        """Give a mirror blocks for its tokens and so many guesses; those of mirrors that take no
        part are taken, the one unused for longest first."""
        memory, num_tokens = self._memory, mirror.num_tokens + count - 1
        kept = set(keeping)
        while memory.blocks_wanted(mirror, num_tokens) > memory.pool.num_free:
            idle = (
                r for r, m in self._mirrors.items()
                if m is not mirror and m.block_ids and r not in kept
            )  # fmt: skip
            victim = next(idle, None)
            if victim is None:
                return False
            self._memory.drop(self._mirrors.pop(victim))
        memory.grow(mirror, num_tokens)
        return True

    # ----------------------------------------------------------------- steps

    def _catch_up(self, mirrors: Sequence[Request]) -> set[Request]:
        """Compute what mirrors lack, but for few tokens of each: in one step, so that nobody waits
        for longer than for a chunk of a prompt. Those that lack least come first. Returns which
        have not caught up."""
        most = self.runner.limits.max_step_tokens
        few = max(1, min(_FEW_TOKENS, most // max(1, len(mirrors))))
        left, items, behind = min(most, self.max_step_tokens or most), [], set()
        lacking = {m: m.num_tokens - m.num_computed_tokens - few for m in mirrors}
        for mirror, lack in sorted(lacking.items(), key=lambda pair: pair[1]):
            count = min(lack, left)
            if count > 0:
                items.append(ScheduledRequest(mirror, count, False))
                left -= count
            if count < lack:
                behind.add(mirror)
        self.was_reading = bool(items)
        if items:
            self._launch(tuple(items))
            self._read(0)
        return behind

    def _guess(self, drafting: Mapping[Request, int]) -> None:
        """One guess a step for each of those that are to have more. The step before is read while
        one runs, where the runner can."""
        items = tuple(
            ScheduledRequest(m, m.num_tokens - m.num_computed_tokens, True) for m in drafting
        )
        most = max(drafting.values())
        for number in range(1, most + 1):
            self._launch(items)
            self._read(1 if self.runner.can_run_ahead and number < most else 0)
            going_on = [m for m, count in drafting.items() if count > number]
            if len(going_on) < len(items) or any(item.num_tokens > 1 for item in items):
                # The same object while the same go on: a runner then sends nothing but a start.
                items = tuple(ScheduledRequest(m, 1, True) for m in going_on)

    def _launch(self, items: tuple[ScheduledRequest, ...]) -> None:
        sampling = [item.request for item in items if item.samples]
        self._unread.append((self.runner.launch(Schedule(items)), sampling))
        for item in items:
            item.request.num_computed_tokens += item.num_tokens
            item.request.num_tokens += item.samples

    def _read(self, num_left: int) -> None:
        while len(self._unread) > num_left:
            read, sampling = self._unread[0]
            token_ids = read()
            self._unread.popleft()
            assert isinstance(token_ids, list)
            for mirror, token_id in zip(sampling, token_ids, strict=True):
                mirror.append(token_id)
