"""Bugs planted in how the decode step of one launch gets its inputs: each must be found."""

from __future__ import annotations

import pytest

from tests.kernels.decode_step_mutants import Mutant, assert_is_found
from tests.shim import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

INT4, ROWS = ("int4", 32), ("int4", None)

MUTANTS = [
    # ------------------------------------------------------------------------------ the norm
    Mutant(
        "spans that do not exist are normed from what lies behind",
        "(k < end ? k : first) / SPAN",
        "k / SPAN",
        "a norm of two spans",
    ),
    Mutant(
        "spans that do not exist are put behind the row",
        "            if (k >= end) break;\n",
        "",
        "three, a norm of eight spans",
    ),
    Mutant(
        "a thread's second span of a norm is its third",
        "return SpanPlace{token, first + i * NORM_STEP};",
        "return SpanPlace{token, first + (i > 0 ? 2 : 0) * NORM_STEP};",
        "a norm of two spans",
        INT4,
    ),
    # ------------------------------------------------------------------------------ sums of groups
    Mutant(
        "two sums of groups change places",
        "return N == 4 ? part / 2 + part % 2 * 2 : part;",
        "return N == 4 ? part / 2 + part % 2 * 2 : N == 2 ? 1 - part : part;",
        "a norm of two spans",
        INT4,
    ),
    Mutant(
        "only eight of sixteen spans are summed",
        "for (int first = 0; first < N; first += TOGETHER) {",
        "for (int first = 0; first < (N < 8 ? N : 8); first += TOGETHER) {",
        "sixteen spans",
        INT4,
    ),
    Mutant(
        "inputs beyond the tile are summed",
        "place_of(first + i).k < count ? sum : 0.0f",
        "sum",
        "one",
        ROWS,
    ),
    # ------------------------------------------------------------------------------ words
    Mutant(
        "the second word of a span is not looked at",
        "distances[1] |= distance(found[i][1], moment);",
        "",
        "one",
    ),
    Mutant(
        "what was missing is there, but is not read",
        "wait_for_words(words + number_of(missing) * WORDS, moment, alone);",
        "wait_for_words(words + number_of(missing) * WORDS, moment, alone); break;",
        "four",
    ),
    Mutant(
        "the words of the first token",
        "SpanPlace{first_token + number",
        "SpanPlace{number",
        "parts of two",
    ),
    Mutant(
        "no barrier behind what attention gives",
        "first, count);\n                users_sync();\n            } else if (kind == DOWN)",
        "first, count);\n            } else if (kind == DOWN)",
    ),
    Mutant(
        "no barrier behind the activations",
        "SEQUENCES);\n                users_sync();",
        "SEQUENCES);",
    ),
    Mutant(
        "a tile is overwritten before it is multiplied",
        "if (start > 0) users_sync();",
        "",
        "tiles",
        INT4,
    ),
    # ------------------------------------------------------------------------------ parts
    Mutant(
        "a part that does not exist counts as the last one",
        "own[s] = s < left ? ",
        "own[s] = true ? ",
        "several parts",
    ),
    Mutant(
        "a part that does not exist is waited for",
        "const int part = min(s, left - 1);",
        "const int part = s;",
        "several parts",
    ),
    Mutant(
        "parts are taken before they are there",
        "if (distances == 0) break;",
        "break;",
        "several parts",
    ),
    Mutant(
        "all spans of a thread are of the first one's head",
        "const int64_t at = heads[i] + part;",
        "const int64_t at = heads[0] + part;",
        "spans of several heads, several parts",
    ),
    Mutant(
        "all spans of a thread are of the first one's columns",
        "values + at * HEAD_SIZE + columns[i]",
        "values + at * HEAD_SIZE + columns[0]",
        "spans of several heads, several parts",
    ),
    Mutant(
        "every tile has what attention gives the first",
        "const int k = first + min(place_of",
        "const int k = min(place_of",
        "attention in tiles, several parts",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    assert_is_found(mutant)
