"""A score is the sum of the model's own log-probabilities, however rows are batched or cached."""

from __future__ import annotations

import dataclasses
import functools
from itertools import chain

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.layouts import as_decoder, as_prefix_lm
from t5x_lite.data.objectives import TextToText
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode import scoring
from t5x_lite.decode.asking import Asking
from t5x_lite.decode.choices import choices, score_alternatives, score_choices
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.scoring import Item
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests import common

BYTES = ByteVocabulary()
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PAIRS = [
    ("a red ", "fox"),
    ("the longer one", " goes on so"),
    ("", "b"),
    ("x", "y z"),
    ("a red ", "dog"),
]


@functools.cache
def loaded(name: str) -> Loaded:
    config = dataclasses.replace(common.FAMILIES[name], vocab_size=BYTES.size)
    model, params = common.build(common.with_stacks(config, num_layers=1))
    return Loaded(model, params, BYTES, Partitioner())


@functools.cache
def logits_of(name: str):
    """The training call on one row, padded where a causal decoder can't see it: one program."""
    of = loaded(name)

    @jax.jit
    def apply(batch):
        return of.model.apply({"params": of.params}, batch)

    def logits(row: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        batch = {types.DECODER_INPUT_TOKENS: np.resize(row, (1, 32)).astype(np.int32)}
        if context is not None:
            tokens, real = scoring.padded([context], 1, 32)
            batch |= {types.ENCODER_INPUT_TOKENS: tokens}
            batch |= {types.ENCODER_SEGMENT_IDS: real.astype(np.int32)}
            batch |= {types.DECODER_SEGMENT_IDS: np.ones((1, 32), np.int32)}
        return np.asarray(apply(batch)[0, : len(row)], np.float64)

    return logits


def reference(name: str, item: Item) -> tuple[float, bool]:
    """One item by itself, by numpy, from the logits of the training call."""
    if loaded(name).model.config.encoder is None:
        row = np.concatenate([item.context, item.continuation[:-1]])
        logits = logits_of(name)(row)[len(item.context) - 1 :]
    else:
        row = np.concatenate([[BYTES.start_id], item.continuation[:-1]])
        logits = logits_of(name)(row, item.context)
    places = np.arange(len(item.continuation))
    shares = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    best = np.argmax(logits, axis=1) == item.continuation
    return float(np.sum(shares[places, item.continuation])), bool(best.all())


@pytest.mark.parametrize("name", ["gpt2", slow("bart")])
def test_scores_are_sums_of_the_models_log_probabilities(name):
    """Whatever else is in the batch, in buckets of lengths, in the order of the pairs."""
    of = loaded(name)
    scores = scoring.loglikelihood(of, PAIRS, batch_size=8)
    for pair, score in zip(PAIRS, scores, strict=True):
        item = scoring.encode_pair(of.model.config, BYTES, *pair)
        logprob, greedy = reference(name, item)
        np.testing.assert_allclose(score.logprob, logprob, rtol=1e-5, atol=1e-4)
        assert (score.tokens, score.greedy) == (len(item.continuation), greedy)


def test_batches_that_are_not_full_change_nothing():
    of = loaded("gpt2")
    whole = scoring.loglikelihood(of, [*PAIRS, *PAIRS], batch_size=8)
    assert [score.tokens for score in whole[:5]] == [4, 11, 1, 3, 4]
    for score, again in zip(whole[:5], whole[5:], strict=True):
        np.testing.assert_allclose(score.logprob, again.logprob, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", *map(slow, ("gpt2", "t5_1_0"))])
def test_one_cache_scores_every_choice_as_rows_of_their_own(name):
    """Unequal prompts, and unequal numbers of choices of unequal lengths."""
    of = loaded(name)
    questions = [
        ("a red ", ["fox", "dog", "house"]),
        ("it", [" is", "s"]),
        ("", ["b", "cd", "e", "f g"]),
    ]
    found = choices(of, questions, batch_size=8)
    pairs = [(prompt, text) for prompt, texts in questions for text in texts]
    apart = scoring.loglikelihood(of, pairs, batch_size=16)
    assert [len(scores) for scores in found] == [3, 2, 4]
    for score, expected in zip(chain(*found), apart, strict=True):
        np.testing.assert_allclose(score.logprob, expected.logprob, rtol=1e-5, atol=1e-4)
        assert (score.tokens, score.greedy) == (expected.tokens, expected.greedy)


def test_the_prompt_is_read_once(monkeypatch):
    """What the model sees: the prompt's tokens in one call, and those of one choice in another."""
    of = loaded("gpt2")
    prompts = {types.DECODER_INPUT_TOKENS: np.ones((2, 7), np.int32)}
    targets = np.ones((2, 5, 3), np.int32)
    seen = []
    embed = type(of.model)._embed

    def watched(self, tokens):
        seen.append(tokens.shape)
        return embed(self, tokens)

    monkeypatch.setattr(type(of.model), "_embed", watched)
    jax.eval_shape(
        functools.partial(score_choices, of.model), of.params, prompts, targets, targets > 0
    )
    assert set(seen) == {(2, 7), (2, 2)}  # the last token of a choice predicts nothing


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "layout"), [("wrapped", as_decoder), ("prefix", as_prefix_lm)])
def test_a_decoder_that_answers_is_scored_as_its_layout_trains_it(prompt, layout):
    of = dataclasses.replace(loaded("gpt2"), asking=Asking(prompt=prompt))
    made = TextToText(BYTES)(BYTES.encode("a red "), BYTES.encode("fox"))
    batch = {key: value[None] for key, value in layout(made, {"decoder": 32}).items()}
    score_rows = jax.jit(functools.partial(scoring.score_rows, of.model))
    logprob, tokens, greedy = score_rows(of.params, batch)
    expected = pytest.approx(float(logprob[0]), rel=1e-5)
    (score,) = scoring.loglikelihood(of, [("a red ", "fox")], batch_size=8)
    ((choice, _),) = choices(of, [("a red ", ["fox", "dog"])], batch_size=8)
    for found in (score, choice):
        assert found == scoring.Score(expected, int(tokens[0]), bool(greedy[0]))


