"""A soft prompt in front of rows that hold one text each: how a tuned model is asked.

Training writes a prompt's ids into its rows, because packed texts each have their own; see
`data.layouts.put_ahead`. Whoever asks a model brings texts alone.

Shapes: b batch, l length, p prompt.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from t5x_lite import types
from t5x_lite.models import weights
from t5x_lite.models.config_heads import LMHead, TokenHead
from t5x_lite.models.stack import prefix_length
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, Params


def prompt_length(params: Params) -> int:
    """How many embeddings stand in front of every text of a model with these parameters."""
    rows = weights.prompt_rows((params or {}).get("token_embedding", {}).get("embedding"))
    return 0 if rows is None else int(rows.shape[0])


def ahead(params: Params, stack: str) -> int:
    """How many positions of a stack, "encoder" or "decoder", are not a text's own."""
    params = params or {}
    first = "encoder" if "encoder" in params else "decoder"
    own = prompt_length(params) if stack == first else 0
    return own + prefix_length(params.get(stack, {}))


class PromptedTransformer(Transformer):
    """A Transformer whose `apply` puts `prompt` tokens in front of every row's text.

    Rows are unpacked, padded on either side. Places in the batch and in what is returned are the
    text's: slots move with it, and states and logits of the prompt are left out.
    """

    prompt: int = 0

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        if method == "extend" or not self.prompt:
            return super().apply(variables, *args, method=method, **kwargs)
        batch, *rest = args
        made = behind_prompt(batch, self.prompt, self.config.vocab_size)
        if method == "prefill":
            if self.config.encoder is None:
                rest[0] += self.prompt  # the cache's capacity
            logits, cache = super().apply(variables, made, *rest, method=method, **kwargs)
            whole = self.config.encoder is not None or types.MASKED_POSITIONS in batch
            return logits if whole else logits[:, self.prompt :], cache
        found = super().apply(variables, made, *rest, method=method, **kwargs)
        in_stream = method == "encode" or self.config.encoder is None or self.config.decoder is None
        by_token = method in ("encode", "states") or (
            types.MASKED_POSITIONS not in batch and isinstance(self.config.head, LMHead | TokenHead)
        )
        return found[:, self.prompt :] if in_stream and by_token else found


def _tokens(batch: Batch) -> str:
    encoder = types.ENCODER_INPUT_TOKENS
    return encoder if encoder in batch else types.DECODER_INPUT_TOKENS


def behind_prompt(batch: Batch, prompt: int, vocab_size: int) -> dict[str, Array]:
    """The batch with ids `vocab_size`, ... in front of each row's text, behind padding on its left.

        tokens  0 0 5 6    segments  0 0 1 1    prompt 2 ->   0 0 96 97 5 6      0 0 1 1 1 1

    In the encoder's stream, or the decoder's if there is no encoder; slots move with the text.
    """
    key = _tokens(batch)
    stream = key.split("_", maxsplit=1)[0]
    tokens = batch[key]
    segments = batch.get(f"{stream}_segment_ids", jnp.ones_like(tokens))
    padding = jnp.sum(jnp.cumsum(segments > 0, axis=1) == 0, axis=1, keepdims=True)
    # A row of padding alone only fills the batch up: its prompt stands at its beginning.
    padding = jnp.where(padding == tokens.shape[1], 0, padding)
    places = jnp.arange(tokens.shape[1] + prompt)[None, :] - padding
    own = (places >= 0) & (places < prompt)

    def put(values: Array, new: Array | int) -> Array:
        wide = jnp.pad(values, ((0, 0), (0, prompt)))
        moved = jnp.pad(values, ((0, 0), (prompt, 0)))
        return jnp.where(own, new, jnp.where(places < 0, wide, moved))

    made = {**batch, key: put(tokens, vocab_size + places)}
    made[f"{stream}_segment_ids"] = put(segments, 1)
    if (name := f"{stream}_positions") in batch:
        made[name] = put(batch[name] + prompt, places)
    if types.ENCODER_TOKEN_TYPES in batch:
        made[types.ENCODER_TOKEN_TYPES] = put(batch[types.ENCODER_TOKEN_TYPES], 0)
    if stream == "decoder" and types.DECODER_PREFIX in batch:
        made[types.DECODER_PREFIX] = put(batch[types.DECODER_PREFIX], 1)
    slots_in = types.ENCODER_INPUT_TOKENS in batch and types.DECODER_INPUT_TOKENS in batch
    if types.MASKED_POSITIONS in batch and not slots_in:
        made[types.MASKED_POSITIONS] = batch[types.MASKED_POSITIONS] + prompt
    return made
