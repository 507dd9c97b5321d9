"""Public datasets as text: T5's published examples (Raffel et al. 2020, appendix D), and ours."""

from __future__ import annotations

import pytest

from t5x_lite.data.preprocessors import Template
from t5x_lite.data.selection import Where
from t5x_lite.data.text_formats import (
    TextEntities,
    TextLabel,
    TextMultirc,
    TextNumber,
    TextRecord,
    TextSquad,
    TextWsc,
)
from t5x_lite.types import InputError


def said(preprocessor, record):
    made = preprocessor(record)
    return made["inputs"], made["targets"]


def test_labels_are_said_by_their_names():
    rte = TextLabel(
        name="rte",
        fields=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
    )
    record = {"sentence1": "A smaller proportion.", "sentence2": "30 million.", "label": 1}
    assert rte({**record, "idx": 3}) == {
        **record,
        "idx": 3,
        "inputs": "rte sentence1: A smaller proportion. sentence2: 30 million.",
        "targets": "not_entailment",
    }
    with pytest.raises(InputError, match=r"rte: label -1 is none of entailment, .*use validation"):
        rte({**record, "label": -1})


def test_numbers_are_said_in_fifths():
    stsb = TextNumber(name="stsb", fields=("sentence1", "sentence2"))
    record = {"sentence1": "a", "sentence2": "b"}
    for number, text in ((3.25, "3.2"), (2.57, "2.6"), (0.0, "0.0"), (5.0, "5.0")):
        assert said(stsb, {**record, "label": number})[1] == text


def test_multirc_knows_its_question():
    made = TextMultirc()(
        {
            "paragraph": "<b>Sent 1: </b>It rained.<br><b>Sent 2: </b>They ran.<br>",
            "question": "Who ran?",
            "answer": "They",
            "idx": {"paragraph": 5, "question": 2, "answer": 9},
            "label": 1,
        }
    )
    assert made["inputs"] == (
        "multirc question: Who ran? answer: They paragraph: Sent 1: It rained. Sent 2: They ran."
    )
    assert made["targets"] == "True"
    assert made["references"] == {"question": "5-2", "answer": "True"}


def test_record_joins_its_highlights_and_keeps_all_answers():
    made = TextRecord()(
        {
            "query": "@placeholder won.",
            "entities": ["Ann", "Bob"],
            "passage": "They met.\n@highlight\nAnn ran\n@highlight\nBob slept",
            "answers": ["Ann", "Ann B."],
        }
    )
    assert made["inputs"] == (
        "record query: @placeholder won. entities: Ann, Bob passage: They met. Ann ran. Bob slept"
    )
    assert (made["targets"], made["references"]) == ("Ann", ["Ann", "Ann B."])


@pytest.mark.parametrize(
    ("text", "place", "pronoun", "marked"),
    [
        ("The council refused because they feared it.", 4, "they", "because *they* feared"),
        ("Bob saw that Tom liked him.", 5, "him", "liked *him*."),
        ("He gave Ann the hat, and she kept it on.", 5, "and she", "*and she* kept"),
    ],
)
def test_a_pronoun_is_marked_where_it_stands(text, place, pronoun, marked):
    record = {"text": text, "span2_index": place, "span2_text": pronoun, "span1_text": "Bob"}
    made = TextWsc()({**record, "label": 0})
    assert made["inputs"].startswith("wsc: ")
    assert marked in made["inputs"]
    assert made["inputs"].count("*") == 2
    assert (made["targets"], made["references"]) == ("Bob", {"referent": "Bob", "label": 0})


def test_squad_keeps_each_answer_once():
    record = {
        "question": "What?",
        "context": "This and that.",
        "answers": {"text": ["that", "This", "that"], "answer_start": [9, 0, 9]},
    }
    made = TextSquad()(record)
    assert made["inputs"] == "question: What? context: This and that."
    assert (made["targets"], made["references"]) == ("that", ["that", "This"])


def test_entities_are_listed_in_order():
    tags = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
    entities = TextEntities(tags=tags)
    record = {"tokens": ["EU", "News", "met", "Ann", "Lee", "Bob"], "ner": [3, 4, 0, 1, 2, 1]}
    assert said(entities, record) == (
        "ner: EU News met Ann Lee Bob",
        "ORG: EU News; PER: Ann Lee; PER: Bob",
    )
    assert said(entities, {"tokens": ["so"], "ner": [0]}) == ("ner: so", "none")
    # An inside without a beginning of its kind begins one, as conlleval has it.
    assert said(entities, {"tokens": ["EU", "Ann"], "ner": [3, 2]})[1] == "ORG: EU; PER: Ann"


def test_templates_read_the_record_as_it_was():
    swap = Template({"inputs": "from {targets}: {{x}}", "targets": "{inputs}"})
    record = {"inputs": "a", "targets": "b", "id": 1}
    assert swap(record) == {"inputs": "from b: {x}", "targets": "a", "id": 1}
    with pytest.raises(KeyError, match="text"):
        Template({"inputs": "{text}"})(record)


class Source:
    splits = ("train", "validation")

    def open(self, split):
        return [{"label": i % 2, "i": i} for i in range(5)]


def test_where_selects_in_some_splits():
    some = Where(source=Source(), field="label", values=[1], only=["train"])
    records = some.open("train")
    assert [records[i]["i"] for i in range(len(records))] == [1, 3]
    assert len(some.open("validation")) == 5
    assert some.splits == ("train", "validation")
    with pytest.raises(InputError, match="'labl', but the record has label, i"):
        Where(source=Source(), field="labl", values=[1]).open("train")
    with pytest.raises(InputError, match="no record of split 'train' has one of"):
        Where(source=Source(), field="label", values=[7]).open("train")
