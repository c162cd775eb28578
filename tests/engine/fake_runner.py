"""A runner without a model: tokens follow from hashes, and every read of the cache is checked.

A slot of the cache holds the hash of all tokens up to its position (and of the rotary base), so
that a block of other tokens, of the same tokens behind others, of another base, or not written at
all is found when a request reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from nanocupy.config import ModelConfig
from nanocupy.engine.request import PENDING_TOKEN, Request
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule


def next_token(history: int, vocab_size: int) -> int:
    """The token after a history of this hash."""
    return (history >> 7) % vocab_size


def expected_tokens(
    prompt_ids: Sequence[int], count: int, vocab_size: int, rope_base: int = 0
) -> list[int]:
    """What the runner gives for a prompt that is run alone."""
    history = rope_base
    for token_id in prompt_ids:
        history = hash((history, token_id))
    tokens = []
    for _ in range(count):
        tokens.append(next_token(history, vocab_size))
        history = hash((history, tokens[-1]))
    return tokens


class FakeRunner(Runner):
    """`deferred`: a launched step happens when its ids are read, and sees what was given then."""

    def __init__(self, config: ModelConfig, limits: RunnerLimits, *, deferred: bool = False):
        self.config, self.limits, self.device = config, limits, "fake"
        self.observer = None
        self.can_run_ahead = deferred
        self.cells = [[0] * limits.block_size for _ in range(limits.num_blocks)]
        self.host_cells = [[0] * limits.block_size for _ in range(limits.num_host_blocks)]
        self.num_prompt_tokens_run = 0
        self.last_num_tokens = 0
        self._last_requests: object = None  # of the schedule before
        self._num_blocks: dict[Request, int] = {}  # of each of those, then
        self._tokens: dict[Request, list[int]] = {}  # prompt and what was sampled here
        self._hashes: dict[Request, list[int]] = {}
        self._queue: deque[Callable[[], list[int]]] = deque()

    def run(self, schedule: Schedule) -> list[int]:
        return self._prepare(schedule)()

    def launch(self, schedule: Schedule) -> Callable[[], list[int]]:
        if not self.can_run_ahead:
            return super().launch(schedule)
        self._queue.append(self._prepare(schedule))
        return lambda: self._queue.popleft()()

    def _prepare(self, schedule: Schedule) -> Callable[[], list[int]]:
        limits = self.limits
        self.last_num_tokens = schedule.num_tokens
        assert schedule.num_tokens <= limits.max_step_tokens
        assert len(schedule) <= limits.max_num_seqs
        assert len({id(item.request) for item in schedule}) == len(schedule)
        targets = [block for block, _ in schedule.swap_in]
        assert len(targets) == len(set(targets))
        assert not {h for _, h in schedule.swap_in} & {h for _, h in schedule.swap_out}
        self._check_grown(schedule)
        items = []
        assert sum(len(item.drafts) for item in schedule) <= limits.max_draft_rows
        for item in schedule:
            request, start = item.request, item.request.num_computed_tokens
            stop = start + item.num_tokens
            assert item.num_tokens > 0
            assert request.num_tokens < request.max_total_tokens, "a step that is for nothing"
            assert item.samples == (stop - len(item.drafts) == request.num_tokens)
            assert len(request.block_ids) * limits.block_size >= stop
            assert stop < request.max_total_tokens or not item.drafts, "a draft that is for nothing"
            assert len(item.drafts) <= limits.max_drafts
            given = request.token_slice(start, stop - len(item.drafts))
            assert len(given) + len(item.drafts) == item.num_tokens
            assert PENDING_TOKEN not in given or not item.drafts
            items.append((request, start, given, list(request.block_ids), item))
            self.num_prompt_tokens_run += max(0, min(stop, request.num_prompt_tokens) - start)

        def execute() -> list[int]:
            for block, host_block in schedule.swap_out:
                self.host_cells[host_block] = list(self.cells[block])
            for block, host_block in schedule.swap_in:
                self.cells[block] = list(self.host_cells[host_block])
            for request, start, given, block_ids, item in items:
                self._write(request, start, given, block_ids)
                self._write_drafts(request, start + len(given), item.drafts, block_ids)
            for request, start, given, block_ids, _ in items:
                self._check(request, start + len(given), block_ids)
            return [
                token_id
                for request, *_, item in items if item.samples
                for token_id in self._sample(request, item.drafts)
            ]  # fmt: skip

        return execute

    def _check_grown(self, schedule: Schedule) -> None:
        assert schedule.members.issuperset(schedule.grown)
        num_blocks = {item.request: len(item.request.block_ids) for item in schedule}
        if schedule.requests is self._last_requests:
            changed = {r for r, count in num_blocks.items() if count != self._num_blocks[r]}
            assert changed == set(schedule.grown), "blocks have changed unsaid"
            assert all(num_blocks[r] == self._num_blocks[r] + 1 for r in changed)
        self._last_requests, self._num_blocks = schedule.requests, num_blocks

    def _write(self, request: Request, start: int, given: list[int], block_ids: list[int]) -> None:
        tokens = self._tokens.setdefault(request, list(request.prompt_ids))
        hashes = self._hashes.setdefault(request, [])
        while len(hashes) < len(tokens):
            before = hashes[-1] if hashes else request.rope_base
            hashes.append(hash((before, tokens[len(hashes)])))
        for position, token_id in enumerate(given, start):
            assert token_id in (tokens[position], PENDING_TOKEN), "a wrong token was fed"
            block = block_ids[position // self.limits.block_size]
            assert block != 0
            self.cells[block][position % self.limits.block_size] = hashes[position]

    def _write_drafts(
        self, request: Request, start: int, drafts: Sequence[int], block_ids: list[int]
    ) -> None:
        """Behind the tokens; what was wrong is to be written again before anyone reads it."""
        history = self._hashes[request][-1]
        for position, token_id in enumerate(drafts, start):
            history = hash((history, token_id))
            block = block_ids[position // self.limits.block_size]
            assert block != 0
            self.cells[block][position % self.limits.block_size] = history

    def _check(self, request: Request, num_tokens: int, block_ids: list[int]) -> None:
        hashes, size = self._hashes[request], self.limits.block_size
        for index in range(-(-num_tokens // size)):
            wanted = hashes[index * size : min((index + 1) * size, num_tokens)]
            assert self.cells[block_ids[index]][: len(wanted)] == wanted, "a wrong block was read"

    def _sample(self, request: Request, drafts: Sequence[int]) -> list[int]:
        """The token after each draft too, as if all were right; of those, what the request gets is
        kept."""
        history, tokens = self._hashes[request][-1], self._tokens[request]
        chosen, is_right = [], True
        for draft in (*drafts, None):
            chosen.append(next_token(history, self.config.vocab_size))
            if is_right:
                tokens.append(chosen[-1])
            is_right = is_right and draft == chosen[-1]
            history = hash((history, draft))
        return chosen
