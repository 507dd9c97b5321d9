"""Continuous batching gives each request what it would get alone, whatever stands beside it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from t5x_lite import types
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.asking import Asking
from t5x_lite.decode.engine import Engine
from t5x_lite.decode.greedy import greedy
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.prompts import pad_left, pad_right
from t5x_lite.decode.requests import Request
from t5x_lite.decode.sampling import BeamSearch, Greedy, Sampling
from t5x_lite.models import transformer
from t5x_lite.peft import many
from t5x_lite.peft.lora import LoRA
from t5x_lite.sharding import MESH_AXES, Partitioner
from t5x_lite.types import InputError
from tests import common

NEW = 7


class OneDevice(Partitioner):
    """However many the tests have: slots and prompts are split elsewhere."""

    @functools.cached_property
    def mesh(self):
        return jax.make_mesh(
            (1, 1, 1), MESH_AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3
        )


@functools.cache
def load(name):
    model, params = common.build(common.T5 if name == "t5" else common.FAMILIES[name])
    return Loaded(model, params, ByteVocabulary(), OneDevice())


@functools.cache
def engine_of(name):
    """One for all tests: its programs take a while to compile."""
    return engine(load(name))


def engine(loaded, slots=3, **changes):
    arguments = {"slots": slots, "prompt_buckets": (4, 12), "capacity": 18} | changes
    return Engine(loaded, **arguments)


families = pytest.mark.parametrize("name", ["t5", "gpt2"])


def requests(count=7):
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(2, 96, 1 + 5 * (i % 2) + 2 * (i % 3)).astype(np.int32), 2 + i % 6)
        for i in range(count)
    ]


@functools.cache
def _greedy(model):
    return jax.jit(functools.partial(greedy, model, max_tokens=NEW, eos_id=1, pad_id=0))


def answers(name, asked):
    """The definition: `greedy` of padded rows, each up to and with eos."""
    model, params = load(name).model, load(name).params
    rows = [one.tokens for one in asked]
    if model.config.encoder is None:
        batch = pad_left(rows, 12)
    else:
        tokens, segments = pad_right(rows, 12)
        batch = {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
    made = np.asarray(_greedy(model)(params, batch)).tolist()
    cut = [row[: one.max_tokens] for row, one in zip(made, asked, strict=True)]
    return [row[: row.index(1) + 1] if 1 in row else row for row in cut]


@families
def test_more_requests_than_slots_get_what_each_gets_alone(name, compilations):
    asked = requests()
    expected = dict(enumerate(answers(name, asked)))
    made = engine_of(name)
    before = len(compilations)
    assert dict(made.run(asked)) == expected
    # Two buckets and the step; run again, nothing.
    assert len(compilations) - before == 3
    assert dict(made.run(asked)) == expected
    assert len(compilations) - before == 3
    assert made.pending == 0


@pytest.mark.slow
def test_several_steps_a_dispatch_change_nothing():
    made = engine(load("gpt2"), stride=4, prompt_buckets=(12,))
    assert dict(made.run(requests())) == dict(enumerate(answers("gpt2", requests())))


@pytest.mark.slow
def test_a_token_that_ends_texts_frees_its_slot():
    asked = requests(4)
    full = answers("t5", asked)
    ends = (full[1][0], full[3][1])
    loaded = dataclasses.replace(load("t5"), end_ids=ends)
    made = dict(engine(loaded, slots=1, prompt_buckets=(12,)).run(asked))
    for number, tokens in enumerate(full):
        ended = [place for place, token in enumerate(tokens) if token in ends][:1]
        assert made[number] == (tokens[: ended[0] + 1] if ended else tokens)


def test_draws_depend_on_the_request_alone():
    prompt = np.arange(22, 28, dtype=np.int32)  # its greedy answer is long and repeats itself
    drawn = [
        Request(prompt, NEW, Sampling(temperature=9.0, top_k=50), seed=3),
        Request(prompt, NEW, Sampling(temperature=9.0, top_k=50), seed=4),
        Request(prompt, NEW, Sampling(temperature=9.0, top_p=0.9), seed=3),
        Request(prompt, NEW, Greedy(repetition_penalty=3.0)),
        Request(prompt, NEW),
    ]
    made = engine_of("t5")
    together = dict(made.run(drawn))
    again = dict(made.run([*requests(2), *drawn[::-1]]))  # other slots, other neighbours
    assert [again[2 + i] for i in range(5)] == [together[4 - i] for i in range(5)]
    assert len({tuple(tokens) for tokens in together.values()}) == 5
    assert len(set(together[3])) == NEW  # a penalty that lets nothing come twice
    assert together[4] == answers("t5", drawn[4:])[0]


@families
def test_a_cancelled_request_is_silent_and_the_others_go_on(name):
    asked = requests(5)
    made = engine_of(name)
    ids = [made.submit(one) for one in asked]
    events = made.step()
    assert {event.id for event in events} == set(ids[:3])
    made.cancel(ids[0])  # running
    made.cancel(ids[3])  # waiting
    assert made.pending == 3 - sum(event.finished is not None for event in events[1:])
    while made.pending:
        events += made.step()
    heard = {id: [event.token for event in events if event.id == id] for id in ids}
    assert len(heard[ids[0]]) == 1
    assert not heard[ids[3]]
    expected = answers(name, asked)
    assert [heard[ids[i]] for i in (1, 2, 4)] == [expected[i] for i in (1, 2, 4)]
    assert made.step() == []


@pytest.mark.slow
def test_an_eight_bit_cache_writes_nearly_the_same():
    asked = requests()
    made = dict(engine(load("llama"), cache_dtype="int8", prompt_buckets=(12,)).run(asked))
    expected = answers("llama", asked)
    assert {number: len(tokens) for number, tokens in made.items()} == {
        number: len(tokens) for number, tokens in enumerate(expected)
    }
    same = [made[number][0] == tokens[0] for number, tokens in enumerate(expected)]
    assert sum(same) >= len(same) - 1


@pytest.mark.slow
def test_a_prefix_is_seen_in_both_directions():
    loaded = dataclasses.replace(load("llama"), asking=Asking("prefix"))
    prompt = np.arange(5, 14, dtype=np.int32)
    batch = {
        types.DECODER_INPUT_TOKENS: prompt[None],
        types.DECODER_PREFIX: np.ones((1, 9), np.int32),
    }
    expected = np.asarray(_greedy(loaded.model)(loaded.params, batch))[0].tolist()
    made = engine(loaded, slots=1, prompt_buckets=(12,))
    assert dict(made.run([Request(prompt, NEW)]))[0] == expected
    assert expected != answers("llama", [Request(prompt, NEW)])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots=0"),
        ({"prompt_buckets": ()}, "prompt_buckets"),
        ({"prompt_buckets": (4, 19)}, "capacity=18 holds no prompt of 19"),
        ({"capacity": 33}, "32 positions"),
        ({"cache_dtype": "int4"}, "int4"),
    ],
)
def test_what_an_engine_cant_be_is_said_at_once(changes, message):
    with pytest.raises(InputError, match=message):
        engine(load("gpt2"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros(0, np.int32)}, "one or more"),
        ({"tokens": np.zeros(13, np.int32)}, "longer than 12"),
        ({"tokens": np.array([96])}, "outside"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 99}, "capacity"),
        ({"strategy": BeamSearch()}, "BeamSearch"),
    ],
)
def test_a_request_that_doesnt_fit_is_refused(changes, message):
    made = engine_of("gpt2")
    with pytest.raises(InputError, match=message):
        made.submit(Request(**({"tokens": np.array([5]), "max_tokens": 3} | changes)))
    assert made.pending == 0


@pytest.fixture(scope="module")
def compilations():
    """A list that grows with every program that XLA compiles."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_slots_of_one_engine_go_through_adapters_of_their_own(compilations):
    loaded = load("gpt2")
    names = transformer.axes(loaded.model)
    adapted, merged = [], []
    for number, lora in enumerate((LoRA(rank=1), LoRA(rank=2, targets=(".*/wo/kernel",)))):
        tree = lora.split(loaded.params, names, jax.random.key(number))[0]
        tree = jax.tree.map(lambda x: x + 0.4, tree)
        adapted.append(lora.apply(tree, loaded.params))
        merged.append(lora.merge(tree, loaded.params))
    params = many.together(loaded.params, adapted, np.array([many.NONE]))
    made = engine(dataclasses.replace(loaded, params=params))
    asked = [
        dataclasses.replace(one, adapter=i % 3 - 1, max_tokens=6)
        for i, one in enumerate(requests())
    ]
    found = dict(made.run(asked))
    before = len(compilations)
    again = dict(made.run(reversed(asked)))
    assert again == {len(asked) - 1 - number: text for number, text in found.items()}
    assert len(compilations) == before  # whichever adapters meet
    texts = {}
    for number, one in enumerate((loaded.params, *merged)):
        batch = pad_left([one.tokens for one in asked], 12)
        texts[number - 1] = np.asarray(_greedy(loaded.model)(one, batch)).tolist()
    for number, one in enumerate(asked):
        row = texts[one.adapter][number][:6]
        assert found[number] == (row[: row.index(1) + 1] if 1 in row else row)
    assert texts[-1] != texts[0] != texts[1]
    with pytest.raises(InputError, match=r"Request.adapter=2: the engine's parameters hold 2 ada"):
        made.submit(dataclasses.replace(asked[0], adapter=2))
