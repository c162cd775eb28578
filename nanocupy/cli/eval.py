"""`nanocupy eval`: how well a model holds a text, and what other settings change of that."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.console import make_table, plain_console
from nanocupy.cli.engine_options import engine_config, engine_options
from nanocupy.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from nanocupy.engine.config import EngineConfig
    from nanocupy.evaluation import TextScore

MAX_TEXT_BYTES = 64 << 20


@click.command(name="eval", short_help="Measure a model's perplexity on a text.")
@click.option("--model", "-m", required=True, metavar="MODEL", help="The model to measure.")
@click.option(
    "--text", "text_file", required=True, type=click.Path(path_type=Path), metavar="FILE",
    help="A text in UTF-8.",
)  # fmt: skip
@click.option(
    "--against", multiple=True, metavar="NAME=VALUE",
    help="Run it again with this engine setting changed, and say where the two hold other tokens "
    "most likely. May be given often; all are changed together.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(2), default=4096, show_default=True,
    help="Tokens of the text, from its start.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(2), default=512, show_default=True,
    help="Tokens the model sees at once.",
)  # fmt: skip
@click.option(
    "--overlap", type=click.IntRange(1), default=None,
    help="Tokens that a window sees before those that it scores. [default: half of it]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options()
def evaluate(
    model: str, text_file: Path, against: tuple[str, ...], tokens: int, window: int,
    overlap: int | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure how likely a model holds the tokens of a text.

    Perplexity is the exponential of the mean surprise: the lower, the better the model knows how
    the text goes on. With --against, the model is run twice, and the table says what the change
    costs: both perplexities, and the share of places where both would have chosen the same token.
    """
    config = engine_config(options)
    changed = _changed(config, against)
    text = _read(text_file)
    runs = [("as given", config)] + ([(", ".join(against), changed)] if changed else [])
    scores = [_score(model, text, tokens, window, overlap, run) for _, run in runs]
    names = [name for name, _ in runs]
    if as_json:
        click.echo(json.dumps(_as_dict(names, scores), ensure_ascii=False))
        return
    columns = ("", "tokens", "perplexity", "change", "same choice")
    table = make_table(f"{text_file.name} by {model}", *columns, right=(1, 2, 3, 4))
    first = scores[0]
    for name, score in zip(names, scores, strict=True):
        is_other = score is not first
        table.add_row(
            name,
            f"{len(score.logprobs):,}",
            f"{score.perplexity:.4f}",
            # Rounded first, as -0.00 % is no change; adding 0.0 takes the sign of a zero.
            f"{round(score.perplexity / first.perplexity - 1, 4) + 0.0:+.2%}" if is_other else "",
            f"{score.agreement(first):.2%}" if is_other else "",
        )
    plain_console().print(table)


def _changed(config: EngineConfig, against: tuple[str, ...]) -> EngineConfig | None:
    """The settings of the second run, None where there is none."""
    from nanocupy.engine.config import SETTINGS, require_known

    if not against:
        return None
    changes = {}
    for text in against:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--against {text!r} has no value; write it as NAME=VALUE")
        require_known({name: value})
        changes[name] = SETTINGS[name].parse(value)
    return config.with_(**changes)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(
                f"{path}: {path.stat().st_size:,} bytes; a text has {MAX_TEXT_BYTES:,} at most"
            )
        return path.read_text("utf-8")
    except UnicodeDecodeError as exc:
        raise RequestError(f"{path}: byte {exc.start} is not UTF-8; give a text file") from None
    except OSError as exc:
        raise RequestError(f"{path}: cannot be read: {exc.strerror}") from None


def _score(
    model: str, text: str, tokens: int, window: int, overlap: int | None, config: EngineConfig
) -> TextScore:
    """One run; its memory is free again behind it."""
    from nanocupy.evaluation import score_text
    from nanocupy.llm import LLM
    from nanocupy.progress import count_progress

    llm = LLM(model, config=config)
    ids = llm.encode(text)[:tokens]
    window = min(window, len(ids)) if len(ids) > 1 else window
    with count_progress("scoring tokens") as report:
        score = score_text(
            llm, ids, window, max(1, window // 2) if overlap is None else overlap, report
        )
    del llm
    gc.collect()
    return score


def _as_dict(names: list[str], scores: list[TextScore]) -> dict[str, Any]:
    found = [
        {"settings": name, "tokens": len(score.logprobs), "perplexity": score.perplexity}
        for name, score in zip(names, scores, strict=True)
    ]
    result: dict[str, Any] = {"runs": found}
    if len(scores) > 1:
        result["same_choice"] = scores[1].agreement(scores[0])
    return result
