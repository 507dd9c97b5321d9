"""Extractive question answering: the answer is a piece of the text (SQuAD)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data.objectives.base import Example, wrap, wrapping
from t5x_lite.data.objectives.labels import text_field
from t5x_lite.data.objectives.words import encode_words
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import MASKED_TARGET_SPANS, SPAN_BEGINS, SPAN_ENDS, InputError

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanAnswer:
    """Where in a context the answer to a question begins and ends.

        question [5 6]   context "the old oak": [7 8 9]   answer "old oak", at character 4
        inputs            101   5   6 102   7   8   9 102
        token_types         0   0   0   0   1   1   1   1
        masked_positions    0               4   5   6           "no answer", then the context
        masked_targets      0               0   1   2           bits: 1 begins, 2 ends

    With `between=2`, as RoBERTa has it, there are two eos between them and no token types.

    Devlin et al. 2019 (arXiv:1810.04805, sections 4.2 and 4.3): a score for each token of being the
    first and one of being the last, each normalised over the slots of its example, by a TokenHead
    with two labels. An answer that isn't there, or was cut off, begins and ends at the first token;
    words (or signs) are whole: an answer takes in all of those that it touches. Contexts too long
    for the row are cut at their end.
    """

    vocabulary: Vocabulary
    question: str = "question"  # fields of a record: as in SQuAD's
    context: str = "context"
    answers: str = "answers"  # {"text": [...], "answer_start": [...]}, in characters
    max_question: int = 64  # tokens
    max_answer: int = 30  # tokens of a prediction
    # An answer is predicted to be missing where that scores so much more than the best one; None:
    # never, as befits SQuAD 1.1.
    null_margin: float | None = None
    between: int = 1  # eos between question and context; RoBERTa has 2, and no token types

    features: ClassVar[tuple[str, ...]] = ("question", "context")
    labels: ClassVar[tuple[str, ...]] = ("begins", "ends")
    asks: ClassVar[str] = "span"

    def __post_init__(self) -> None:
        if min(self.max_question, self.max_answer, self.between) < 1:
            raise InputError(
                f"SpanAnswer(max_question={self.max_question}, max_answer={self.max_answer}, "
                f"between={self.between}): expected 1 or more"
            )

    @property
    def makes(self) -> tuple[str, ...]:
        made = ("inputs", "masked_positions", "masked_targets")
        return (*made, "token_types") if self.between == 1 else made

    def fit(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """The question's room, and what is left for the context beside the longest question."""
        specials = wrapping(self.vocabulary) + self.between
        context = min(lengths["encoder"] - specials - self.max_question, lengths["masked"] - 1)
        if context < 1:
            raise InputError(
                f"lengths {dict(lengths)} leave no room for a context beside {specials} specials "
                f"and SpanAnswer.max_question={self.max_question} tokens: raise 'encoder', and "
                "'masked' to one more than the context's tokens"
            )
        return self.max_question, context

    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """(question, context, first and last token of the answer, or none), int32."""
        text = text_field(record, self.context, "SpanAnswer")
        question = self.vocabulary.encode(text_field(record, self.question, "SpanAnswer"))
        tokens, starts, places = self._context(text)
        answer: list[int] = []
        for found, at in zip(*self._given(record), strict=True):
            touched = [i for i, (a, b) in enumerate(places) if a < at + len(found) and at < b]
            if touched:
                ends = [*starts[1:].tolist(), len(tokens)]
                answer = [int(starts[touched[0]]), ends[touched[-1]] - 1]
                break
        return question, tokens, np.array(answer, np.int32)

    def cut(
        self, arrays: Sequence[np.ndarray], lengths: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]:
        """The question and the context cut to their rooms, and the answer if it is still there."""
        question, context, answer = arrays
        question = question[: self.fit(lengths)[0]]
        room = lengths["encoder"] - wrapping(self.vocabulary) - self.between - len(question)
        context = context[: min(room, lengths["masked"] - 1)]
        return question, context, answer[: 2 * int(np.all(answer < len(context)))]

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """(question, context, answer) -> an encoder's Example. Nothing is random."""
        question, context, answer = tokens
        ends: np.ndarray = np.full(self.between, self.vocabulary.eos_id, np.int32)
        inputs = wrap(np.concatenate([question, ends, context]), self.vocabulary)
        begin = len(inputs) - 1 - len(context)
        types: np.ndarray | None = None
        if self.between == 1:
            types = np.zeros(len(inputs), np.int32)
            types[begin:] = 1
        targets: np.ndarray = np.zeros(len(context) + 1, np.int32)
        first, last = 1 + answer if len(answer) else (0, 0)
        targets[first] |= SPAN_BEGINS
        targets[last] |= SPAN_ENDS
        return Example(
            inputs=inputs,
            token_types=types,
            masked_positions=np.append(0, begin + np.arange(len(context))).astype(np.int32),
            masked_targets=targets,
            asked_as=MASKED_TARGET_SPANS,
        )

    def truth(self, record: Mapping[str, Any]) -> list[str]:
        """All answers that count as right; an empty text alone if there is none."""
        return self._given(record)[0] or [""]

    def answer(self, record: Mapping[str, Any], scores: np.ndarray) -> str:
        """The best piece of the context, or an empty text; `scores [asked, 2]`."""
        begins, ends = scores[1:, 0], scores[1:, 1]
        if not len(begins):
            return ""
        # [first, last]: the last is not before the first, nor too far behind it.
        both = begins[:, None] + ends[None, :]
        allowed = np.triu(np.ones(both.shape, bool)) & ~np.triu(
            np.ones(both.shape, bool), self.max_answer
        )
        both = np.where(allowed, both, -np.inf)
        first, last = np.unravel_index(both.argmax(), both.shape)
        missing = scores[0].sum() - both[first, last]
        if self.null_margin is not None and missing > self.null_margin:
            return ""
        text = text_field(record, self.context, "SpanAnswer")
        _, starts, places = self._context(text)
        begin, end = (
            places[int(np.searchsorted(starts, at, side="right")) - 1] for at in (first, last)
        )
        return text[begin[0] : end[1]]

    def _context(self, text: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """(tokens, places of the words' first tokens, each word's characters)."""
        found = [match.span() for match in _WORD.finditer(text)]
        spaced = [begin > 0 and text[begin - 1].isspace() for begin, _ in found]
        tokens, starts = encode_words([text[a:b] for a, b in found], self.vocabulary, spaced)
        return tokens, starts, found

    def _given(self, record: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        answers = record.get(self.answers)
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
            raise InputError(
                f"SpanAnswer needs the field '{self.answers}' with 'text' and 'answer_start', as "
                f"SQuAD has it; the record has {', '.join(record)}"
            )
        texts, starts = (_list(answers[name]) for name in ("text", "answer_start"))
        good = all(isinstance(text, str) for text in texts) and all(map(_is_place, starts))
        if not good or len(texts) != len(starts):
            raise InputError(
                f"SpanAnswer needs in '{self.answers}' as many texts as characters (from 0) that "
                f"they start at, but it has 'text' {answers['text']!r} and 'answer_start' "
                f"{answers['answer_start']!r}"
            )
        return texts, [int(start) for start in starts]


def _list(value: Any) -> list[Any]:
    """What a list holds; of anything else, that alone."""
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _is_place(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0
