"""What an objective is, and the small arrays that all of them use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import MASKED_TARGET_TOKENS, InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Token streams of one example, each int32 `[its own length]`, with bos and eos."""

    inputs: np.ndarray | None = None  # what is read: by the encoder, or as a decoder's prefix
    targets: np.ndarray | None = None  # what is written
    masked_positions: np.ndarray | None = None  # places in the inputs that are predicted
    masked_targets: np.ndarray | None = None  # what stood there; as long as masked_positions
    token_types: np.ndarray | None = None  # of each input: 0 in sentence A, 1 in sentence B
    asked_as: str = MASKED_TARGET_TOKENS  # the batch key of masked_targets
    start_id: int = 0  # what the decoder has before it writes its first token


def as_text(example: Example, vocabulary: Vocabulary) -> dict[str, Any]:
    """The example for people, by the fields it has:

    {"inputs": "text", "targets": "text", "masked": [[place, "piece"], ...]}
    """
    found: dict[str, Any] = {}
    for name in ("inputs", "targets"):
        tokens = getattr(example, name)
        if tokens is not None:
            found[name] = vocabulary.decode(tokens)
    if example.masked_positions is not None and example.masked_targets is not None:
        slots = zip(example.masked_positions.tolist(), example.masked_targets.tolist(), strict=True)
        found["masked"] = [[place, vocabulary.piece(token)] for place, token in slots]
    return found


class Objective(Protocol):
    """What a Task asks of an objective.

    `features` names the record fields whose tokens it takes, in order; `makes` the streams of the
    `Example` that it fills. `fit(lengths)` gives, for each feature, the most tokens whose streams
    fit the model's lengths: longer ones are cut before the call. An objective whose first masked
    slot holds the label of its row has `one_a_row = True`: its examples can't be packed.
    """

    @property
    def features(self) -> tuple[str, ...]: ...
    @property
    def makes(self) -> tuple[str, ...]: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def fit(self, lengths: Mapping[str, int]) -> tuple[int, ...]: ...
    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example: ...


class Labelled(Objective, Protocol):
    """An objective that asks for labels: it reads its records itself, for labels are no text.

    `asks` says of what: of a "sequence", of each "token", a "value" of a sequence, or a "span". The
    arrays that `read` takes from a record are cut by `cut` before the call. `truth` is what metrics
    take for the record's target, and `answer` the prediction that a head's scores of the asked
    slots, float32 `[asked, labels]`, make.
    """

    @property
    def asks(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, ...]: ...
    def cut(
        self, arrays: Sequence[np.ndarray], lengths: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]: ...
    def truth(self, record: Mapping[str, Any]) -> Any: ...
    def answer(self, record: Mapping[str, Any], scores: np.ndarray) -> Any: ...


def is_labelled(objective: Any) -> TypeGuard[Labelled]:
    """Whether an objective asks for labels."""
    return hasattr(objective, "asks")


# --- beginnings and ends -------------------------------------------------------------------------


def append_eos(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """`[5, 6]` -> `[5, 6, eos_id]`, int32."""
    result: np.ndarray = np.empty(len(tokens) + 1, dtype=np.int32)
    result[:-1] = tokens
    result[-1] = eos_id
    return result


def wrap(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`[5, 6]` -> `[bos, 5, 6, eos]`, int32; without bos where the vocabulary has none (T5)."""
    bos = vocabulary.bos_id
    if bos is None:
        return append_eos(tokens, vocabulary.eos_id)
    result: np.ndarray = np.empty(len(tokens) + 2, dtype=np.int32)
    result[0], result[1:-1], result[-1] = bos, tokens, vocabulary.eos_id
    return result


def wrap_targets(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """As `wrap`, but without a bos that the decoder starts from anyway: it isn't predicted.

    BART starts from eos and writes `bos 5 6 eos`; Llama starts from bos and writes `5 6 eos`.
    """
    if vocabulary.bos_id == vocabulary.start_id:
        return append_eos(tokens, vocabulary.eos_id)
    return wrap(tokens, vocabulary)


def wrapping(vocabulary: Vocabulary) -> int:
    """How many tokens `wrap` adds."""
    return 1 if vocabulary.bos_id is None else 2


# --- rooms ---------------------------------------------------------------------------------------


def most(fits: Callable[[int], bool], limit: int, what: str, lengths: Mapping[str, int]) -> int:
    """The largest n in 1..limit with `fits(n)`. Raises InputError if there is none."""
    for tokens in range(limit, 0, -1):
        if fits(tokens):
            return tokens
    raise InputError(
        f"lengths {dict(lengths)} are too short for {what}: not one token fits; raise them"
    )


def fits(lengths: Mapping[str, int], inputs: int, targets: int) -> bool:
    """Whether so many inputs and targets fit a model's streams: without an encoder, in one row."""
    if "encoder" not in lengths:
        return inputs + targets <= lengths["decoder"]
    return inputs <= lengths["encoder"] and targets <= lengths["decoder"]


def ordinary_tokens(vocabulary: Vocabulary) -> np.ndarray:
    """Which ids are text: bool `[vocabulary.size]`, False for specials and sentinels."""
    ordinary: np.ndarray = np.ones(vocabulary.size, dtype=bool)
    ordinary[sorted(vocabulary.special_ids)] = False
    ordinary[[vocabulary.sentinel_id(k) for k in range(vocabulary.num_sentinels)]] = False
    return ordinary


def mask_token(vocabulary: Vocabulary, what: str) -> int:
    """The id of the mask. Raises InputError where the vocabulary has none."""
    if vocabulary.mask_id is None:
        raise InputError(
            f"{what} hides tokens behind the vocabulary's mask, but {type(vocabulary).__name__} "
            "has none: take a vocabulary with one (BERT's, BART's), or train one with a mask"
        )
    return vocabulary.mask_id


def check_rate(name: str, rate: float) -> None:
    """Raises InputError unless `rate` is a share of something."""
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"{name} is {rate}; expected between 0 and 1")
