"""`nanocupy generate`: prompts in, answers on stdout, statistics to stderr.

A single answer is streamed; of several prompts or samples, each is printed whole, in their order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.model_options import (
    Stopwatch,
    load_model,
    model_options,
    read_prompt,
    statistics_line,
)
from nanocupy.errors import RequestError

if TYPE_CHECKING:
    from nanocupy.llm import LLM, Completion
    from nanocupy.sampling_params import SamplingParams


@click.command(short_help="Answer prompts and exit.")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), help="Take the prompt from a UTF-8 file."
)
@click.option("--system", help="System message before each prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is: no chat template.")
@click.option("--samples", "-n", "num_samples", type=int, default=1, help="Answers to each prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each prompt.")
@click.option("--quiet", "-q", is_flag=True, help="No statistics, no progress.")
@model_options
def generate(
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    num_samples: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer each PROMPT and exit.

    Without PROMPT, or with "-", it is read from stdin. A single answer comes on stdout as it is
    made; several are made together, and come one after the other.
    """
    texts = _prompt_texts(prompts, prompt_file)
    if system is not None and raw:
        raise RequestError("--system needs the chat template, which --raw turns off; leave one out")
    watch = Stopwatch()
    num_answers = len(texts) * max(num_samples, 1)
    llm, params = load_model(options, num_answers=num_answers, n=num_samples)
    load_time = watch.seconds
    use_chat = not raw and llm.checkpoint.chat_template is not None
    if system is not None and not use_chat:
        raise RequestError("--system: this model has no chat template; leave --system out")
    opening = [{"role": "system", "content": system}] if system is not None else []
    # Each as `LLM.stream` takes it.
    asked: list[Any] = [
        [*opening, {"role": "user", "content": text}] if use_chat else text for text in texts
    ]
    if num_answers == 1 and not as_json:
        completions = [_stream(llm, asked[0], params)]
    else:
        completions = llm.generate(asked, params, progress=False if quiet else None)
        if as_json:
            for completion in completions:
                click.echo(json.dumps(_as_dict(llm, completion, load_time), ensure_ascii=False))
        else:
            _print_all(completions)
    if not quiet and not as_json:
        if num_answers == 1:
            line = statistics_line(llm, completions[0], load_time)
        else:
            line = _statistics_of_many(llm, completions, load_time, watch.seconds)
        click.echo(f"[{line}]", err=True)
    failed = [
        number
        for number, completion in enumerate(completions, 1)
        if any(sample.finish_reason == "error" for sample in completion.samples)
    ]
    if failed:
        plural = "s" if len(failed) > 1 else ""
        which = f"prompt{plural} {', '.join(map(str, failed))}" if len(completions) > 1 else ""
        error = llm.no_numbers(which)
        if all(s.finish_reason == "error" for c in completions for s in c.samples):
            raise error
        click.echo(f"nanocupy: {error}", err=True)


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> Completion:
    answer = llm.stream(prompt, params)
    ends_line = True
    try:
        for chunk in answer:
            if chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                ends_line = chunk.text.endswith("\n")
    finally:
        if not ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return answer.completion()


def _print_all(completions: Sequence[Completion]) -> None:
    """Every answer after a line that says which it is."""
    for number, completion in enumerate(completions, 1):
        for index, sample in enumerate(completion.samples, 1):
            which = f"prompt {number}" if len(completions) > 1 else ""
            if len(completion.samples) > 1:
                which += f"{', ' if which else ''}sample {index}"
            note = ": the model gave no numbers" if sample.finish_reason == "error" else ""
            click.echo(f"--- {which}{note}")
            click.echo(sample.text, nl=not sample.text.endswith("\n"))


def _as_dict(llm: LLM, completion: Completion, load_time: float) -> dict[str, Any]:
    found = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": len(completion.token_ids),
        "load_seconds": round(load_time, 4),
        "time_to_first_token_seconds": round(completion.time_to_first_token, 4),
        "total_seconds": round(completion.total_time, 4),
        "device": llm.device,
        "model": str(llm.checkpoint.path),
    }
    if len(completion.samples) > 1:
        found["samples"] = [
            {"text": s.text, "token_ids": s.token_ids, "finish_reason": s.finish_reason}
            for s in completion.samples
        ]
    return found


def _statistics_of_many(
    llm: LLM, completions: Sequence[Completion], load_time: float, end_time: float
) -> str:
    samples = [sample for completion in completions for sample in completion.samples]
    num_prompt = sum(completion.num_prompt_tokens for completion in completions)
    num_output = sum(len(sample.token_ids) for sample in samples)
    seconds = end_time - load_time
    guesses = "" if llm.speculation is None else f"; guesses: {llm.speculation.summary()}"
    return (
        f"{len(samples)} answers: {num_prompt} prompt + {num_output} output tokens on "
        f"{llm.device}; load {load_time:.2f} s; {num_output / max(seconds, 1e-9):.1f} tokens/s"
        f"{guesses}"
    )


def _prompt_texts(prompts: Sequence[str], prompt_file: Path | None) -> list[str]:
    if prompt_file is not None:
        if prompts:
            raise RequestError("give PROMPT or --prompt-file, not both")
        try:
            with prompt_file.open("rb") as file:
                texts = [read_prompt(file, str(prompt_file))]
        except OSError as exc:
            raise RequestError(f"{prompt_file}: cannot be read: {exc.strerror}") from None
    elif prompts in ((), ("-",)):
        if not prompts and sys.stdin.isatty():
            raise RequestError('no prompt: give one as in `nanocupy generate -m MODEL "Hello"`')
        texts = [read_prompt(sys.stdin.buffer, "stdin")]
    else:
        texts = list(prompts)
    if not all(texts):
        raise RequestError("the prompt is empty; give it some text")
    return texts
