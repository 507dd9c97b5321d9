"""The model that is served, as it is and with its adapters: what can be asked of it, and how.

Everything that may be refused is refused here, before the worker is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.decode import modes
from t5x_lite.decode.loaded import Loaded
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_positions import Learned
from t5x_lite.serving import requests
from t5x_lite.serving.simple_engine import Engine, Request
from t5x_lite.types import InputError, Params

BASE: Final = ""  # the model without an adapter, among their names
NAMES: Final = ("generate", "infill", "fill_mask", "embed")
MAX_CANDIDATES: Final = 20
_ROOM: Final = 512  # tokens in, and tokens out, where the model says nothing
_SHORTEST: Final = 16  # of the lengths that rows are padded to


@dataclass(frozen=True)
class Answer:
    """A request that an engine may answer, and what becomes of its tokens."""

    name: str  # of the engine
    request: Request
    decode: Callable[[Any], str]
    record: Callable[[np.ndarray], dict[str, Any]] = lambda tokens: {}


class Host:
    """What the routes ask.

    Args:
      name: the model's, shown to people.
      models: by adapter, `BASE` among them.
      input_tokens: the longest input, its specials included; None: as the model allows, at most
        512.
      new_tokens: the most that may be generated; None: likewise.

    Raises InputError for sizes that the model can't have, and for a model that has nothing to say.
    """

    def __init__(
        self,
        name: str,
        models: Mapping[str, Loaded],
        *,
        input_tokens: int | None = None,
        new_tokens: int | None = None,
    ):
        self._name = name
        self._models = dict(models)
        self._config = self._models[BASE].model.config
        self.input_tokens, self.new_tokens = room(self._config, input_tokens, new_tokens)
        self._modes = {
            adapter: {kind: self._mode(loaded, kind) for kind in NAMES if _can(loaded, kind)}
            for adapter, loaded in self._models.items()
        }
        if not self._modes[BASE]:
            modes.choose(self._config, None)  # says why

    def describe(self) -> dict[str, Any]:
        """What the model is and can do, for `/api/model`."""
        config = self._config
        stacks = {"encoder": config.encoder, "decoder": config.decoder}
        limits = {"input_tokens": self.input_tokens}
        if config.decoder is not None:
            limits["max_tokens"] = self.new_tokens
        if "fill_mask" in self._modes[BASE]:
            limits["candidates"] = self._most_candidates
        return {
            "name": self._name,
            "family": "-".join(name for name, stack in stacks.items() if stack is not None),
            "parameters": trees.count(self._models[BASE].params),
            "modes": list(self._modes[BASE]),
            "adapters": [name for name in self._models if name != BASE],
            "limits": limits,
        }

    def engines(self, slots: int) -> dict[str, Engine]:
        """By adapter, an engine of so many slots; none for a model that writes nothing."""
        if self._config.decoder is None:
            return {}
        capacity = self.new_tokens
        if self._config.encoder is None:
            capacity += self.input_tokens
        return {
            adapter: Engine(
                loaded,
                slots=slots,
                prompt_buckets=buckets(self.input_tokens),
                capacity=capacity,
            )
            for adapter, loaded in self._models.items()
        }

    def generate(self, asked: requests.Generate) -> Answer:
        """Raises InputError for what this model can't be asked."""
        return self._answer("generate", asked)

    def infill(self, asked: requests.Generate) -> Answer:
        """The text of the answer's record is whole, with its gaps filled. Raises InputError."""
        return self._answer("infill", asked)

    def _answer(self, kind: modes.Name, asked: requests.Generate) -> Answer:
        adapter, mode = self._find(kind, asked.adapter)
        if asked.max_tokens is not None and asked.max_tokens > self.new_tokens:
            raise InputError(
                f"max_tokens={asked.max_tokens}: this server makes at most {self.new_tokens}"
            )
        strategy = asked.how
        tokens = self._encode(mode, asked.prompt)
        request = Request(tokens, asked.max_tokens or self.new_tokens, strategy, asked.seed)

        def record(made: np.ndarray) -> dict[str, Any]:
            found = mode.record(asked.prompt, tokens, made)
            return {"text": found["prediction"], "filled": found.get("filled")}

        return Answer(adapter, request, self._models[adapter].text, record)

    def fill_mask(self, asked: requests.FillMask) -> Callable[[], dict[str, Any]]:
        """Answers when it is called. Raises InputError."""
        adapter, mode = self._find("fill_mask", asked.adapter)
        if not 1 <= asked.candidates <= self._most_candidates:
            raise InputError(
                f"candidates={asked.candidates}: expected 1 to {self._most_candidates}"
            )
        ids = self._encode(mode, asked.text)

        def answer() -> dict[str, Any]:
            (row,) = self._compute(adapter, "fill_mask", [ids])
            found = mode.record(asked.text, ids, row)
            masks = [candidates[: asked.candidates] for candidates in found["masks"]]
            return {"text": found["prediction"], "masks": masks}

        return answer

    def embed(self, asked: requests.Embed) -> Callable[[], dict[str, Any]]:
        """Answers when it is called. Raises InputError."""
        adapter, mode = self._find("embed", asked.adapter)
        encoded = [self._encode(mode, text) for text in asked.texts]

        def answer() -> dict[str, Any]:
            rows = self._compute(adapter, "embed", encoded)
            vectors: np.ndarray = np.stack([np.asarray(row, np.float32) for row in rows])
            lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
            directions = vectors / np.maximum(lengths, 1e-12)
            cosines = directions @ directions.T
            return {"vectors": vectors.tolist(), "cosines": cosines.tolist()}

        return answer

    @property
    def _most_candidates(self) -> int:
        return min(MAX_CANDIDATES, self._config.vocab_size)

    def _mode(self, loaded: Loaded, kind: modes.Name) -> modes.Mode:
        chosen = modes.choose(loaded.model.config, kind)
        return chosen(
            loaded.model,
            loaded.vocabulary,
            self.input_tokens,
            self.new_tokens,
            self._most_candidates,
        )

    def _find(self, kind: modes.Name, adapter: str | None) -> tuple[str, modes.Mode]:
        name = BASE if adapter is None else adapter
        if name not in self._models:
            known = ", ".join(f"'{one}'" for one in self._models if one != BASE) or "none"
            raise InputError(f"there is no adapter '{name}' here; served are: {known}")
        if kind not in self._modes[name]:
            raise InputError(f"'{self._name}' can't {kind}: it does {', '.join(self._modes[name])}")
        return name, self._modes[name][kind]

    def _encode(self, mode: modes.Mode, text: str) -> np.ndarray:
        """The text's ids. Raises InputError for an empty text, and one that is too long."""
        if not text.strip():
            raise InputError("the text is empty: write something")
        return mode.encode(text)

    def _compute(self, adapter: str, kind: modes.Name, encoded: list[np.ndarray]) -> list[Any]:
        """What the mode computes for each row, padded to one of few shapes."""
        loaded = self._models[adapter]
        longest = max(len(ids) for ids in encoded)
        length = next(size for size in buckets(self.input_tokens) if size >= longest)
        count = loaded.partitioner.batch_shards
        while count < len(encoded):
            count *= 2
        mode, program = self._program(adapter, kind, length)
        # What fills the batch up has to be a text too: a row must see something.
        batch = mode.rows([*encoded, *encoded[:1] * (count - len(encoded))])
        with loaded.partitioner.activate():
            answers = program(loaded.params, loaded.partitioner.put_batch(batch, count))
        answers = jax.device_get(answers)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], answers) for i in range(len(encoded))]

    @functools.cache  # noqa: B019 (a server has one host)
    def _program(self, adapter: str, kind: modes.Name, length: int) -> tuple[modes.Mode, Any]:
        mode = dataclasses.replace(self._modes[adapter][kind], input_tokens=length)
        return mode, modes.program(mode, self._models[adapter].partitioner.replicated)


