"""Pieces of text as tokens come: whole characters, nothing of a stop string, all in the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.stopping import cut_at
from t5x_lite.serving.texts import TextStream

BYTES = ByteVocabulary(extra_ids=0)


def stream(text, stops=()):
    """The pieces of a text given byte by byte, and the stream."""
    made = TextStream(BYTES.decode, stops)
    pieces = []
    for token in BYTES.encode(text).tolist():
        pieces.append(made.add(token))
        if made.stopped:
            break
    return [*pieces, made.rest()], made


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_make_the_text_and_no_piece_is_half_a_character(text):
    pieces, made = stream(text)
    assert "".join(pieces) == made.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_token():
    assert stream("aé🙂")[0] == ["a", "", "é", "", "", "", "🙂", ""]


def test_bytes_that_are_no_character_come_when_that_is_clear():
    made = TextStream(BYTES.decode)
    given = [made.add(byte + 3) for byte in b"\xff\xfea"]
    assert "".join(given) == "\ufffd\ufffda"


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_never_shown(text, stops):
    pieces, made = stream(text, stops)
    assert "".join(pieces) == made.text == cut_at(text, stops)
    assert made.is_cut == any(stop in text for stop in stops)


def test_text_that_may_begin_a_stop_string_waits():
    assert stream("a\n b", ["\n\n"])[0] == ["a", "", "\n ", "b", ""]
    assert stream("a\n", ["\n\n"])[0] == ["a", "", "\n"]


@pytest.mark.parametrize("stops", [(), ("!",)])
def test_text_that_later_tokens_change_is_right_at_the_end(stops):
    """WordPiece: 'stop' '.' is 'stop .' and then 'stop.'"""
    made = TextStream(lambda tokens: ["a", "a .", "a. b"][len(tokens) - 1], stops)
    for token in range(3):
        made.add(token)
    made.rest()
    assert made.text == "a. b"
