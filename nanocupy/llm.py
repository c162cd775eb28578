"""The Python API: a model that takes text and gives text.

    from nanocupy import LLM, SamplingParams
    llm = LLM("smollm2-135m")
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=8)).text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from nanocupy.checkpoint import Checkpoint, GenerationDefaults, open_checkpoint
from nanocupy.engine.backend import make_runner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.stops import StopMatcher
from nanocupy.errors import RequestError, TokenizerError
from nanocupy.sampling_params import SamplingParams
from nanocupy.tokenizer import StreamDecoder, Tokenizer, stream_decoder
from nanocupy.tokenizer.chat import ChatTemplate

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class TextChunk:
    """A piece of a streamed answer. `text` may be empty; the last piece has a finish_reason:
    "stop", "length" or "abort"."""

    text: str
    token_id: int | None
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    text without stop strings and special tokens; token_ids as sampled, the end-of-text id
    included; times in seconds: to the first token and in all.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    time_to_first_token: float
    total_time: float


@dataclass
class _Answer:
    """A request's text as it grows."""

    stream: StreamDecoder
    stops: StopMatcher
    num_prompt_tokens: int
    started: float
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_at: float = 0.0
    finished_at: float = 0.0

    def completion(self) -> Completion:
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "abort",
            num_prompt_tokens=self.num_prompt_tokens,
            time_to_first_token=self.first_token_at - self.started,
            total_time=self.finished_at - self.started,
        )


class LLM:
    """A loaded model.

    model        a NanoInfer or GGUF file, a Hugging Face folder, "smollm2-135m" (fetched on first
                 use), or owner/name on a hub
    device       "auto" (a GPU where one is usable, else the CPU), "cuda" or "cpu"
    max_context  tokens a sequence may have at most; None = what the model was made for
    max_num_seqs sequences that run at once
    chunk_size   tokens of prompt computed in one step
    Raises a NanocupyError that says what is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        max_context: int | None = None,
        max_num_seqs: int = 16,
        chunk_size: int = 512,
        progress: bool = False,
        **checkpoint_options: Any,
    ) -> None:
        from nanocupy.hub import resolve_model

        path = resolve_model(os.fspath(model), progress=progress)
        self.checkpoint: Checkpoint = open_checkpoint(path, **checkpoint_options)
        self.config = self.checkpoint.config
        runner = make_runner(
            self.checkpoint,
            device=device,
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            chunk_size=chunk_size,
        )
        self.device = runner.device
        self._engine = LLMEngine(self.config, runner)
        self._num_requests = 0
        self._chat_template: ChatTemplate | None = None

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and output."""
        return self._engine.max_context

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; TokenizerError where the checkpoint has none."""
        tokenizer = self.checkpoint.tokenizer
        if tokenizer is None:
            raise TokenizerError(
                f"{self.checkpoint.path} has no tokenizer; give its file with tokenizer_path "
                "(--tokenizer on the command line)"
            )
        return tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, or None where it has none (a base model)."""
        if self._chat_template is None and self.checkpoint.chat_template is not None:
            self._chat_template = ChatTemplate(self.checkpoint.chat_template, self.tokenizer)
        return self._chat_template

    def default_params(self, **changes: Any) -> SamplingParams:
        """The sampling settings the model's author recommends, with `changes` over them."""
        return SamplingParams(**(_author_settings(self.checkpoint.generation_defaults) | changes))

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a plain prompt, with the beginning-of-text id where the model wants one."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt)
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        template = self.chat_template
        if template is None:
            raise TokenizerError(
                f"{self.checkpoint.path} has no chat template: it is not a chat model; "
                "give it a plain prompt (--raw on the command line)"
            )
        return template.encode(messages, add_generation_prompt=True, **variables)

    # ----------------------------------------------------------------- answers

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]: ...
    def generate(self, prompts, params=None):
        """Continue a prompt, or many in one batch. A prompt is text or a list of token ids; the
        answers come in the prompts' order."""
        if isinstance(prompts, str):
            return self._complete([self.encode(prompts)], params)[0]
        ids = [self.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        return self._complete(ids, params)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Completion:
        """Answer a conversation: messages are {"role": …, "content": …}; `variables` go to the
        chat template (enable_thinking=False for Qwen3, say)."""
        return self._complete([self.encode_chat(messages, **variables)], params)[0]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[TextChunk]:
        """The answer piece by piece, as it comes. The prompt is text, token ids, or a
        conversation. An abandoned iterator ends its request."""
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        answers = self._add([ids], params)
        return self._stream(answers)

    def _stream(self, answers: dict[str, _Answer]) -> Iterator[TextChunk]:
        try:
            while self._engine.has_unfinished:
                for _, chunk in self._step(answers):
                    yield chunk
        finally:
            self._abort(answers)

    def _complete(self, prompts: Sequence[list[int]], params: Any) -> list[Completion]:
        answers = self._add(prompts, params)
        try:
            while any(a.finish_reason is None for a in answers.values()):
                for _ in self._step(answers):
                    pass
        finally:
            self._abort(answers)
        return [answer.completion() for answer in answers.values()]

    def _add(self, prompts: Sequence[list[int]], params: Any) -> dict[str, _Answer]:
        params = params if params is not None else self.default_params()
        answers: dict[str, _Answer] = {}
        try:
            for ids in prompts:
                self._num_requests += 1
                request_id = str(self._num_requests)
                self._engine.add_request(request_id, ids, params)
                answers[request_id] = _Answer(
                    stream=stream_decoder(self.tokenizer),
                    stops=StopMatcher(params.stop),
                    num_prompt_tokens=len(ids),
                    started=time.perf_counter(),
                )
        except BaseException:
            self._abort(answers)
            raise
        return answers

    def _abort(self, answers: Mapping[str, _Answer]) -> None:
        for request_id, answer in answers.items():
            if answer.finish_reason is None:
                self._engine.abort(request_id)

    def _step(self, answers: Mapping[str, _Answer]) -> Iterator[tuple[str, TextChunk]]:
        for output in self._engine.step():
            answer = answers.get(output.request_id)
            if answer is None:
                raise RequestError("another answer of this model is being streamed; finish it first")
            if not answer.token_ids:
                answer.first_token_at = time.perf_counter()
            answer.token_ids.append(output.token_id)
            reason = output.finish_reason
            # The id that ends a text is not part of it.
            text = "" if reason == "stop" else answer.stream.push(output.token_id)
            shown = answer.stops.push(text)
            if reason is not None:
                shown += answer.stops.push(answer.stream.finish()) + answer.stops.finish()
            elif answer.stops.stopped_by is not None:
                self._engine.abort(output.request_id)
                reason = "stop"
            if reason is not None:
                answer.finish_reason = reason
                answer.finished_at = time.perf_counter()
            answer.pieces.append(shown)
            yield output.request_id, TextChunk(shown, output.token_id, reason)


def _author_settings(defaults: GenerationDefaults) -> dict[str, Any]:
    """GenerationDefaults as fields of SamplingParams; what they don't say stays out."""
    if defaults.do_sample is False:
        settings: dict[str, Any] = {"temperature": 0.0}
    else:
        names = ("temperature", "top_k", "top_p", "min_p")
        settings = {n: getattr(defaults, n) for n in names if getattr(defaults, n) is not None}
        if settings.get("top_k") == 0:
            settings["top_k"] = -1  # transformers' way to say "all"
    if defaults.repetition_penalty is not None:
        settings["repetition_penalty"] = defaults.repetition_penalty
    return settings
