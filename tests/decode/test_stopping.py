"""Text that comes in pieces is cut where the whole would be."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_lite.decode.stopping import StopStrings, cut_at
from t5x_lite.types import InputError


def test_the_first_stop_cuts():
    assert cut_at("a b\nc. d", ["\n"]) == "a b"
    assert cut_at("a b\nc. d", [".", "\n"]) == "a b"
    assert cut_at("a b\nc. d", ["x"]) == "a b\nc. d"
    assert cut_at("a b", []) == "a b"
    assert cut_at("", ["a"]) == ""


def test_pieces_as_documented():
    stops = StopStrings(["END"])
    assert [stops.push(piece) for piece in ("some E", "asy EN", "D more", "again")] == [
        "some ", "Easy ", "", "",
    ]  # fmt: skip
    assert stops.stopped
    assert stops.finish() == ""


def test_any_pieces_give_what_the_whole_gives():
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(2000):
        text = "".join(rng.choice(list("ab"), rng.integers(0, 14)))
        stops = [
            "".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(rng.integers(3))
        ]
        cuts = sorted(rng.integers(0, len(text) + 1, rng.integers(0, 6)).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        streamed = StopStrings(stops)
        written = ""
        for piece in pieces:
            written += streamed.push(piece)
            assert cut_at(text, stops).startswith(written)  # nothing is taken back
        ended += streamed.stopped
        assert written + streamed.finish() == cut_at(text, stops), (pieces, stops)
    assert 500 < ended < 1900


def test_only_what_may_be_a_stop_is_held_back():
    stops = StopStrings(["\n\n", "Q:"])
    assert stops.push("one\n") == "one"
    assert stops.push("two Q") == "\ntwo "
    assert not stops.stopped
    assert stops.finish() == "Q"


@pytest.mark.parametrize("stops", ["END", ["a", ""], [3]])
def test_what_is_no_stop_string(stops):
    with pytest.raises(InputError, match="stop string"):
        StopStrings(stops)
