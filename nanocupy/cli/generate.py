"""`nanocupy generate`: one prompt in, the answer streamed to stdout, statistics to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from nanocupy.cli.model_options import (
    Stopwatch,
    load_model,
    model_options,
    read_prompt,
    statistics_line,
)
from nanocupy.errors import RequestError


@click.command(short_help="Answer one prompt and exit.")
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), help="Take the prompt from a UTF-8 file."
)
@click.option("--system", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is: no chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--quiet", "-q", is_flag=True, help="No statistics.")
@model_options
def generate(
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer PROMPT and exit.

    Without PROMPT, or with "-", it is read from stdin. The text comes on stdout as it is made.
    """
    text = _prompt_text(prompt, prompt_file)
    if system is not None and raw:
        raise RequestError("--system needs the chat template, which --raw turns off; leave one out")
    watch = Stopwatch()
    llm, params = load_model(options)
    load_time = watch.seconds
    use_chat = not raw and llm.checkpoint.chat_template is not None
    if system is not None and not use_chat:
        raise RequestError("--system: this model has no chat template; leave --system out")
    if use_chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        answer = llm.stream([*messages, {"role": "user", "content": text}], params)
    else:
        answer = llm.stream(text, params)
    ends_line = True
    try:
        for chunk in answer:
            if not as_json and chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                ends_line = chunk.text.endswith("\n")
    finally:
        if not ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
    completion = answer.completion()
    if as_json:
        click.echo(
            json.dumps(
                {
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
                },
                ensure_ascii=False,
            )
        )
    if not quiet and not as_json:
        click.echo(f"[{statistics_line(llm, completion, load_time)}]", err=True)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt_file is not None:
        if prompt is not None:
            raise RequestError("give PROMPT or --prompt-file, not both")
        try:
            with prompt_file.open("rb") as file:
                text = read_prompt(file, str(prompt_file))
        except OSError as exc:
            raise RequestError(f"{prompt_file}: cannot be read: {exc.strerror}") from None
    elif prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise RequestError('no prompt: give one as in `nanocupy generate -m MODEL "Hello"`')
        text = read_prompt(sys.stdin.buffer, "stdin")
    else:
        text = prompt
    if not text:
        raise RequestError("the prompt is empty; give it some text")
    return text
