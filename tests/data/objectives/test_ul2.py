"""UL2: its seven denoisers, each told by its mode, each invertible, in one row's lengths."""

import collections
import dataclasses

import numpy as np
import pytest

from t5x_lite.data.objectives import UL2, Denoiser
from t5x_lite.types import InputError
from tests.data.toy import T5, text

VOCABULARY = dataclasses.replace(T5, size=1000, num_sentinels=600)
EOS = 3


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def invert(inputs: list[int], targets: list[int], first: int) -> list[int]:
    assert inputs[-1] == targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= first:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    out: list[int] = []
    for token in inputs[:-1]:
        out.extend(spans.pop(token) if token >= first else [token])
    assert not spans
    return out


def test_every_denoiser_is_told_and_invertible():
    objective = UL2(VOCABULARY)
    modes = {objective.mode_token(mode): mode for mode in ("R", "S", "X")}
    assert sorted(modes) == [400, 401, 402], "the last three sentinels"
    assert modes[402] == "R"
    seen = collections.Counter()
    for seed in range(700):
        tokens = text(200 + seed % 100, seed)
        example = objective(tokens, rng=generator(seed))
        mode = modes[int(example.inputs[0])]
        seen[mode] += 1
        inputs, targets = example.inputs[1:].tolist(), example.targets.tolist()
        assert invert(inputs, targets, 403) == tokens.tolist()
        hidden = sum(token < 400 for token in targets) - 1
        share = hidden / len(tokens)
        if mode == "S":
            assert inputs[-2] == VOCABULARY.sentinel_id(0), "the end, as one span"
            assert hidden == round(0.25 * len(tokens))
        elif mode == "R":
            assert abs(share - 0.15) < 0.01
        else:
            assert abs(share - 0.5) < 0.01 or (abs(share - 0.15) < 0.01 and len(targets) < 60)
    for mode, share in (("R", 2 / 7), ("S", 1 / 7), ("X", 4 / 7)):
        assert abs(seen[mode] / 700 - share) < 0.08


def test_weights_choose():
    r, s = Denoiser("R", 0.15, 3.0), Denoiser("S", 0.25, None)
    objective = UL2(VOCABULARY, denoisers=[r, s], weights=[1, 3])
    first = [int(objective(text(50), rng=generator(i)).inputs[0]) for i in range(400)]
    assert abs(first.count(objective.mode_token("S")) / 400 - 0.75) < 0.08


@pytest.mark.parametrize("lengths", [{"encoder": 64, "decoder": 64}, {"decoder": 128}])
def test_whatever_is_drawn_fits(lengths):
    objective = UL2(VOCABULARY)
    (most,) = objective.fit(lengths)
    inputs = targets = row = 0
    for seed in range(200):
        example = objective(text(most, seed), rng=generator(seed))
        inputs = max(inputs, len(example.inputs))
        targets = max(targets, len(example.targets))
        row = max(row, len(example.inputs) + len(example.targets))
    if "encoder" in lengths:
        assert inputs <= 64
        assert targets <= 64
        assert most >= 64, "a text is longer than what is left of it"
    else:
        assert 126 <= row <= 128


def test_short_texts():
    for seed in range(40):
        for length in (0, 1, 2, 3):
            tokens = text(length, seed)
            example = UL2(VOCABULARY)(tokens, rng=generator(seed))
            whole = invert(example.inputs[1:].tolist(), example.targets.tolist(), 403)
            assert whole == tokens.tolist()


def test_input_errors():
    few = dataclasses.replace(VOCABULARY, num_sentinels=20)
    with pytest.raises(InputError, match="needs 98 sentinels"):
        UL2(few).fit({"encoder": 512, "decoder": 512})
    published = dataclasses.replace(VOCABULARY, num_sentinels=100)
    assert UL2(published).fit({"encoder": 512, "decoder": 512})[0] > 560
    for wrong in ({"weights": [1.0]}, {"denoisers": []}, {"weights": [0.0] * 7}):
        with pytest.raises(InputError, match="one positive weight a denoiser"):
            UL2(VOCABULARY, **wrong)
    for wrong in (("Q", 0.5, 3.0), ("R", 1.0, 3.0), ("R", 0.5, 0.5)):
        with pytest.raises(InputError, match="expected"):
            Denoiser(*wrong)
    with pytest.raises(InputError, match="too short for UL2"):
        UL2(VOCABULARY).fit({"encoder": 2, "decoder": 64})
