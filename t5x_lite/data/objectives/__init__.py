"""Objectives: what the model is asked to learn from a text.

An objective maps the tokens of one example and a random generator to an `Example`. The
self-supervised ones are made of a noise mask (which tokens are hidden) and renderers (what is read,
and what must be written), each a short function of arrays. The generator is keyed by (seed,
example), so that every epoch is noised anew, as RoBERTa does, and every run alike.

| objective | family | layouts |
|---|---|---|
| `MaskedLM`, `NextSentencePairs` | encoder | `as_encoder` |
| `Classify`, `Regress`, `Tag`, `SpanAnswer` (labels, not tokens) | encoder | `as_encoder` |
| `CausalLM`, `FillInTheMiddle` | decoder | `as_decoder` |
| `PrefixLM`, `TextToText`, `SpanCorruption`, `IidDenoising`, `UL2`, `BART` | encoder-decoder, or decoder | `as_encoder_decoder`, `as_prefix_lm`, `as_decoder` |
"""  # noqa: E501

from t5x_lite.data.objectives.bart import (
    BART,
    DocumentRotation,
    SentencePermutation,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
)
from t5x_lite.data.objectives.base import (
    Example,
    Labelled,
    Objective,
    append_eos,
    as_text,
    is_labelled,
)
from t5x_lite.data.objectives.causal import CausalLM, FillInTheMiddle, PrefixLM
from t5x_lite.data.objectives.labels import Classify, Regress
from t5x_lite.data.objectives.masks import (
    iid_noise_mask,
    noise_counts,
    random_segmentation,
    random_spans_noise_mask,
)
from t5x_lite.data.objectives.mlm import MaskedLM, MaskSpans, MaskTokens, MaskWholeWords
from t5x_lite.data.objectives.pairs import NextSentencePairs
from t5x_lite.data.objectives.rendering import noise_after_sentinels, spans_to_sentinels
from t5x_lite.data.objectives.span_corruption import (
    IidDenoising,
    SpanCorruption,
    span_corruption_lengths,
)
from t5x_lite.data.objectives.spans import SpanAnswer
from t5x_lite.data.objectives.text_to_text import TextToText
from t5x_lite.data.objectives.ul2 import UL2, Denoiser
from t5x_lite.data.objectives.words import Tag, encode_words

__all__ = [
    "BART",
    "UL2",
    "CausalLM",
    "Classify",
    "Denoiser",
    "DocumentRotation",
    "Example",
    "FillInTheMiddle",
    "IidDenoising",
    "Labelled",
    "MaskSpans",
    "MaskTokens",
    "MaskWholeWords",
    "MaskedLM",
    "NextSentencePairs",
    "Objective",
    "PrefixLM",
    "Regress",
    "SentencePermutation",
    "SpanAnswer",
    "SpanCorruption",
    "Tag",
    "TextInfilling",
    "TextToText",
    "TokenDeletion",
    "TokenMasking",
    "append_eos",
    "as_text",
    "encode_words",
    "iid_noise_mask",
    "is_labelled",
    "noise_after_sentinels",
    "noise_counts",
    "random_segmentation",
    "random_spans_noise_mask",
    "span_corruption_lengths",
    "spans_to_sentinels",
]
