"""Left to right: causal and prefix LM, fill in the middle, and pairs for every family."""

import numpy as np
import pytest

from t5x_lite.data.objectives import CausalLM, FillInTheMiddle, PrefixLM, TextToText
from t5x_lite.types import InputError
from tests.data.toy import BERT, GPT, LLAMA, T5, ToyVocabulary, text

EOS = 3


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def test_causal_lm_is_the_text_and_its_end():
    objective = CausalLM(GPT)
    example = objective(np.array([5, 6, 7], np.int32), rng=generator(0))
    assert example.targets.tolist() == [5, 6, 7, EOS]
    assert example.inputs is None
    assert example.start_id == 3
    ended = objective(np.array([5, 6, EOS], np.int32))
    assert ended.targets.tolist() == [5, 6, EOS], "not twice"
    assert objective(np.zeros(0, np.int32)).targets.tolist() == [EOS]
    assert objective.fit({"decoder": 64}) == (64,)


@pytest.mark.parametrize(
    ("vocabulary", "begins", "continues"),
    [(T5, [], []), (BERT, [2], [2]), (LLAMA, [2], []), (GPT, [], [])],
)
def test_prefix_and_rest_are_the_text(vocabulary, begins, continues):
    objective, cuts = PrefixLM(vocabulary), set()
    for seed in range(300):
        tokens = text(12)
        example = objective(tokens, rng=generator(seed))
        prefix, rest = example.inputs.tolist(), example.targets.tolist()
        assert prefix[: len(begins)] == begins
        assert rest[: len(continues)] == continues
        assert prefix[-1] == rest[-1] == EOS
        joined = prefix[len(begins) : -1] + rest[len(continues) : -1]
        assert joined == tokens.tolist()
        cuts.add(len(prefix) - len(begins) - 1)
    assert cuts == set(range(1, 12)), "any cut with a token on either side"
    for short in ([], [5]):
        example = objective(np.array(short, np.int32), rng=generator(0))
        assert example.inputs.tolist() == [*begins, *short, EOS]


@pytest.mark.parametrize("vocabulary", [T5, BERT, LLAMA])
@pytest.mark.parametrize("lengths", [{"encoder": 9, "decoder": 7}, {"decoder": 20}])
def test_any_prefix_fits(vocabulary, lengths):
    (most,) = PrefixLM(vocabulary).fit(lengths)
    sizes = {"encoder": 0, "decoder": 0, "row": 0}
    for seed in range(300):
        example = PrefixLM(vocabulary)(text(most), rng=generator(seed))
        made = len(example.inputs), len(example.targets)
        for name, size in zip(sizes, (*made, sum(made)), strict=True):
            sizes[name] = max(sizes[name], size)
    if "encoder" in lengths:
        assert sizes["encoder"] <= 9
        assert sizes["decoder"] <= 7
        assert sizes["encoder"] == 9 or sizes["decoder"] == 7
    else:
        assert sizes["row"] == 20


def unfilled(targets: np.ndarray, markers: tuple[int, int, int]) -> tuple[str, list[int]]:
    """(order, the text): the parts put back where they were."""
    pre, suf, mid = markers
    tokens = targets.tolist()
    assert tokens.pop() == EOS
    if pre not in tokens:
        return "plain", tokens
    assert tokens[0] == pre
    at_suf, at_mid = tokens.index(suf), tokens.index(mid)
    assert sum(t in markers for t in tokens) == 3
    prefix, suffix, middle = tokens[1:at_suf], tokens[at_suf + 1 : at_mid], tokens[at_mid + 1 :]
    if at_suf == 1 and prefix == []:  # SPM, or PSM with an empty prefix: the same in both readings
        return "SPM", middle + suffix
    return "PSM", prefix + middle + suffix


def test_the_middle_can_be_put_back():
    objective = FillInTheMiddle(GPT, rate=0.7)
    markers = tuple(GPT.sentinel_id(k) for k in range(3))
    orders = []
    for seed in range(600):
        tokens = text(60)
        example = objective(tokens, rng=generator(seed))
        order, whole = unfilled(example.targets, markers)
        orders.append(order)
        assert whole == tokens.tolist()
        assert len(example.targets) == 61 + 3 * (order != "plain")
    shares = [orders.count(order) / 600 for order in ("plain", "PSM", "SPM")]
    assert np.allclose(shares, [0.3, 0.35, 0.35], atol=0.08)
    for short in ([], [5]):
        example = FillInTheMiddle(GPT, rate=1.0)(np.array(short, np.int32), rng=generator(0))
        assert unfilled(example.targets, markers)[1] == short


def test_fill_in_the_middle_by_hand():
    tokens = np.arange(10, 20, dtype=np.int32)
    for spm in (0.0, 1.0):
        objective = FillInTheMiddle(GPT, rate=1.0, spm_rate=spm, tokens=(301, 302, 303))
        drawn = generator(4)
        drawn.random(2)
        first, second = sorted(drawn.integers(0, 11, 2).tolist())
        prefix, middle, suffix = (
            tokens[:first].tolist(),
            tokens[first:second].tolist(),
            tokens[second:].tolist(),
        )
        want = (
            [301, 302, *suffix, 303, *prefix, *middle, EOS]
            if spm
            else [301, *prefix, 302, *suffix, 303, *middle, EOS]
        )
        assert objective(tokens, rng=generator(4)).targets.tolist() == want


def test_pairs_by_vocabulary():
    one, two = np.array([5, 6], np.int32), np.array([7], np.int32)
    for vocabulary, inputs, targets, start in (
        (T5, [5, 6, 3], [7, 3], 0),
        (BERT, [2, 5, 6, 3], [2, 7, 3], 3),  # BART's way
        (LLAMA, [2, 5, 6, 3], [7, 3], 2),
    ):
        example = TextToText(vocabulary)(one, two)
        assert example.inputs.tolist() == inputs
        assert example.targets.tolist() == targets
        assert example.start_id == start
    assert TextToText(T5).fit({"encoder": 10, "decoder": 6}) == (9, 5)
    assert TextToText(BERT).fit({"encoder": 10, "decoder": 6}) == (8, 4)
    assert TextToText(LLAMA).fit({"encoder": 10, "decoder": 6}) == (8, 5)
    assert TextToText(LLAMA, inputs_share=0.75).fit({"decoder": 16}) == (10, 3)


def test_input_errors():
    few = ToyVocabulary(num_sentinels=2)
    with pytest.raises(InputError, match="marks three places"):
        FillInTheMiddle(few).fit({"decoder": 64})
    assert FillInTheMiddle(few, tokens=(7, 8, 9)).fit({"decoder": 64}) == (60,)
    with pytest.raises(InputError, match="three different ids"):
        FillInTheMiddle(few, tokens=(7, 7, 9))
    with pytest.raises(InputError, match=r"FillInTheMiddle\.rate is 2"):
        FillInTheMiddle(GPT, rate=2.0)
    with pytest.raises(InputError, match="5 or more"):
        FillInTheMiddle(GPT).fit({"decoder": 4})
    with pytest.raises(InputError, match="not one token fits"):
        PrefixLM(BERT).fit({"decoder": 4})
    with pytest.raises(InputError, match="no room"):
        TextToText(T5).fit({"encoder": 1, "decoder": 5})
    with pytest.raises(InputError, match="no room"):
        TextToText(BERT).fit({"decoder": 5})
