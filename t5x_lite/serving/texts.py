"""Text from tokens as they come: only what later tokens can't change is given out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # how vocabularies write bytes that are no character, or not yet
_LONGEST = 3  # bytes of a character that lacks its last


class TextStream:
    """The text of one answer, token by token, up to the first of `stops`.

    A character of several tokens comes whole with its last one, and what may be the beginning of a
    stop string is held until it is clear that it isn't. Where a vocabulary's later tokens change
    earlier text (WordPiece sets a full stop against the word before it), the pieces differ from
    `text`, which is right.

    Args:
      decode: the text of tokens; an ending token among them ends it.
      stops: texts that end the answer and are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = tuple(stops)
        self._given = ""
        self.tokens: list[int] = []
        self.text = ""  # all so far, that which is held included
        self.stopped = False  # by one of `stops`

    def add(self, token: int) -> str:
        """What can be given out since the last call; "" often."""
        self.tokens.append(token)
        self.text = self._decode(self.tokens)
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self.text = self.text[: min(places)]
            return self.rest()
        ready = self.text
        for _ in range(_LONGEST):
            ready = ready.removesuffix(_UNFINISHED)
        held = max((_overlap(ready, stop) for stop in self._stops), default=0)
        return self._give(ready[: len(ready) - held])

    def rest(self) -> str:
        """What was held, when nothing more comes."""
        return self._give(self.text)

    def _give(self, ready: str) -> str:
        if not ready.startswith(self._given):
            return ""
        piece = ready[len(self._given) :]
        self._given = ready
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
