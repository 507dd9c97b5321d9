"""A run that trains a soft prompt and a prefix: nothing but the transform has to be said."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from t5x_lite.data.packing import Pack
from t5x_lite.data.tasks import Mixture
from t5x_lite.models.config_positions import Learned
from t5x_lite.models.prompted import PromptedTransformer, prompt_length
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PromptTuning
from t5x_lite.train import loop
from t5x_lite.train.offline import evaluate_run
from t5x_lite.train.opening import open_model
from t5x_lite.train.run import RunCheckpoint, load_params
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

BOTH = Compose((PromptTuning(length=4), PrefixTuning(length=3)))


@pytest.mark.slow
def test_a_run_trains_evaluates_and_opens(tmp_path):
    run = harness.tiny_run(tmp_path / "run", tmp_path, transform=BOTH, total_steps=2)
    packed = dataclasses.replace(run["batches"], assembly=Pack(window=4, rows=4))
    run |= {"batches": packed, "eval_period": None}
    scores = loop.train(**run)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert records[0]["held/loss"] != scores["held/loss"]
    held = run["evaluations"]
    again = evaluate_run(
        model_dir=str(tmp_path / "run"), evaluations=held, partitioner=harness.one_device()
    )
    assert again[2]["held/loss"] == pytest.approx(scores["held/loss"], rel=1e-5)
    loaded = open_model(str(tmp_path / "run"), partitioner=harness.one_device())
    assert isinstance(loaded.model, PromptedTransformer)
    assert prompt_length(loaded.params) == 4
    with pytest.raises(InputError, match="PrefixTuning can't be merged: no weight of the base"):
        load_params(RunCheckpoint(str(tmp_path / "run")), run["model"], harness.one_device())


def test_rows_have_room_for_the_prompt(tmp_path):
    task = harness.tiny_task(tmp_path)
    behind = task.behind((384, 385))
    assert behind.limits[0] < task.limits[0]
    assert behind.lengths == task.lengths
    with pytest.raises(InputError, match=r"prompt of 32 tokens leaves no room in rows of \{'enc"):
        task.behind(tuple(range(384, 416)))
    with pytest.raises(InputError, match="behind a soft prompt of 31 tokens: "):
        task.behind(tuple(range(384, 415)))
    two = Mixture(name="both", tasks=[task, dataclasses.replace(task, name="other")])
    assert all(one.prompt_ids == (384, 385) for one in two.behind((384, 385)).tasks)
    assert behind.streams((np.arange(5, 20, dtype=np.int32),), np.random.default_rng(0))[
        "encoder_input_tokens"
    ][:2].tolist() == [384, 385]


def test_a_prefix_that_learned_positions_do_not_hold_is_refused(tmp_path):
    learned = common.with_stacks(harness.MODEL, positions=Learned(max_length=34))
    run = harness.tiny_run(tmp_path / "run", tmp_path, model=learned)
    deep = PrefixTuning(length=4, targets=("encoder/.*/(key|value)/kernel",))
    with pytest.raises(InputError, match="32 encoder tokens behind a prefix of 4, but the model"):
        loop.train(**run, transform=deep)
