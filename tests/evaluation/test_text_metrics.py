"""ROUGE, SQuAD's and MultiRC's scores: worked values, several references, spaces and articles."""

from __future__ import annotations

import sys

import pytest

from t5x_lite.evaluation.bootstrap import bootstrap
from t5x_lite.evaluation.metrics import bleu, chrf, exact_match
from t5x_lite.evaluation.text_metrics import (
    entity_f1,
    normalize_answer,
    referents,
    rouge,
    several_answers,
    squad,
)
from t5x_lite.types import InputError


def test_rouge_by_hand():
    # 4 of 6 and of 5 words; 2 of 5 and of 4 pairs (the cat, on the); "the cat on the" in order.
    found = rouge(["the cat sat on the mat"], ["the cat lay on the"])
    assert found["rouge1"] == pytest.approx(100 * 2 * 4 / 11)
    assert found["rouge2"] == pytest.approx(100 * 2 * 2 / 9)
    assert found["rougeLsum"] == pytest.approx(100 * 2 * 4 / 11)


def test_sentences_in_another_order_keep_their_longest_subsequences():
    target, prediction = "One two three. Four five six.", "Four five six. One two three."
    assert rouge([target], [prediction])["rougeLsum"] == pytest.approx(100)
    assert rouge([target.replace(".", "")], [prediction.replace(".", "")])["rougeLsum"] < 60


def test_squad_compares_without_case_articles_and_punctuation():
    assert normalize_answer("The  Denver Broncos!") == "denver broncos"
    assert squad(["the Denver Broncos"], ["Denver broncos."]) == {"em": 100.0, "f1": 100.0}
    # Words: target 3, prediction 2, both 2.
    found = squad(["in Santa Clara"], ["Santa Clara"])
    assert found == {"em": 0.0, "f1": pytest.approx(100 * 4 / 5)}
    assert squad(["Denver"], [""]) == {"em": 0.0, "f1": 0.0}


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf, rouge, squad])
def test_any_of_several_references_will_do(metric):
    targets = [["one two three four", "five six seven eight"], ["nine ten eleven twelve"]]
    predictions = ["five six seven eight", "nine ten eleven twelve"]
    assert all(value == pytest.approx(100) for value in metric(targets, predictions).values())
    firsts = [several[0] for several in targets]
    assert all(value < 100 for value in metric(firsts, predictions).values())


def test_squad_takes_the_best_reference_of_each_measure():
    assert squad([["Denver", "the Denver Broncos"]], ["Denver Broncos"])["f1"] == 100.0
    assert squad([["a b c", "b c d e"]], ["b c d"])["f1"] == pytest.approx(100 * 6 / 7)


def test_a_question_is_right_when_all_its_answers_are():
    asked = [("q1", "True"), ("q1", "False"), ("q2", "True"), ("q2", "True"), ("q3", "False")]
    targets = [{"question": question, "answer": answer} for question, answer in asked]
    found = several_answers(targets, ["True", "False", "True", "nonsense", "True"])
    # Found true 3 (2 of them rightly), wanted 3; q1 alone is wholly right.
    assert found == {"f1": pytest.approx(100 * 4 / 6), "em": pytest.approx(100 / 3)}
    low, high = bootstrap(several_answers, targets, ["True"] * 5, samples=100)["em"]
    assert 0 <= low <= high <= 100


@pytest.mark.parametrize("metric", [rouge, squad])
def test_bad_input_is_named(metric):
    with pytest.raises(InputError, match="2 targets and 1 predictions"):
        metric(["a", "b"], ["a"])
    with pytest.raises(InputError, match="no examples"):
        metric([], [])


def test_missing_rouge_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"package rouge-score: pip install t5x_lite\[eval\]"):
        rouge(["a"], ["a"])


@pytest.mark.parametrize(
    ("referent", "label", "prediction", "right"),
    [
        ("The city councilmen", 1, "the councilmen", True),
        ("The city councilmen", 1, "the demonstrators", False),
        ("The demonstrators", 0, "the city councilmen", True),
        ("The demonstrators", 0, "demonstrators", False),
        ("Bob", 0, "Bob's mother", True),
        ("Bob", 1, "", False),
        ("Bob", 1, "the", False),
    ],
)
def test_a_mention_is_named_by_its_words(referent, label, prediction, right):
    target = {"referent": referent, "label": label}
    assert referents([target], [prediction]) == {"accuracy": 100.0 * right}


def test_entities_count_with_their_type_and_their_number():
    targets = ["ORG: EU; PER: Ann Lee; PER: Ann Lee", "none"]
    found = entity_f1(targets, ["PER: Ann Lee; LOC: EU;", "no colon here"])
    assert found == {
        "precision": pytest.approx(50),
        "recall": pytest.approx(100 / 3),
        "f1": pytest.approx(40),
    }
    assert entity_f1(["none"], ["none"])["f1"] == 0.0


def test_no_answer_is_an_answer():
    assert squad([[""]], [""]) == {"em": 100.0, "f1": 100.0}
    assert squad([[""], ["an oak"]], ["oak", ""]) == {"em": 0.0, "f1": 0.0}
