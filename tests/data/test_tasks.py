"""Tasks and mixtures: what is refused when built, and the arithmetic of rates."""

import collections
import pickle
from fractions import Fraction

import numpy as np
import pytest

from t5x_lite.data.layouts import as_encoder_decoder, layout
from t5x_lite.data.objectives import SpanCorruption, TextToText
from t5x_lite.data.preprocessors import Prefix, Rename
from t5x_lite.data.rates import Capped, Proportional, Temperature, assign, whole_ratio
from t5x_lite.data.sources import TextSource
from t5x_lite.data.tasks import Chunks, Mixture, Task
from t5x_lite.data.text_formats import TextSquad
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError

BYTES = ByteVocabulary()


def task(**changes) -> Task:
    settings = {
        "name": "t",
        "source": TextSource({"train": "x"}),
        "vocabulary": BYTES,
        "objective": SpanCorruption(BYTES),
        "lengths": {"encoder": 64, "decoder": 32},
    }
    return Task(**{**settings, **changes})


def test_a_task_makes_streams():
    one = task(
        objective=TextToText(BYTES),
        lengths={"encoder": 6, "decoder": 3},
        preprocessors=[Rename({"inputs": "a", "targets": "b"}), Prefix("> ")],
    )
    record = one.record({"a": "abcdef", "b": "xy", "c": "kept"})
    assert record == {"c": "kept", "inputs": "> abcdef", "targets": "xy"}
    streams = one.streams(one.tokens(record), np.random.default_rng(0))
    assert BYTES.decode(streams["encoder_input_tokens"]) == "> abc", "cut, with room for eos"
    assert streams["encoder_input_tokens"][-1] == 1
    assert BYTES.decode(streams["decoder_target_tokens"]) == "xy"
    assert one.fingerprint == BYTES.fingerprint
    assert pickle.loads(pickle.dumps(one)) == one


def test_records_of_tokens_skip_the_vocabulary():
    assert task().tokens({"tokens": np.array([7, 8], np.uint16)})[0].dtype == np.int32


@layout(needs=("prefix",), streams=("encoder", "decoder"))
def needs_a_prefix(example, lengths):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": needs_a_prefix}, "needs prefix, but SpanCorruption makes inputs, targets"),
        ({"layout": len}, "is not a layout"),
        ({"lengths": {"encoder": 64}}, "needs exactly encoder, decoder"),
        ({"lengths": {"encoder": 64, "decoder": 0}}, r"\['decoder'\] is 0; expected a positive"),
        ({"lengths": {"encoder": 64, "decoder": 8}}, "task 't': .*set it to"),
        ({"lengths": {"encoder": 2, "decoder": 8}}, "too short"),
        ({"vocabulary": ByteVocabulary(7)}, "another vocabulary"),
        (
            {"vocabulary": ByteVocabulary(1), "objective": SpanCorruption(ByteVocabulary(1))},
            "sentinels",
        ),
        ({"objective": TextToText(BYTES), "chunk": Chunks()}, "inputs and targets: set chunk=None"),
    ],
)
def test_bad_tasks_are_refused_when_built(changes, message):
    with pytest.raises(InputError, match=message):
        task(**changes)


def test_bad_records_are_named():
    with pytest.raises(
        InputError, match=r"the text field 'text', but the record has line: .*Rename"
    ):
        task().tokens({"line": "a"})
    with pytest.raises(InputError, match="reads the field 'inputs', but the record has text"):
        task(preprocessors=[Prefix("a")]).record({"text": "a"})
    with pytest.raises(
        InputError, match=r"task 'a': TextSquad\(\) can't take the record, whose fields are answers"
    ):
        task(name="a", preprocessors=[TextSquad()]).record({"answers": ["x"]})
    with pytest.raises(InputError, match="returned NoneType"):
        task(preprocessors=[lambda record: None]).record({"text": "a"})
    with pytest.raises(InputError, match="the splits are: train"):
        task().open("test")
    with pytest.raises(InputError, match="Chunks"):
        Chunks(window=0)


def test_bad_mixtures_are_refused():
    with pytest.raises(InputError, match="no tasks"):
        Mixture(name="m", tasks=[])
    with pytest.raises(InputError, match="name"):
        Mixture(name="m", tasks=[task(), task()])
    with pytest.raises(InputError, match="two tasks of one name"):
        Mixture(name="m", tasks=[task(), task(name="b"), task(name="b")])
    with pytest.raises(InputError, match="lengths"):
        Mixture(name="m", tasks=[task(), task(name="b", lengths={"encoder": 64, "decoder": 33})])
    other = ByteVocabulary(50)
    with pytest.raises(InputError, match="vocabulary"):
        Mixture(
            name="m",
            tasks=[task(), task(name="b", vocabulary=other, objective=SpanCorruption(other))],
        )
    for rates in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(InputError, match="one positive rate a task"):
            Mixture(name="m", tasks=[task(), task(name="b")], rates=rates)


def test_rates():
    assert Proportional()([10, 30]) == [10, 30]
    assert Capped(20)([10, 30]) == [10, 20]
    assert [float(r) for r in Temperature(2.0)([100, 400])] == [0.5, 1.0]
    assert [float(r) for r in Temperature(2.0, limit=100)([100, 400])] == [1.0, 1.0]
    assert whole_ratio([Fraction(1, 2), Fraction(1, 3)]) == (3, 2)
    mixture = Mixture(name="m", tasks=[task(), task(name="b")], rates=[0.7, 0.3])
    assert mixture.weights([5, 5]) == (7, 3)


@pytest.mark.parametrize("weights", [(1, 2), (7, 3), (1,), (5, 1, 1, 93), (2, 3, 5), (10**9, 1)])
def test_assignment_is_exact_gapless_and_never_far_off(weights):
    seen = collections.Counter()
    for index in range(3000):
        which, before = assign(index, weights)
        assert before == seen[which], "each task's examples come in order, none skipped"
        seen[which] += 1
        for k, weight in enumerate(weights):
            assert abs(seen[k] - (index + 1) * weight / sum(weights)) <= k + 1
    period = sum(weights)
    if period <= 100:
        counts = collections.Counter(assign(i, weights)[0] for i in range(7 * period))
        assert [counts[k] for k in range(len(weights))] == [7 * w for w in weights]


def test_the_layout_survives_a_wrapper_such_as_gins():
    import functools

    @functools.wraps(as_encoder_decoder)
    def wrapper(*args):
        return as_encoder_decoder(*args)

    assert task(layout=wrapper).layout is as_encoder_decoder
