"""What vectors know of labels: probes over what `embed` wrote."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import numpy as np

from t5x_lite.evaluation import probes
from t5x_lite.evaluation.bootstrap import with_intervals
from t5x_lite.evaluation.label_metrics import accuracy
from t5x_lite.train.embed import read
from t5x_lite.types import InputError


def probe(
    *,
    vectors: str,
    labels: str,
    test_vectors: str | None = None,
    test_labels: str | None = None,
    label: str = "label",
    held_out: float = 0.2,
    seed: int = 0,
    neighbours: int = 10,
    penalty: float = 1e-3,
    resamples: int = 1000,
) -> dict[str, float]:
    """Trains a linear probe and asks the nearest neighbours; prints what share of each is right.

    Args:
      vectors: a folder that scripts/embed.py wrote.
      labels: a `.jsonl` file with a label for each vector, such as the one that was embedded:
        matched by the field `id`, or else by the line's number, from 0.
      test_vectors, test_labels: what the probes are judged by, likewise; None: a part held out.
      label: the field of the labels, texts or numbers.
      held_out: that part's share, without test_vectors.
      seed: of which vectors are held out.
      neighbours: that have a vote, by their cosines.
      penalty: of the linear probe's weights, L2.
      resamples: of the 95% intervals; see `evaluation.bootstrap`.

    Returns:
      `linear` and `neighbours`, accuracies in percent, each with its interval `_low` and `_high`;
      `majority`, what always saying the commonest label gets; `trained_on` and `judged_by`, how
      many vectors. InputError: files that don't belong together, or too few vectors or labels.
    """
    if neighbours < 1 or penalty < 0:
        raise InputError(
            f"probe.neighbours={neighbours}, penalty={penalty}: expected at least 1, and at least 0"
        )
    if (test_vectors is None) != (test_labels is None):
        raise InputError("probe.test_vectors and probe.test_labels go together: give both or none")
    x, y = _labelled(vectors, labels, label)
    if test_vectors is None or test_labels is None:
        test, train = _parts(len(x), held_out, seed)
        (x, test_x), (y, test_y) = (x[train], x[test]), (_at(y, train), _at(y, test))
    else:
        test_x, test_y = _labelled(test_vectors, test_labels, label)
        if test_x.shape[1] != x.shape[1]:
            raise InputError(
                f"the vectors in '{vectors}' have {x.shape[1]} dimensions and those in "
                f"'{test_vectors}' {test_x.shape[1]}: embed both with one model"
            )
    linear = probes.LinearProbe(x, y, penalty=penalty)
    answers = {
        "linear": linear.predict(test_x),
        "neighbours": probes.vote(x, y, test_x, k=neighbours),
    }
    common = Counter(y).most_common(1)[0][0]
    found: dict[str, float] = {"trained_on": len(x), "judged_by": len(test_x)}
    found["majority"] = accuracy(test_y, [common] * len(test_y))["accuracy"]
    for name, predicted in answers.items():
        for key, value in with_intervals(accuracy, test_y, predicted, samples=resamples).items():
            found[key.replace("accuracy", name)] = value
    print(json.dumps({key: round(value, 2) for key, value in found.items()}))
    unseen = set(test_y) - set(y)
    if unseen:
        print(f"warning: no vector to learn {sorted(map(str, unseen))} from", file=sys.stderr)
    return found


def _labelled(folder: str, path: str, field: str) -> tuple[np.ndarray, list[Any]]:
    """The folder's vectors `[n, d]` and each one's label."""
    ids, vectors = read(folder)
    known: dict[Any, Any] = {}
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except OSError as error:
        raise InputError(f"can't read probe.labels '{path}': {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"probe.labels '{path}' is not JSON lines in UTF-8: {error}") from error
    for number, record in enumerate(records):
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str | int | float):
            raise InputError(
                f"{path}, line {number + 1}: expected a JSON object with a text or a number in the "
                f"field '{field}' (probe.label)"
            )
        name = record.get("id", number)
        if name in known:
            raise InputError(f"{path}, line {number + 1}: the id {name!r} is there twice")
        known[name] = value
    without = next((name for name in ids if name not in known), None)
    if without is not None:
        raise InputError(
            f"'{path}' has no label for the vector {without!r} of '{folder}': give the file that "
            "was embedded, or one with its ids"
        )
    return vectors, [known[name] for name in ids]


def _parts(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which are held out, and the others."""
    held = round(count * share)
    if not 0 < held < count:
        raise InputError(
            f"probe.held_out={share} of {count} vectors are {held}: expected at least one to be "
            "judged by, and one to learn from"
        )
    order = np.random.default_rng(seed).permutation(count)
    return order[:held], order[held:]


def _at(labels: list[Any], places: np.ndarray) -> list[Any]:
    return [labels[place] for place in places]
