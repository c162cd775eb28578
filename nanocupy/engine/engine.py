"""The engine: requests are added, `step` is called, tokens come out. It knows no text, no arrays.

A step: schedule → run → append each sampled id → finish what has ended.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nanocupy.config import ModelConfig
from nanocupy.engine.request import Request, RequestState
from nanocupy.engine.runner import Runner
from nanocupy.engine.scheduler import Scheduler
from nanocupy.errors import RequestError
from nanocupy.memory.block_pool import BlockPool
from nanocupy.sampling_params import SamplingParams


@dataclass(frozen=True)
class StepOutput:
    """One new token of a request. finish_reason: "stop" (end of text or a stop id: token_id is
    that id), "length", or None while it goes on."""

    request_id: str
    token_id: int
    finish_reason: str | None


class LLMEngine:
    """Any number of requests over one runner, first come, first served."""

    def __init__(self, config: ModelConfig, runner: Runner) -> None:
        limits = runner.limits
        self.config = config
        self.runner = runner
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=limits.max_num_seqs, max_step_tokens=limits.max_step_tokens
        )
        # A sequence must fit in the whole cache, or it could never finish.
        capacity = (limits.num_blocks - 1) * limits.block_size
        self.max_context = min(limits.max_context, capacity)
        self._requests: dict[str, Request] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue a prompt of token ids. Raises RequestError; nothing is queued then."""
        prompt_ids = list(prompt_ids)
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        if not prompt_ids:
            raise RequestError("the prompt is empty: it must have at least one token")
        vocab_size = self.config.vocab_size
        for token_id in [*prompt_ids, *params.logit_bias, *params.stop_token_ids]:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"token id {token_id} is not in the vocabulary of {vocab_size}")
        if len(prompt_ids) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.max_context} "
                "with at least one of output; shorten the prompt"
            )
        max_total = self.max_context
        if params.max_tokens is not None:
            max_total = min(max_total, len(prompt_ids) + params.max_tokens)
        seed = params.seed if params.seed >= 0 else secrets.randbits(63)
        request = Request(request_id, prompt_ids, params, seed, max_total)
        self.scheduler.add(request)
        self._requests[request_id] = request

    def abort(self, request_id: str) -> None:
        """End a request now; an id that is not running is ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")

    def step(self) -> list[StepOutput]:
        """Run one step; the new token of every request that got one."""
        schedule = self.scheduler.schedule()
        if not schedule:
            return []
        sampled = iter(self.runner.run(schedule))
        outputs = []
        for item in schedule:
            request = item.request
            request.num_computed_tokens += item.num_tokens
            if item.samples:
                token_id = next(sampled)
                request.append(token_id)
                reason = self._end_of(request, token_id)
                if reason is not None:
                    self._finish(request, reason)
                outputs.append(StepOutput(request.request_id, token_id, reason))
        return outputs

    def _end_of(self, request: Request, token_id: int) -> str | None:
        params = request.params
        if len(request.output_ids) >= params.min_tokens and (
            token_id in params.stop_token_ids
            or (token_id in self.config.eos_ids and not params.ignore_eos)
        ):
            return "stop"
        return "length" if request.num_tokens >= request.max_total_tokens else None

    def _finish(self, request: Request, reason: str) -> None:
        assert request.state is not RequestState.FINISHED
        request.finish_reason = reason
        self.scheduler.finish(request)
        del self._requests[request.request_id]
