"""How one of our arrays lies in one of theirs, said by naming axes.

"embed heads kv -> (heads kv) embed" is a `torch.nn.Linear`: outputs first, heads flattened.
"embed heads kv -> embed (0/3 heads kv)" takes the first of three parts that are fused behind one
another, as GPT-2's queries; "... -> (heads 0/3 kv) embed" those fused within each head, as
GPT-NeoX's. "vocab -> 0/1 vocab" has an axis of one more.

Every such layout is a view of their array, so one description serves both ways: reading copies
out of the view, writing copies into it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axes:
    """A parsed description."""

    ours: tuple[str, ...]
    theirs: tuple[tuple[str, ...], ...]  # the parts of each of their axes, outermost first

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of their array that holds one of ours of `shape`."""
        return tuple(math.prod(sizes) for sizes in self._sizes(shape))

    def view(self, theirs: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Our array of `shape`, as a view of theirs."""
        split = theirs.reshape([size for sizes in self._sizes(shape) for size in sizes])
        parts = [part for group in self.theirs for part in group]
        index = tuple(slice(None) if "/" not in p else int(p.split("/")[0]) for p in parts)
        names = [part for part in parts if "/" not in part]
        return split[index].transpose([names.index(name) for name in self.ours])

    def _sizes(self, shape: Sequence[int]) -> list[list[int]]:
        table = dict(zip(self.ours, shape, strict=True))
        return [
            [int(part.split("/")[1]) if "/" in part else table[part] for part in group]
            for group in self.theirs
        ]


@functools.cache
def parse(description: str) -> Axes:
    """Axes of a description; ValueError unless both sides name the same axes, each once."""
    left, arrow, right = description.partition("->")
    ours = tuple(left.split())
    groups: list[tuple[str, ...]] = []
    open_group: list[str] | None = None
    for token in right.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            open_group = []
        elif token == ")" and open_group is not None:
            groups.append(tuple(open_group))
            open_group = None
        elif open_group is not None:
            open_group.append(token)
        else:
            groups.append((token,))
    named = [part for group in groups for part in group if "/" not in part]
    if not arrow or open_group is not None or sorted(named) != sorted(ours):
        raise ValueError(
            f"axes '{description}': expected 'a b -> (b a)', the same names on both sides"
        )
    return Axes(ours, tuple(groups))


def same(rank: int) -> Axes:
    """Both arrays have the same axes."""
    names = tuple(f"axis{number}" for number in range(rank))
    return Axes(names, tuple((name,) for name in names))
