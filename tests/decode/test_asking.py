"""A model is asked as it was trained: prompts and marks are those of its task's examples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from t5x_lite.data.layouts import as_decoder, as_encoder_decoder, as_prefix_lm
from t5x_lite.data.objectives import (
    BART,
    UL2,
    CausalLM,
    FillInTheMiddle,
    IidDenoising,
    PrefixLM,
    SpanCorruption,
    TextToText,
    TokenMasking,
)
from t5x_lite.data.objectives.span_corruption import denoising_example
from t5x_lite.data.sources import JsonlSource
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.decode import modes, prompts
from t5x_lite.decode.asking import Asking, asking_of
from t5x_lite.decode.loaded import Loaded
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import InputError
from tests import common
from tests.data import toy
from tests.train import harness

GPT = dataclasses.replace(toy.GPT, size=96, num_sentinels=8)
LLAMA = dataclasses.replace(toy.LLAMA, size=96, num_sentinels=8)
BART_V = dataclasses.replace(toy.BERT, size=96, num_sentinels=8)
ROOM = 16


def task_of(objective, layout, name="task"):
    lengths = dict.fromkeys(layout.streams, 24)
    return Task(
        name=name,
        source=JsonlSource(files={"train": "/nowhere.jsonl"}),
        vocabulary=objective.vocabulary,
        objective=objective,
        layout=layout,
        lengths=lengths,
    )


def mode_of(task, name=None, **options):
    family = "bart" if "encoder" in task.lengths else "llama"
    model = Transformer(common.FAMILIES[family])
    loaded = Loaded(model, None, task.vocabulary, harness.one_device(), asking=asking_of(task))
    made = modes.Options(max_input_tokens=ROOM, max_tokens=8, **options)
    return modes.make(loaded, name, made)


def prompted(task, example):
    """What evaluation decodes from: an example's row, up to its first target, with a room of 16."""
    streams = task.layout(example, task.lengths)
    row = {key: np.zeros((1, ROOM), value.dtype) for key, value in streams.items()}
    for key, value in streams.items():
        row[key][0, : len(value)] = value
    for stream in ("encoder", "decoder"):
        key = f"{stream}_input_tokens"
        if key in streams:
            segments = (np.arange(ROOM) < len(streams[key])).astype(np.int32)
            row[f"{stream}_segment_ids"] = segments[None]
    return {key: np.asarray(value) for key, value in prompts.of_batch(row).items()}


def same_prompt(task, asked, text, example):
    found = asked.rows([asked.encode({"inputs": text})], ROOM)
    expected = prompted(task, example)
    assert set(found) == set(expected)
    seen = next(value for key, value in expected.items() if key.endswith("segment_ids"))
    for key, value in found.items():
        np.testing.assert_array_equal(value * seen, expected[key] * seen, err_msg=key)
    np.testing.assert_array_equal(found[next(k for k in found if k.endswith("segment_ids"))], seen)


@pytest.mark.parametrize("vocabulary", [GPT, LLAMA, BART_V], ids=["gpt", "llama", "bart"])
@pytest.mark.parametrize("layout", [as_decoder, as_prefix_lm, as_encoder_decoder])
def test_a_tuned_model_is_prompted_as_in_training_and_evaluation(vocabulary, layout):
    task = task_of(TextToText(vocabulary), layout)
    tokens = np.array([7, 8, 9], np.int32), np.array([10, 11], np.int32)
    same_prompt(task, mode_of(task), "7 8 9", task.objective(*tokens))


@pytest.mark.parametrize("layout", [as_decoder, as_prefix_lm, as_encoder_decoder])
@pytest.mark.parametrize("kind", [SpanCorruption, UL2])
def test_gaps_are_marked_as_in_training(layout, kind):
    vocabulary = BART_V  # with a mask, which is no sign of how it was trained
    task = task_of(SpanCorruption(vocabulary), layout)
    asking = asking_of(task)
    assert asking.gaps == "sentinels"
    mode_token = None
    options = {}
    if kind is UL2:
        mode_token = UL2(vocabulary).mode_token("X")
        options = {"mode_token": "X"}
    noise = np.array([0, 1, 1, 0, 0, 1], bool)
    tokens = np.arange(7, 13).astype(np.int32)
    example = denoising_example(tokens, noise, vocabulary, mode_token)
    same_prompt(task, mode_of(task, "infill", **options), "7 <mask> 10 11 <mask>", example)


def test_a_text_to_rebuild_has_masks_as_in_training():
    masking = TokenMasking(BART_V, 0.5)
    task = task_of(BART(BART_V, [masking]), as_encoder_decoder)
    assert asking_of(task).gaps == "mask"
    example = task.objective(np.arange(7, 15).astype(np.int32), rng=np.random.default_rng(0))
    text = " ".join("<mask>" if i == BART_V.mask_id else str(i) for i in example.inputs[1:-1])
    assert "<mask>" in text
    same_prompt(task, mode_of(task, "infill"), text, example)


@pytest.mark.parametrize("tokens", [None, (50, 51, 52)])
def test_a_middle_is_asked_for_with_the_objectives_marks(tokens):
    objective = FillInTheMiddle(GPT, rate=1.0, spm_rate=0.0, tokens=tokens)
    task = task_of(objective, as_decoder)
    text = np.arange(7, 13).astype(np.int32)
    targets = objective(text, rng=np.random.default_rng(3)).targets
    prefix, suffix, middle = objective.markers
    marks = [targets.tolist().index(mark) for mark in (prefix, suffix, middle)]
    before, after = targets[marks[0] + 1 : marks[1]], targets[marks[1] + 1 : marks[2]]
    asked = mode_of(task, "infill")
    row = asked.encode({"inputs": " ".join(map(str, [*before, "<mask>", *after]))})
    assert row.ids.tolist() == [GPT.start_id, *targets[: marks[2] + 1]]


@pytest.mark.parametrize(
    ("objective", "layout", "expected"),
    [
        (CausalLM(GPT), as_decoder, Asking("continue")),
        (FillInTheMiddle(GPT), as_decoder, Asking("continue", "middle", (95, 94, 93))),
        (TextToText(GPT), as_decoder, Asking("wrapped")),
        (PrefixLM(GPT), as_prefix_lm, Asking("prefix")),
        (PrefixLM(GPT), as_encoder_decoder, Asking()),
        (IidDenoising(GPT, 0.2), as_encoder_decoder, Asking(gaps="sentinels")),
    ],
)
def test_a_task_says_how_it_is_asked(objective, layout, expected):
    assert asking_of(task_of(objective, layout)) == expected


def test_a_mixture_says_what_its_tasks_agree_on():
    causal = task_of(CausalLM(GPT), as_decoder, "causal")
    middle = task_of(FillInTheMiddle(GPT), as_decoder, "middle")
    pairs = task_of(TextToText(GPT), as_decoder, "pairs")
    assert asking_of(Mixture(name="both", tasks=(causal, middle))).prompt == "continue"
    assert asking_of(Mixture(name="both", tasks=(causal, middle))).gaps == "middle"
    assert asking_of(Mixture(name="other", tasks=(causal, pairs))) == Asking()


def test_a_way_of_asking_that_nobody_knows_is_refused():
    with pytest.raises(InputError, match="prompt='chat': expected one of continue, wrapped, pref"):
        Asking(prompt="chat")
