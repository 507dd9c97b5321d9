"""BART's noises: exact counts, what may change and what may not, and the published mix."""

import collections
import itertools

import numpy as np
import pytest

from t5x_lite.data.objectives import (
    BART,
    DocumentRotation,
    SentencePermutation,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
)
from t5x_lite.data.objectives.bart import span_lengths
from t5x_lite.types import InputError
from tests.data.toy import BERT, T5, text

BOS, EOS, MASK = 2, 3, 4
LENGTHS = [0, 1, 2, 3, 7, 20, 100, 500]


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def cases(specials: bool = True):
    for seed, length in enumerate(LENGTHS * 20):
        yield text(length, seed, specials=min(length // 6, 5) if specials else 0), generator(seed)


def test_token_masking():
    for tokens, rng in cases():
        noised = TokenMasking(BERT)(tokens, rng)
        hidden = noised == MASK
        assert hidden.sum() == round(0.3 * np.sum(tokens != EOS))
        np.testing.assert_array_equal(noised[~hidden], tokens[~hidden])
        assert not np.any(tokens[hidden] == EOS)


def is_subsequence(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(token in rest for token in short)


def test_token_deletion():
    for tokens, rng in cases():
        noised = TokenDeletion(BERT)(tokens, rng)
        assert len(tokens) - len(noised) == round(0.3 * np.sum(tokens != EOS))
        assert is_subsequence(noised.tolist(), tokens.tolist())
        assert np.sum(noised == EOS) == np.sum(tokens == EOS)


def test_infilling_hides_exactly_its_share_behind_no_more_masks():
    for tokens, rng in cases():
        noised = TextInfilling(BERT)(tokens, rng)
        count = round(0.3 * np.sum(tokens != EOS))
        kept = noised[noised != MASK]
        assert len(kept) == len(tokens) - count
        assert is_subsequence(kept.tolist(), tokens.tolist())
        assert np.sum(kept == EOS) == np.sum(tokens == EOS)
        assert len(noised) <= len(tokens)


def test_each_mask_of_infilling_stands_for_a_span():
    """With distinct tokens the spans can be read off: each has its mask, also across an eos."""
    inserted, lengths = 0, []
    for seed in range(300):
        tokens = np.arange(10, 110, dtype=np.int32)
        tokens[[30, 60, 61]] = EOS
        noised = TextInfilling(BERT)(tokens, generator(seed))
        gaps: list[int] = []  # hidden tokens before each kept one, and masks before it
        place = 0
        for is_mask, run in itertools.groupby(noised.tolist(), lambda token: token == MASK):
            if is_mask:
                gaps.append(len(list(run)))
                continue
            for token in run:
                at = place
                while at < 100 and tokens[at] != token:
                    at += 1
                masks = gaps.pop() if gaps else 0
                missing = at - place
                assert not (tokens[place:at] == EOS).any()
                assert bool(missing) <= masks, "nothing goes without a mask"
                inserted += masks > 0 and missing == 0
                if masks == 1 and missing:
                    lengths.append(missing)
                place = at + 1
        masks = gaps.pop() if gaps else 0
        assert bool(100 - place) <= masks
    assert inserted > 50, "empty spans put masks where nothing is missing"
    assert 2.5 < np.mean(lengths) < 3.7


def test_span_lengths():
    lengths = [span_lengths(120, 3.0, generator(s), at_most=120) for s in range(300)]
    assert all(one.sum() == 120 for one in lengths)
    counts = collections.Counter(np.concatenate([one[:-1] for one in lengths]).tolist())
    total = sum(counts.values())
    poisson = [0.0498, 0.1494, 0.2240, 0.2240, 0.1680]
    assert np.allclose([counts[k] / total for k in range(5)], poisson, atol=0.02)
    for total, limit in itertools.product(range(1, 6), range(-2, 6)):
        for seed in range(50):
            one = span_lengths(total, 0.5, generator(seed), at_most=limit)
            assert one.sum() == total
            assert len(one) <= max(limit, np.sum(one > 0))


def test_sentences_are_permuted_within_their_documents():
    seen = collections.Counter()
    for seed in range(300):
        # Ids that end with 9 end a sentence; the last has no end; 3 lies between documents.
        one = [[11, 12, 19], [29], [31, 32, 33, 39]]
        two = [[41, 49], [51, 52]]
        tokens = np.array([*itertools.chain(*one), EOS, *itertools.chain(*two)], np.int32)
        noised = SentencePermutation(BERT)(tokens, generator(seed)).tolist()
        at = noised.index(EOS)
        assert at == 8
        orders = [list(itertools.chain(*order)) for order in itertools.permutations(one)]
        assert noised[:at] in orders
        assert noised[at + 1 :] in [[41, 49, 51, 52], [51, 52, 41, 49]]
        seen[orders.index(noised[:at])] += 1
    assert len(seen) == 6
    assert min(seen.values()) > 25
    assert SentencePermutation(BERT)(np.zeros(0, np.int32), generator(0)).tolist() == []


def test_rotation():
    starts = set()
    for seed in range(100):
        tokens = np.arange(10, 18, dtype=np.int32)
        noised = DocumentRotation()(tokens, generator(seed)).tolist()
        starts.add(noised[0])
        at = noised.index(10)
        assert noised[at:] + noised[:at] == tokens.tolist()
    assert starts == set(range(10, 18))
    assert DocumentRotation()(np.zeros(0, np.int32), generator(0)).tolist() == []


def test_the_objective_writes_the_text_as_it_was():
    objective = BART(BERT)
    assert [type(noise) for noise in objective.noises] == [SentencePermutation, TextInfilling]
    for tokens, rng in cases():
        example = objective(tokens, rng=rng)
        assert example.targets.tolist() == [BOS, *tokens.tolist(), EOS]
        assert example.inputs[0] == BOS
        assert example.inputs[-1] == EOS
        assert example.start_id == EOS
        assert len(example.inputs) <= len(example.targets)
    tokens = text(100)
    assert BART(BERT, noises=())(tokens, rng=generator(0)).inputs.tolist() == [BOS, *tokens, EOS]


def test_noises_compose_in_order():
    tokens = text(50)
    noises = (DocumentRotation(), TokenDeletion(BERT, 0.2), TokenMasking(BERT, 0.5))
    rng, want = generator(5), tokens
    for noise in noises:
        want = noise(want, rng)
    got = BART(BERT, noises=list(noises))(tokens, rng=generator(5)).inputs
    np.testing.assert_array_equal(got[1:-1], want)


def test_fit_and_errors():
    assert BART(BERT).fit({"encoder": 64, "decoder": 64}) == (62,)
    assert BART(BERT).fit({"encoder": 64, "decoder": 32}) == (30,)
    assert BART(BERT).fit({"decoder": 64}) == (30,)
    with pytest.raises(InputError, match="BART's TextInfilling hides tokens behind the"):
        BART(T5).fit({"encoder": 64, "decoder": 64})
    assert BART(T5, noises=[DocumentRotation()]).fit({"encoder": 64, "decoder": 64}) == (63,)
    with pytest.raises(InputError, match=r"TokenDeletion\.rate is -1"):
        TokenDeletion(BERT, -1)
    with pytest.raises(InputError, match="mean_span_length is 0"):
        TextInfilling(BERT, mean_span_length=0)
    with pytest.raises(InputError, match="not one token fits"):
        BART(BERT).fit({"encoder": 2, "decoder": 64})
