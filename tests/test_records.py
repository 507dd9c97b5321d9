"""Dataclasses through JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import RelativeBias
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Freeze, Full
from t5x_lite.records import from_record, to_record
from t5x_lite.types import InputError
from tests import common

CLASSES = (ModelConfig, StackConfig, RelativeBias, LMHead, Full, Freeze, LoRA)


@dataclasses.dataclass(frozen=True)
class Holder:
    values: object


@pytest.mark.parametrize(
    "value",
    [
        common.T5,
        dataclasses.replace(common.BERT, dtype="bfloat16"),
        Full(),
        LoRA(rank=3, alpha=0.1, targets=(".*/query/kernel", "lm_head/kernel")),
        Freeze(trainable=("decoder/.*",)),
        Holder((1, 2.5, None, True, "x", (Full(), LoRA()))),
        Holder({"a": {"b": (Full(), 1)}, "c": ()}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_record_comes_back_from_json_as_it_was(value):
    text = json.dumps(to_record(value))
    assert from_record(json.loads(text), (*CLASSES, Holder)) == value


def test_a_record_says_its_class_and_fields():
    assert to_record(LoRA(rank=2, targets=("x",))) == {
        "class": "LoRA",
        "rank": 2,
        "alpha": 16.0,
        "targets": ["x"],
        "rank_rules": [],
        "alpha_rules": [],
        "rank_stabilised": False,
        "dropout": 0.0,
        "init": "lora",
    }
    # What was written before there were more fields is read as it was meant.
    before = {"class": "LoRA", "rank": 2, "alpha": 16.0, "targets": ["x"]}
    assert from_record(before, CLASSES) == LoRA(rank=2, targets=("x",))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"class": "Lora"}, "class 'Lora': expected one of Freeze, Full, LMHead, LoRA"),
        ([1, {"x": {"class": "Nothing"}}], "class 'Nothing'"),
        ({"class": "LoRA", "ranks": 3}, "'LoRA' does not fit this version.*ranks"),
        ({"class": "Freeze"}, "'Freeze' does not fit this version.*trainable"),
        ({"class": "LoRA", "rank": 0}, "LoRA.rank=0"),
    ],
)
def test_a_record_of_something_else_is_an_error(record, message):
    with pytest.raises(InputError, match=message):
        from_record(record, CLASSES)
