"""Texts that end what is generated."""

from __future__ import annotations

from collections.abc import Iterable


def cut_at(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first place at which one of `stops` begins; all of it if none does."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text
