"""Labels of texts and words, and answers inside texts: places, cuts, and the way back."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data import inspection
from t5x_lite.data.layouts import as_encoder
from t5x_lite.data.objectives import Classify, Regress, SpanAnswer, Tag, encode_words
from t5x_lite.data.packing import Pack, Pad
from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.data.sources import JsonlSource
from t5x_lite.data.tasks import Chunks, Mixture, Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.types import InputError, check_batch
from tests.data.toy import BERT, T5

MOODS = ("bad", "good")
KINDS = ("O", "B-x", "I-x")
ROBERTA = Classify(vocabulary=BERT, features=("text", "other"), between=2, labels=MOODS)


def task(objective, encoder=16, masked=1, records=None, tmp_path=None, **settings) -> Task:
    files = {"train": "none"}
    if records is not None:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"train": str(path), "test": str(path)}
    return Task(
        name="t",
        source=JsonlSource(files),
        vocabulary=objective.vocabulary,
        objective=objective,
        layout=as_encoder,
        lengths={"encoder": encoder, "masked": masked},
        **settings,
    )


def streams(one: Task, record) -> dict[str, list]:
    made = one.streams(one.tokens(record), np.random.default_rng(0))
    return {key: value.tolist() for key, value in made.items()}


def some_words(rng, count: int) -> list[str]:
    """Words of one to three tokens."""
    return [" ".join(map(str, rng.integers(10, 90, rng.integers(1, 4)))) for _ in range(count)]


def test_a_text_is_asked_for_its_label_at_bos():
    one = task(Classify(vocabulary=BERT, labels=MOODS))
    expected = {
        types.ENCODER_INPUT_TOKENS: [2, 15, 16, 3],
        types.MASKED_POSITIONS: [0],
        types.MASKED_TARGET_TOKENS: [1],
        types.MASKED_LOSS_WEIGHTS: [1.0],
    }
    assert streams(one, {"text": "15 16", "label": 1}) == expected
    assert streams(one, {"text": "15 16", "label": "good"}) == expected
    assert one.labels == MOODS
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_pair_has_token_types():
    pair = Classify(vocabulary=BERT, features=("text", "other"), labels=MOODS)
    made = streams(task(pair), {"text": "15 16", "other": "18", "label": 0})
    assert made[types.ENCODER_INPUT_TOKENS] == [2, 15, 16, 3, 18, 3]
    assert made[types.ENCODER_TOKEN_TYPES] == [0, 0, 0, 0, 1, 1]
    made = streams(task(ROBERTA), {"text": "15 16", "other": "18", "label": 0})
    assert made[types.ENCODER_INPUT_TOKENS] == [2, 15, 16, 3, 3, 18, 3]
    assert types.ENCODER_TOKEN_TYPES not in made
    t5 = Classify(vocabulary=T5, features=("text", "other"), labels=MOODS)
    made = streams(task(t5), {"text": "15 16", "other": "18", "label": 0})
    assert made[types.ENCODER_INPUT_TOKENS] == [15, 16, 3, 18, 3]
    assert made[types.ENCODER_TOKEN_TYPES] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("room", [2, 5, 8])
def test_pairs_are_cut_as_bert_cuts_them(room):
    """Token by token from the longer text, from the second of two alike."""
    pair = Classify(vocabulary=BERT, features=("text", "other"), labels=MOODS)
    lengths = {"encoder": room + 3, "masked": 1}
    for first in range(8):
        for second in range(8):
            a, b = list(range(first)), list(range(second))
            while len(a) + len(b) > room:
                (a if len(a) > len(b) else b).pop()
            arrays = [np.arange(first), np.arange(second), np.zeros(1)]
            kept = pair.cut(arrays, lengths)
            assert [len(kept[0]), len(kept[1])] == [len(a), len(b)]


def test_a_number_is_a_float_target():
    one = task(Regress(vocabulary=BERT, label="score"))
    made = one.streams(one.tokens({"text": "15", "score": 3.5}), np.random.default_rng(0))
    assert made[types.MASKED_TARGET_VALUES].dtype == np.float32
    assert made[types.MASKED_TARGET_VALUES].tolist() == [3.5]
    assert types.MASKED_TARGET_TOKENS not in made
    assert one.objective.answer({}, np.array([[2.5]])) == 2.5
    for bad in (None, "high", float("nan"), True):
        with pytest.raises(InputError, match="needs a number in the field 'score'"):
            one.tokens({"text": "15", "score": bad})


def test_each_word_is_asked_at_its_first_token():
    one = task(Tag(vocabulary=BERT, labels=KINDS), masked=5)
    record = {"tokens": ["15", "18 19", "", "21"], "tags": ["O", 1, "I-x", "O"]}
    made = streams(one, record)
    assert made[types.ENCODER_INPUT_TOKENS] == [2, 15, 18, 19, 1, 21, 3]  # 1: unk
    assert made[types.MASKED_POSITIONS] == [1, 2, 4, 5]
    assert made[types.MASKED_TARGET_TOKENS] == [0, 1, 2, 0]


@pytest.mark.parametrize("vocabulary", [BERT, T5, ByteVocabulary()], ids=["bert", "t5", "bytes"])
def test_labels_come_back_from_the_slots(vocabulary):
    """Alignment inverted: perfect scores at the slots name every word's own label."""
    rng = np.random.default_rng(0)
    for length in range(1, 12):
        words = [
            " ".join(map(str, rng.integers(10, 90, rng.integers(1, 4)))) for _ in range(length)
        ]
        tags = [KINDS[i] for i in rng.integers(0, 3, length)]
        record = {"tokens": words, "tags": tags}
        one = task(Tag(vocabulary=vocabulary, labels=KINDS), encoder=200, masked=20)
        made = streams(one, record)
        tokens, places = made[types.ENCODER_INPUT_TOKENS], made[types.MASKED_POSITIONS]
        text = [*places, len(tokens) - 1]
        for word, first, last in zip(words, text[:-1], text[1:], strict=True):
            assert vocabulary.decode(tokens[first:last]).strip() == word
        scores = np.eye(3)[made[types.MASKED_TARGET_TOKENS]]
        assert one.objective.answer(record, scores) == tags == one.objective.truth(record)


