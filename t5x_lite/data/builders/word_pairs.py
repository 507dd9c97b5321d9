"""TFDS datasets of pairs of words and how alike people find them, out of gensim's wheel.

wordsim353    353 pairs, related or alike, 0 to 10 (Finkelstein et al. 2002)
simlex999     999 pairs, alike and not only related, 0 to 10 (Hill et al. 2015, arXiv:1408.3456)

gensim (LGPL) carries the collections as test data; they are read here, and not passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from t5x_lite.data.builders.packages import TextRecords, damaged, read_members

VERSION = "4.4.0"


class _WordPairs(TextRecords):
    """Records of the split `test`: `first`, `second` in lower case, and `score`, all as text."""

    FIELDS: ClassVar[tuple[str, ...]] = ("first", "second", "score")
    FILE: ClassVar[str] = ""

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        wheel = self.wheel("gensim", VERSION)
        member = f"gensim/test/test_data/{self.FILE}"
        lines = read_members(wheel, [member])[member].splitlines()
        pairs = [line.lower().split("\t") for line in lines if line and not line.startswith("#")]
        try:
            for number, (first, second, score) in enumerate(pairs):
                record = {"first": first, "second": second, "score": str(float(score))}
                yield "test", {"id": f"{number}", **record}
        except ValueError as error:
            raise damaged(wheel, error) from error

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"test": self._generate_examples([record for _, record in self.read()])}


class Wordsim353(_WordPairs):
    """353 pairs of words by relatedness."""

    FILE = "wordsim353.tsv"


class Simlex999(_WordPairs):
    """999 pairs of words by likeness."""

    FILE = "simlex999.txt"


DATASETS = {"wordsim353": Wordsim353, "simlex999": Simlex999}
