"""Another model's weights to start from: what is read from where, and what is drawn anew.

A classifier is a pretrained encoder under a new head. Rules on the new model's paths, the first
match wins, say where each parameter is found:

    (("sequence_head/.*", None),)         the head is fresh, all else keeps its path
    ((r"encoder/(.*)", r"decoder/\\1"),)    the encoder starts as the other model's decoder
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from absl import logging

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params

Rule: TypeAlias = tuple[str, str | None]  # (regex of our paths, template of theirs or None: fresh)


def fill(session: Session, found: Params, rules: Sequence[Rule], where: str) -> Params:
    """The session's base parameters: `found` where the rules say so, fresh from its seed elsewhere.

    Logs what is restored, what is fresh and what of `found` is left out. Raises InputError for a
    rule that matches none of the model's paths, and for parameters that `found`, from `where`,
    lacks or has in another shape.
    """
    shapes = trees.flatten(session.base_shapes)
    theirs = trees.flatten(found, is_leaf=weights.is_node)  # quantised weights stay so
    sources = find_sources(shapes, rules)
    problems = [
        f"{path} {tuple(shape.shape)} is not there"
        if source not in theirs
        else f"{source} is {tuple(theirs[source].shape)}, the model's {path} {tuple(shape.shape)}"
        for path, shape in shapes.items()
        if (source := sources[path]) is not None
        and (source not in theirs or theirs[source].shape != shape.shape)
    ]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"the weights in '{where}' do not fill this model:\n  "
            + "\n  ".join(problems[:8])
            + more
            + "\nWhat is to be drawn anew, RunCheckpoint.restore says, for instance "
            "(('sequence_head/.*', None),)"
        )
    fresh = [path for path, source in sources.items() if source is None]
    left_out = [path for path in theirs if path not in sources.values()]
    logging.info(
        "restored %d of %d parameters of '%s'", len(shapes) - len(fresh), len(shapes), where
    )
    for what, paths in (("fresh", fresh), ("left out", left_out)):
        logging.info("%s: %s", what, ", ".join(paths) or "nothing")
    drawn = session.init_some(fresh) if fresh else {}
    return trees.unflatten(
        {
            path: drawn[path] if source is None else _placed(theirs[source], shapes[path])
            for path, source in sources.items()
        }
    )


def _placed(found: Any, shape: Any) -> Any:
    """An array as the model has it; a node keeps the shards that it was restored in."""
    if weights.is_node(found):
        return found
    return jax.device_put(found.astype(shape.dtype), shape.sharding)


def find_sources(paths: Mapping[str, object], rules: Sequence[Rule]) -> dict[str, str | None]:
    """Where each path is found; None: it is fresh. InputError: a rule that matches nothing."""
    chosen = trees.match_first(
        [(pattern, (pattern, template)) for pattern, template in rules],
        paths,
        what="RunCheckpoint.restore",
    )
    sources: dict[str, str | None] = {}
    for path, rule in chosen.items():
        if rule is None:
            sources[path] = path
            continue
        pattern, template = rule
        match = re.fullmatch(pattern, path)
        assert match is not None
        try:
            sources[path] = None if template is None else match.expand(template)
        except (re.error, IndexError) as error:
            raise InputError(
                f"RunCheckpoint.restore: '{template}' can't be filled from '{pattern}': {error}"
            ) from error
    return sources
