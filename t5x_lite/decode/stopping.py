"""Stop strings: text ends before any of them, whole or while it is being written.

They are sought in text, not in tokens: a stop string may begin and end in the middle of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from t5x_lite.types import InputError


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first place where one of `stops` begins: 'a b\\n c', ['\\n'] -> 'a b'."""
    check_stops(stops)
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class StopStrings:
    """The same for text that comes piece by piece.

    What may be the beginning of a stop string is held back until it is clear:

        stops = StopStrings(["END"])
        stops.push("some E") -> "some "
        stops.push("asy EN") -> "Easy "
        stops.push("D more") -> ""         stops.stopped is True

    All that `push` and `finish` return, put together, is `cut_at` of the whole.
    """

    def __init__(self, stops: Sequence[str]):
        check_stops(stops)
        self.stopped = False  # a stop string was met: nothing comes any more
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """What is certain to be before any stop string, of `piece` and what was held back."""
        if self.stopped:
            return ""
        text = self._held + piece
        certain = cut_at(text, self._stops)
        # Another stop may begin before the one that was met, and not be whole yet.
        kept = min((_open_end(text, stop) for stop in self._stops), default=len(text))
        if len(certain) < len(text) and len(certain) <= kept:
            self.stopped, self._held = True, ""
            return certain
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What is left when no more pieces come."""
        rest = "" if self.stopped else cut_at(self._held, self._stops)
        self.stopped, self._held = True, ""
        return rest


def check_stops(stops: Sequence[str]) -> None:
    """Raises InputError unless `stops` are texts with something in them."""
    if isinstance(stops, str):
        raise InputError(f"stop strings {stops!r}: expected a list of texts, such as [{stops!r}]")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise InputError(f"stop string {stop!r}: expected a text of at least one character")


def _open_end(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that begins `stop`, but is not all of it."""
    for place in range(max(0, len(text) - len(stop) + 1), len(text)):
        if stop.startswith(text[place:]):
            return place
    return len(text)
