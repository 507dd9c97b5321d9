"""Every file of gin_configs/peft is a transform that fits a model, behind another or alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from t5x_lite import configure, trees
from t5x_lite.models.config_heads import SequenceHead
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.train.session import Session
from tests import common

FOLDER = Path(__file__).resolve().parents[2] / "gin_configs" / "peft"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gin"))


def built_transform(*, transform: Transform) -> Transform:
    """What the gin files make of `%TRANSFORM`."""
    return transform


@pytest.fixture(scope="module", autouse=True)
def _registered():
    configure.register([built_transform])


def read(*names: str) -> Transform:
    files = [f"peft/{name}.gin" for name in names]
    with configure.isolated():
        configure.parse(files, ["built_transform.transform = %TRANSFORM"])
        return built_transform(**configure.arguments(built_transform))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_some_of_a_model_and_is_itself_behind_another(name):
    transform = read(name)
    head = SequenceHead(num_labels=2)
    config = dataclasses.replace(common.BERT, head=head) if "head" in name else common.BERT
    if any(word in name for word in ("qlora", "int8")):  # blocks of 64 inputs
        stack = dataclasses.replace(common.STACK, head_dim=16, mlp_dim=128)
        config = dataclasses.replace(config, embed_dim=128, encoder=stack)
    trainable, _ = Session(config, transform).split_shapes
    whole = sum(leaf.size for leaf in jax.tree.leaves(Session(config).base_shapes))
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert (trained == whole) == (transform == Full())
    if name.endswith("_head"):
        assert any("sequence_head/out" in path for path in trees.flatten(trainable))
    assert read("full", name) == transform
    assert FOLDER.joinpath(f"{name}.gin").read_text().startswith("# ")
