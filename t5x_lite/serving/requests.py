"""What clients ask, from JSON: each field checked, each mistake named.

A field's type is its annotation: `str`, `int`, `float`, `bool`, `tuple[str, ...]` for a list of
texts, `X | None` where it may be null or left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.types import InputError

_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
}
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_MAX_STOPS = 16
_MAX_TEXTS = 64
_MAX_INT = 2**31 - 1


class Malformed(InputError):
    """A body that is no JSON object."""


class Body:
    """What the bodies share."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Raises Malformed for what is no JSON object, InputError for fields that are wrong."""
        record = _object(body)
        kinds = typing.get_type_hints(cls)
        for name in record:
            if name not in kinds:
                raise InputError(f"the field {name!a} is unknown; known are: {', '.join(kinds)}")
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name not in record and field.default is dataclasses.MISSING:
                raise InputError(f"the field '{field.name}' is missing")
        return cls(**{name: _value(name, value, kinds[name]) for name, value in record.items()})


@dataclass(frozen=True)
class Generate(Body):
    """An answer or a continuation, or what belongs at each `<mask>`."""

    prompt: str
    adapter: str | None = None  # None: the model as it is
    strategy: str = "greedy"  # or "sampling", of which are the four fields that follow
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: as many as the server allows
    stop: tuple[str, ...] = ()  # any of them ends the text, and isn't part of it
    seed: int = 0
    stream: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "sampling"):
            raise InputError(
                f"strategy='{self.strategy}' is not served: expected greedy or sampling"
            )
        for name in _SAMPLED:
            if self.strategy == "greedy" and getattr(self, name) is not None:
                raise InputError(f"{name} is for strategy='sampling', and this is 'greedy'")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens}: expected at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: expected 0 or more")
        if len(self.stop) > _MAX_STOPS or "" in self.stop:
            raise InputError(f"stop: expected at most {_MAX_STOPS} texts, none of them empty")

    @property
    def how(self) -> Greedy | Sampling:
        """The strategy as an object. Raises InputError for settings out of range."""
        if self.strategy == "greedy":
            return Greedy(repetition_penalty=self.repetition_penalty)
        given = {name: getattr(self, name) for name in _SAMPLED}
        given = {name: value for name, value in given.items() if value is not None}
        return Sampling(repetition_penalty=self.repetition_penalty, **given)


@dataclass(frozen=True)
class FillMask(Body):
    """Candidates for each `<mask>` of a text."""

    text: str
    adapter: str | None = None
    candidates: int = 5


@dataclass(frozen=True)
class Embed(Body):
    """Vectors of texts."""

    texts: tuple[str, ...]
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= _MAX_TEXTS:
            raise InputError(f"{len(self.texts)} texts: expected 1 to {_MAX_TEXTS}")


def _object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        record = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(record, dict):
        raise Malformed(f"the body is a JSON {type(record).__name__}: expected an object")
    return record


def _value(name: str, value: Any, kind: Any) -> Any:
    optional = type(None) in typing.get_args(kind)
    if optional:
        if value is None:
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if kind == tuple[str, ...] and isinstance(value, list):
        return tuple(_value(name, one, str) for one in value)
    if kind is float and type(value) is int and abs(value) <= _MAX_INT:
        value = float(value)
    good = type(value) is kind  # to isinstance, a bool is an int
    if good and kind is int:
        good = abs(value) <= _MAX_INT
    if good and kind is float:
        good = math.isfinite(value)
    if not good:
        found = json.dumps(value)
        found = found if len(found) < 40 else found[:37] + "..."
        raise InputError(f"the field '{name}' is {found}: expected {_NAMES[kind]}")
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the field '{name}' is not Unicode text at character {error.start}"
            ) from error
    return value
