"""Synthetic texts that can only be read in context: keys and values, by a mapping of each text.

Made from (seed, index) alone, so that there is nothing to download and no end to it. After the
synthetic pretraining of Garg et al. (2022, arXiv:2208.01066) and Chan et al. (2022,
arXiv:2205.05055): what a key means is drawn anew for each text, and can't be kept in weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import string
from collections.abc import Mapping
from typing import Literal

import numpy as np

from t5x_lite.data.sources import RandomAccess, Record
from t5x_lite.types import InputError

# Which (key, value) pairs a text's mapping is drawn from, see `Mappings.held_out`.
Pairs = Literal["seen", "held_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mappings:
    """Texts such as `aDcBaDbA...`: `pairs` times a key and its value, by a mapping for each text.

        mapping  a -> D, c -> B, b -> A                of keys_a_text keys, drawn for this text
        text     a D c B a D b A c B                   keys drawn one by one, with replacement

    `structured=False` is the control: each value is drawn anew at each place, so that keys, values
    and pairs are exactly as frequent, but nothing in a text says what comes next.

    One pair in `held_out` of all (key + value divisible by it) is in no text but those of split
    "held_out", whose texts have no others: a model that has learned which values a key takes
    knows nothing of these. Splits "train" and "validation" differ in their draws alone.
    """

    keys: int = 16  # kinds: letters from `a` on
    values: int = 16  # kinds: letters from `A` on
    keys_a_text: int = 8  # keys that a text's mapping has
    pairs: int = 32  # a text is twice as many letters
    held_out: int = 4
    structured: bool = True
    sizes: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 1 << 24, "validation": 4096, "held_out": 4096}
    )
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("keys", 26), ("values", 26), ("keys_a_text", self.keys)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(
                    f"Mappings.{name}={getattr(self, name)}: expected between 1 and {most}"
                )
        if self.pairs < 1 or self.held_out < 2 or self.values % self.held_out:
            raise InputError(
                f"Mappings(pairs={self.pairs}, held_out={self.held_out}): expected 1 or more "
                f"pairs, and one in 2 or more held out that divides the {self.values} values"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def open(self, split: str) -> RandomAccess:
        if split not in self.sizes:
            raise InputError(
                f"Mappings has no split '{split}'; its splits are: {', '.join(self.sizes)}"
            )
        return _Texts(self, split)

    def letters(self, keys: np.ndarray, values: np.ndarray) -> str:
        """The text of key and value numbers `[pairs]`."""
        pairs = zip(keys.tolist(), values.tolist(), strict=True)
        return "".join(
            string.ascii_lowercase[key] + string.ascii_uppercase[value] for key, value in pairs
        )

    def draw_values(self, keys: np.ndarray, pairs: Pairs, rng: np.random.Generator) -> np.ndarray:
        """A value for each key, equally likely among the pairs that are allowed."""
        # A pair is held out where key + value is divisible: one value in each row of `held_out`.
        if pairs == "held_out":
            residue: np.ndarray = np.zeros(len(keys), np.int64)
        else:
            residue = rng.integers(1, self.held_out, len(keys))
        row = rng.integers(0, self.values // self.held_out, len(keys))
        return self.held_out * row + (residue - keys) % self.held_out


@dataclasses.dataclass(frozen=True)
class _Texts:
    config: Mappings
    split: str

    def __len__(self) -> int:
        return self.config.sizes[self.split]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        config = self.config
        digest = hashlib.sha256(f"mapping/{config.seed}/{self.split}/{index}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        pairs: Pairs = "held_out" if self.split == "held_out" else "seen"
        kinds = rng.permutation(config.keys)[: config.keys_a_text]
        places = rng.integers(0, len(kinds), config.pairs)
        if config.structured:
            values = config.draw_values(kinds, pairs, rng)[places]
        else:
            values = config.draw_values(kinds[places], pairs, rng)
        return {"text": config.letters(kinds[places], values)}