def test_words_that_do_not_fit_are_outside():
    record = {"tokens": ["15", "18 19", "21", "24"], "tags": [1, 1, 1, 1]}
    for encoder, masked, asked in ((5, 9, 2), (16, 3, 3), (4, 9, 2)):
        one = task(Tag(vocabulary=BERT, labels=KINDS), encoder, masked)
        made = streams(one, record)
        assert len(made[types.MASKED_POSITIONS]) == asked
        answer = one.objective.answer(record, np.eye(3)[made[types.MASKED_TARGET_TOKENS]])
        assert answer == ["B-x"] * asked + ["O"] * (4 - asked)


def test_byte_level_words_have_their_space_before_them():
    tokens, starts = encode_words(["ab", "c"], ByteVocabulary())
    assert ByteVocabulary().decode(tokens) == "ab c"
    assert starts.tolist() == [0, 2]


CONTEXT = "The old oak, they say, is 300 years old."
ORACLE = {"question": "How old?", "context": CONTEXT}


def answered(text: str, at: int | None = None) -> dict:
    at = CONTEXT.index(text) if at is None else at
    return {**ORACLE, "answers": {"text": [text], "answer_start": [at]}}


def test_answers_come_back_from_their_span():
    one = task(SpanAnswer(vocabulary=ByteVocabulary(), max_question=20), encoder=99, masked=64)
    for text in ("The", "old oak", "300 years", "old.", CONTEXT):
        record = answered(text)
        made = streams(one, record)
        bits = np.array(made[types.MASKED_TARGET_SPANS])
        scores = np.stack([bits & 1, bits >> 1], axis=-1).astype(np.float32)
        scores[0] = -1
        # The question's bytes are no candidates; the first slot stands for no answer.
        assert made[types.MASKED_POSITIONS][:2] == [0, 9]
        long = SpanAnswer(vocabulary=ByteVocabulary(), max_answer=64)
        assert long.answer(record, scores) == text
    assert one.objective.truth(answered("old oak")) == ["old oak"]


def test_an_answer_takes_in_the_words_that_it_touches():
    one = SpanAnswer(vocabulary=ByteVocabulary())
    _, context, answer = one.read(answered("ak, th"))
    assert ByteVocabulary().decode(context[answer[0] : answer[1] + 1]).strip() == "oak, they"


def test_missing_answers_stand_at_the_first_token():
    vocabulary = ByteVocabulary()
    one = task(SpanAnswer(vocabulary=vocabulary, max_question=20), encoder=40, masked=64)
    nothing = {**ORACLE, "answers": {"text": [], "answer_start": []}}
    for record in (nothing, answered("old.")):  # the second is cut off
        made = streams(one, record)
        assert len(made[types.ENCODER_INPUT_TOKENS]) == 40
        assert made[types.MASKED_TARGET_SPANS][0] == 3
        assert not any(made[types.MASKED_TARGET_SPANS][1:])
    assert one.objective.truth(nothing) == [""]
    scores = np.zeros((6, 2))
    scores[0] = 1.0
    assert one.objective.answer(answered("The"), scores) == "The"
    careful = SpanAnswer(vocabulary=vocabulary, null_margin=1.0)
    assert careful.answer(answered("The"), scores) == ""
    scores[0] = 0.4
    assert careful.answer(answered("The"), scores) == "The"


