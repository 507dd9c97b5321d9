"""The model that is served, as it is and with its adapters: what can be asked of it, and how.

Everything that may be refused is refused here, before the worker is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.decode import modes
from t5x_lite.decode.engine import Engine
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.modes.asker import Asker
from t5x_lite.decode.modes.gaps import MASK
from t5x_lite.decode.requests import Request
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft import many
from t5x_lite.serving import requests
from t5x_lite.types import InputError, Params

BASE: Final = ""  # the model without an adapter, among their names
NAMES: Final[tuple[modes.Name, ...]] = ("generate", "infill", "fill_mask", "embed")
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

    Raises InputError for sizes that the model can't have.
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
        self.input_tokens, self.new_tokens = room(
            self._config, self._models.values(), input_tokens, new_tokens
        )
        options = modes.Options(
            max_input_tokens=self.input_tokens,
            max_tokens=self.new_tokens,
            candidates=self._most_candidates,
        )
        self._modes = {
            adapter: _offered(loaded, options) for adapter, loaded in self._models.items()
        }
        self._sharing = _sharing(self._models)

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
        """By name, engines of so many slots; none for a model that writes nothing.

        The base and its LoRA adapters share one, `BASE`; what can't share has one by its own name.
        """
        if self._config.decoder is None:
            return {}
        capacity = self.new_tokens
        if self._config.encoder is None:
            capacity += self.input_tokens - 1  # the last new token is never fed
        base = self._models[BASE]
        models = {name: one for name, one in self._models.items() if name not in self._sharing}
        if self._sharing:
            tuned = [self._models[name].params for name in self._sharing]
            params = many.together(base.params, tuned, np.array([many.NONE]))
            models[BASE] = dataclasses.replace(base, params=params)
        return {
            name: Engine(
                loaded,
                slots=slots,
                prompt_buckets=buckets(self.input_tokens),
                capacity=capacity,
            )
            for name, loaded in models.items()
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
        row = _encode(mode, asked.prompt)
        number = self._sharing.get(adapter, many.NONE)
        most = asked.max_tokens or self.new_tokens
        request = Request(row.ids, most, strategy, asked.seed, number)

        def record(made: np.ndarray) -> dict[str, Any]:
            found = mode.record({"inputs": asked.prompt}, row, made)
            return {"text": found["prediction"], "filled": found.get("filled")}

        engine = BASE if adapter in self._sharing else adapter
        return Answer(engine, request, self._models[adapter].text, record)

    def fill_mask(self, asked: requests.FillMask) -> Callable[[], dict[str, Any]]:
        """Answers when it is called. Raises InputError."""
        adapter, mode = self._find("fill_mask", asked.adapter)
        if not 1 <= asked.candidates <= self._most_candidates:
            raise InputError(
                f"candidates={asked.candidates}: expected 1 to {self._most_candidates}"
            )
        row = _encode(mode, asked.text)

        def answer() -> dict[str, Any]:
            ((found,),) = self._asker(adapter, "fill_mask").answers([row])
            record = mode.record({"inputs": asked.text}, row, found)
            masks = [candidates[: asked.candidates] for candidates in record["masks"]]
            return {"text": record["prediction"], "masks": masks}

        return answer

    def embed(self, asked: requests.Embed) -> Callable[[], dict[str, Any]]:
        """Answers when it is called. Raises InputError."""
        adapter, mode = self._find("embed", asked.adapter)
        rows = [_encode(mode, text) for text in asked.texts]

        def answer() -> dict[str, Any]:
            parts = self._asker(adapter, "embed").answers(rows)
            vectors: np.ndarray = np.stack([x for part in parts for x in part]).astype(np.float32)
            lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
            directions = vectors / np.maximum(lengths, 1e-12)
            cosines = directions @ directions.T
            return {"vectors": vectors.tolist(), "cosines": cosines.tolist()}

        return answer

    @property
    def _most_candidates(self) -> int:
        return min(MAX_CANDIDATES, self._config.vocab_size)

    def _find(self, kind: modes.Name, adapter: str | None) -> tuple[str, modes.Mode]:
        name = BASE if adapter is None else adapter
        if name not in self._models:
            known = ", ".join(f"'{one}'" for one in self._models if one != BASE) or "none"
            raise InputError(f"there is no adapter '{name}' here; served are: {known}")
        if kind not in self._modes[name]:
            raise InputError(f"'{self._name}' can't {kind}: it does {', '.join(self._modes[name])}")
        return name, self._modes[name][kind]

    @functools.cache  # noqa: B019 (a server has one host)
    def _asker(self, adapter: str, kind: modes.Name) -> Asker:
        return Asker(self._modes[adapter][kind], self._models[adapter].partitioner.batch_shards)


def _offered(loaded: Loaded, options: modes.Options) -> dict[modes.Name, modes.Mode]:
    """What the model does. Raises InputError for sizes that it can't have."""
    least = dataclasses.replace(options, max_input_tokens=1, max_tokens=1, candidates=1)
    found: dict[modes.Name, modes.Mode] = {}
    for name in NAMES:
        try:
            modes.make(loaded, name, least)
        except InputError:
            continue  # whatever the sizes
        try:
            found[name] = modes.make(loaded, name, options)
        except InputError as error:
            raise InputError(str(error).replace("infer.", "serve.")) from error
    if "infill" in found:
        try:
            found["infill"].encode({"inputs": MASK})
        except InputError:  # its vocabulary has nothing to mark a gap with
            del found["infill"]
    return found


def _sharing(models: Mapping[str, Loaded]) -> dict[str, int]:
    """Numbers of the adapters whose rows may stand in one batch with the base's."""
    base, found = models[BASE], []
    for name, loaded in models.items():
        alike = all(
            getattr(loaded, field) == getattr(base, field) for field in ("model", "ends", "asking")
        )
        if name == BASE or not alike or loaded.vocabulary.start_id != base.vocabulary.start_id:
            continue
        try:
            many.low_ranks(base.params, loaded.params)
        except InputError:
            continue  # it has an engine of its own
        found.append(name)
    return {name: number for number, name in enumerate(found)}


def _encode(mode: modes.Mode, text: str) -> modes.Row:
    """Raises InputError for an empty text, and for one that is too long."""
    if not text.strip():
        raise InputError("the text is empty: write something")
    try:
        return mode.encode({"inputs": text})
    except InputError as error:
        raise InputError(str(error).replace("infer.", "")) from error


def room(
    config: ModelConfig,
    models: Iterable[Loaded],
    input_tokens: int | None,
    new_tokens: int | None,
) -> tuple[int, int]:
    """The longest input and the most new tokens: what is given, or what all models allow.

    A prompt or prefix of an adapter takes positions.
    """
    models = list(models)

    def most(name: str) -> int:
        if getattr(config, name) is None:
            return 2 * _ROOM
        known = [room for one in models if (room := one.room(name)) is not None]
        return min(known, default=2 * _ROOM)

    for name, size in {"max_input_tokens": input_tokens, "max_tokens": new_tokens}.items():
        if size is not None and size < 1:
            raise InputError(f"serve.{name}={size}: expected at least 1")
    if config.encoder is not None or config.decoder is None:
        read, written = (min(_ROOM, most(name)) for name in ("encoder", "decoder"))
        return input_tokens or read, new_tokens or written
    both = min(2 * _ROOM, most("decoder"))  # in one row
    if input_tokens is None:
        input_tokens = max(1, both - (new_tokens or both // 2))
    return input_tokens, new_tokens or max(1, both - input_tokens)


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
