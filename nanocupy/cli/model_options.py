"""What `generate` and `chat` share: options of the model, the sampler and the engine, loading,
statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import click

from nanocupy.cli.engine_options import COMMON, engine_config, engine_options
from nanocupy.cli.legacy_options import NAMES as LEGACY_NAMES
from nanocupy.cli.legacy_options import legacy_options
from nanocupy.errors import RequestError

if TYPE_CHECKING:
    from nanocupy.llm import LLM, Completion
    from nanocupy.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 512
DEFAULT_NUM_SEQS = 32  # answers made at once, where there are as many
# A file or pipe may never end; ten million tokens are more than any model takes.
MAX_PROMPT_BYTES = 64 << 20

_OPTIONS: list[Callable[..., Any]] = [
    click.option(
        "--model",
        "-m",
        required=True,
        metavar="MODEL",
        help="A NanoInfer or GGUF file, a Hugging Face folder, smollm2-135m, or OWNER/NAME.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        default=DEFAULT_MAX_TOKENS,
        show_default=True,
        help="Tokens of an answer at most.",
    ),
    click.option(
        "--temperature",
        type=float,
        help="0 = always the likeliest token. [default: the model's, else 1]",
    ),
    click.option(
        "--top-k", type=int, help="Only the k likeliest tokens; -1 = all. [default: the model's]"
    ),
    click.option(
        "--top-p",
        type=float,
        help="Only the likeliest tokens that hold this share. [default: the model's, else 1]",
    ),
    click.option(
        "--min-p",
        type=float,
        help="Only tokens at least this likely beside the likeliest. [default: the model's]",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1 discourages repeating. [default: the model's, else 1]",
    ),
    click.option("--seed", type=int, help="The same seed gives the same text. [default: random]"),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given often."
    ),
]


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options above, in their order, those of the engine and of legacy files."""
    command = engine_options(shown=(*COMMON, "speculate", "draft_model"))(legacy_options(command))
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def load_model(
    options: dict[str, Any], *, num_answers: int = 1, **more: Any
) -> tuple[LLM, SamplingParams]:
    """Load the model that `options` (of `model_options`) name, for so many answers at once, unless
    the options say; and its sampling parameters, `more` among them."""
    # Wrong numbers are refused before a model is fetched or loaded.
    changes: dict[str, Any] = {
        name: options[name]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        if options[name] is not None
    }
    changes |= {"max_tokens": options["max_tokens"], "stop": options["stop"], **more}
    from nanocupy.sampling_params import SamplingParams

    SamplingParams(**changes)
    # Memory is planned for no more sequences than there will be, unless more are asked for.
    config = engine_config(options, max_num_seqs=min(num_answers, DEFAULT_NUM_SEQS))

    from nanocupy.llm import LLM

    llm = LLM(
        options["model"],
        config=config,
        progress=True,
        **{name: options[name] for name in LEGACY_NAMES},
    )
    return llm, llm.default_params(**changes)


def statistics_line(llm: LLM, completion: Completion, load_time: float) -> str:
    """One line about an answer: tokens, times and rates."""
    num_output = len(completion.token_ids)
    decode_time = completion.total_time - completion.time_to_first_token
    parts = [
        f"{completion.num_prompt_tokens} prompt + {num_output} output tokens on {llm.device}",
        f"load {load_time:.2f} s",
        f"first token {completion.time_to_first_token:.2f} s",
    ]
    if num_output > 1 and decode_time > 0:
        parts.append(f"{(num_output - 1) / decode_time:.1f} tokens/s")
    if completion.finish_reason == "length":
        parts.append("cut at the token limit")
    if llm.speculation is not None:
        parts.append(f"guesses: {llm.speculation.summary()}")
    return "; ".join(parts)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def read_prompt(source: IO[bytes], name: str) -> str:
    """All of `source` as text; RequestError where it is too long or not UTF-8."""
    data = source.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(
            f"{name}: more than {MAX_PROMPT_BYTES >> 20} MiB, beyond any model's context; "
            "shorten the prompt"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise RequestError(
            f"{name}: byte {exc.start} is not UTF-8 text; convert it (iconv -t utf-8)"
        ) from None
