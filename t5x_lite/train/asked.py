"""What infer is asked: texts, JSON lines or standard input; and the file that it answers into."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from t5x_lite.types import InputError


def read_items(path: str) -> Iterator[dict[str, Any]]:
    """Records with a text under `inputs`: of a file's lines, its JSON lines, or standard input.

    Raises InputError for a file that is not there, empty, not UTF-8, or not what its name says.
    """
    if path == "-":
        try:
            yield from ({"inputs": line.rstrip("\n")} for line in sys.stdin)
        except UnicodeDecodeError as error:
            raise InputError("standard input is not UTF-8") from error
        return
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]  # splitlines() would cut at U+2028 too
    except OSError as error:
        raise InputError(f"can't read infer.input '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"infer.input '{path}' is not UTF-8 at byte {error.start}") from error
    if not lines:
        raise InputError(f"infer.input '{path}' is empty: expected one input a line")
    if not path.endswith(".jsonl"):
        yield from ({"inputs": line} for line in lines)
        return
    for number, line in enumerate(lines, start=1):
        yield _record(line, f"{path}, line {number}")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # no half of a surrogate pair
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("inputs"), str):
        raise InputError(f"{where}: expected a JSON object with a text field 'inputs'")
    for name in ("targets", "pair"):
        if not isinstance(record.get(name, ""), str):
            raise InputError(f"{where}: expected a text in the field '{name}'")
    return record


def finished_lines(output: str, items: Sequence[Mapping[str, Any]] | None = None) -> int:
    """Whole lines in a half-written output; a torn last line is cut off.

    Raises InputError, and changes nothing, where those are no answers to the first of `items`
    (None: to whatever was asked).
    """
    if output == "-" or not os.path.exists(output):
        return 0
    try:
        with open(output, "rb+") as file:
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            lines = whole.splitlines()
            if not _answers(lines, items) or content[len(whole) :][:1] not in (b"", b"{"):
                raise InputError(
                    f"infer.output '{output}' holds something else than the first answers to "
                    "this input: name another file, or remove it"
                )
            if len(whole) < len(content):
                file.truncate(len(whole))
    except OSError as error:
        raise InputError(f"can't write infer.output '{output}': {error.strerror}") from error
    return len(lines)


def _answers(lines: Sequence[bytes], items: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a file's lines answer the first of the items."""
    if items is None:
        return True
    try:
        asked = [json.loads(line)["inputs"] for line in lines]
    except (ValueError, TypeError, KeyError):
        return False
    return asked == [item["inputs"] for item in items[: len(asked)]]


@contextlib.contextmanager
def open_output(output: str, done: int, quiet: bool) -> Iterator[TextIO]:
    """Where answers go; nowhere if `quiet`. After `done` lines, behind them."""
    if quiet:
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield file
    elif output == "-":
        yield sys.stdout
    else:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        with open(output, "a" if done else "w", encoding="utf-8") as file:
            yield file
        print(f"Predictions are in {output}", file=sys.stderr)