def test_an_answer_never_ends_before_it_begins_nor_is_too_long():
    one = SpanAnswer(vocabulary=BERT, max_answer=2)
    record = {**ORACLE, "context": "15 18 21 24"}
    scores = np.zeros((5, 2))
    scores[4, 0], scores[1, 1] = 5.0, 5.0
    assert one.answer(record, scores) in ("24", "15")
    scores[:] = -9
    scores[1, 0] = scores[4, 1] = 5
    scores[2, 1] = 4
    assert one.answer(record, scores) == "15 18"


def test_roberta_has_two_ends_between_and_no_token_types():
    one = SpanAnswer(vocabulary=BERT, max_question=4, between=2)
    assert "token_types" not in one.makes
    record = {"question": "15", "context": "18 21 24", "answers": {"text": [], "answer_start": []}}
    example = one(*one.cut(one.read(record), {"encoder": 30, "masked": 20}))
    assert example.token_types is None
    inputs, slots = example.inputs.tolist(), example.masked_positions
    end = BERT.eos_id
    assert inputs.count(end) == 3
    assert inputs[slots[1] - 2 : slots[1]] == [end, end]  # the context begins behind both


@pytest.mark.parametrize("kind", ["classify", "tag", "span"])
def test_packed_slots_point_into_their_own_example(tmp_path, kind):
    rng = np.random.default_rng(0)
    records = [
        {
            "text": " ".join(some_words(rng, 3)),
            "label": int(rng.integers(2)),
            "tokens": (words := some_words(rng, int(rng.integers(1, 4)))),
            "tags": rng.integers(0, 3, len(words)).tolist(),
            "question": "15",
            "context": "18 21 24",
            "answers": {"text": ["21"], "answer_start": [3]},
        }
        for _ in range(40)
    ]
    objective = {
        "classify": Classify(vocabulary=BERT, labels=MOODS),
        "tag": Tag(vocabulary=BERT, labels=KINDS),
        "span": SpanAnswer(vocabulary=BERT, max_question=2),
    }[kind]
    one = task(objective, 24, 16, records, tmp_path)
    batches = Batches(one, batch_size=4, assembly=Pack(8, 6), seed=1)
    batch = batches.batch(0)
    check_batch(batch, BERT.size)
    (key,) = set(batch) & set(types.SLOT_TARGETS)
    alone = [batches.example(index) for index in range(8)]
    alike = 0
    for row in range(4):
        segments, places = batch[types.ENCODER_SEGMENT_IDS][row], batch[types.MASKED_POSITIONS][row]
        used = batch[types.MASKED_LOSS_WEIGHTS][row] > 0
        for segment in range(1, segments.max() + 1):
            tokens = batch[types.ENCODER_INPUT_TOKENS][row][segments == segment].tolist()
            slots = used & (segments[places] == segment)
            own = places[slots] - np.flatnonzero(segments == segment)[0]
            asked = batch[key][row][slots]
            alike += any(
                tokens == e[types.ENCODER_INPUT_TOKENS].tolist()
                and own.tolist() == e[types.MASKED_POSITIONS].tolist()
                and asked.tolist() == e[key].tolist()
                for e in alone
            )
    assert alike == sum(batch[types.ENCODER_SEGMENT_IDS].max(axis=1))
    held = EvaluationBatches(one, "test", batch_size=6)
    assert sum((held.batch(i)[types.MASKED_LOSS_WEIGHTS] > 0).any(1).sum() for i in range(7)) == 40
    shown = inspection.describe(batches, 0)["rows"][0]["tokens"][key]
    names = {"": 0, "begins": 1, "ends": 2, "begins+ends": 3}
    if kind == "span":
        assert [names[piece] for piece in shown["pieces"]] == shown["ids"]
    else:
        assert shown["pieces"] == [objective.labels[i] for i in shown["ids"]]


def test_numbers_are_packed_and_shown(tmp_path):
    records = [{"text": "15", "label": x / 4} for x in range(8)]
    one = task(Regress(vocabulary=BERT), 12, 4, records, tmp_path)
    batches = Batches(one, batch_size=2, assembly=Pack(8, 2), shuffle=False)
    batch = batches.batch(0)
    assert sorted(batch[types.MASKED_TARGET_VALUES].ravel()) == [x / 4 for x in range(8)]
    shown = inspection.describe(batches, 0)["rows"][0]["tokens"][types.MASKED_TARGET_VALUES]
    assert shown["pieces"] == ["0", "0.25", "0.5", "0.75"]
    assert Pad()([batches.example(0)], one.lengths).rows[types.MASKED_TARGET_VALUES].shape == (1, 4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "15"}, "no label field 'label'; it has text"),
        ({"text": "15", "label": 2}, "holds 2: expected one of the labels bad, good"),
        ({"text": "15", "label": -1}, "a test set without labels"),
        ({"text": "15", "label": "great"}, "holds 'great'"),
        ({"text": "15", "label": True}, "holds True"),
        ({"inputs": "15", "label": 1}, "needs the text field 'text', but the record has inputs"),
    ],
)
def test_records_without_a_label_are_named(record, message):
    with pytest.raises(InputError, match=f"task 't': .*{message}"):
        task(Classify(vocabulary=BERT, labels=MOODS)).tokens(record)


