"""TFDS datasets of three English Bibles: text for pretraining, and KJV -> Basic English.

    bible_text    one record a chapter of a version: text, version, book, chapter
    kjv_to_bbe    one record a verse: id ("John 3:16"), inputs (KJV), targets (BBE)

Chapters are divided by a hash of book and chapter, the same for all versions and both datasets: a
chapter in a task's validation or test split is in no version's pretraining split. (Some chapters
retell others nearly word for word, such as 2 Kings 18-20 and Isaiah 36-39; these count as
different.)

`catalog.prepare` makes them as array_record files; `sources.TfdsSource` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from t5x_lite.data.builders import packages
from t5x_lite.data.builders.bible_verses import BOOKS, VERSIONS, Reference, fetch, read_verses
from t5x_lite.data.builders.packages import SPLITS

# Shares of chapters, in thousandths.
_TEST, _VALIDATION = 105, 55


def split_of(book: int, chapter: int) -> str:
    """The split of a chapter, from a hash of its name: the same on any machine, for ever."""
    return packages.split_of(f"{BOOKS[book]} {chapter}", test=_TEST, validation=_VALIDATION)


def chapters(verses: dict[Reference, str], split: str) -> Iterator[tuple[int, int, str]]:
    """(book, chapter, verses joined by spaces) of a split's chapters, in order."""
    texts: dict[tuple[int, int], list[str]] = {}
    for (book, chapter, _), verse in verses.items():
        if split_of(book, chapter) == split:
            texts.setdefault((book, chapter), []).append(verse)
    for (book, chapter), parts in texts.items():
        yield book, chapter, " ".join(parts)


class _Bible(tfds.core.GeneratorBasedBuilder):
    """What both builders share: where the wheels are, and the splits."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, wheels: str | None = None, **kwargs: Any):
        self._wheels = wheels  # folder; None: `wheels` beside the datasets
        super().__init__(**kwargs)

    def _info_of(self, description: str, features: dict[str, Any], keys: Any) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=keys,
            homepage="https://github.com/avendesora/pythonbible",
        )

    def _verses(self, *versions: str) -> list[dict[Reference, str]]:
        directory = self._wheels or os.path.join(self._data_dir_root, "wheels")
        paths = fetch(directory, versions)
        return [read_verses(paths[version], version) for version in versions]


class BibleText(_Bible):
    """Chapters of the KJV, ASV and BBE."""

    def _info(self) -> Any:
        features = {
            "text": tfds.features.Text(),
            "version": tfds.features.Text(),
            "book": tfds.features.Text(),
            "chapter": np.int32,
        }
        return self._info_of("Chapters of the KJV, ASV and BBE.", features, None)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        verses = dict(zip(VERSIONS, self._verses(*VERSIONS), strict=True))
        return {split: self._generate_examples(verses, split) for split in SPLITS}

    def _generate_examples(self, verses: Any, split: str) -> Iterator[tuple[str, Any]]:
        for version in VERSIONS:
            for book, chapter, text in chapters(verses[version], split):
                record = {
                    "text": text,
                    "version": version,
                    "book": BOOKS[book],
                    "chapter": chapter,
                }
                yield f"{version}/{BOOKS[book]}/{chapter}", record


class KjvToBbe(_Bible):
    """Verses of the KJV with the same verses in Basic English."""

    def _info(self) -> Any:
        features = {name: tfds.features.Text() for name in ("id", "inputs", "targets")}
        return self._info_of("KJV verses and their BBE.", features, ("inputs", "targets"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        kjv, bbe = self._verses("kjv", "bbe")
        return {split: self._generate_examples(kjv, bbe, split) for split in SPLITS}

    def _generate_examples(self, kjv: Any, bbe: Any, split: str) -> Iterator[tuple[str, Any]]:
        for reference, verse in kjv.items():
            book, chapter, number = reference
            if reference in bbe and split_of(book, chapter) == split:
                name = f"{BOOKS[book]} {chapter}:{number}"
                yield name, {"id": name, "inputs": verse, "targets": bbe[reference]}


DATASETS = {"bible_text": BibleText, "kjv_to_bbe": KjvToBbe}
