"""T5's denoising: its counts, invertibility, distribution, and every error."""

import itertools

import numpy as np
import pytest

from t5x_lite.data.objectives import (
    IidDenoising,
    SpanCorruption,
    noise_after_sentinels,
    noise_counts,
    random_segmentation,
    random_spans_noise_mask,
    span_corruption_lengths,
    spans_to_sentinels,
)
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError

BYTES = ByteVocabulary(extra_ids=2000)


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """The published algorithm, once more: TensorFlow's float32, and its round half to even."""

    def round_half_even(x: np.float32) -> int:
        floor = int(np.floor(x))
        rest = x - np.float32(floor)
        if rest == np.float32(0.5):
            return floor + floor % 2
        return floor + int(rest > np.float32(0.5))

    length = max(length, 2)
    noise = round_half_even(np.multiply(np.float32(length), np.float32(density)))
    noise = min(max(noise, 1), length - 1)
    return noise, max(round_half_even(np.divide(np.float32(noise), np.float32(mean))), 1)


def cases(n: int):
    rng = generator(7)
    for seed in range(n):
        yield int(rng.integers(2, 1500)), seed


def test_noise_counts_are_t5s_for_1000_lengths_and_seeds():
    settings = itertools.cycle([(0.15, 3.0), (0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 10.0)])
    for (length, seed), (density, mean) in zip(cases(1000), settings, strict=False):
        mask = random_spans_noise_mask(
            length, generator(seed), noise_density=density, mean_span_length=mean
        )
        noise, spans = t5_counts(length, density, mean)
        spans = min(spans, length - noise)
        assert mask.shape == (length,)
        assert not mask[0], "a kept span comes first"
        assert mask[-1], "a noise span comes last"
        assert mask.sum() == noise
        assert np.sum(np.diff(mask.astype(int)) == 1) == spans
        assert noise_counts(length, density, mean) == (noise, spans)


@pytest.mark.parametrize(
    ("length", "counts"),
    [(568, (85, 28)), (10, (2, 1)), (30, (4, 1)), (2, (1, 1)), (1, (1, 1)), (50, (8, 3))],
)
def test_ties_round_to_even(length, counts):
    assert noise_counts(length, 0.15, 3.0) == counts


def invert(inputs: np.ndarray, targets: np.ndarray, vocabulary) -> np.ndarray:
    """Puts each target span where its sentinel stands in the inputs."""
    first = vocabulary.size - vocabulary.num_sentinels
    assert inputs[-1] == targets[-1] == vocabulary.eos_id
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token >= first:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    out: list[int] = []
    for token in inputs[:-1].tolist():
        out.extend(spans[token] if token >= first else [token])
    return np.asarray(out, np.int32)


def test_span_corruption_is_invertible():
    objective = SpanCorruption(BYTES)
    for length, seed in cases(300):
        tokens = generator(seed, 1).integers(3, 259, length).astype(np.int32)
        example = objective(tokens, rng=generator(seed))
        assert example.inputs.dtype == example.targets.dtype == np.int32
        np.testing.assert_array_equal(invert(example.inputs, example.targets, BYTES), tokens)
        noise, spans = t5_counts(length, 0.15, 3.0)
        assert len(example.inputs) == length - noise + spans + 1
        assert len(example.targets) == noise + spans + 1
        sentinels = [BYTES.sentinel_id(k) for k in range(spans)]
        for stream in (example.inputs, example.targets):
            assert [t for t in stream if t >= 259] == sentinels


def test_same_generator_same_example_and_another_another():
    objective, tokens = SpanCorruption(BYTES), np.arange(3, 203, dtype=np.int32)
    one, two, other = (objective(tokens, rng=generator(s)).inputs for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_rendering_by_hand():
    tokens = np.array([5, 6, 7, 8, 9, 10, 11, 12], np.int32)
    mask = np.array([0, 0, 0, 1, 1, 0, 0, 1], bool)
    assert spans_to_sentinels(tokens, mask, 99).tolist() == [5, 6, 7, 99, 10, 11, 98]
    assert spans_to_sentinels(tokens, ~mask, 99).tolist() == [99, 8, 9, 98, 12]


def test_segmentations_are_all_equally_likely():
    rng = generator(0)
    seen = [tuple(random_segmentation(5, 3, rng).tolist()) for _ in range(6000)]
    counts = {s: seen.count(s) for s in set(seen)}
    assert set(counts) == {s for s in itertools.product(range(1, 4), repeat=3) if sum(s) == 5}
    assert max(abs(c - 1000) for c in counts.values()) < 150  # 5 standard deviations


def test_short_and_dense_sequences_behave():
    objective = SpanCorruption(BYTES)
    one = objective(np.array([9], np.int32), rng=generator(0))
    assert one.inputs.tolist() == [9, 1]
    assert one.targets.tolist() == [BYTES.sentinel_id(0), 1]
    none = objective(np.array([], np.int32), rng=generator(0))
    assert none.inputs.tolist() == none.targets.tolist() == [1]
    dense = SpanCorruption(BYTES, noise_density=0.9, mean_span_length=1.0)
    tokens = np.arange(3, 43, dtype=np.int32)
    example = dense(tokens, rng=generator(0))
    np.testing.assert_array_equal(invert(example.inputs, example.targets, BYTES), tokens)


def test_published_lengths():
    assert span_corruption_lengths(512) == (568, 114)
    assert span_corruption_lengths(1024) == (1137, 229)
    assert span_corruption_lengths(512, 0.5, 3.0)[1] <= 512


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 64.0)])
def test_what_fit_allows_fits(density, mean):
    objective = SpanCorruption(BYTES, density, mean)
    for length in range(8, 700, 3):
        tokens, targets = span_corruption_lengths(length, density, mean)
        (most,) = objective.fit({"encoder": length, "decoder": max(targets, 3)})
        if tokens * density > mean:  # with fewer, the published lengths count no span at all
            assert tokens - 1 <= most <= tokens
        for n in range(max(most - 10, 0), most + 1):
            example = objective(np.full(n, 5, np.int32), rng=generator(n))
            assert len(example.inputs) <= length
            assert len(example.targets) <= max(targets, 3)


