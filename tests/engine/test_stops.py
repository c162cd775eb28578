"""Stop strings in a growing text."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from nanocupy.engine.stops import StopMatcher


def feed(pieces: list[str], stops: list[str]) -> tuple[str, list[str], str | None]:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.stopped_by is not None:
            return "".join(shown), shown, matcher.stopped_by
    shown.append(matcher.finish())
    return "".join(shown), shown, None


def test_a_stop_across_pieces_is_never_shown():
    assert feed(["one <", "/s", "> two"], ["</s>"]) == ("one ", ["one ", "", ""], "</s>")


def test_what_only_began_like_a_stop_is_shown_at_once():
    assert feed(["a<", "b"], ["</s>"])[1] == ["a", "<b", ""]


def test_an_unfinished_stop_is_shown_at_the_end():
    assert feed(["a", "</"], ["</s>"])[0] == "a</"


def test_after_the_stop_nothing_comes():
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_equal_to_searching_the_text_as_it_grows(pieces, stops):
    shown, _, stopped_by = feed(pieces, stops)
    # The plain way: after every piece, look for the first stop in all of the text.
    text = ""
    expected = None
    for piece in pieces:
        text += piece
        if stops and (match := re.search("|".join(map(re.escape, stops)), text)):
            expected = text[: match.start()]
            break
    if expected is None:
        assert stopped_by is None
        assert shown == text
    else:
        assert stopped_by in stops
        assert shown == expected
