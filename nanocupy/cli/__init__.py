"""The command line's frame: which commands there are, and how they end.

It owns the table of commands, the global options, signals, exit codes and the one line an error
becomes. It knows nothing about models: a command's module is imported when that command runs, so
that `nanocupy --help` imports click and nothing else.

Exit codes: 0 done, 1 a fault of ours or the machine's, 2 a mistake the user can mend, 130 Ctrl-C,
141 the reader of the output went away, 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import TextIO

import click

from nanocupy import __version__
from nanocupy.errors import NanocupyError

PROGRAM = "nanocupy"

# name -> (where the command lives, the line `nanocupy --help` shows for it)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("nanocupy.cli.generate:generate", "Answer prompts and exit."),
    "chat": ("nanocupy.cli.chat:chat", "Talk with a model in the terminal."),
    "pull": ("nanocupy.cli.pull:pull", "Fetch a model into the cache and print its path."),
    "inspect": ("nanocupy.cli.inspect:inspect", "Show what a model file holds and what it needs."),
    "doctor": ("nanocupy.cli.doctor:doctor", "Check GPU, driver, CuPy and cache; say how to mend."),
    "bench": ("nanocupy.cli.bench:bench", "Measure decode, prefill, throughput, start-up."),
    "warmup": ("nanocupy.cli.warmup:warmup", "Compile a model's GPU kernels into the cache."),
    "plan": ("nanocupy.cli.plan:plan", "Show what an engine takes of a GPU's memory."),
    "eval": ("nanocupy.cli.eval:evaluate", "Measure a model's perplexity on a text."),
    "profile": ("nanocupy.cli.profile:profile", "Show where time and memory of a model go."),
    "config": ("nanocupy.cli.config:config", "Show the engine's settings, or write a file."),
    "export-qwen": (
        "nanocupy.cli.export:export_qwen",
        "Convert Qwen2, Qwen2.5 or Qwen3 to a NanoInfer file.",
    ),
    "export-llama": (
        "nanocupy.cli.export:export_llama",
        "Convert a LLaMA-type model to a NanoInfer file.",
    ),
    "export-gguf": ("nanocupy.cli.export:export_gguf", "Convert a GGUF file to a NanoInfer file."),
    "quantize": (
        "nanocupy.cli.quantize:quantize",
        "Write a model in int4, int8 or fp8 to a NanoInfer file.",
    ),
}


@dataclass
class _Invocation:
    """What the global options said; `main` needs it after click has unwound."""

    debug: bool = False


class _LazyGroup(click.Group):
    """A group whose help comes from COMMANDS and whose commands are imported only to be run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Run large language models from one file, on the CPU or an NVIDIA GPU.

    MODEL is a file or folder, a name of ours (smollm2-135m), or OWNER/NAME on a Hugging Face hub.
    """
    ctx.ensure_object(_Invocation).debug = debug
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (default: the process's own) and give its exit code.

    Every error becomes one line on stderr; `--debug` before the command adds the traceback.
    """
    invocation = _Invocation()
    _open_missing_streams()
    _tolerate_narrow_terminals()
    _end_on_signals()
    try:
        code = _invoke(list(sys.argv[1:] if argv is None else argv), invocation)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except Exception as exc:
        if isinstance(exc, OSError):  # perhaps stdout's own: a full disk behind a redirection
            try:
                sys.stdout.flush()
            except OSError:
                _redirect_to_nothing(sys.stdout)
        if invocation.debug:
            import traceback

            traceback.print_exc()
        message, code = _describe(exc, invocation.debug)
        _print_error(message)
        return code


def _invoke(args: list[str], invocation: _Invocation) -> int:
    """click's own `main` less its handling of Ctrl-C and broken pipes, which is ours."""
    if "_NANOCUPY_COMPLETE" in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(
            cli, {}, PROGRAM, "_NANOCUPY_COMPLETE", os.environ["_NANOCUPY_COMPLETE"]
        )
    try:
        with cli.make_context(PROGRAM, args, obj=invocation) as ctx:
            code = cli.invoke(ctx)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    return code if isinstance(code, int) else 0


def _describe(exc: Exception, debug: bool) -> tuple[str, int]:
    """The one line for `exc`, and the exit code."""
    if isinstance(exc, NanocupyError):
        return str(exc), exc.exit_code
    if isinstance(exc, click.UsageError):
        command = exc.ctx.command_path if exc.ctx else PROGRAM
        return f"{exc.format_message().rstrip('.')} (see `{command} --help`)", 2
    if isinstance(exc, click.ClickException):
        return exc.format_message(), 2
    if isinstance(exc, MemoryError):
        return "out of memory" + (f": {exc}" if str(exc) else ""), 1
    if isinstance(exc, OSError) and exc.strerror:
        return (f"{exc.filename}: " if exc.filename else "") + exc.strerror, 1
    hint = "" if debug else f"; run again as `{PROGRAM} --debug …` for a traceback"
    return f"unexpected {type(exc).__name__}: {exc or 'no message'}{hint}", 1


def _print_error(message: str) -> None:
    # One line, whatever a file name or a library put into the message.
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with suppress(OSError):  # where nobody reads stderr the exit code still tells
        print(f"{PROGRAM}: error: {line}", file=sys.stderr, flush=True)


def _open_missing_streams() -> None:
    """Where a caller closed stdin, stdout or stderr, Python has None there: nothing stands in."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open until the process ends, like the stream it replaces.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _tolerate_narrow_terminals() -> None:
    """A character the terminal cannot show becomes "?" on stdout and an escape on stderr."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)


def _end_on_signals() -> None:
    """SIGTERM and SIGHUP unwind the stack like an exit, so that temporary files are removed."""

    def end(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    for name in ("SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        # Only the default is replaced: under nohup a hang-up is ignored and stays so.
        if signum is not None and signal.getsignal(signum) is signal.SIG_DFL:
            try:
                signal.signal(signum, end)
            except ValueError:  # not the main thread: signals are another's business
                return


def _discard_output() -> None:
    """Point stdout and stderr at nothing, so that the interpreter's last flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        _redirect_to_nothing(stream)


def _redirect_to_nothing(stream: TextIO) -> None:
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        pass  # a stream without a file behind it needs no care
