"""Learning in context: k solved examples in front of each question, and no weight touched.

Brown et al. (2020, arXiv:2005.14165). A task is data: which records, how one looks in a prompt,
and how an answer is had: the likeliest of several choices, or what the model writes. Which shots
stand before a question, and in what order, depends on (seed, number of the example) alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from t5x_lite.data.sources import RandomAccess, Record, Source
from t5x_lite.data.tasks import Preprocessor
from t5x_lite.decode.choices import choices
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.sampling import Greedy, Strategy
from t5x_lite.decode.scoring import Score
from t5x_lite.evaluation.generation import write
from t5x_lite.evaluation.metrics import Metric, exact_match
from t5x_lite.types import InputError

Per: TypeAlias = Literal["token", "byte", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotTemplate:
    """How examples look in a prompt: fields of the record in braces.

        question "Review: {text}\\nIt is"   answer " {answer}."   separator "\\n\\n"   two shots:

        Review: Dull.
        It is bad.

        Review: A joy.
        It is good.

        Review: I laughed.
        It is

    A question that ends in a space loses it to the answer, where most tokenizers have it.
    """

    question: str = "{inputs}"  # of a shot and of what is asked
    answer: str = " {answer}"  # of a shot and of a choice, behind its question
    separator: str = "\n\n"  # behind each shot
    instruction: str = ""  # before all else

    def __post_init__(self) -> None:
        if _fields(self.answer) != {"answer"}:
            raise InputError(
                f"ShotTemplate.answer is {self.answer!r}: expected {{answer}} in it, alone"
            )
        if not _fields(self.question):
            raise InputError(
                f"ShotTemplate.question is {self.question!r}: expected a field in it, "
                "such as {inputs}"
            )

    def ask(self, record: Mapping[str, Any]) -> str:
        """The question alone. Raises InputError for a field that the record doesn't have."""
        missing = _fields(self.question) - set(record)
        if missing:
            raise InputError(
                f"ShotTemplate asks for {{{', '.join(sorted(missing))}}}, but the record has "
                f"{', '.join(record)}"
            )
        return self.question.format_map(dict(record))

    def reply(self, answer: str) -> str:
        """What stands behind the question that has this answer."""
        return self.answer.format(answer=answer)

    def prompt(self, shots: Sequence[tuple[Mapping[str, Any], str]], record: Record) -> str:
        """Solved records in their order, then the question of `record`."""
        solved = (self.ask(shot) + self.reply(text) + self.separator for shot, text in shots)
        return self.instruction + "".join(solved) + self.ask(record)

    def without_content(self, record: Record, text: str) -> Record:
        """The record with `text` in every field that the question shows."""
        return {**record, **dict.fromkeys(_fields(self.question), text)}


