"""The Python API: a model that takes text and gives text.

from nanocupy import LLM, SamplingParams
llm = LLM("smollm2-135m")
print(llm.generate("The capital of France is", SamplingParams(max_tokens=8)).text)
"""

from __future__ import annotations

import operator
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload
from weakref import WeakValueDictionary

from nanocupy.answer import Answer, Completion, Sample, TextChunk, no_numbers
from nanocupy.checkpoint import Checkpoint, GenerationDefaults, open_checkpoint
from nanocupy.engine.backend import make_engine, starting_driver
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import scheduler_settings
from nanocupy.engine.request import RequestPriority
from nanocupy.engine.results import StepOutput
from nanocupy.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from nanocupy.progress import count_progress
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.speculator import SpeculationCounters
from nanocupy.tokenizer import Tokenizer
from nanocupy.tokenizer.chat import ChatTemplate
from nanocupy.tokenizer.compare import first_difference

__all__ = ["LLM", "Answer", "Completion", "Message", "Prompt", "Sample", "TextChunk"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

# So many prompts get a progress bar on a terminal unasked.
MANY_PROMPTS = 16

_CHECKPOINT_OPTIONS = ("legacy_format", "legacy_kind", "rope_scaling", "tokenizer_path")


class LLM:
    """A loaded model.

    model        a NanoInfer or GGUF file, a Hugging Face folder, "smollm2-135m" (fetched on first
                 use), or owner/name on a hub
    config       the engine's settings; None = all defaults
    progress     show a bar on stderr while a model is fetched or loaded
    Guesses (`speculate`, `draft_model`) change how fast tokens come and not which, up to the last
    bits of the logits: on a GPU a step of several rows adds up in another order, so near ties may
    fall otherwise.
    Other keywords are settings of EngineConfig (device="cpu", max_num_seqs=4), which win over
    `config`, or go to `open_checkpoint` (a legacy file's tokenizer_path, say).
    Raises a NanocupyError that says what is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        config: EngineConfig | None = None,
        progress: bool = False,
        **options: Any,
    ) -> None:
        # Wrong settings are refused before a model is fetched or loaded.
        self.engine_config, checkpoint_options = _split_options(config, options)
        self.started_with = self.engine_config
        from nanocupy.hub import resolve_model

        path = resolve_model(os.fspath(model), progress=progress)
        draft_path = None
        if self.engine_config.proposer == "draft":
            draft_path = resolve_model(str(self.engine_config.draft_model), progress=progress)
        with starting_driver(self.engine_config):
            self.checkpoint: Checkpoint = open_checkpoint(path, **checkpoint_options)
            self.config = self.checkpoint.config
            # Whatever is wrong with the tokenizer is said before gigabytes are loaded; and the
            # tables for its first text are made while the driver starts.
            self.tokenizer.encode("\n")
            draft = None if draft_path is None else self._open_draft(draft_path)
            self._engine = make_engine(
                self.checkpoint, self.engine_config, draft=draft, progress=progress
            )
        self.device = self._engine.runner.device
        self._num_requests = 0
        # Weak, so that an answer nobody holds any more ends.
        self._answers: WeakValueDictionary[str, Answer] = WeakValueDictionary()
        self._outputs: deque[StepOutput] = deque()  # of the engine, not handed out yet
        self._chat_template: ChatTemplate | None = None

    def _open_draft(self, path: Path) -> Checkpoint:
        """The draft model. Raises ConfigError where its ids mean something else."""
        draft = open_checkpoint(path)
        if draft.tokenizer is None:
            raise ConfigError(f"draft_model {path} has no tokenizer to compare with the model's")
        difference = first_difference(self.tokenizer, draft.tokenizer)
        if difference is not None:
            raise ConfigError(
                f"draft_model {path} has another tokenizer than {self.checkpoint.path}: "
                f"{difference}; take a smaller model of the same family"
            )
        return draft

    @property
    def speculation(self) -> SpeculationCounters | None:
        """What came of guesses so far; None where nothing guesses."""
        speculator = self._engine.speculator
        return None if speculator is None else speculator.counters

    def configure(self, **changes: Any) -> None:
        """Change settings of EngineConfig while the engine runs, from its next step on: those its
        manual marks as changeable. Raises ConfigError; nothing is changed then."""
        new = self.engine_config.with_(**changes)
        self.started_with.changes_allowed(new)
        self._engine.configure(scheduler_settings(new, self._engine.runner.limits))
        self.engine_config = new

    def no_numbers(self, where: str = "") -> CheckpointError:
        """What to tell of a sample whose finish_reason is "error": that its logits are NaN or
        infinite, and what mends it with the types in use. where: named first, "prompt 3" say."""
        return no_numbers(where, *self._engine.runner.dtypes)

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and output."""
        return self._engine.max_context

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; TokenizerError where the checkpoint has none."""
        tokenizer = self.checkpoint.tokenizer
        if tokenizer is None:
            mend = "export it again from a source that has one, or use a model that does"
            if self.checkpoint.format.startswith("nanoinfer-legacy"):
                mend = "give its file with tokenizer_path (--tokenizer on the command line)"
            raise TokenizerError(f"{self.checkpoint.path} has no tokenizer; {mend}")
        return tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, or None where it has none (a base model)."""
        if self._chat_template is None and self.checkpoint.chat_template is not None:
            self._chat_template = ChatTemplate(
                self.checkpoint.chat_template,
                self.tokenizer,
                where=f"{self.checkpoint.path}: chat template",
            )
        return self._chat_template

    def default_params(self, **changes: Any) -> SamplingParams:
        """The sampling settings the model's author recommends, with `changes` over them."""
        defaults = _author_settings(self.checkpoint.generation_defaults)
        return SamplingParams().with_(**(defaults | changes))

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
    def generate(
        self, prompts: str, params: SamplingParams | None = None, *, progress: bool | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]: ...
    def generate(self, prompts, params=None, *, progress=None):
        """Answer a text, or many prompts in one batch. A prompt is text or a list of token ids, to
        be gone on with, or a conversation; the answers come in the prompts' order, each of params.n
        samples.

        progress: show how many have ended on stderr; None = on a terminal, where they are many.
        Raises CheckpointError where the model gives no numbers for a prompt that is alone; of many,
        that one's finish_reason is "error".
        """
        if isinstance(prompts, str):
            return self._complete([self._encoded(prompts)], params, progress=progress)[0]
        if not isinstance(prompts, Sequence):
            raise RequestError(f"prompts are {prompts!r}; give a text or a list of prompts")
        encoded = [self._encoded(prompt) for prompt in prompts]
        return self._complete(encoded, params, progress=progress, many=True)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Completion:
        """Answer a conversation: messages are {"role": …, "content": …}; `variables` go to the
        chat template (enable_thinking=False for Qwen3, say)."""
        return self._complete([(self.encode_chat(messages, **variables), False)], params)[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        priority: RequestPriority = RequestPriority(),  # noqa: B008 (frozen)
    ) -> Answer:
        """The answer piece by piece, as it comes. The prompt is text, token ids, or a
        conversation; the priority counts where the policy is "priority". Several answers can be
        read in turns: they run in one batch."""
        return self._add([self._encoded(prompt)], params, priority)[0]

    def _encoded(self, prompt: Prompt | Sequence[Message]) -> tuple[list[int], bool]:
        """Token ids, and whether the answer goes on a text, so that the space before its first word
        is its own."""
        if isinstance(prompt, str):
            return self.encode(prompt), True
        if isinstance(prompt, Sequence) and any(isinstance(m, Mapping) for m in prompt[:1]):
            return self.encode_chat(prompt), False  # type: ignore[arg-type]
        return _token_ids(prompt), True

    def _complete(
        self,
        prompts: Sequence[tuple[list[int], bool]],
        params: SamplingParams | None,
        *,
        progress: bool | None = False,
        many: bool = False,
    ) -> list[Completion]:
        if progress is None:
            on_terminal = sys.stderr is not None and sys.stderr.isatty()
            progress = on_terminal and len(prompts) >= MANY_PROMPTS
        answers = self._add(prompts, params)
        try:
            with count_progress("answers", progress) as report:
                while waiting := sum(answer.finish_reason is None for answer in answers):
                    report(len(answers) - waiting, len(answers))
                    self._step()
                report(len(answers), len(answers))
        finally:
            for answer in answers:
                answer.close()
        for answer in answers:
            if answer.error is not None and not many:
                raise answer.error
        return [answer.completion() for answer in answers]

    def _add(
        self,
        prompts: Sequence[tuple[list[int], bool]],
        params: SamplingParams | None,
        priority: RequestPriority = RequestPriority(),  # noqa: B008 (frozen)
    ) -> list[Answer]:
        """Queue all prompts (of `_encoded`), or none of them."""
        params = params if params is not None else self.default_params()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params are {params!r}; give a SamplingParams")
        added: list[Answer] = []
        try:
            for ids, continuing in prompts:
                self._num_requests += 1
                request_id = str(self._num_requests)
                answer = Answer(self, request_id, ids, params, continuing=continuing)
                self._engine.add_request(request_id, ids, params, priority)
                self._answers[request_id] = answer
                added.append(answer)
        except BaseException:  # Ctrl-C included
            for answer in added:
                answer.close()
            raise
        return added

    def _step(self) -> None:
        """One step of the engine; every answer it brought forward takes in its token."""
        # Where one answer's turn ends in an exception, the others' tokens wait for the next step.
        outputs = self._outputs
        if not outputs:
            outputs.extend(self._engine.step())
        while outputs:
            output = outputs.popleft()
            answer = self._answers.get(output.request_id)
            if answer is None:  # dropped unread, and not collected in time
                self._engine.abort(output.request_id)
                continue
            answer._extend(output)

    def _end(self, request_id: str, sample_index: int | None = None) -> None:
        """Forget an answer that has ended, or end one sample of it; the engine may not know yet (a
        stop string)."""
        if sample_index is None:
            self._answers.pop(request_id, None)
        self._engine.abort(request_id, sample_index)


def _split_options(
    config: EngineConfig | None, options: dict[str, Any]
) -> tuple[EngineConfig, dict[str, Any]]:
    """The engine's settings and the keywords of `open_checkpoint`; ConfigError for anything
    else."""
    if config is not None and not isinstance(config, EngineConfig):
        raise ConfigError(f"config is {config!r}; give an EngineConfig")
    of_checkpoint = {n: v for n, v in options.items() if n in _CHECKPOINT_OPTIONS}
    changes = {n: v for n, v in options.items() if n not in of_checkpoint}
    config = (config or EngineConfig()).with_(**changes)
    return config, of_checkpoint


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


def _token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids as a list of int; RequestError for anything else."""
    try:
        if isinstance(prompt, (str, bytes)) or any(isinstance(i, bool) for i in prompt):
            raise TypeError
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        text = repr(prompt)
        text = text if len(text) <= 80 else f"{text[:80]}…"
        raise RequestError(f"prompt {text} is neither text nor a list of token ids") from None
