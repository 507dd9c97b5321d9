"""Texts with a mapping of their own: what holds in each, and what the control shares with them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from t5x_lite.data.mappings import Mappings
from t5x_lite.types import InputError


def pairs(text: str) -> list[tuple[str, str]]:
    return list(zip(text[::2], text[1::2], strict=True))


def texts(source: Mappings, split: str, count: int = 400) -> list[str]:
    records = source.open(split)
    return [records[index]["text"] for index in range(count)]


def apart(pair: tuple[str, str]) -> bool:
    return (ord(pair[0]) - ord("a") + ord(pair[1]) - ord("A")) % 4 == 0


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_a_text_keeps_to_one_mapping_and_texts_differ_in_theirs(split):
    mappings = []
    for text in texts(Mappings(), split):
        assert len(text) == 64
        mapping = dict(pairs(text))
        assert all(mapping[key] == value for key, value in pairs(text))
        assert len(mapping) <= 8
        mappings.append(tuple(sorted(mapping.items())))
    assert len(set(mappings)) == len(mappings)


def test_held_out_pairs_are_in_their_split_alone():
    for structured in (True, False):
        source = Mappings(structured=structured)
        assert not any(apart(p) for text in texts(source, "train") for p in pairs(text))
        assert all(apart(p) for text in texts(source, "held_out") for p in pairs(text))


def test_the_control_has_the_same_letters_and_pairs_but_no_mapping():
    """Every key, value and pair as often as in the structured texts, within sampling error."""
    counts = {}
    for structured in (True, False):
        found = texts(Mappings(structured=structured), "train", 2000)
        counts[structured] = collections.Counter(pair for text in found for pair in pairs(text))
        consistent = [len(set(pairs(text))) == len(dict(pairs(text))) for text in found]
        assert all(consistent) if structured else not any(consistent)
    assert set(counts[True]) == set(counts[False])
    assert len(counts[True]) == 16 * 12
    for mine in counts.values():
        shares = np.array(list(mine.values())) / sum(mine.values())
        np.testing.assert_allclose(shares, 1 / 192, rtol=0.35)


def test_texts_are_a_function_of_seed_split_and_index():
    one, again = Mappings().open("train"), Mappings().open("train")
    assert [one[i] for i in (5, 3)] == [again[5], again[3]]
    assert one[3] != one[5]
    assert one[3] != Mappings(seed=1).open("train")[3]
    assert one[3] != Mappings().open("validation")[3]
    assert len(one) == 1 << 24
    with pytest.raises(IndexError):
        one[1 << 24]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="no split 'test'; its splits are: train, validation"):
        Mappings().open("test")
    with pytest.raises(InputError, match=r"Mappings\.keys=27: expected between 1 and 26"):
        Mappings(keys=27)
    with pytest.raises(InputError, match=r"keys_a_text=9: expected between 1 and 4"):
        Mappings(keys=4, keys_a_text=9)
    with pytest.raises(InputError, match="held_out=5"):
        Mappings(held_out=5)
