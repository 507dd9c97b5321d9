"""Continuous batching: requests share a batch of slots, and a slot that ends takes the next one.

Every slot stands at a place of its own in its row of the cache, so that the others go on while one
is filled. Two kinds of programs, compiled once: one a bucket of prompt lengths, which fills a slot,
and the step, which gives every slot a token. What a request becomes depends on itself alone.

Shapes: s slots, v vocab, t steps a dispatch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.decode import sampling
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.requests import Event, Finished, Request
from t5x_lite.decode.sampling import Greedy, RowStrategies, Sampling
from t5x_lite.models.cache import DTYPES, Cache, CacheDtype
from t5x_lite.models.transformer import for_decoding
from t5x_lite.peft import many
from t5x_lite.types import Array, InputError, Params


@flax.struct.dataclass
class _State:
    """Of every slot; rows first in all arrays."""

    cache: Cache
    last: Array  # int32 [s]: the token to feed next
    made: Array  # int32 [s]: new tokens so far
    seeds: Array  # uint32 [s]
    strategy: RowStrategies
    seen: Array  # bool [s, v]: tokens in the decoder's row
    adapters: Array  # int32 [s]


@dataclass
class _Running:
    """What a slot works on."""

    id: int
    left: int  # tokens


class Engine:
    """Answers requests with `slots` of them at a time.

    A request is admitted with all its prompt but the last token in the cache, which the next step
    then feeds: first tokens and later ones come from one program.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        slots: int,
        prompt_buckets: tuple[int, ...],
        capacity: int,
        cache_dtype: CacheDtype | None = None,
        stride: int = 1,
    ):
        """Checks everything that can be checked before a program is compiled.

        Args:
          loaded: a model with a decoder and a language model's head.
          slots: requests that advance together.
          prompt_buckets: lengths that prompts are padded to, for each of which a program is
            compiled when the first prompt of such a length comes.
          capacity: the most decoder tokens of a request: prompt and new ones, but for the last of
            those, which is never fed.
          cache_dtype: see `Transformer.prefill`.
          stride: tokens made for all slots between two looks at them. A larger one saves
            transfers; slots that end in between idle for the rest.

        Raises InputError.
        """
        config = loaded.model.config
        if config.decoder is None:
            raise InputError("the engine writes text: it needs a model with a decoder")
        for name, value in {"slots": slots, "capacity": capacity, "stride": stride}.items():
            if value < 1:
                raise InputError(f"Engine.{name}={value}: expected at least 1")
        if not prompt_buckets or min(prompt_buckets) < 1:
            raise InputError(f"Engine.prompt_buckets={prompt_buckets}: expected lengths from 1 on")
        if cache_dtype is not None and cache_dtype not in DTYPES:
            raise InputError(f"Engine.cache_dtype='{cache_dtype}': expected one of {DTYPES}")
        loaded.partitioner.check_batch_size(slots)
        self._reads_apart = config.encoder is not None
        self._buckets = tuple(sorted(set(prompt_buckets)))
        lengths = {
            "encoder": self._buckets[-1] if self._reads_apart else 0,
            "decoder": max(capacity, 0 if self._reads_apart else self._buckets[-1]),
        }
        for name, length in lengths.items():
            most = None if getattr(config, name) is None else loaded.room(name)
            if most is not None and length > most:
                raise InputError(
                    f"the engine's rows of {length} {name} tokens are longer than the {most} "
                    "positions that this model has for them: lower Engine.capacity or "
                    "prompt_buckets"
                )
        if not self._reads_apart and self._buckets[-1] > capacity:
            raise InputError(
                f"Engine.capacity={capacity} holds no prompt of {self._buckets[-1]} tokens, the "
                "largest of prompt_buckets: raise it, or lower that"
            )
        self._loaded, self._slots, self._capacity = loaded, slots, capacity
        self._cache_dtype, self._stride = cache_dtype, stride
        self._queue: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: list[_Running | None] = [None] * slots
        self._submitted = 0
        self._params: Params = jax.jit(for_decoding)(loaded.params)
        self._adapters = many.count(loaded.params)
        shapes = jax.eval_shape(self._empty)
        shardings = self._shardings(shapes)
        self._state = jax.jit(self._empty, out_shardings=shardings)()
        self._admit = jax.jit(self._filled, donate_argnums=1, out_shardings=shardings)
        self._advance = jax.jit(
            self._advanced,
            donate_argnums=1,
            out_shardings=(shardings, loaded.partitioner.replicated),
        )

    # --- requests --------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._queue) + sum(one is not None for one in self._running)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id. Raises InputError for one that can't be answered."""
        self._check(request)
        self._submitted += 1
        self._queue.append((self._submitted, request))
        return self._submitted

    def cancel(self, id: int) -> None:
        """Forgets a request, wherever it stands; nothing more is heard of it."""
        self._queue = collections.deque(one for one in self._queue if one[0] != id)
        self._running = [None if one is not None and one.id == id else one for one in self._running]

    def step(self) -> list[Event]:
        """Fills free slots from the queue, makes `stride` tokens, and says what came of them."""
        for slot, running in enumerate(self._running):
            if running is None and self._queue:
                self._running[slot] = self._start(slot, *self._queue.popleft())
        if not any(self._running):
            return []
        with self._loaded.partitioner.activate():
            self._state, made = self._advance(self._params, self._state)
        events = []
        for tokens in np.asarray(made):
            for slot, running in enumerate(self._running):
                if running is None:
                    continue
                token = int(tokens[slot])
                finished: Finished | None = None
                running.left -= 1
                if token in self._loaded.ends:
                    finished = "eos"
                elif not running.left:
                    finished = "length"
                events.append(Event(running.id, token, finished))
                if finished:
                    self._running[slot] = None
        return events

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, list[int]]]:
        """Answers many requests: (number, its tokens up to and with eos), as they end.

        Requests are taken from the iterable as slots come free, so that it may be endless.
        """
        source = enumerate(requests)
        numbers: dict[int, int] = {}
        answers: dict[int, list[int]] = collections.defaultdict(list)
        while True:
            # One at least, or others' requests would end this before it began.
            room = max(2 * self._slots - self.pending, 0 if numbers else 1)
            for number, request in (next(source, (None, None)) for _ in range(room)):
                if number is None or request is None:
                    break
                numbers[self.submit(request)] = number
            if not numbers:
                return
            for event in self.step():
                if event.id not in numbers:
                    continue  # submitted by someone else
                answers[event.id].append(event.token)
                if event.finished:
                    yield numbers.pop(event.id), answers.pop(event.id)

    def _check(self, request: Request) -> None:
        tokens = np.asarray(request.tokens)
        vocab_size = self._loaded.model.config.vocab_size
        if tokens.ndim != 1 or not len(tokens):
            raise InputError(f"a request's tokens have shape {tokens.shape}: expected one or more")
        if len(tokens) > self._buckets[-1]:
            raise InputError(
                f"a prompt of {len(tokens)} tokens is longer than {self._buckets[-1]}, the largest "
                "of Engine.prompt_buckets: shorten it"
            )
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise InputError(f"a prompt has a token outside of the model's {vocab_size}")
        if request.max_tokens < 1:
            raise InputError(f"Request.max_tokens={request.max_tokens}: expected at least 1")
        before = 1 if self._reads_apart else len(tokens)
        if before + request.max_tokens - 1 > self._capacity:
            raise InputError(
                f"{before} tokens and {request.max_tokens} new ones don't fit Engine.capacity="
                f"{self._capacity}: shorten the prompt, or lower max_tokens"
            )
        if not many.NONE <= request.adapter < self._adapters:
            raise InputError(
                f"Request.adapter={request.adapter}: the engine's parameters hold {self._adapters} "
                "adapters, counted from 0 (-1: none)"
            )
        if not isinstance(request.strategy, Greedy | Sampling):
            raise InputError(
                f"the engine does Greedy and Sampling, not {type(request.strategy).__name__}: use "
                "decode.generate"
            )

    def _start(self, slot: int, id: int, request: Request) -> _Running:
        """Puts a request into a slot."""
        length = len(request.tokens)
        bucket = next(size for size in self._buckets if size >= length)
        rows = self._loaded.partitioner.batch_shards  # one would do, if it could be split
        tokens: np.ndarray = np.zeros((rows, bucket), np.int32)
        tokens[:, :length] = request.tokens
        with self._loaded.partitioner.activate():
            self._state = self._admit(
                self._params,
                self._state,
                tokens,
                np.int32(length),
                np.int32(slot),
                np.uint32(request.seed & 0xFFFFFFFF),
                sampling.by_row([request.strategy]),
                np.int32(request.adapter),
            )
        return _Running(id, request.max_tokens)

    # --- programs --------------------------------------------------------------------------------

    def _empty(self) -> _State:
        """All slots free; traceable."""
        row = jax.eval_shape(
            functools.partial(self._prefilled, bucket=self._buckets[-1]),
            self._params,
            jax.ShapeDtypeStruct((1, self._buckets[-1]), jnp.int32),
            jnp.int32(1),
            jnp.int32(many.NONE),
        )
        cache = jax.tree.map(lambda x: jnp.zeros((self._slots, *x.shape[1:]), x.dtype), row)
        zeros = jnp.zeros(self._slots, jnp.int32)
        return _State(
            cache=cache,
            last=zeros,
            made=zeros,
            seeds=zeros.astype(jnp.uint32),
            strategy=jax.tree.map(jnp.asarray, sampling.by_row([Greedy()] * self._slots)),
            seen=jnp.zeros((self._slots, self._loaded.model.config.vocab_size), bool),
            adapters=zeros,
        )

    def _shardings(self, shapes: _State) -> Any:
        """Slots split as a batch's rows, heads as in attention."""
        place = self._loaded.partitioner.sharding

        def by_row(x: Any) -> Any:
            return place(("batch", *(None,) * (x.ndim - 1)), x.shape)

        def by_head(x: Any) -> Any:
            return place(("batch", "heads", *(None,) * (x.ndim - 2)), x.shape)

        cache = jax.tree.map(by_row, shapes.cache)
        layers = jax.tree.map(by_head, shapes.cache.layers)
        return dataclasses.replace(
            jax.tree.map(by_row, shapes), cache=dataclasses.replace(cache, layers=layers)
        )

    def _prefilled(
        self, params: Params, tokens: Array, length: Array, adapter: Array, *, bucket: int
    ) -> Cache:
        """The cache of one prompt: row 0 of `tokens [rows, bucket]`, as slots of `bucket` have it.

        It stands before the last token of the decoder's row. Places behind hold what nobody sees
        until it is overwritten.
        """
        real = (jnp.arange(tokens.shape[1]) < length).astype(jnp.int32)
        real = jnp.broadcast_to(real[None], tokens.shape)
        # Segments keep padding out of the positions, on which Rotary's DynamicScaling depends.
        batch = {types.DECODER_INPUT_TOKENS: tokens, types.DECODER_SEGMENT_IDS: real}
        if self._reads_apart:
            wide = ((0, 0), (0, bucket - tokens.shape[1]))
            batch = {
                types.ENCODER_INPUT_TOKENS: jnp.pad(tokens, wide),
                types.ENCODER_SEGMENT_IDS: jnp.pad(real, wide),
                types.DECODER_INPUT_TOKENS: jnp.full((len(tokens), 1), self._start_id, jnp.int32),
            }
        elif self._loaded.asking.prompt == "prefix":
            batch[types.DECODER_PREFIX] = real
        model, dtype = self._loaded.model, self._cache_dtype
        chosen = many.select(params, jnp.broadcast_to(adapter, tokens.shape[:1]))
        _, cache = model.apply(
            {"params": chosen}, batch, self._capacity, cache_dtype=dtype, method="prefill"
        )
        # Behind a soft prompt, which the cache holds too.
        before = cache.positions[:1] - 1
        rows = jax.tree.map(lambda x: x[:1], (cache.layers, cache.memory_segment_ids))
        return dataclasses.replace(
            cache,
            layers=rows[0],
            segment_ids=None,  # the padding's places are written over
            memory_segment_ids=rows[1],
            index=before,
            positions=before,
        )

    @property
    def _start_id(self) -> int:
        return self._loaded.vocabulary.start_id

    def _filled(
        self,
        params: Params,
        state: _State,
        tokens: Array,
        length: Array,
        slot: Array,
        seed: Array,
        strategy: RowStrategies,
        adapter: Array,
    ) -> _State:
        """The state with a prompt in a slot."""
        if self._reads_apart:
            row = jnp.full(1, self._start_id, jnp.int32)
            real = jnp.ones(1, bool)
        else:
            row, real = tokens[0], jnp.arange(tokens.shape[1]) < length
        seen = sampling.tokens_seen(row[None], real[None], state.seen.shape[-1])
        new = _State(
            cache=self._prefilled(params, tokens, length, adapter, bucket=self._buckets[-1]),
            last=row[jnp.sum(real) - 1][None],
            made=jnp.zeros(1, jnp.int32),
            seeds=seed[None],
            strategy=strategy,
            seen=seen,
            adapters=adapter[None],
        )

        def put(old: Array, one: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, one.astype(old.dtype), slot, axis=0)

        filled: _State = jax.tree.map(put, state, new)
        return filled

    def _advanced(self, params: Params, state: _State) -> tuple[_State, Array]:
        """The state `stride` tokens on, and the tokens int32 `[t, s]`."""
        params = many.select(params, state.adapters)

        def one(state: _State, _: None) -> tuple[_State, Array]:
            logits, cache = self._loaded.model.apply(
                {"params": params}, state.last[:, None], state.cache, method="extend"
            )
            adjusted = sampling.adjust(logits[:, -1], state.seen, state.strategy)
            keys = sampling.keys_at(jax.vmap(jax.random.key)(state.seeds), state.made)
            token = sampling.choose(adjusted, state.strategy, keys)
            seen = state.seen.at[jnp.arange(self._slots), token].set(True)
            new = dataclasses.replace(
                state, cache=cache, last=token, made=state.made + 1, seen=seen
            )
            return new, token

        if self._stride == 1:
            state, token = one(state, None)
            return state, token[None]
        return jax.lax.scan(one, state, length=self._stride)
