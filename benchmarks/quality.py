"""What fewer bits cost: a model's perplexity on a text, quantised or with a cache of codes.

    python -m benchmarks.quality --model MODEL --text FILE [--tokens N] [--only TEXT] [--record]

The model is turned into float32 first, so that no form has its bits in common with how it is
stored; each form is what `nanocupy quantize` writes. The same tokens of the text, in windows of 512
of which half is scored. Runs on whatever `nanocupy eval` would run on.

The text of the records is Botchan from its first chapter on, in the public domain: test/botchan.txt
in sentencepiece's source package (pip download --no-deps --no-binary :all: sentencepiece==0.2.0).
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import write_record
from nanocupy import LLM
from nanocupy.checkpoint import open_checkpoint
from nanocupy.evaluation import TextScore, score_text
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView, RoundingError
from nanocupy.hub import resolve_model

WINDOW = 512
# name -> options of QuantizedView; where there are none, the model in float32
FORMS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "kv-int8": None,
    "kv-fp8": None,
    "int8/row": {"kind": "int8", "group_size": -1},
    "int8/g64": {"kind": "int8", "group_size": 64},
    "fp8/row": {"kind": "fp8", "group_size": -1},
    "fp8/g64": {"kind": "fp8", "group_size": 64},
    "int4/g192": {"kind": "int4", "group_size": 192},
    "int4/g192/nearest": {"kind": "int4", "group_size": 192, "search": False},
    "int4/g64": {"kind": "int4", "group_size": 64},
    "int4/g64/nearest": {"kind": "int4", "group_size": 64, "search": False},
}
SETTINGS = {"kv-int8": {"kv_cache_dtype": "int8"}, "kv-fp8": {"kv_cache_dtype": "fp8"}}


def score(path: Path, text: str, num_tokens: int, settings: dict[str, Any]) -> TextScore:
    llm = LLM(path, **settings)
    found = score_text(llm, llm.encode(text)[:num_tokens], WINDOW, WINDOW // 2)
    del llm
    gc.collect()
    return found


def rounding_error(view: QuantizedView) -> float:
    """Squared error of all rounded weights as a share of their squares."""
    total = sum(view.errors.values(), RoundingError(0.0, 0.0, 0.0, 0))
    return total.written / total.weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="smollm2-135m", help="in the records")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", default="", help="forms whose names have this in them")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    device = f"{os.cpu_count()} cores {platform.machine()}"
    first: TextScore | None = None
    with tempfile.TemporaryDirectory() as folder:
        exact, path = Path(folder) / "float32.nano", Path(folder) / "m.nano"
        with open_checkpoint(resolve_model(args.model)) as source:
            write_nanoinfer2(source, exact, dtype="float32")
        for name, options in FORMS.items():
            if first is not None and args.only not in name:
                continue
            more: dict[str, Any] = {}
            if options is not None:
                with open_checkpoint(exact) as checkpoint:
                    view = QuantizedView(checkpoint, **options)
                    write_nanoinfer2(view, path)
                    more["rounding_error"] = round(rounding_error(view), 6)
            file = exact if options is None else path
            found = score(file, text, args.tokens, SETTINGS.get(name, {}))
            first = first or found
            more |= {
                "bytes": file.stat().st_size,
                "tokens": len(found.logprobs),
                "same_choice": round(found.agreement(first), 4),
                "text": args.text.name,
            }
            print(
                f"{name:20} {file.stat().st_size / 1e6:7.1f} MB  perplexity "
                f"{found.perplexity:8.4f} {found.perplexity / first.perplexity - 1:+8.2%}  same "
                f"choice {more['same_choice']:.2%}  {more.get('rounding_error', 0):.4%}",
                flush=True,
            )
            if args.record:
                write_record(
                    "quality",
                    f"quality/{args.name}/{name}",
                    [found.perplexity],
                    "perplexity",
                    device=device,
                    dtype=name.split("/")[0],
                    **more,
                )


if __name__ == "__main__":
    main()