def _fields(text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise InputError(f"template {text!r}: {error}; a brace itself is written twice") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Answers that are likely whatever is asked lose that advantage.

    Contextual calibration (Zhao et al. 2021, arXiv:2102.09690): each choice's probability is
    divided by the mean of those behind the same shots and a question without content. It costs a
    prompt more for each text.
    """

    texts: tuple[str, ...] = ("N/A", "[MASK]", "")  # the paper's

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        if not self.texts:
            raise InputError("Calibration.texts is empty: expected one text or more, such as 'N/A'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choose:
    """The likeliest of several answers, by log-likelihood."""

    choices: tuple[str, ...] = ()  # the same for every record; empty: those of its `choices_field`
    choices_field: str = "choices"  # a list of texts
    target_field: str = "label"  # the right choice: its number, or its text
    # Log-likelihoods of longer answers are lower for their length alone. They are divided by the
    # answer's tokens (Brown et al. 2020, 2.4) or UTF-8 bytes (the same for every vocabulary).
    per: Per = "token"
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if self.per not in ("token", "byte", "text"):
            raise InputError(f"Choose.per='{self.per}': expected 'token', 'byte' or 'text'")

    def of(self, record: Record) -> tuple[str, ...]:
        """The record's choices."""
        if self.choices:
            return self.choices
        found = _field(record, self.choices_field, "Choose.choices_field")
        listed = isinstance(found, list | tuple | np.ndarray)
        if not listed or not len(found) or not all(isinstance(one, str) for one in found):
            raise InputError(
                f"the record's '{self.choices_field}' is {found!r}: expected a list of texts"
            )
        return tuple(found)

    def target(self, record: Record) -> str:
        """The text of the right one."""
        found, known = _field(record, self.target_field, "Choose.target_field"), self.of(record)
        number = isinstance(found, int | np.integer) and not isinstance(found, bool)
        if number and 0 <= found < len(known):
            return known[int(found)]
        if isinstance(found, str) and found in known:
            return found
        raise InputError(
            f"the record's '{self.target_field}' is {found!r}: expected the number of a choice, or "
            f"one of {known}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """What the model writes behind the question, up to a stop, without spaces around."""

    target_field: str = "targets"
    max_tokens: int = 32
    stops: tuple[str, ...] = ("\n",)
    strategy: Strategy = Greedy()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stops", tuple(self.stops))

    def target(self, record: Record) -> str:
        return str(_field(record, self.target_field, "Write.target_field"))


def _field(record: Record, name: str, what: str) -> Any:
    if name not in record:
        raise InputError(f"{what} is '{name}', but the record has {', '.join(record)}")
    return record[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContext:
    """A task for prompts: records, a template, and how the answer is had."""

    name: str
    source: Source
    template: ShotTemplate
    answer: Choose | Write
    split: str = "test"  # what is asked
    shots_split: str = "train"  # what stands before it
    preprocessors: Sequence[Preprocessor] = ()
    metrics: Sequence[Metric] = (exact_match,)  # of the right answers and those given
    limit: int | None = None  # the first so many of the split; None: all
    seed: int = 0  # of the shots, and of what is drawn

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessors", tuple(self.preprocessors))
        object.__setattr__(self, "metrics", tuple(self.metrics))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question behind its shots."""

    text: str
    record: Record
    shots: tuple[int, ...]  # numbers in the shots' split
    solved: tuple[tuple[Record, str], ...]  # their records and answers


def prompts(task: InContext, shots: int) -> list[Prompt]:
    """The task's prompts with so many shots each. Raises InputError for too few records."""
    pool, asked = task.source.open(task.shots_split), task.source.open(task.split)
    count = len(asked) if task.limit is None else min(task.limit, len(asked))
    own = task.split == task.shots_split

    def read(records: RandomAccess, index: int) -> Record:
        record = records[index]
        for preprocessor in task.preprocessors:
            record = preprocessor(record)
        return record

    found = []
    for index in range(count):
        numbers = draw(shots, len(pool), task.seed, index, leave_out=index if own else None)
        examples = [read(pool, number) for number in numbers]
        solved = tuple((example, task.answer.target(example)) for example in examples)
        record = read(asked, index)
        text = task.template.prompt(solved, record)
        found.append(Prompt(text, record, tuple(numbers), solved))
    return found


def draw(count: int, size: int, seed: int, index: int, leave_out: int | None = None) -> list[int]:
    """`count` different numbers below `size` in the order of their drawing, by (seed, index) alone.

    Fewer are the first of more: k shots are the k first of k + 1. `leave_out` is never among them.
    """
    room = size - (leave_out is not None)
    if not 0 <= count <= room:
        raise InputError(f"{count} shots: expected between 0 and the {room} records there are")
    digest = hashlib.sha256(f"shots/{seed}/{index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    found: list[int] = []
    while len(found) < count:
        number = int(rng.integers(size))
        if number != leave_out and number not in found:
            found.append(number)
    return found


def answer(
    loaded: Loaded, task: InContext, shots: int, *, batch_size: int = 8
) -> list[dict[str, Any]]:
    """What a model answers to every question behind so many shots, in the records' order.

    Returns records with `prompt`, `shots` (their numbers), `target` and `prediction`; of choices
    also `choices` and their `scores`: log-likelihoods by `per`, after calibration log-probabilities
    up to a constant.
    """
    asked = prompts(task, shots)
    how = task.answer
    if isinstance(how, Write):
        found = write(
            loaded,
            [prompt.text for prompt in asked],
            max_tokens=how.max_tokens,
            stops=how.stops,
            strategy=how.strategy,
            seed=task.seed,
            batch_size=batch_size,
        )
        answers = [{"prediction": text.strip()} for text in found]
    else:
        answers = _choose(loaded, task.template, how, asked, batch_size)
    return [
        {
            "prompt": prompt.text,
            "shots": list(prompt.shots),
            "target": how.target(prompt.record),
            **given,
        }
        for prompt, given in zip(asked, answers, strict=True)
    ]


def _choose(
    loaded: Loaded, template: ShotTemplate, how: Choose, asked: Sequence[Prompt], batch_size: int
) -> list[dict[str, Any]]:
    bare = how.calibration.texts if how.calibration is not None else ()
    questions = []
    for prompt in asked:
        replies = [template.reply(choice) for choice in how.of(prompt.record)]
        records = (template.without_content(prompt.record, text) for text in bare)
        texts = [prompt.text, *(template.prompt(prompt.solved, record) for record in records)]
        questions += [(text, replies) for text in texts]
    scores = [
        [normalised(score, reply, how.per) for score, reply in zip(row, replies, strict=True)]
        for row, (_, replies) in zip(
            choices(loaded, questions, batch_size=batch_size), questions, strict=True
        )
    ]
    answers: list[dict[str, Any]] = []
    for number, prompt in enumerate(asked):
        own, *rest = scores[number * (1 + len(bare)) : (number + 1) * (1 + len(bare))]
        values = calibrated(np.array(own), np.array(rest)) if rest else np.array(own)
        known = how.of(prompt.record)
        answers.append(
            {
                "prediction": known[int(np.argmax(values))],
                "choices": list(known),
                "scores": [float(value) for value in values],
            }
        )
    return answers


def normalised(score: Score, text: str, per: Per) -> float:
    """A log-likelihood in nats per token, per UTF-8 byte of its text, or as it is."""
    length = {"token": score.tokens, "byte": len(text.encode("utf-8")), "text": 1}[per]
    return score.logprob / max(length, 1)


def calibrated(scores: np.ndarray, without_content: np.ndarray) -> np.ndarray:
    """log(p / q) of scores `[choices]`, where p = softmax(scores).

    q is the mean of the softmax of each of the scores `[texts, choices]` without content.
    """
    # In logarithms throughout: a long answer's probability is below float64's range.
    expected = np.logaddexp.reduce(_log_softmax(without_content), axis=0)
    return _log_softmax(scores) - (expected - np.log(len(without_content)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