def test_greedy_is_what_argmax_would_write():
    """Fed with its own most probable tokens a row is greedy, and with one other token it isn't."""
    of = loaded("gpt2")
    context = np.array([0, 40, 41], np.int32)
    written: list[int] = []
    for _ in range(4):
        row = np.concatenate([context, written]).astype(np.int32)
        written.append(int(np.argmax(logits_of("gpt2")(row)[-1])))
    other = [*written[:2], (written[2] + 1) % BYTES.size, written[3]]
    items = [Item(context, np.array(ids, np.int32)) for ids in (written, other)]
    assert [score.greedy for score in scoring.score_items(of, items, batch_size=8)] == [True, False]


@pytest.mark.parametrize(("length", "overlap"), [(3, 1), (5, 3), (4, 4), (50, 1), (7, 1)])
def test_windows_continue_every_token_once_behind_what_stands_before_it(length, overlap):
    tokens = np.arange(10, 17)
    row = [0, *tokens]
    done = 1
    for item in scoring.windows(tokens, 0, length, overlap):
        end = done + len(item.continuation)
        assert len(item.context) + len(item.continuation) - 1 <= length
        assert item.continuation.tolist() == row[done:end]
        assert item.context.tolist() == row[done - len(item.context) : done]
        assert len(item.context) >= min(overlap, done)
        done = end
    assert done == len(row)


def test_a_document_is_the_sum_of_its_windows_and_one_that_fits_is_exact():
    of = loaded("gpt2")
    text = "a document that is longer than a row"
    ids = BYTES.encode(text)
    short, cut, none = scoring.rolling_loglikelihood(
        of, [text[:20], text, ""], length=20, overlap=4, batch_size=8
    )
    exact, _ = reference("gpt2", Item(np.array([BYTES.start_id]), ids[:20]))
    np.testing.assert_allclose(short.logprob, exact, rtol=1e-5)
    parts = scoring.windows(ids, BYTES.start_id, 20, 4)
    assert len(parts) == 2
    np.testing.assert_allclose(cut.logprob, sum(reference("gpt2", i)[0] for i in parts), rtol=1e-5)
    assert (cut.tokens, none) == (len(ids), scoring.Score(0, 0, True))


def test_spaces_at_the_seam_belong_to_the_continuation():
    config = loaded("gpt2").model.config
    item = scoring.encode_pair(config, BYTES, "to be ", "or")
    assert BYTES.decode(item.continuation) == " or"
    assert item.context.tolist() == [BYTES.start_id, *BYTES.encode("to be")]


def test_what_cannot_be_scored_is_said_before_compiling():
    of = loaded("gpt2")
    with pytest.raises(InputError, match="no token"):
        scoring.loglikelihood(of, [("a", "")], batch_size=8)
    with pytest.raises(InputError, match=r"a row of 43 tokens .* 32 positions"):
        scoring.loglikelihood(of, [("a" * 40, "bcd")], batch_size=8)
    with pytest.raises(InputError, match="no choices"):
        choices(of, [("a", [])])
    both = dataclasses.replace(of, model=type(of.model)(common.T5))
    with pytest.raises(InputError, match="decoder alone"):
        scoring.rolling_loglikelihood(both, ["a"], length=8)
    with pytest.raises(InputError, match="overlap=9"):
        scoring.windows(np.arange(3), 0, 8, 9)
    bert = dataclasses.replace(common.BERT, vocab_size=BYTES.size)
    model = dataclasses.replace(of, model=type(of.model)(bert))
    with pytest.raises(InputError, match="encoder alone"):
        scoring.loglikelihood(model, [], batch_size=8)


def test_questions_share_a_batch_only_where_all_of_them_fit():
    """A row holds the batch's longest context and behind it the longest choice of any question."""
    one = loaded("gpt2")
    sizes = ((20, 2), (6, 26), (30, 3), (3, 3))  # of 32 positions
    questions = [
        [Item(np.full(context, 9, np.int32), np.full(written, 10 + c, np.int32)) for c in range(2)]
        for context, written in sizes
    ]
    found = score_alternatives(one, questions, batch_size=8)
    for question, scores in zip(questions, found, strict=True):
        alone = scoring.score_items(one, question, batch_size=8)
        np.testing.assert_allclose(
            [s.logprob for s in scores], [s.logprob for s in alone], rtol=1e-4
        )
