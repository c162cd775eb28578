"""`nanocupy chat`: a conversation in the terminal, answers streamed as they come."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from nanocupy.cli.model_options import Stopwatch, load_model, model_options, statistics_line
from nanocupy.errors import NanocupyError, RequestError

HELP = "/reset starts over, /stats shows the last answer's speed, /quit (or Ctrl-D) ends"


@click.command(short_help="Talk with a model in the terminal.")
@click.option("--system", help="System message before the conversation.")
@model_options
def chat(system: str | None, **options: Any) -> None:
    """Talk with a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation.

    Lines that come through a pipe are taken as one message each.
    """
    watch = Stopwatch()
    llm, params = load_model(options)
    load_time = watch.seconds
    if llm.chat_template is None:
        raise RequestError(
            f"{llm.checkpoint.path} has no chat template: it is not a chat model; "
            "continue a text with `nanocupy generate --raw`"
        )
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    statistics = "no answer yet"
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"{llm.config.name or llm.checkpoint.path.name} on {llm.device}. {HELP}.")
    for text in _lines(interactive):
        command = text.strip()
        if not command:
            continue
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            messages = list(opening)
            click.echo("(a new conversation)", err=True)
        elif command == "/stats":
            click.echo(f"[{statistics}]", err=True)
        elif command == "/help":
            click.echo(HELP, err=True)
        else:
            try:
                answer = llm.stream([*messages, {"role": "user", "content": text}], params)
            except NanocupyError as exc:  # one message that cannot be answered ends nothing
                click.echo(f"nanocupy: error: {exc}", err=True)
                if len(messages) > len(opening):
                    click.echo("(/reset starts a new conversation)", err=True)
                continue
            try:
                for chunk in answer:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                if not interactive:
                    raise
                answer.close()
            sys.stdout.write("\n")
            sys.stdout.flush()
            completion = answer.completion()
            statistics = statistics_line(llm, completion, load_time)
            messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": completion.text},
            ]


def _lines(interactive: bool) -> Any:
    """The user's messages, until end of input."""
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # at the prompt: drop the line, as shells do
            click.echo()
