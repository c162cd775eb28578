"""The strict JSON reader beside Python's own, and with what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.errors import TokenizerError
from nanocupy.strict_json import MAX_DEPTH, parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(value=st.dictionaries(st.text(), VALUES), escape=st.booleans())
@settings(max_examples=200, deadline=2000)
def test_agrees_with_json_on_sound_objects(value: dict[str, Any], escape: bool) -> None:
    data = json.dumps(value, ensure_ascii=escape).encode()  # text() draws no lone surrogates
    assert parse_object(data, "here") == value
    assert parse_object(b"\xef\xbb\xbf" + data, "here") == value  # with a byte order mark


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": "\\ud800"}', "is not Unicode"),
        ('{"\\uDFFF": 1}', "is not Unicode"),
        ('{"a": [[{"b": "x\\udc00"}]]}', "is not Unicode"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a": Infinity}', "Infinity is not a number"),
        ('{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH, "nested deeper"),
    ],
)
def test_refused_in_one_line_with_the_callers_error(text: str, says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as caught:
        parse_object(text.encode(), "here", error=TokenizerError)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


def test_escapes_of_whole_characters_and_the_deepest_nesting_are_taken() -> None:
    assert parse_object(rb'{"a": "\ud83d\ude00"}', "here") == {"a": "\U0001f600"}
    deepest = '{"a":' * (MAX_DEPTH - 1) + "{}" + "}" * (MAX_DEPTH - 1)
    assert parse_object(deepest.encode(), "here") == json.loads(deepest)
