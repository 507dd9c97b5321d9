"""What is written behind prompts: the model's own tokens, whatever shares a batch, up to a stop."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.sampling import Sampling
from t5x_lite.evaluation import generation
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests import common

BYTES = ByteVocabulary(extra_ids=0)
PROMPTS = ["a red ", "it", "the fox is", "a", "so", "we went", "x", "on", "at", "no more"]


@functools.cache
def loaded() -> Loaded:
    config = dataclasses.replace(common.FAMILIES["gpt2"], vocab_size=BYTES.size)
    model, params = common.build(common.with_stacks(config, num_layers=1))
    return Loaded(model, params, BYTES, Partitioner())


def test_greedy_texts_are_the_models_most_probable_tokens():
    """Two batches, of which the second is not full; each prompt by itself through the model."""
    of = loaded()
    ids = [np.concatenate([[BYTES.start_id], BYTES.encode(text)]) for text in PROMPTS]
    found = generation.write_tokens(of, ids, max_tokens=3, batch_size=8)
    logits = jax.jit(lambda batch: of.model.apply({"params": of.params}, batch))
    for prompt, tokens in zip(ids, found, strict=True):
        row = prompt.tolist()
        for token in tokens:
            padded = np.array([(row + [0] * 32)[:32]], np.int32)
            best = np.argmax(logits({types.DECODER_INPUT_TOKENS: padded})[0, len(row) - 1])
            assert token == best
            row.append(int(token))
            if token == BYTES.eos_id:
                break


def test_a_draw_depends_on_the_seed_and_the_prompts_number_alone():
    draw = functools.partial(
        generation.write, loaded(), max_tokens=3, strategy=Sampling(), batch_size=8
    )
    texts = draw(PROMPTS)
    # Other prompts of other lengths beside them, and in another batch.
    assert draw([*PROMPTS[:2], "longer than any of them"])[:2] == texts[:2]
    assert len(set(draw(["a"] * 10))) > 3
    assert draw(PROMPTS[:2], seed=1) != texts[:2]


def test_texts_end_before_the_first_stop():
    assert generation.cut("one\ntwo. three", (".", "\n")) == "one"
    assert generation.cut("one two", (".", "")) == "one two"
    assert generation.cut("\n", ("\n",)) == ""


def test_prompts_leave_room_for_what_is_written():
    with pytest.raises(InputError, match="31 tokens and 5 to write are more than the 32 positions"):
        generation.write(loaded(), ["a" * 30], max_tokens=5)
    with pytest.raises(InputError, match="max_tokens=0"):
        generation.write(loaded(), ["a"], max_tokens=0, batch_size=8)
