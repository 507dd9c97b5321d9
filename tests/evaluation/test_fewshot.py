"""Prompts of k shots: what stands in them, who is never among them, and what scores decide."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from t5x_lite.data.preprocessors import Rename
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.scoring import Score, loglikelihood
from t5x_lite.evaluation import fewshot
from t5x_lite.evaluation.fewshot import Calibration, Choose, InContext, ShotTemplate, Write
from t5x_lite.models.config_positions import RelativeBias
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests import common

BYTES = ByteVocabulary(extra_ids=0)
ANSWERS = ("bad", "good")


@dataclasses.dataclass(frozen=True)
class Records:
    """Splits of records that are numbered words."""

    sizes: tuple[tuple[str, int], ...] = (("train", 9), ("test", 5))

    @property
    def splits(self):
        return tuple(dict(self.sizes))

    def open(self, split):
        return [{"text": f"{split}{i}", "label": i % 2} for i in range(dict(self.sizes)[split])]


def task(**changes) -> InContext:
    template = ShotTemplate(question="{text} is", separator="\n", instruction="Say.\n")
    parts = {"name": "words", "source": Records(), "template": template}
    return InContext(**(parts | {"answer": Choose(choices=ANSWERS)} | changes))


@functools.cache
def loaded() -> Loaded:
    config = common.with_stacks(common.FAMILIES["llama"], num_layers=1, positions=RelativeBias())
    model, params = common.build(dataclasses.replace(config, vocab_size=BYTES.size))
    return Loaded(model, params, BYTES, Partitioner())


def test_a_prompt_is_its_shots_and_then_its_question():
    (first, *_) = fewshot.prompts(task(), 2)
    one, two = (f"train{number} is {ANSWERS[number % 2]}\n" for number in first.shots)
    assert first.text == f"Say.\n{one}{two}test0 is"
    assert fewshot.prompts(task(), 0)[3].text == "Say.\ntest3 is"


def test_shots_are_of_the_seed_and_the_example_and_never_the_example_itself():
    own = task(shots_split="test")
    for index, prompt in enumerate(fewshot.prompts(own, 4)):
        assert sorted([*prompt.shots, index]) == [0, 1, 2, 3, 4]
    shots = [prompt.shots for prompt in fewshot.prompts(task(), 3)]
    assert shots == [prompt.shots for prompt in fewshot.prompts(task(limit=5), 3)]
    assert shots != [prompt.shots for prompt in fewshot.prompts(task(seed=1), 3)]
    assert len(set(shots)) > 1
    fewer = [prompt.shots for prompt in fewshot.prompts(task(limit=3), 2)]
    assert fewer == [numbers[:2] for numbers in shots[:3]]


def test_every_order_of_shots_is_drawn():
    drawn = {tuple(fewshot.draw(2, 3, 0, index, leave_out=1)) for index in range(40)}
    assert drawn == {(0, 2), (2, 0)}


@pytest.mark.parametrize("per", ["token", "byte", "text"])
def test_the_likeliest_choice_by_length_is_the_answer(per):
    """`loglikelihood` of prompt and choice by themselves says the same, divided by length."""
    choose = Choose(choices=("a", "good", "bä"), per=per)
    asked = task(answer=choose, limit=2)
    answers = fewshot.answer(loaded(), asked, 1, batch_size=8)
    pairs = [(record["prompt"], f" {text}") for record in answers for text in choose.choices]
    scores = np.array([s.logprob for s in loglikelihood(loaded(), pairs, batch_size=8)])
    lengths = {"token": [2, 5, 4], "byte": [2, 5, 4], "text": [1, 1, 1]}[per]
    expected = scores.reshape(2, 3) / lengths
    np.testing.assert_allclose([record["scores"] for record in answers], expected, rtol=1e-5)
    for record, row in zip(answers, expected, strict=True):
        assert record["prediction"] == choose.choices[int(np.argmax(row))]
        assert record["target"] in ANSWERS + choose.choices


def test_lengths_are_tokens_or_bytes_or_nothing():
    score = Score(logprob=-12.0, tokens=2, greedy=False)
    found = {per: fewshot.normalised(score, "ä b", per) for per in ("token", "byte", "text")}
    assert found == {"token": -6.0, "byte": -3.0, "text": -12.0}


def test_calibration_takes_away_what_is_likely_without_content():
    """A choice twice as likely in a bare prompt has to be twice as likely to win (Zhao et al.)."""
    bare = np.log([[0.6, 0.4], [0.8, 0.2]])
    ours = fewshot.calibrated(np.log([0.6, 0.4]), bare)
    np.testing.assert_allclose(np.exp(ours), [0.6 / 0.7, 0.4 / 0.3])
    # Any constant may be added to scores, and the same scores everywhere decide nothing.
    np.testing.assert_allclose(fewshot.calibrated(np.log([0.6, 0.4]) + 7.0, bare - 5.0), ours)
    same = fewshot.calibrated(np.array([-3.0, -9.0]), np.array([[-3.0, -9.0]]))
    np.testing.assert_allclose(same, [0.0, 0.0], atol=1e-12)


@pytest.mark.slow
def test_calibrated_answers_come_from_prompts_with_the_same_shots():
    choose = Choose(choices=ANSWERS, calibration=Calibration(texts=("N/A", "")))
    (record,) = fewshot.answer(loaded(), task(answer=choose, limit=1), 2, batch_size=8)
    start = record["prompt"].removesuffix("test0 is")

    def row(prompt):
        found = loglikelihood(loaded(), [(prompt, " bad"), (prompt, " good")], batch_size=8)
        return np.array([score.logprob / score.tokens for score in found])

    bare = np.array([row(start + "N/A is"), row(start + " is")])
    expected = fewshot.calibrated(row(record["prompt"]), bare)
    np.testing.assert_allclose(record["scores"], expected, rtol=1e-4, atol=1e-4)


def test_written_answers_end_at_a_stop(monkeypatch):
    def write(loaded, prompts, *, max_tokens, stops, **options):
        assert (max_tokens, stops) == (3, (".",))
        return [f" {prompt[-5:]} " for prompt in prompts]

    monkeypatch.setattr(fewshot, "write", write)
    how = Write(target_field="name", max_tokens=3, stops=(".",))
    asked = task(answer=how, preprocessors=[Rename({"name": "label"})])
    assert fewshot.answer(loaded(), asked, 1)[4] == {
        "prompt": fewshot.prompts(asked, 1)[4].text,
        "shots": list(fewshot.prompts(asked, 1)[4].shots),
        "target": "0",
        "prediction": "t4 is",
    }


def test_mistakes_in_a_task_are_named():
    with pytest.raises(InputError, match=r"asks for \{title\}, but the record has text, label"):
        fewshot.prompts(task(template=ShotTemplate(question="{title}")), 0)
    with pytest.raises(InputError, match=r"expected \{answer\} in it"):
        ShotTemplate(answer="{label}")
    with pytest.raises(InputError, match="a brace itself is written twice"):
        ShotTemplate(question="{text")
    with pytest.raises(InputError, match="10 shots: expected between 0 and the 9"):
        fewshot.prompts(task(), 10)
    with pytest.raises(InputError, match="target_field is 'x', but the record has text, label"):
        fewshot.prompts(task(answer=Choose(choices=ANSWERS, target_field="x")), 1)
    with pytest.raises(InputError, match="the record's 'text' is 'train"):
        fewshot.prompts(task(answer=Choose(choices=ANSWERS, target_field="text")), 1)
    for odd in ("good", ["good", 3], [], None):
        with pytest.raises(
            InputError, match=r"the record's 'choices' is .*expected a list of text"
        ):
            Choose().of({"choices": odd})
    for odd in (True, [1], None, 2, 0.5):
        with pytest.raises(InputError, match=r"the record's 'label' is .*the number of a choice"):
            Choose(choices=ANSWERS[:2]).target({"label": odd})
    with pytest.raises(InputError, match=r"Choose\.per='word'"):
        Choose(per="word")


def test_calibration_by_what_is_all_but_impossible_is_finite():
    found = fewshot.calibrated(np.array([-10.0, -900.0]), np.array([[-10.0, -900.0]]))
    np.testing.assert_allclose(found, [0.0, 0.0], atol=1e-9)