@pytest.mark.parametrize("objective", [SpanCorruption(BYTES), IidDenoising(BYTES)])
def test_one_row_holds_inputs_and_targets_without_an_encoder(objective):
    for length in range(8, 300, 7):
        (most,) = objective.fit({"decoder": length})
        sizes = [
            len(e.inputs) + len(e.targets)
            for e in (objective(np.full(most, 5, np.int32), rng=generator(s)) for s in range(5))
        ]
        assert max(sizes) <= length
        if isinstance(objective, SpanCorruption):
            assert length - 3 <= max(sizes), "one more token would not fit"


def test_iid_denoising_is_invertible_with_exact_counts():
    objective, at_the_edges = IidDenoising(BYTES), 0
    for length, seed in cases(300):
        tokens = generator(seed, 1).integers(3, 259, length).astype(np.int32)
        example = objective(tokens, rng=generator(seed))
        np.testing.assert_array_equal(invert(example.inputs, example.targets, BYTES), tokens)
        hidden = np.sum(example.targets < 259) - 1
        assert hidden == max(round(length * 0.15), 1)
        at_the_edges += example.inputs[0] == BYTES.sentinel_id(0)
        at_the_edges += example.inputs[-2] < 259
    assert at_the_edges > 200, "a mask may begin with noise and end without"
    empty = objective(np.zeros(0, np.int32), rng=generator(0))
    assert empty.inputs.tolist() == empty.targets.tolist() == [1]


def test_what_iid_denoising_allows_fits_at_worst():
    (most,) = IidDenoising(BYTES).fit({"encoder": 64, "decoder": 21})
    assert most == 63
    apart = np.zeros(most, bool)
    apart[: 2 * round(0.15 * most) : 2] = True
    tokens = np.full(most, 5, np.int32)
    assert len(noise_after_sentinels(tokens, apart, 400)) + 1 <= 21
    (most,) = IidDenoising(BYTES).fit({"encoder": 64, "decoder": 11})
    assert round(0.15 * most) == 5
    with pytest.raises(InputError, match="needs 9 sentinels"):
        IidDenoising(ByteVocabulary(extra_ids=8)).fit({"encoder": 64, "decoder": 21})
    with pytest.raises(InputError, match=r"too short for i\.i\.d\."):
        IidDenoising(BYTES).fit({"encoder": 1, "decoder": 1})


def test_the_targets_of_any_mask_by_hand():
    tokens = np.array([5, 6, 7, 8, 9, 10, 11, 12], np.int32)
    mask = np.array([1, 0, 0, 1, 1, 0, 0, 0], bool)
    assert spans_to_sentinels(tokens, mask, 99).tolist() == [99, 6, 7, 98, 10, 11, 12]
    assert noise_after_sentinels(tokens, mask, 99).tolist() == [99, 5, 98, 8, 9]
    kept_first = np.array([0, 0, 0, 1, 1, 0, 0, 1], bool)
    assert noise_after_sentinels(tokens, kept_first, 99).tolist() == [99, 8, 9, 98, 12]


def test_input_errors():
    few = SpanCorruption(ByteVocabulary(extra_ids=3))
    with pytest.raises(InputError, match="needs 28 sentinels"):
        few.fit({"encoder": 512, "decoder": 114})
    with pytest.raises(InputError, match="sentinels"):
        few(np.full(568, 5, np.int32), rng=generator(0))
    with pytest.raises(InputError, match="set it to 114"):
        SpanCorruption(BYTES).fit({"encoder": 512, "decoder": 113})
    with pytest.raises(InputError, match="too short"):
        span_corruption_lengths(2)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="noise_density"):
            SpanCorruption(BYTES, noise_density=wrong)
    with pytest.raises(InputError, match="mean_span_length"):
        SpanCorruption(BYTES, mean_span_length=0.5)
