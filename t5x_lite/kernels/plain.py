"""Who may see whom, and plain attention: what every other kernel is compared with.

Shapes: b batch, q query length, k key length, h heads, d head width.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.types import Array

# Exactly zero after softmax in float32 wherever a row sees at least one key; finite, so that a row
# that sees none is uniform instead of NaN.
HIDDEN = -1e10
# Rematerialisation policies know the result of attention, and its softmax's sums, by this name.
ATTENDED = "attended"


@flax.struct.dataclass
class Visibility:
    """Which keys a query sees, as data: packing, causality and prefixes.

    A kernel either honours every field that is set or raises; none may be ignored.
    """

    query_segments: Array | None = None  # [b, q] int32; a query sees keys of its own segment only
    key_segments: Array | None = None  # [b, k]
    # int32 [q] and [k], or [b, q] and [b, k]: only keys not after the query.
    query_places: Array | None = None
    key_places: Array | None = None
    in_order: bool = flax.struct.field(pytree_node=False, default=False)  # places are 0, 1, 2, ...
    key_prefix: Array | None = None  # [b, k]: nonzero keys are seen ahead of causality (prefix LM)
    allowed: Array | None = None  # bool [b, q, k]: no other keys are seen
    window: int | None = flax.struct.field(pytree_node=False, default=None)  # places seen, own too
    # So many keys stand ahead of those that all of this is about, and every query sees them.
    ahead: int = flax.struct.field(pytree_node=False, default=0)

    def mask(self) -> Array | None:
        """True where visible: bool `[b or 1, 1, q, ahead + k]`, or None if all is visible."""
        visible = None
        if self.query_places is not None and self.key_places is not None:
            query, key = self.query_places[..., :, None], self.key_places[..., None, :]
            if key.ndim == 2:
                query, key = query[None], key[None]
            visible = (key <= query)[:, None]
            if self.key_prefix is not None:
                visible = visible | (self.key_prefix != 0)[:, None, None, :]
            if self.window is not None:
                visible = visible & (key > query - self.window)[:, None]
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
            visible = same if visible is None else visible & same
        if self.allowed is not None:
            allowed = self.allowed[:, None]
            visible = allowed if visible is None else visible & allowed
        if visible is None or not self.ahead:
            return visible
        return jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (self.ahead, 0)), constant_values=True)


@flax.struct.dataclass
class ByDistance:
    """A bias that depends on the distance from query to key alone, for kernels that take no more.

    `values [h, 2 l]`: place `l - 1 + distance` is for keys so far after the query, in rows of l.
    """

    values: Array

    def dense(self) -> Array:
        """The bias `[1, h, l, l]`."""
        length = self.values.shape[-1] // 2
        places = jnp.arange(length)
        return self.values[None, :, places[None, :] - places[:, None] + length - 1]


def dot_product_attention(
    query: Array, key: Array, value: Array, visibility: Visibility, bias: Array | None = None
) -> Array:
    """Plain attention, the reference for every other kernel; softmax in float32.

    Queries come scaled by `1/sqrt(d)`, or not at all (T5's initialisation does it).

    The gradient is written out because autodiff's costs a CPU twice as much (one layer of T5 1.1
    small's encoder, batch 8 x 512, both ways: 390 CPU-ms against 220). XLA has no fast product
    for the forms that autodiff gives key's gradient, sums bias's over the batch in a strided loop
    (125 ms alone), and the weights `[b, h, q, k]` are kept where two numbers a query suffice.

    Args:
      query: `[b, q, h, d]`.
      key, value: `[b, k, h, d]`.
      visibility: see `Visibility`.
      bias: `[1 or b, h, q, k]`, added to the logits.

    Returns:
      `[b, q, h, d]` in `query`'s dtype.
    """
    return _attend(query, key, value, bias, visibility)


@jax.custom_vjp
def _attend(
    query: Array, key: Array, value: Array, bias: Array | None, visibility: Visibility
) -> Array:
    return _attend_forward(query, key, value, bias, visibility)[0]


def _attend_forward(
    query: Array, key: Array, value: Array, bias: Array | None, visibility: Visibility
) -> tuple[Array, tuple]:
    logits = _logits(query, key, bias, visibility.mask())
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    attended = product(weights.astype(value.dtype), _by_row(value)) / total
    attended = jnp.swapaxes(attended, 1, 2).astype(query.dtype)
    kept = jax.tree.map(lambda x: checkpoint_name(x, ATTENDED), (attended, highest, total))
    return kept[0], (query, key, value, bias, visibility, *kept)


def _attend_backward(residuals: tuple, gradient: Array) -> tuple:
    query, key, value, bias, visibility, attended, highest, total = residuals
    mask = visibility.mask()
    # Both the softmax's division and the mask are applied to the gradient [b, q, h, d], not to
    # arrays [b, h, q, k]: XLA:CPU would compute a masked d_logits twice, for bias and for the rest.
    # Three layers of T5 1.1 small's encoder, 8 x 512, both ways: 1.53 CPU-seconds, 1.35 like this.
    weights = jnp.exp(_logits(query, key, bias, mask) - highest)
    scaled = of_logits = gradient.astype(jnp.float32) / jnp.swapaxes(total, 1, 2)
    if mask is not None:  # hidden keys weigh 0 already, unless a row sees nothing: all weigh alike
        of_logits = jnp.where(jnp.swapaxes(highest, 1, 2) > HIDDEN, scaled, 0.0)
    of_logits = of_logits.astype(gradient.dtype)
    # sum_k weights * d_weights, without the two [b, h, q, k] arrays; of the same rounded gradient.
    mean = jnp.sum(of_logits.astype(jnp.float32) * attended.astype(jnp.float32), axis=-1)
    d_weights = product(_by_row(of_logits), _by_column(value))
    d_logits = weights * (d_weights - jnp.swapaxes(mean, 1, 2)[..., None])
    d_bias = None
    if bias is not None:
        d_bias = d_logits
        if bias.shape[0] == 1:  # a sum over the batch, as a product: see dot_product_attention
            d_bias = jnp.einsum("b,bhqk->hqk", jnp.ones(query.shape[0]), d_logits)[None]
        d_bias = d_bias.astype(bias.dtype)
    d_logits = d_logits.astype(query.dtype)
    d_query = jnp.swapaxes(product(d_logits, _by_row(key)), 1, 2)
    d_key = jnp.moveaxis(product(_by_column(query), d_logits), 3, 1)
    scaled = scaled.astype(gradient.dtype)
    d_value = jnp.moveaxis(product(_by_column(scaled), weights.astype(gradient.dtype)), 3, 1)
    d_key, d_value = d_key.astype(key.dtype), d_value.astype(value.dtype)
    return d_query.astype(query.dtype), d_key, d_value, d_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(query: Array, key: Array, bias: Array | None, mask: Array | None) -> Array:
    """What the softmax is of: float32 `[b, h, q, k]`."""
    logits = product(_by_row(query), _by_column(key))
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask, logits, HIDDEN)


def product(x: Array, y: Array) -> Array:
    """`[b, h, m, c]` times `[b, h, c, n]`: float32 `[b, h, m, n]`.

    The one form of batched product that XLA:CPU computes fast: 110 to 180 GFLOP/s, against 50 to
    60 where the inner axis is another one. Transposing `[b, l, h, d]` first costs next to nothing.
    """
    dimensions = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _by_row(x: Array) -> Array:
    """`[b, l, h, d] -> [b, h, l, d]`."""
    return jnp.transpose(x, (0, 2, 1, 3))


def _by_column(x: Array) -> Array:
    """`[b, l, h, d] -> [b, h, d, l]`."""
    return jnp.transpose(x, (0, 2, 3, 1))
