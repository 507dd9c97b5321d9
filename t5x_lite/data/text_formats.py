"""Public datasets as text to text, in T5's words (Raffel et al. 2020, appendix D).

Each is a preprocessor of TFDS's records: it adds `inputs` and `targets`, and keeps the other
fields. Where several answers are right, or a metric compares with something else than one text,
the record gets `references` besides: see `tasks.Metric`.

    glue/rte   {"sentence1": "A dog ran.", "sentence2": "It ran.", "label": 0}
    inputs     rte sentence1: A dog ran. sentence2: It ran.
    targets    entailment
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLabel:
    """Named fields behind the task's name; the target is the label's name.

    Raises InputError for a label that is none, such as the -1 of GLUE's test splits.
    """

    name: str
    fields: Sequence[str]
    labels: Sequence[str]  # in the order of the dataset's numbers
    label: str = "label"

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        number = record[self.label]
        if not 0 <= number < len(self.labels):
            raise InputError(
                f"{self.name}: label {number} is none of {', '.join(self.labels)}; test splits of "
                "GLUE and SuperGLUE have no labels: use validation"
            )
        inputs = named_fields(self.name, record, self.fields)
        return {**record, "inputs": inputs, "targets": self.labels[number]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextNumber:
    """A number to be said as text, in steps: STS-B's 2.57 is "2.6" in steps of 0.2."""

    name: str
    fields: Sequence[str]
    label: str = "label"
    per_unit: int = 5  # steps in 1

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        inputs = named_fields(self.name, record, self.fields)
        number = round(record[self.label] * self.per_unit) / self.per_unit
        return {**record, "inputs": inputs, "targets": f"{number:.1f}"}


def named_fields(name: str, record: Mapping[str, Any], fields: Sequence[str]) -> str:
    """`"name field: text field: text"`."""
    return " ".join([name, *(f"{field}: {record[field]}" for field in fields)])


@dataclasses.dataclass(frozen=True)
class TextMultirc:
    """MultiRC: is this answer right? One record an answer; the metric is `several_answers`."""

    labels: Sequence[str] = ("False", "True")

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        bare = {key: _unmarked(record[key]) for key in ("question", "answer", "paragraph")}
        made = TextLabel(name="multirc", fields=tuple(bare), labels=self.labels)(
            {**bare, "label": record["label"]}
        )
        index = record["idx"]
        question = f"{index['paragraph']}-{index['question']}"
        asked = {"question": question, "answer": made["targets"]}
        return {**record, **made, "references": asked}


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """ReCoRD: which entity is behind `@placeholder`? Any of its names is right.

    One record a query, with the first of its answers as target. (T5 trains on one example an
    answer, the same query again; and scores as here.)
    """

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", record["passage"])
        passage = passage.replace("\n@highlight\n", ". ")
        entities = ", ".join(record["entities"])
        inputs = f"record query: {record['query']} entities: {entities} passage: {passage}"
        answers = list(record["answers"])
        target = answers[0] if answers else ""
        return {**record, "inputs": inputs, "targets": target, "references": answers or [target]}


@dataclasses.dataclass(frozen=True)
class TextWsc:
    """WSC: whom does the pronoun mean? The target is a mention, which may be the wrong one.

    The pronoun stands between asterisks. Train on the records with label 1 alone
    (`selection.Where`), as T5; the metric `referents` tells whether what the model names is that
    mention, and compares with the label.
    """

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        words = record["text"].split(" ")
        place, pronoun = record["span2_index"], record["span2_text"]
        count = len(pronoun.split(" "))
        found = " ".join(words[place : place + count])
        # Punctuation stays outside: "him." becomes "*him*."
        words[place : place + count] = [found.replace(pronoun, f"*{pronoun}*", 1)]
        target = record["span1_text"]
        asked = {"referent": target, "label": record["label"]}
        return {
            **record,
            "inputs": "wsc: " + " ".join(words),
            "targets": target,
            "references": asked,
        }


@dataclasses.dataclass(frozen=True)
class TextSquad:
    """SQuAD: the first answer is the target, and each of them a reference."""

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        answers = list(dict.fromkeys(record["answers"]["text"]))
        target = answers[0] if answers else ""
        return {
            **record,
            "inputs": f"question: {record['question']} context: {record['context']}",
            "targets": target,
            "references": answers or [target],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEntities:
    """Named entities as a list of them, in order: "ORG: EU; MISC: German" (none: "none").

    From words and the numbers of their BIO tags, as in CoNLL-2003. The metric is `entity_f1`.
    """

    tags: Sequence[str]  # names in the order of the dataset's numbers: "O", "B-PER", ...
    words: str = "tokens"
    tagged: str = "ner"
    name: str = "ner"

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        words = list(record[self.words])
        names = [self.tags[int(tag)] for tag in record[self.tagged]]
        found: list[list[str]] = []  # type, words
        before = "O"
        for word, tag in zip(words, names, strict=True):
            kind = tag[2:]
            if tag.startswith("I-") and before[2:] == kind:
                found[-1].append(word)
            elif tag != "O":
                found.append([kind, word])
            before = tag
        entities = "; ".join(f"{kind}: {' '.join(parts)}" for kind, *parts in found)
        return {
            **record,
            "inputs": f"{self.name}: {' '.join(words)}",
            "targets": entities or "none",
        }


def _unmarked(text: str) -> str:
    """Text without MultiRC's tags: `<b>Sent 1: </b>It rained.<br>` -> `Sent 1: It rained.`."""
    return " ".join(re.sub(r"<(?:b|/b|br)>", " ", text).split())
