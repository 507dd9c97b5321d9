"""Attention on TPUs whose logits never reach memory: splash, or ours with a bias by distance.

The same signature as `plain.dot_product_attention`. What a visibility asks for is honoured or
refused; see `attention`. Tiles where nobody sees anybody are not computed: half of them, if causal.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_lite import sharding
from t5x_lite.kernels import relative
from t5x_lite.kernels.plain import ATTENDED, ByDistance, Visibility
from t5x_lite.types import Array, InputError

_FUSED = 4096  # the longest row of keys whose backward pass is one kernel
_TILES = (1024, 512, 256, 128)  # the largest that divides a length is used


def attention(
    query: Array,
    key: Array,
    value: Array,
    visibility: Visibility,
    bias: Array | ByDistance | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """`dot_product_attention`, rows and heads each on the device that has them.

    Args:
      query: `[b, q, h, d]`, scaled; key, value: `[b, k, h, d]`.
      visibility: packed segments, causality of places in order, a window.
      bias: by distance alone, for rows of one length: T5's; or None.
      interpret: run the kernel's program by jax, anywhere, slowly; for tests.

    Raises InputError for what the kernel can't do: another bias, a prefix (of tokens, or of
    tuning), chosen places, lengths that 128 does not divide, and, if not interpreted, no TPU.
    """
    _check(query, key, visibility, bias, interpret)
    shape = _Shape(visibility)
    segments = [visibility.query_segments, visibility.key_segments]
    if any(ids is None for ids in segments):
        segments = [jnp.ones(x.shape[:2], jnp.int32) for x in (query, key)]
    names = ("batch", None, "heads", None)
    inputs, arrays = [names] * 3 + [("batch", None)] * 2, [query, key, value, *segments]
    if isinstance(bias, ByDistance):
        inputs, arrays = [*inputs, ("heads", None)], [*arrays, bias.values]
        run = functools.partial(_biased, causal=shape.causal, interpret=interpret)
    else:
        run = functools.partial(_rows, visibility=shape, interpret=interpret)
    attended: Array = sharding.on_shards(run, inputs, names)(*arrays)
    return attended


def _biased(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    by_distance: Array,
    *,
    causal: bool,
    interpret: bool,
) -> Array:
    """One device's rows and heads, with a bias by distance."""
    by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    segments = query_segments, key_segments
    attended = relative.attend(*by_head, by_distance, *segments, causal, interpret)
    return checkpoint_name(jnp.swapaxes(attended, 1, 2), ATTENDED)


class _Shape:
    """What of a visibility is the same for all rows."""

    def __init__(self, visibility: Visibility):
        self.causal = visibility.query_places is not None
        self.window = visibility.window


def _rows(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    *,
    visibility: _Shape,
    interpret: bool,
) -> Array:
    """One device's rows and heads."""
    # A tenth of a second to import: for those who have a TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, lengths = query.shape[2], (query.shape[1], key.shape[1])
    mask: Any = masks.FullMask(lengths)
    if visibility.causal:
        mask = masks.CausalMask(lengths)
        if visibility.window is not None:
            mask = masks.LocalMask(lengths, (visibility.window - 1, 0), 0)
    own, others = map(_tile, lengths)
    # The fused kernel is faster, and keeps a part of query's gradient for each tile of keys.
    fused = lengths[1] <= _FUSED
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=own,
            block_kv=others,
            block_kv_compute=min(others, 512),
            block_q_dkv=own,
            block_kv_dkv=others,
            block_kv_dkv_compute=min(others, 512),
            use_fused_bwd_kernel=fused,
            block_q_dq=None if fused else own,
            block_kv_dq=None if fused else others,
        ),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    segments = splash.SegmentIds(query_segments, key_segments)
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)


def _tile(length: int) -> int:
    return next(tile for tile in _TILES if length % tile == 0)


def _check(
    query: Array,
    key: Array,
    visibility: Visibility,
    bias: Array | ByDistance | None,
    interpret: bool,
) -> None:
    refused = {
        "a bias that is not by distance": bias is not None and not isinstance(bias, ByDistance),
        "a bias with a window": bias is not None and visibility.window is not None,
        "a prefix that is seen from everywhere": visibility.key_prefix is not None,
        "keys ahead of the row (prefix tuning)": visibility.ahead > 0,
        "places chosen one by one": visibility.allowed is not None,
        "places out of order": visibility.query_places is not None and not visibility.in_order,
        "a window without causality": visibility.window is not None
        and visibility.query_places is None,
    }
    asked = [what for what, found in refused.items() if found]
    if asked:
        raise InputError(
            f"StackConfig.attention='flash' can't do {' and '.join(asked)}: set it to 'plain'"
        )
    if isinstance(bias, ByDistance) and query.shape[1] != key.shape[1]:
        raise InputError("a bias by distance is of rows with as many keys as queries")
    for length in (query.shape[1], key.shape[1]):
        if length % relative.LANES:
            raise InputError(
                f"StackConfig.attention='flash' wants rows of a multiple of "
                f"{relative.LANES} tokens, not {length}: make them longer, or set it to 'plain'"
            )
    if not interpret and sharding.platform() != "tpu":
        raise InputError(
            f"StackConfig.attention='flash' is for TPUs, and this is {sharding.platform()}: set it "
            "to 'plain'"
        )
