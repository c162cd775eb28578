"""Answers: tokens of a request as text, piece by piece and whole. Knows the engine by one function.

A request has params.n samples; each is a text of its own, with its own stop strings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nanocupy.engine.results import StepOutput, TokenLogprob
from nanocupy.engine.stops import StopMatcher
from nanocupy.errors import CheckpointError
from nanocupy.sampling_params import SamplingParams
from nanocupy.tokenizer import Tokenizer, stream_decoder


def no_numbers(where: str, dtype: str, residual_dtype: str, lm_head_dtype: str) -> CheckpointError:
    """What is raised where no token can be told. where: the request, or nothing; the types are
    those of activations, of the residual stream and of the LM head."""
    if dtype == "float16":
        wider = ", or residual_dtype float32" if residual_dtype == "float16" else ""
        why = (
            "its values are beyond float16 (65504), or its weights are damaged; take dtype "
            f"bfloat16{wider}"
        )
    elif lm_head_dtype == "float16":
        why = (
            "the LM head's inputs are beyond float16 (65504), or weights are damaged; take "
            "lm_head_dtype bfloat16"
        )
    else:
        why = (
            "its weights are damaged or out of range, or this prompt is more than its number "
            "format holds; check the file with `nanocupy inspect --verify`, or try another dtype"
        )
    return CheckpointError(
        f"{where}{': ' if where else ''}the model computes NaN or infinite logits: {why}"
    )


@dataclass(frozen=True)
class TextChunk:
    """A piece of a streamed answer, one token. `text` may be empty; the last piece of each sample
    has a finish_reason: "stop", "length" or "abort", or "error" where the model gave no numbers
    (then token_id is None). logprobs of the token, where they were asked for."""

    text: str
    token_id: int | None
    finish_reason: str | None
    sample_index: int = 0
    logprobs: TokenLogprob | None = None


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt.

    text without stop strings and special tokens; token_ids as sampled, the end-of-text id
    included; finish_reason "stop", "length", "abort", or "error" where the model gave no numbers;
    times in seconds: to the first token and in all; logprobs: of each of token_ids, or None.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    time_to_first_token: float
    total_time: float
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Completion:
    """What a prompt got: params.n samples. The first one's fields stand here too: `.text`, ….

    prompt_logprobs: of each token of the prompt, None for the first (nothing is before it); None
    where they were not asked for.
    """

    samples: tuple[Sample, ...]
    num_prompt_tokens: int
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def texts(self) -> list[str]:
        """The text of each sample."""
        return [sample.text for sample in self.samples]

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.samples[0].logprobs

    @property
    def time_to_first_token(self) -> float:
        return self.samples[0].time_to_first_token

    @property
    def total_time(self) -> float:
        return max(sample.total_time for sample in self.samples)


class Steps(Protocol):
    """What an answer needs of whoever runs the engine."""

    tokenizer: Tokenizer

    def _step(self) -> None:
        """Run a step of the engine."""

    def _end(self, request_id: str, sample_index: int | None = None) -> None:
        """Forget a request, or end one sample of it; it may have ended already."""

    def no_numbers(self, where: str = "") -> CheckpointError:
        """What is wrong where the model gave no numbers; see the function of this name."""


class _SampleText:
    """One sample in the making."""

    def __init__(self, started: float, params: SamplingParams, decoder: Callable) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._decoder = decoder()
        self._stops = StopMatcher(params.stop)
        self._pieces: list[str] = []
        self._started = self._first_token_at = self._finished_at = started

    def extend(self, output: StepOutput) -> TextChunk:
        """Take in a token; what it adds to the text."""
        now = time.perf_counter()
        if not self.token_ids:
            self._first_token_at = now
        reason, token_id = output.finish_reason, None
        text = ""
        if reason != "error":
            token_id = output.token_id
            self.token_ids.append(token_id)
            if self.logprobs is not None and output.logprobs is not None:
                self.logprobs.append(output.logprobs)
            if reason != "stop":  # the id that ends a text is not part of it
                text = self._decoder.push(token_id)
        shown = self._stops.push(text)
        if reason is not None:
            shown += self._stops.push(self._decoder.finish()) + self._stops.finish()
        if self._stops.stopped_by is not None:
            reason = "stop"
        self.finish_reason, self._finished_at = reason, now
        self._pieces.append(shown)
        return TextChunk(shown, token_id, reason, output.sample_index, output.logprobs)

    def close(self) -> None:
        if self.finish_reason is None:
            self.finish_reason = "abort"
            self._finished_at = time.perf_counter()

    def sample(self) -> Sample:
        return Sample(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            time_to_first_token=self._first_token_at - self._started,
            total_time=self._finished_at - self._started,
            logprobs=None if self.logprobs is None else list(self.logprobs),
        )


class Answer(Iterator[TextChunk]):
    """An answer in the making: iterate over its chunks, those of all samples as they come. Close or
    drop it to end it early. Where the model gave no numbers for any of them, the iteration ends in
    a CheckpointError, `error`.

    finish_reason: the first sample's once all have ended; None before.
    """

    def __init__(
        self,
        steps: Steps,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        continuing: bool,
    ) -> None:
        self._steps = steps
        self.request_id = request_id
        self.num_prompt_tokens = len(prompt_ids)
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.finish_reason: str | None = None
        self.error: CheckpointError | None = None
        started = time.perf_counter()
        self._samples = [
            _SampleText(
                started, params, lambda: stream_decoder(steps.tokenizer, continuing=continuing)
            )
            for _ in range(params.n)
        ]
        self._chunks: deque[TextChunk] = deque()

    def __next__(self) -> TextChunk:
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self.finish_reason is not None:
                raise StopIteration
            self._steps._step()
        return self._chunks.popleft()

    def take_chunks(self) -> Iterator[TextChunk]:
        """The chunks that are there and were not taken yet; never runs the engine."""
        while self._chunks:
            yield self._chunks.popleft()

    def close(self) -> None:
        """End the answer now, with what it has."""
        if self.finish_reason is None:
            for sample in self._samples:
                sample.close()
            self._settle()

    def __del__(self) -> None:
        self.close()

    def completion(self) -> Completion:
        """The answer so far; the whole one once the iteration has ended."""
        return Completion(
            tuple(sample.sample() for sample in self._samples),
            self.num_prompt_tokens,
            self.prompt_logprobs,
        )

    def _extend(self, output: StepOutput) -> None:
        """Take in a new token."""
        sample = self._samples[output.sample_index]
        if sample.finish_reason is not None:
            return  # a step may bring several tokens, and a stop string ended with one before
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *output.prompt_logprobs]
        chunk = sample.extend(output)
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._steps._end(self.request_id, output.sample_index)
            if all(s.finish_reason is not None for s in self._samples):
                self._settle()

    def _settle(self) -> None:
        """All samples have ended."""
        reasons = [sample.finish_reason for sample in self._samples]
        self.finish_reason = reasons[0]
        if all(reason == "error" for reason in reasons):
            self.error = self._steps.no_numbers(f"request {self.request_id}")
        self._steps._end(self.request_id)
