"""A stand-in for the engine: every request by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.decode import sampling
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.prompts import pad_left
from t5x_lite.decode.sampling import Greedy, Sampling


@dataclass(frozen=True)
class Request:
    tokens: np.ndarray
    max_tokens: int
    strategy: Greedy | Sampling = Greedy()
    seed: int = 0


@dataclass(frozen=True)
class Event:
    id: int
    token: int | None
    finished: Literal["eos", "length"] | None = None


class Engine:
    def __init__(
        self, loaded: Loaded, *, slots: int, prompt_buckets: tuple[int, ...], capacity: int
    ):
        self.loaded, self.slots, self.buckets = loaded, slots, prompt_buckets
        self.capacity = capacity
        self.active: dict[int, list[Any]] = {}
        self.waiting: list[tuple[int, Request]] = []
        self.count = 0
        model = loaded.model
        self._prefill = jax.jit(
            lambda p, b: model.apply({"params": p}, b, capacity, method="prefill")
        )
        self._extend = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="extend"))

    @property
    def pending(self) -> int:
        return len(self.active) + len(self.waiting)

    def submit(self, request: Request) -> int:
        self.count += 1
        self.waiting.append((self.count, request))
        return self.count

    def cancel(self, id: int) -> None:
        self.active.pop(id, None)
        self.waiting = [one for one in self.waiting if one[0] != id]

    def step(self) -> list[Event]:
        events = []
        for id, (request, token, cache, made) in list(self.active.items()):
            rows = self.loaded.partitioner.batch_shards
            logits, cache = self._extend(
                self.loaded.params, jnp.full((rows, 1), token, jnp.int32), cache
            )
            events.append(self._next(id, request, logits, cache, made))
        while self.waiting and len(self.active) < self.slots:
            id, request = self.waiting.pop(0)
            rows = self.loaded.partitioner.batch_shards
            bucket = next(b for b in self.buckets if b >= len(request.tokens))
            prompts = [request.tokens] * rows
            if self.loaded.model.config.encoder is None:
                batch = pad_left(prompts, bucket)
            else:
                tokens = np.zeros((rows, bucket), np.int32)
                segments = np.zeros_like(tokens)
                tokens[:, : len(request.tokens)] = request.tokens
                segments[:, : len(request.tokens)] = 1
                batch = {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
                start = self.loaded.vocabulary.start_id
                batch[types.DECODER_INPUT_TOKENS] = np.full((rows, 1), start, np.int32)
            logits, cache = self._prefill(self.loaded.params, batch)
            events.append(self._next(id, request, logits, cache, 0))
        return events

    def _next(self, id, request, logits, cache, made):
        row = logits[:1, -1]
        keys = jax.random.key(request.seed)[None]
        keys = sampling.keys_at(keys, jnp.int32(made))
        strategy = dataclass_without_penalty(request.strategy)
        token = int(sampling.choose(sampling.adjust(row, None, strategy), strategy, keys)[0])
        made += 1
        finished = None
        if token in self.loaded.ends:
            finished = "eos"
        elif made == request.max_tokens:
            finished = "length"
        if finished:
            self.active.pop(id, None)
        else:
            self.active[id] = [request, token, cache, made]
        return Event(id, token, finished)


def dataclass_without_penalty(strategy):
    import dataclasses

    return dataclasses.replace(strategy, repetition_penalty=1.0)
