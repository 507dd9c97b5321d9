"""What holds of every objective: same key, same example; what fit allows fits; legal layouts."""

import dataclasses
import functools
import pickle

import numpy as np
import pytest

from t5x_lite.data.examples import keyed_rng
from t5x_lite.data.layouts import as_decoder, as_encoder, as_encoder_decoder, as_prefix_lm
from t5x_lite.data.objectives import (
    BART,
    UL2,
    CausalLM,
    DocumentRotation,
    FillInTheMiddle,
    IidDenoising,
    MaskedLM,
    MaskSpans,
    MaskWholeWords,
    NextSentencePairs,
    PrefixLM,
    SpanCorruption,
    TextToText,
    TokenDeletion,
)
from t5x_lite.data.packing import Pack, Pad
from t5x_lite.data.sources import TextSource
from t5x_lite.data.tasks import Task
from t5x_lite.types import InputError, check_batch
from tests.data.toy import BERT, GPT, LLAMA, T5, text

OBJECTIVES = {
    "masked": MaskedLM(BERT),
    "masked words": MaskedLM(BERT, selection=MaskWholeWords()),
    "masked spans": MaskedLM(BERT, selection=MaskSpans()),
    "pairs": NextSentencePairs(BERT),
    "causal": CausalLM(GPT),
    "fill in the middle": FillInTheMiddle(LLAMA),
    "prefix": PrefixLM(T5),
    "prefix, Llama": PrefixLM(LLAMA),
    "text to text": TextToText(T5),
    "text to text, BART": TextToText(BERT),
    "span corruption": SpanCorruption(T5),
    "i.i.d.": IidDenoising(T5),
    "UL2": UL2(T5),
    "BART": BART(BERT),
    "BART, others": BART(BERT, noises=(DocumentRotation(), TokenDeletion(BERT))),
}
LENGTHS = {
    as_encoder: {"encoder": 48, "masked": 9},
    as_encoder_decoder: {"encoder": 48, "decoder": 40},
    as_decoder: {"decoder": 80},
    as_prefix_lm: {"decoder": 80},
}
RANDOM = [name for name in OBJECTIVES if name[:6] not in ("causal", "text t")]
LEGAL = {
    as_encoder: {"masked", "masked words", "masked spans", "pairs"},
    as_encoder_decoder: {*list(OBJECTIVES)[6:]},
    as_prefix_lm: {*list(OBJECTIVES)[6:]},
    as_decoder: {*list(OBJECTIVES)[4:]},
}


def task(name: str, layout) -> Task:
    objective = OBJECTIVES[name]
    return Task(
        name="t",
        source=TextSource({"train": "x"}),
        vocabulary=objective.vocabulary,
        objective=objective,
        lengths=LENGTHS[layout],
        layout=layout,
    )


PAIRS = [(name, layout) for layout, names in LEGAL.items() for name in sorted(names)]
ids = lambda value: getattr(value, "__name__", value)


def streams(one: Task, index: int, seed: int = 0, longest: bool = False):
    """Example `index`, of texts as long as they may be, or shorter."""
    rng = np.random.default_rng(index)
    tokens = [
        text(limit if longest else int(rng.integers(0, limit + 1)), index + 100 * k)
        for k, limit in enumerate(one.limits)
    ]
    return one.streams(tokens, keyed_rng(seed, index))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", LENGTHS, ids=ids)
def test_only_legal_pairs_are_built(name, layout):
    if name in LEGAL[layout]:
        assert task(name, layout).limits
    else:
        with pytest.raises(InputError, match=f"layout {layout.__name__} needs .* makes"):
            task(name, layout)


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=ids)
def test_the_same_key_makes_the_same_example(name, layout):
    one = task(name, layout)
    copied = pickle.loads(pickle.dumps(one))
    assert copied == one
    tokens = [text(limit) for limit in one.limits]

    def make(built: Task, seed: int, index: int) -> dict[str, list]:
        made = built.streams(tokens, keyed_rng(seed, index))
        return {key: value.tolist() for key, value in made.items()}

    first = make(one, 3, 7)
    assert make(copied, 3, 7) == first
    # UL2's S denoiser draws nothing: one other key alone may agree.
    assert all(make(one, 3, index) == first for index in (8, 9, 10, 11)) == (name not in RANDOM)
    assert all(make(one, seed, 7) == first for seed in (4, 5, 6, 7)) == (name not in RANDOM)
    assert [t.tolist() for t in tokens] == [text(limit).tolist() for limit in one.limits]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=ids)
def test_whatever_fits_makes_sound_rows(name, layout):
    one = task(name, layout)
    examples = [streams(one, i, longest=i % 3 == 0) for i in range(60)]
    examples += [streams(one, i, longest=True) for i in range(60, 90)]
    rows = Pad()(examples, one.lengths).rows
    check_batch(rows, one.vocabulary.size)
    for stream in set(one.lengths) - {"masked"}:
        used = rows[f"{stream}_segment_ids"].sum(axis=1).max()
        assert used <= one.lengths[stream]
    if not getattr(one.objective, "one_a_row", False):
        check_batch(Pack(90, 60)(examples, one.lengths).rows, one.vocabulary.size)


@pytest.mark.parametrize(
    "name", ["masked", "masked words", "masked spans", "BART", "BART, others", "pairs"]
)
def test_document_ends_inside_a_text_stay(name):
    objective = OBJECTIVES[name]
    added = 2 if name == "pairs" else 1
    for index in range(100):
        tokens = text(44, index, specials=4)
        given = [tokens, text(44, index + 100)][: len(objective.features)]
        example = objective(*given, rng=keyed_rng(0, index))
        if name == "pairs" and example.masked_targets[0]:
            continue
        assert np.sum(example.inputs == 3) == 4 + added
        if name.startswith("masked"):
            np.testing.assert_array_equal(example.inputs[1:-1] == 3, tokens == 3)


def test_objectives_are_values():
    for name, objective in OBJECTIVES.items():
        assert dataclasses.replace(objective) == objective
        assert hash(objective) == hash(dataclasses.replace(objective)), name
    assert functools.reduce(set.union, LEGAL.values()) == set(OBJECTIVES)