def test_tags_that_do_not_fit_their_words_are_named():
    one = task(Tag(vocabulary=BERT, labels=KINDS))
    with pytest.raises(InputError, match="for each of the 2 words in 'tokens', but there are 1"):
        one.tokens({"tokens": ["15", "16"], "tags": [0]})
    with pytest.raises(InputError, match="needs a list of words in the field 'tokens'"):
        one.tokens({"tokens": "15 16", "tags": [0]})
    with pytest.raises(InputError, match="needs the field 'answers' with 'text'"):
        task(SpanAnswer(vocabulary=BERT, max_question=2), 16, 9).tokens(
            {"context": "15", "question": "15"}
        )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("span", {"answers": {"text": "21", "answer_start": [3, 4]}}, "as many texts as char"),
        ("span", {"answers": {"text": [5], "answer_start": [3]}}, "in 'answers' as many texts"),
        ("span", {"answers": {"text": ["21"], "answer_start": ["x"]}}, r"'answer_start' \['x'\]"),
        ("span", {"answers": {"text": ["21"], "answer_start": [-1]}}, r"'answer_start' \[-1\]"),
        ("span", {"answers": {"text": None, "answer_start": None}}, "'text' None"),
        ("span", {"answers": ["21"]}, "needs the field 'answers' with 'text'"),
        ("span", {"question": 3}, "needs the text field 'question'"),
        ("token", {"tags": None}, "a list of labels in the field 'tags', but it is None"),
        ("token", {"tags": "O"}, "a list of labels in the field 'tags', but it is 'O'"),
        ("token", {"tokens": ["15", None], "tags": [0, 1]}, "needs texts in the list 'tokens'"),
        ("token", {"tokens": ["15", 16], "tags": [0, 1]}, "'tokens', but one is 16"),
        ("token", {"tags": [0, [1]]}, r"'tags' holds \[1\]"),
    ],
)
def test_malformed_records_are_named_by_number_and_field(tmp_path, kind, changes, message):
    """Whoever reads them: training, or an evaluation."""
    objective = {
        "span": SpanAnswer(vocabulary=BERT, max_question=2),
        "token": Tag(vocabulary=BERT, labels=KINDS),
    }[kind]
    good = {
        "question": "15",
        "context": "18 21",
        "answers": {"text": ["21"], "answer_start": [3]},
        "tokens": ["15", "16"],
        "tags": [0, 1],
    }
    one = task(objective, 16, 9, [good, good, {**good, **changes}], tmp_path)
    for batches in (
        Batches(one, batch_size=4, shuffle=False),
        EvaluationBatches(one, "train", batch_size=4),
    ):
        with pytest.raises(InputError, match=f"record 3: task 't': .*{message}"):
            batches.batch(0)


def test_what_can_not_be_built():
    for labels in ((), ("one",), ("one", "one"), (1, 2)):
        with pytest.raises(InputError, match="expected two or more names"):
            Classify(vocabulary=BERT, labels=labels)
    with pytest.raises(InputError, match="outside is 'O', which is none of"):
        Tag(vocabulary=BERT, labels=("a", "b"))
    with pytest.raises(InputError, match="one field or two"):
        Classify(vocabulary=BERT, labels=MOODS, features=("a", "b", "c"))
    with pytest.raises(InputError, match="no room for a token beside 2 specials"):
        task(Classify(vocabulary=BERT, labels=MOODS), encoder=2)
    with pytest.raises(InputError, match="leave no room for a context"):
        task(SpanAnswer(vocabulary=BERT), encoder=64, masked=9)
    with pytest.raises(InputError, match="Chunks joins documents, and Classify"):
        task(Classify(vocabulary=BERT, labels=MOODS), chunk=Chunks())
    moods = task(Classify(vocabulary=BERT, labels=MOODS))
    others = task(Classify(vocabulary=BERT, labels=("a", "b")))
    with pytest.raises(InputError, match="because of its labels"):
        Mixture(name="m", tasks=[moods, dataclasses.replace(others, name="other")])
