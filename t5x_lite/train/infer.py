"""Text in, text out: a trained run applied to files or standard input."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from t5x_lite.decode import modes
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.train import run as runs
from t5x_lite.types import InputError


def infer(
    *,
    model_dir: str,
    input: str = "-",
    output: str = "-",
    mode: modes.Name | None = None,
    prefix: str = "",
    step: int | None = None,
    batch_size: int = 32,
    max_input_tokens: int = 128,
    max_tokens: int = 64,
    candidates: int = 5,
    partitioner: Partitioner = Partitioner(),
) -> int:
    """Asks the model about each input, and writes `{"inputs": ..., "prediction": ...}` lines.

    Started again on a half-written output file, it goes on behind the last whole line.

    Args:
      model_dir: the run's folder: model, vocabulary and base are found from there.
      input: a text file (one input a line), a `.jsonl` file (its field `inputs`), or `-` for
        standard input.
      output: a `.jsonl` file, or `-` for standard output.
      mode: "generate" (an answer or a continuation, by greedy decoding), "fill_mask" (an encoder's
        candidates for each `<mask>`), "infill" (the text with its `<mask>` filled); None: what the
        model is for.
      prefix: put before every input, as the task did in training.
      step: the checkpoint; None: the latest.
      batch_size: inputs decoded together; the last batch is filled up.
      max_input_tokens: longer inputs are an error, with their line.
      max_tokens: the most new tokens.
      candidates: how many tokens fill_mask names for each mask.
      partitioner: the mesh.

    Returns:
      How many predictions were written.
    """
    run = runs.Run.read(model_dir)
    kind = modes.choose(run.model, mode)
    modes.check_lengths(run.model, max_input_tokens, max_tokens)
    partitioner.check_batch_size(batch_size)
    done = _finished_lines(output)
    texts = list(itertools.islice(_read(input), done, None))
    model = Transformer(run.model)
    asked = kind(model, run.vocabulary, max_input_tokens, max_tokens, candidates)
    encoded = []
    for number, text in enumerate(texts, start=done + 1):
        try:
            encoded.append(asked.encode(prefix + text))
        except InputError as error:
            raise InputError(f"input {number}: {error}") from error
    session, trainable, frozen = runs.load(runs.RunCheckpoint(model_dir, step), partitioner)
    ask = modes.program(asked, partitioner.replicated)
    params = session.transform.apply(trainable, frozen)
    quiet = jax.process_index() != 0
    console = Console(file=sys.stderr)
    rows = partitioner.local_rows(batch_size)
    nothing: np.ndarray = np.zeros(0, np.int32)
    with (
        partitioner.activate(),
        _open_output(output, done, quiet) as file,
        Progress(console=console, disable=quiet or not console.is_terminal) as progress,
    ):
        for start in progress.track(range(0, len(texts), batch_size), description="decoding"):
            part = encoded[start : start + batch_size]
            filled = asked.rows(part + [nothing] * (batch_size - len(part)))
            local = {key: value[rows] for key, value in filled.items()}
            answers = jax.device_get(ask(params, partitioner.put_batch(local, batch_size)))
            for index, ids in enumerate(part):
                answer = jax.tree.map(lambda leaf, index=index: leaf[index], answers)
                record = asked.record(prefix + texts[start + index], ids, answer)
                record["inputs"] = texts[start + index]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    return len(texts)


def _read(path: str) -> Iterator[str]:
    """The inputs of a file: lines, or the `inputs` fields of JSON lines."""
    if path == "-":
        yield from (line.rstrip("\n") for line in sys.stdin)
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
        yield from lines
        return
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["inputs"]
            if not isinstance(text, str):
                raise TypeError(type(text))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a text field 'inputs'"
            ) from error
        yield text


def _finished_lines(output: str) -> int:
    """Whole lines in a half-written output; a torn last line is cut off."""
    if output == "-" or not os.path.exists(output):
        return 0
    with open(output, "rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return whole.count(b"\n")


@contextlib.contextmanager
def _open_output(output: str, done: int, quiet: bool) -> Iterator[TextIO]:
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
