"""Scores of summaries and of answers, in percent: ROUGE, SQuAD's, and those of several answers."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.evaluation.additive import Statistics, additive, percentages
from t5x_lite.evaluation.metrics import Target, references, require

_ROUGE = ("rouge1", "rouge2", "rougeLsum")


@additive
def rouge(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`rouge1`, `rouge2`, `rougeLsum`: mean F-measures (Lin 2004) by rouge-score, without stemming.

    Of several references the best counts, measure by measure. A sentence ends at a line's end and
    behind `.`, `!` or `?`, which rougeLsum, the union of the sentences' longest common
    subsequences, goes by; the other two do not care.
    """
    module = require("rouge_score.rouge_scorer", "ROUGE scores")
    scorer = module.RougeScorer(list(_ROUGE))
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        several = [sentences(text) for text in references(target)]
        scores = scorer.score_multi(several, sentences(prediction))
        rows.append([scores[name].fmeasure for name in _ROUGE])
    return percentages(_ROUGE, rows)


def sentences(text: str) -> str:
    """The text with a line a sentence."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


@additive
def squad(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`em` and `f1` of answers (Rajpurkar et al. 2016), each the best over the references.

    Texts are compared without case, punctuation, articles and extra spaces; F1 is that of the bag
    of words.
    """
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        found = normalize_answer(prediction)
        wanted = [normalize_answer(text) for text in references(target)]
        rows.append([max(found == t for t in wanted), max(_overlap(t, found) for t in wanted)])
    return percentages(["em", "f1"], rows)


@additive
def several_answers(targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> Statistics:
    """`f1` over all answers, and `em` of whole questions: MultiRC's (Khashabi et al. 2018).

    A target is `{"question": its name, "answer": "True" or "False"}`, one an answer. A question is
    right if each of its answers is; a prediction other than "True" counts as "False".

    The questions are what is resampled: answers to one question are not independent.
    """
    groups: dict[Any, np.ndarray] = collections.defaultdict(lambda: np.zeros(3))
    right: dict[Any, bool] = collections.defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        question = target["question"]
        wanted, found = (text.strip() == "True" for text in (target["answer"], prediction))
        groups[question] += [wanted and found, wanted, found]
        right[question] &= wanted == found
    rows: np.ndarray = np.array([[*groups[q], right[q], 1.0] for q in groups], np.float64)

    def score(total: np.ndarray) -> dict[str, float]:
        both, wanted, found, exact, questions = total.tolist()
        # Counted as 0 where there is nothing to find and nothing found, as scikit-learn does.
        return {"f1": 200.0 * both / max(wanted + found, 1.0), "em": 100.0 * exact / questions}

    return Statistics(rows, score)


@additive
def referents(targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> Statistics:
    """`accuracy` of pronouns' referents (WSC as T5 answers it).

    A target is `{"referent": a mention, "label": whether the pronoun means it}`. A prediction names
    that mention if the words of one are among the other's, articles and the like apart; what it
    says is right if that agrees with the label.
    """
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        wanted, found = (_content(text) for text in (target["referent"], prediction))
        same = bool(found) and (found <= wanted or wanted <= found)
        # "Bob" and "Bob's mother" are not the same person.
        same &= ("'" in target["referent"]) == ("'" in prediction)
        rows.append([same == bool(target["label"])])
    return percentages(["accuracy"], rows)


_DETERMINERS = frozenset(
    "a an the this that these those my your his her its our their some every each many".split()  # noqa: SIM905
)


def _content(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower())) - _DETERMINERS


@additive
def entity_f1(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`precision`, `recall`, `f1` of lists of entities, "ORG: EU; MISC: German", over the corpus.

    As CoNLL-2003 counts: an entity is right with its type and all its words. Where it stands in
    the text is not told, and so not asked.
    """
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        wanted, found = (_entities(text) for text in (references(target)[0], prediction))
        rows.append([sum((wanted & found).values()), sum(wanted.values()), sum(found.values())])

    def score(total: np.ndarray) -> dict[str, float]:
        both, wanted, found = total.tolist()
        return {
            "precision": 100.0 * both / max(found, 1.0),
            "recall": 100.0 * both / max(wanted, 1.0),
            "f1": 200.0 * both / max(wanted + found, 1.0),
        }

    return Statistics(np.array(rows, np.float64), score)


def _entities(text: str) -> collections.Counter[tuple[str, str]]:
    parts = (part.partition(":") for part in text.split(";"))
    return collections.Counter((k.strip(), " ".join(w.split())) for k, colon, w in parts if colon)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: SQuAD's comparison of texts."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap(target: str, prediction: str) -> float:
    """F1 of the bags of words; 0 without a word in common.

    Where one has no words, there is no answer: 1 if the other has none either (SQuAD 2.0's scorer).
    """
    wanted, found = target.split(), prediction.split()
    if not wanted or not found:
        return float(wanted == found)
    common = sum((collections.Counter(wanted) & collections.Counter(found)).values())
    return 2.0 * common / (len(wanted) + len(found)) if common else 0.0
