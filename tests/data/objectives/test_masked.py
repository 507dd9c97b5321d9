"""Masked LM and sentence pairs: what is drawn, what it becomes, and that it can be undone."""

import dataclasses
import itertools

import numpy as np
import pytest

from t5x_lite.data.objectives import (
    MaskedLM,
    MaskSpans,
    MaskTokens,
    MaskWholeWords,
    NextSentencePairs,
)
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError
from tests.data.toy import BERT, LLAMA, text

SELECTIONS = [MaskTokens(), MaskWholeWords(), MaskSpans()]
BOS, EOS, MASK = 2, 3, 4


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def restored(example) -> np.ndarray:
    inputs = example.inputs.copy()
    inputs[example.masked_positions] = example.masked_targets
    return inputs


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
def test_the_text_can_be_restored_and_specials_are_let_alone(selection):
    objective = MaskedLM(BERT, selection=selection)
    for seed, length in enumerate([1, 2, 3, 7, 20, 40, 100, 511] * 5):
        tokens = text(length, seed, specials=min(length // 5, 6))
        example = objective(tokens, rng=generator(seed))
        np.testing.assert_array_equal(restored(example), [BOS, *tokens, EOS])
        assert example.inputs.dtype == example.masked_positions.dtype == np.int32
        assert np.all(np.diff(example.masked_positions) > 0), "ascending, none twice"
        assert not set(example.masked_targets.tolist()) & BERT.special_ids
        changed = example.inputs != [BOS, *tokens, EOS]
        assert set(np.flatnonzero(changed)) <= set(example.masked_positions.tolist())
        new = example.inputs[changed]
        assert np.all((new == MASK) | ((new > 4) & (new < 280))), "the mask, or a token of text"
        ordinary = int(np.sum(tokens != EOS))
        count = min(max(round(0.15 * ordinary), 1), ordinary)
        if isinstance(selection, MaskWholeWords):
            assert len(example.masked_targets) <= count
        else:
            assert len(example.masked_targets) == count


def test_nothing_to_mask():
    for tokens in ([], [EOS, EOS]):
        for selection in SELECTIONS:
            example = MaskedLM(BERT, selection=selection)(
                np.array(tokens, np.int32), rng=generator(0)
            )
            assert example.inputs.tolist() == [BOS, *tokens, EOS]
            assert example.masked_positions.tolist() == example.masked_targets.tolist() == []


def test_eighty_ten_ten_and_every_place_alike():
    objective, tokens = MaskedLM(BERT), text(200)
    places, becomes = np.zeros(202), np.zeros(3)
    for seed in range(1000):
        example = objective(tokens, rng=generator(seed))
        places[example.masked_positions] += 1
        seen = example.inputs[example.masked_positions]
        masked, kept = seen == MASK, seen == example.masked_targets
        becomes += [masked.sum(), kept.sum(), (~masked & ~kept).sum()]
    becomes /= becomes.sum()
    # A random token is the old one once in 275: within 4 standard deviations of 30,000 draws.
    assert np.allclose(becomes, [0.8, 0.1, 0.1], atol=0.01)
    assert places[0] == places[201] == 0
    assert np.abs(places[1:-1] - 150).max() < 60  # 5 standard deviations


@pytest.mark.parametrize(("mask", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_shares_can_be_chosen(mask, random):
    objective = MaskedLM(BERT, rate=0.5, mask_rate=mask, random_rate=random)
    example = objective(text(100), rng=generator(0))
    seen = example.inputs[example.masked_positions]
    assert np.all(seen == MASK) == bool(mask)
    assert np.all(seen == example.masked_targets) == (not mask and not random)


def words_of(tokens: np.ndarray) -> list[list[int]]:
    """Places of each word: it begins where 3 divides, at the start, and after a special."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens.tolist()):
        if token == EOS:
            continue
        if token % 3 == 0 or not words or i == 0 or tokens[i - 1] == EOS:
            words.append([])
        words[-1].append(i)
    return words


def test_whole_words_are_drawn_whole():
    exact = 0
    for seed in range(100):
        tokens = text(150, seed, specials=5)
        example = MaskedLM(BERT, selection=MaskWholeWords())(tokens, rng=generator(seed))
        drawn = set((example.masked_positions - 1).tolist())
        for word in words_of(tokens):
            assert set(word) <= drawn or not set(word) & drawn
        exact += len(drawn) == round(0.15 * 145)
    assert exact > 90, "where words of all lengths are at hand, the count is met"


def test_spans_are_whole_words_replaced_alike():
    lengths = []
    for seed in range(200):
        tokens = text(300, seed, specials=3)
        objective = MaskedLM(BERT, selection=MaskSpans(), random_rate=0.0)
        example = objective(tokens, rng=generator(seed))
        drawn = np.zeros(302, bool)
        drawn[example.masked_positions] = True
        hidden = example.inputs == MASK
        partly = 0
        for word in words_of(tokens):
            of_word = drawn[1:][word]
            partly += 0 < of_word.sum() < len(word)
            if of_word.all():
                masked = hidden[1:][word]
                assert masked.all() or not masked.any() or partly
        assert partly <= 1, "only the last span is cut"
        lengths += [len(list(run)) for value, run in itertools.groupby(drawn) if value]
    # Spans of 3.8 words, of 3 tokens each (a word begins at a third of the ids), some side by side.
    assert 6 < np.mean(lengths) < 13


def test_no_span_crosses_a_special_token():
    places = np.array([*range(10), *range(11, 21)])  # 10 is special
    for seed in range(100):
        drawn = MaskSpans()(places, np.ones(20, bool), 8, generator(seed))
        assert np.sum(drawn >= 0) == 8
        before, after = (set(part[part >= 0].tolist()) for part in (drawn[:10], drawn[10:]))
        assert not before & after


def test_span_lengths_are_geometric():
    bounds = MaskSpans()._bounds
    probabilities = np.diff(bounds, prepend=0)
    assert np.allclose(probabilities[1:] / probabilities[:-1], 0.8)
    assert np.isclose(probabilities @ np.arange(1, 11), 3.8, atol=0.01)


def test_masks_change_with_the_generator_alone():
    tokens = text(100)
    for selection in SELECTIONS:
        one, two, other = (
            MaskedLM(BERT, selection=selection)(tokens, rng=generator(s)) for s in (1, 1, 2)
        )
        np.testing.assert_array_equal(one.inputs, two.inputs)
        assert one.masked_positions.tolist() != other.masked_positions.tolist()


def test_fit_asks_for_enough_slots():
    assert MaskedLM(BERT).fit({"encoder": 512, "masked": 76}) == (510,)
    with pytest.raises(InputError, match=r"15% of 510 tokens takes 76 slots.*set it to 76"):
        MaskedLM(BERT).fit({"encoder": 512, "masked": 75})
    with pytest.raises(InputError, match="has none"):
        MaskedLM(LLAMA).fit({"encoder": 512, "masked": 76})
    with pytest.raises(InputError, match="no room"):
        MaskedLM(BERT).fit({"encoder": 2, "masked": 1})
    for wrong in ({"rate": 1.5}, {"mask_rate": -1.0}, {"mask_rate": 0.8, "random_rate": 0.3}):
        with pytest.raises(InputError, match="expected between 0 and 1"):
            MaskedLM(BERT, **wrong)
    for wrong in ({"p": 0.0}, {"p": 1.0}, {"longest": 0}):
        with pytest.raises(InputError, match="MaskSpans"):
            MaskSpans(**wrong)


# --- pairs ---------------------------------------------------------------------------------------


def sentences(length: int, seed: int) -> np.ndarray:
    tokens = text(length, seed)
    tokens[tokens % 10 == 9] += 1
    tokens[4::7] = 9  # a sentence ends after every seventh token from the fifth
    return tokens


def test_pairs_are_the_text_or_its_beginning_and_another():
    objective = NextSentencePairs(BERT)
    assert objective.fit({"encoder": 64, "masked": 10}) == (61, 61)
    labels = []
    for seed in range(300):
        one, other = sentences(61, seed), sentences(50 + seed % 12, seed + 1000)
        example = objective(one, other, rng=generator(seed))
        assert len(example.inputs) == len(example.token_types) <= 64
        assert example.masked_positions[0] == 0
        label = int(example.masked_targets[0])
        labels.append(label)
        whole = example.inputs.copy()
        whole[example.masked_positions[1:]] = example.masked_targets[1:]
        assert whole[0] == BOS
        first_end, second_end = np.flatnonzero(whole == EOS).tolist()
        assert second_end == len(whole) - 1
        a, b = whole[1:first_end], whole[first_end + 1 : -1]
        np.testing.assert_array_equal(
            example.token_types, [0] * (first_end + 1) + [1] * (len(b) + 1)
        )
        np.testing.assert_array_equal(a, one[: len(a)])
        assert a[-1] == 9, "cut at the end of a sentence"
        if label == 0:
            np.testing.assert_array_equal(b, one[len(a) :])
        else:
            starts = [i for i in range(len(other)) if np.array_equal(other[i : i + len(b)], b)]
            assert starts
            assert starts[0] == 0 or other[starts[0] - 1] == 9
            assert len(b) == min(61 - len(a), len(other))
        assert len(example.masked_targets) == 1 + round(0.15 * (len(a) + len(b)))
        assert not {BOS, EOS} & set(example.masked_targets[1:].tolist())
    assert 110 < sum(labels) < 190


def test_short_pairs_and_texts_of_one_sentence():
    objective = NextSentencePairs(BERT)
    for seed in range(20):
        example = objective(np.array([5, 6, 7], np.int32), text(9), rng=generator(seed))
        end = int(np.flatnonzero(example.inputs == EOS)[0])
        assert end in (2, 3), "cut anywhere, with a token on either side"
        for short in ([], [5]):
            example = objective(np.array(short, np.int32), text(9), rng=generator(seed))
            assert example.masked_targets[0] == 0, "nothing left to replace"
            assert len(example.inputs) == len(short) + 3


def test_pairs_refuse():
    with pytest.raises(InputError, match="set it to 10"):
        NextSentencePairs(BERT).fit({"encoder": 64, "masked": 9})
    with pytest.raises(InputError, match="no bos"):
        NextSentencePairs(dataclasses.replace(BERT, bos_id=None)).fit({"encoder": 64, "masked": 10})
    with pytest.raises(InputError, match="expected 5 or more"):
        NextSentencePairs(BERT).fit({"encoder": 4, "masked": 10})
    with pytest.raises(InputError, match="has none"):
        MaskedLM(ByteVocabulary()).fit({"encoder": 64, "masked": 10})
