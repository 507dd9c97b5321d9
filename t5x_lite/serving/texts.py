"""Text from tokens as they come: only what later tokens can't change is given out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from t5x_lite.decode.stopping import StopStrings, cut_at

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
        self._passing = StopStrings(stops)
        self._whole = ""  # the text of `tokens`
        self._passed = ""  # the part of it that no token to come can change
        self.tokens: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: more tokens would be in vain."""
        return self._passing.stopped

    @property
    def text(self) -> str:
        """All so far, up to the first stop string."""
        return cut_at(self._whole, self._stops)

    @property
    def is_cut(self) -> bool:
        """Whether a stop string has taken something from the text."""
        return len(self.text) < len(self._whole)

    def add(self, token: int) -> str:
        """What can be given out since the last call; "" often."""
        self.tokens.append(token)
        self._whole = ready = self._decode(self.tokens)
        for _ in range(_LONGEST):
            ready = ready.removesuffix(_UNFINISHED)
        return self._passing.push(self._pass(ready))

    def rest(self) -> str:
        """What was held, when nothing more comes."""
        return self._passing.push(self._pass(self._whole)) + self._passing.finish()

    def _pass(self, ready: str) -> str:
        if not ready.startswith(self._passed):
            return ""
        piece = ready[len(self._passed) :]
        self._passed = ready
        return piece
