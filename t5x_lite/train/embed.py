"""Texts to vectors, in bulk: one vector a text, with ids, started again where it was left.

The output folder holds

    vectors.npy           float32 [texts, dimensions], all rows from the start
    ids.jsonl             {"id": ...} a line, of the rows that are written
    embed.json            whose vectors these are
    vectors.array_record  if asked for, when all rows are there: see `read_array_record`
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.data.vocabularies.base import write_atomically
from t5x_lite.decode import modes
from t5x_lite.decode.modes.asker import Asker
from t5x_lite.sharding import Partitioner
from t5x_lite.train import asked
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError

VECTORS = "vectors.npy"
IDS = "ids.jsonl"
ABOUT = "embed.json"
ARRAY_RECORD = "vectors.array_record"
FORMATS = ("npy", "array_record")


def embed(
    *,
    model_dir: str,
    input: str,
    output: str,
    adapter: str | None = None,
    format: Literal["npy", "array_record"] = "npy",
    pooling: Literal["first", "last", "mean"] | None = None,
    prefix: str = "",
    step: int | None = None,
    vocabulary: Vocabulary | None = None,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    partitioner: Partitioner = Partitioner(),
) -> int:
    """Writes a vector for each text of a file.

    Texts of like length share a batch, padded to a power of two. Started again on a folder that is
    half done, it goes on behind the rows that are written.

    Args:
      model_dir: a run's folder, or Hugging Face's.
      input: a text file (one text a line), or a `.jsonl` file: texts in its field `inputs`, ids in
        its field `id`. A text without an id has its line's number, from 0.
      output: a folder.
      adapter: a PEFT directory, or a run's folder that was tuned on the model.
      format: "npy", or "array_record" for that beside it.
      pooling: of the states; None: as the model's EmbeddingHead says, or their mean. Vectors have
        length 1 if the head normalises.
      prefix: put before every text ("query: ", where a model was trained so).
      step: the checkpoint; None: the latest.
      vocabulary: None: the model's.
      batch_size: texts embedded together.
      max_input_tokens: longer texts are an error, with their number; None: 128, or what the model
        has positions for.
      partitioner: the mesh.

    Returns:
      How many vectors were written now.

    Raises InputError, before anything is compiled, for what does not fit, and for a folder that
    holds the vectors of something else.
    """
    if format not in FORMATS:
        raise InputError(f"embed.format='{format}': expected one of {', '.join(FORMATS)}")
    loaded = open_model(
        model_dir, adapter=adapter, step=step, vocabulary=vocabulary, partitioner=partitioner
    )
    config = loaded.model.config
    if max_input_tokens is None:
        max_input_tokens = modes.room(loaded, "embed", 1)
    options = modes.Options(max_input_tokens=max_input_tokens, prefix=prefix, pooling=pooling)
    mode = modes.make(loaded, "embed", options)
    asker = Asker(mode, batch_size)
    items = list(asked.read_items(input))
    ids = [item.get("id", number) for number, item in enumerate(items)]
    about = {
        "model_dir": os.path.abspath(model_dir),
        "adapter": None if adapter is None else os.path.abspath(adapter),
        "step": step,
        "pooling": pooling,
        "prefix": prefix,
        "texts": len(items),
        "texts_fingerprint": _fingerprint(items, ids),
    }
    writes = jax.process_index() == 0
    done = _begin(output, about) if writes or os.path.exists(output) else 0
    rows = []
    for number, item in enumerate(items[done:], start=done + 1):
        try:
            rows.append(mode.encode(item))
        except InputError as error:
            raise InputError(f"text {number} of '{input}': {error}") from error
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not (writes and console.is_terminal)) as progress:
        task = progress.add_task("embedding", total=len(items), completed=done)
        at = done
        for window in asker.answers(rows, done):
            if writes:
                shape = (len(items), config.embed_dim)
                _write(output, shape, at, np.stack(window), ids[at : at + len(window)])
            at += len(window)
            progress.advance(task, len(window))
    if writes:
        if format == "array_record":
            _write_array_record(output)
        print(f"{len(items)} vectors are in {output}", file=sys.stderr)
    return len(items) - done


def read(folder: str) -> tuple[list[Any], np.ndarray]:
    """Ids and vectors `[texts, dimensions]` of a folder that `embed` wrote.

    Raises InputError for one that is not there or half done.
    """
    try:
        vectors = np.load(os.path.join(folder, VECTORS))
        with open(os.path.join(folder, IDS), encoding="utf-8") as file:
            ids = [json.loads(line)["id"] for line in file]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"'{folder}' holds no vectors ({error}): expected a folder that scripts/embed.py wrote"
        ) from error
    if len(ids) != len(vectors):
        raise InputError(
            f"'{folder}' has {len(ids)} of {len(vectors)} vectors: run scripts/embed.py again, and "
            "it goes on from there"
        )
    return ids, vectors


def read_array_record(path: str) -> tuple[list[Any], np.ndarray]:
    """Ids and vectors of an array_record file.

    A record is the length of the id as a little-endian uint32, the id as JSON, and the vector as
    little-endian float32.
    """
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    records = reader.read_all()
    reader.close()
    ids, vectors = [], []
    for record in records:
        (size,) = struct.unpack_from("<I", record)
        ids.append(json.loads(record[4 : 4 + size]))
        vectors.append(np.frombuffer(record, "<f4", offset=4 + size))
    return ids, np.stack(vectors)


def _fingerprint(items: Sequence[Any], ids: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for item, name in zip(items, ids, strict=True):
        digest.update(json.dumps([name, item["inputs"]]).encode())
    return digest.hexdigest()[:16]


def _begin(output: str, about: dict[str, Any]) -> int:
    """How many rows are written already; a fresh folder is given its embed.json."""
    path = os.path.join(output, ABOUT)
    if not os.path.exists(path):
        if os.path.isdir(output) and os.listdir(output):
            raise InputError(f"embed.output='{output}' is not empty: name a new folder")
        write_atomically(path, (json.dumps(about, indent=2) + "\n").encode())
        return 0
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    for name, value in about.items():
        if found.get(name) != value:
            raise InputError(
                f"embed.output='{output}' holds vectors of {name} {found.get(name)!r}, and these "
                f"would be of {value!r}: name a new folder"
            )
    if not os.path.exists(os.path.join(output, VECTORS)):
        return 0
    return asked.finished_lines(os.path.join(output, IDS))


def _write(
    output: str, shape: tuple[int, int], at: int, vectors: np.ndarray, ids: Sequence[Any]
) -> None:
    """Rows from `at` on; their ids last, as what says that they are there."""
    path = os.path.join(output, VECTORS)
    table: np.ndarray
    if at == 0:
        table = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    else:
        table = np.lib.format.open_memmap(path, "r+")
    table[at : at + len(vectors)] = vectors
    table.flush()
    with open(os.path.join(output, IDS), "a" if at else "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": name}, ensure_ascii=False) + "\n" for name in ids)


def _write_array_record(output: str) -> None:
    from array_record.python import array_record_module

    path = os.path.join(output, ARRAY_RECORD)
    writer = array_record_module.ArrayRecordWriter(path + ".partial", "group_size:1")
    for name, vector in zip(*read(output), strict=True):
        text = json.dumps(name, ensure_ascii=False).encode()
        writer.write(struct.pack("<I", len(text)) + text + vector.astype("<f4").tobytes())
    writer.close()
    os.replace(path + ".partial", path)
