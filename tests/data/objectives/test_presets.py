"""gin_configs/objectives: every file builds, and holds the published settings."""

import pytest

from t5x_lite import configure
from t5x_lite.data import objectives
from t5x_lite.data.objectives import (
    BART,
    UL2,
    Denoiser,
    MaskedLM,
    MaskSpans,
    MaskWholeWords,
    SentencePermutation,
    TextInfilling,
)
from t5x_lite.data.vocabularies import ByteVocabulary

BYTES = ByteVocabulary()
SAME_NAME = {
    "span_corruption": objectives.SpanCorruption,
    "iid_denoising": objectives.IidDenoising,
    "masked_lm": MaskedLM,
    "next_sentence_pairs": objectives.NextSentencePairs,
    "causal_lm": objectives.CausalLM,
    "prefix_lm": objectives.PrefixLM,
    "fill_in_the_middle": objectives.FillInTheMiddle,
    "bart": BART,
    "ul2": UL2,
    "text_to_text": objectives.TextToText,
}
WANT = {
    **{name: made(BYTES) for name, made in SAME_NAME.items()},
    "masked_words": MaskedLM(BYTES, selection=MaskWholeWords()),
    "masked_spans": MaskedLM(BYTES, selection=MaskSpans()),
}


def build(name: str, *bindings: str):
    kind = type(WANT[name])
    with configure.isolated():
        files = [f"objectives/{name}.gin"]
        configure.parse(files, ["VOCABULARY = @ByteVocabulary()", *bindings])
        return kind(**configure.arguments(kind))


@pytest.mark.parametrize("name", sorted(WANT))
def test_a_preset_is_what_is_published(name):
    assert build(name) == WANT[name]


def test_every_file_is_tested():
    files = {path.stem for path in (configure.GIN_CONFIGS / "objectives").glob("*.gin")}
    assert files == set(WANT)


def test_settings_can_be_changed_from_gin():
    assert build("bart", "TextInfilling.rate = 0.5") == BART(
        BYTES, [SentencePermutation(BYTES), TextInfilling(BYTES, 0.5)]
    )
    made = build(
        "ul2",
        "UL2.denoisers = [@r/Denoiser()]",
        "r/Denoiser.mode = 'R'",
        "r/Denoiser.noise_density = 0.1",
        "r/Denoiser.mean_span_length = 2.0",
    )
    assert made == UL2(BYTES, [Denoiser("R", 0.1, 2.0)])
