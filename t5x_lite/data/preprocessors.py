"""Preprocessors: a record becomes another, before its fields are turned into tokens.

A preprocessor is any function of one record (a dict) that returns one. It can't drop records: the
number of examples must be known without reading them, so filter when the data is prepared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Puts `text` before a field: `{"inputs": "a"}` -> `{"inputs": "summarize: a"}`."""

    text: str
    field: str = "inputs"

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {**record, self.field: self.text + record[self.field]}


@dataclasses.dataclass(frozen=True)
class Rename:
    """Renames fields, `{new: old}`: `Rename({"text": "article"})` reads `article` as `text`."""

    fields: Mapping[str, str]

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in record.items() if k not in self.fields.values()}
        return {**kept, **{new: record[old] for new, old in self.fields.items()}}


@dataclasses.dataclass(frozen=True)
class Template:
    """Fields made of others: `Template({"inputs": "summarize {aspect}: {text}"})`.

    What is in braces is a field of the record as it was; double braces are braces.
    """

    fields: Mapping[str, str]

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        made = {name: template.format_map(record) for name, template in self.fields.items()}
        return {**record, **made}