def _can(loaded: Loaded, kind: modes.Name) -> bool:
    try:
        modes.choose(loaded.model.config, kind)
    except InputError:
        return False
    return True


def room(config: ModelConfig, input_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The longest input and the most new tokens, of what is given and what the model allows.

    Raises InputError where the two don't fit the positions that a model learned.
    """
    for name, size in {"max_input_tokens": input_tokens, "max_tokens": new_tokens}.items():
        if size is not None and size < 1:
            raise InputError(f"serve.{name}={size}: expected at least 1")
    if config.encoder is not None or config.decoder is None:
        found = (
            min(_ROOM, _learned(config.encoder)) if input_tokens is None else input_tokens,
            min(_ROOM, _learned(config.decoder)) if new_tokens is None else new_tokens,
        )
    else:
        both = min(2 * _ROOM, _learned(config.decoder))
        given = next((size for size in (input_tokens, new_tokens) if size is not None), both // 2)
        rest = max(1, both - given)
        found = (
            (given if new_tokens is None else rest) if input_tokens is None else input_tokens,
            (rest) if new_tokens is None else new_tokens,
        )
    modes.check_lengths(config, *found)
    return found


def _learned(stack: Any) -> int:
    positions = None if stack is None else stack.positions
    return positions.max_length if isinstance(positions, Learned) else 2 * _ROOM


def buckets(longest: int) -> tuple[int, ...]:
    """Lengths that rows are padded to: powers of two, and the longest. 40: 16, 32, 40."""
    sizes = []
    size = _SHORTEST
    while size < longest:
        sizes.append(size)
        size *= 2
    return (*sizes, longest)


def share(base: Params, others: Params) -> Params:
    """`others` with arrays of `base` in the place of equal ones: a base is held once.

    Adapters open with a base of their own; of LoRA's leaves, the matrices are the base's.
    """

    def key(leaf: Any) -> tuple[Any, ...]:
        content = np.ascontiguousarray(jax.device_get(leaf))
        digest = hashlib.sha256(content.view(np.uint8).reshape(-1)).digest()
        return content.shape, str(content.dtype), leaf.sharding, digest

    known = {key(leaf): leaf for leaf in jax.tree.leaves(base)}
    return jax.tree.map(lambda leaf: known.get(key(leaf), leaf), others)
