"""Frozen dataclasses as JSON records and back: a run's folder explains itself without gin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from t5x_lite.types import InputError


def to_record(value: Any) -> Any:
    """A JSON value for a (nested) dataclass: its fields, and its class's name under `class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_record(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_record(item) for item in value]
    if isinstance(value, dict):
        return {key: to_record(item) for key, item in value.items()}
    return value


def from_record(record: Any, classes: Iterable[type]) -> Any:
    """The inverse of `to_record`; lists come back as tuples.

    Raises InputError for a class that is not among `classes`, or for fields it does not have: the
    record was written by another version, or by hand.
    """
    known = {cls.__name__: cls for cls in classes}
    if isinstance(record, list):
        return tuple(from_record(item, known.values()) for item in record)
    if not isinstance(record, dict):
        return record
    values = {key: from_record(item, known.values()) for key, item in record.items()}
    if "class" not in record:
        return values
    name = values.pop("class")
    if name not in known:
        raise InputError(f"record of class '{name}': expected one of {', '.join(sorted(known))}")
    try:
        return known[name](**values)
    except TypeError as error:
        raise InputError(f"record of class '{name}' does not fit this version: {error}") from error
