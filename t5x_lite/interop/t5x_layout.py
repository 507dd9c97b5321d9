"""How T5X lays out a Transformer's parameters, against how we do.

T5X has a subtree a layer (`encoder/layers_0/...`) or, where layers were scanned, one subtree for
all (`encoder/encoder/...`) with a layer axis in second place. Kernels of attention join heads and
their width in one dimension, `[embed, heads * kv]`. See t5x/examples/{t5,scalable_t5,decoder_only}
in github.com/google-research/t5x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from t5x_lite.interop.t5x_files import StoredArray
from t5x_lite.types import InputError

SCAN_AXES = (1, 0)  # where the layer axis may be; T5X's default first

# Regex on T5X's path -> ours; in layers, of what stands behind the layer.
_OUTSIDE = (
    (r"(?:decoder/)?token_embedder/embedding", r"token_embedding/embedding"),
    (r"(encoder|decoder)/relpos_bias/rel_embedding", r"\1/relative_bias/embedding"),
    (r"(encoder|decoder)/\1_norm/scale", r"\1/final_norm/scale"),
    (r"decoder/logits_dense/kernel", r"lm_head/kernel"),
)
_INSIDE = (
    (r"(?:self_)?attention/(query|key|value|out)/kernel", r"layers/self_attention/\1/kernel"),
    (
        r"encoder_decoder_attention/(query|key|value|out)/kernel",
        r"layers/cross_attention/\1/kernel",
    ),
    (r"mlp/wi/kernel", r"layers/mlp/wi_0/kernel"),
    (r"mlp/(wi_\d+|wo)/kernel", r"layers/mlp/\1/kernel"),
    (r"pre_(?:self_)?attention_layer_norm/scale", r"layers/self_attention_norm/scale"),
    (r"pre_cross_attention_layer_norm/scale", r"layers/cross_attention_norm/scale"),
    (r"pre_mlp_layer_norm/scale", r"layers/mlp_norm/scale"),
    # Of its own in every layer, where we share one.
    (r"relpos_bias/rel_embedding", r"relative_bias/embedding"),
)
_LAYER = re.compile(r"(encoder|decoder)/(?:layers_(\d+)|encoder|decoder|layers)/(.+)")


@dataclass
class Stored:
    """Where T5X keeps one of our parameters: one array, one for all layers, or one a layer."""

    single: StoredArray | None = None
    scanned: StoredArray | None = None
    layers: dict[int, StoredArray] = field(default_factory=dict)

    @property
    def arrays(self) -> list[StoredArray]:
        found = [array for array in (self.single, self.scanned) if array is not None]
        return found + [self.layers[i] for i in sorted(self.layers)]


def translate(path: str) -> tuple[str, int | None, bool] | None:
    """`(our path, layer, scanned?)` for T5X's path of a parameter; None for an unknown one.

    >>> translate("encoder/layers_3/attention/query/kernel")
    ('encoder/layers/self_attention/query/kernel', 3, False)
    >>> translate("decoder/decoder/mlp/wi_0/kernel")
    ('decoder/layers/mlp/wi_0/kernel', None, True)
    """
    for pattern, ours in _OUTSIDE:
        if match := re.fullmatch(pattern, path):
            return match.expand(ours), None, False
    if inside := _LAYER.fullmatch(path):
        stack, layer, rest = inside.groups()
        for pattern, ours in _INSIDE:
            if match := re.fullmatch(pattern, rest):
                where = f"{stack}/{match.expand(ours)}"
                return where, None if layer is None else int(layer), layer is None
    return None


def group(arrays: Mapping[str, StoredArray]) -> tuple[dict[str, Stored], list[str]]:
    """Arrays by our parameter's path, and the paths that no rule knows."""
    found: dict[str, Stored] = {}
    unknown = []
    for path, array in arrays.items():
        place = translate(path)
        if place is None:
            unknown.append(path)
            continue
        stored = found.setdefault(place[0], Stored())
        if place[2]:
            stored.scanned = array
        elif place[1] is not None:
            stored.layers[place[1]] = array
        else:
            stored.single = array
    return found, unknown


def is_stacked(names: Sequence[str | None]) -> bool:
    return names[0] == "layers"


def is_shared_bias(path: str) -> bool:
    return path.endswith("/relative_bias/embedding")


def check(path: str, stored: Stored, shape: tuple[int, ...], names: Sequence[str | None]) -> str:
    """What is wrong with how a parameter of our `shape` is stored; "" if nothing."""
    stacked = is_stacked(names)
    inner = shape[1:] if stacked else shape
    layers = shape[0] if stacked else None
    if stacked and stored.single is not None:
        return f"{stored.single.path} {stored.single.shape} stands outside of the layers"
    if stacked and stored.scanned is None:
        missing = sorted(set(range(shape[0])) - set(stored.layers))
        if missing:
            return f"missing {path} of layer {', '.join(map(str, missing))}"
        if len(stored.layers) > shape[0]:
            return f"{path} has {len(stored.layers)} layers, the model {shape[0]}"
    for array in stored.arrays:
        if array is stored.scanned:
            axis = scan_axis(array.shape, inner, layers, path)
            good = axis is not None
        else:
            good = array.shape in layouts(inner, path)
        if not good:
            wanted = " or ".join(map(str, layouts(inner, path)))
            extra = f", with {layers or 'the'} layers on axis 1" if array is stored.scanned else ""
            return f"{array.path} is {array.shape}, the model's {path} needs {wanted}{extra}"
    return ""


def layouts(shape: tuple[int, ...], path: str) -> list[tuple[int, ...]]:
    """Shapes under which T5X may hold one layer's parameter of our `shape`."""
    if is_shared_bias(path):
        return [shape[::-1]]
    if len(shape) == 3 and path.endswith("/out/kernel"):  # [heads, kv, embed]
        return [(shape[0] * shape[1], shape[2]), shape]
    if len(shape) == 3:  # [embed, heads, kv]
        return [(shape[0], shape[1] * shape[2]), shape]
    return [shape]


def scan_axis(
    stored: tuple[int, ...], inner: tuple[int, ...], layers: int | None, path: str
) -> int | None:
    """The layer axis of a scanned array, or None if it does not fit; `layers` None: any number."""
    for axis in SCAN_AXES:
        rest = stored[:axis] + stored[axis + 1 :]
        fits = len(stored) > axis and layers in (None, stored[axis])
        if fits and rest in layouts(inner, path):
            return axis
    return None


def to_ours(array: np.ndarray, shape: tuple[int, ...], path: str) -> np.ndarray:
    """One layer's array in our `shape`; also of a mean, that has 1 in place of some dimensions."""
    if is_shared_bias(path):
        return array.T
    if array.ndim == len(shape):
        return array
    # Dimensions of ours that each of the stored ones joins.
    joined = [(0, 1), (2,)] if path.endswith("/out/kernel") else [(0,), (1, 2)]
    sizes: list[int] = []
    for size, axes in zip(array.shape, joined, strict=True):
        ours = [shape[axis] for axis in axes]
        sizes += ours if size == math.prod(ours) else [1] * len(ours)
    return array.reshape(sizes)


def read(path: str, stored: Stored, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A parameter in our shape and `dtype`, of what `check` found to fit.

    One array of the checkpoint is in memory besides. Raises InputError for a damaged file, and for
    relative biases that differ between layers.
    """
    if is_shared_bias(path) and stored.single is None:
        return _shared(path, stored, shape).astype(dtype, copy=False)
    if stored.single is not None:
        return to_ours(stored.single.read(), shape, path).astype(dtype, copy=False)
    result = np.empty(shape, dtype)
    if stored.scanned is not None:
        axis = scan_axis(stored.scanned.shape, shape[1:], shape[0], path)
        assert axis is not None
        layers: Iterable[np.ndarray] = np.moveaxis(stored.scanned.read(), axis, 0)
    else:
        layers = (stored.layers[index].read() for index in range(shape[0]))
    for index, layer in enumerate(layers):
        result[index] = to_ours(layer, shape[1:], path)
    return result


def _shared(path: str, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """T5's one bias for all layers, of a checkpoint that repeats it in each."""
    if stored.scanned is not None:
        axis = scan_axis(stored.scanned.shape, shape, None, path)
        assert axis is not None
        layers = list(np.moveaxis(stored.scanned.read(), axis, 0))
    else:
        layers = [stored.layers[index].read() for index in sorted(stored.layers)]
    if any(not np.array_equal(layer, layers[0]) for layer in layers[1:]):
        first = stored.arrays[0]
        raise InputError(
            f"'{first.path}' {first.shape} in '{first.where}' differs from layer to layer: this "
            "model has relative biases of its own in every layer (as umT5), and t5x_lite's stacks "
            "share one"
        )
    return to_ours(layers[0], shape, path)


def check_state(path: str, stored: Stored) -> None:
    """Raises InputError for an optimizer's state of one layer's relative bias.

    That of a bias that is shared can't be told from it.
    """
    if is_shared_bias(path) and stored.single is None:
        raise InputError(
            f"'{stored.arrays[0].path}' belongs to one layer's relative bias, where the model "
            "shares one: Adafactor's state can't be taken over; load the parameters alone"
        )


def read_factors(
    path: str, rows: Stored, columns: Stored, shape: tuple[int, ...], names: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of Adafactor's second moment: T5X's `v_row` and `v_col` in our rank.

    T5X takes means over the larger of two dimensions for `v_row`, over the smaller for `v_col`; in
    arrays with a layer axis over what is not `embed`, and over `embed`. Raises InputError for
    arrays that are of other shapes than that gives.
    """
    inner, axes = (shape[1:], names[1:]) if is_stacked(names) else (shape, names)
    found = []
    for slot, stored in (("v_row", rows), ("v_col", columns)):
        parts: list[np.ndarray] = []
        for array in stored.arrays:
            layers = shape[0] if array is stored.scanned else None
            parts += _factors(path, slot, array, layers, inner, axes)
        if is_stacked(names) and len(parts) != shape[0]:
            raise InputError(f"{slot} of '{path}' has {len(parts)} layers, the model {shape[0]}")
        found.append(np.stack(parts) if is_stacked(names) else parts[0])
    return found[0], found[1]


def _factors(
    path: str,
    slot: str,
    array: StoredArray,
    layers: int | None,
    inner: tuple[int, ...],
    names: Sequence[str | None],
) -> list[np.ndarray]:
    """`v_row` or `v_col` of each layer in `array`, with 1 in place of the dimensions reduced."""
    embed = names.index("embed") if "embed" in names else -1
    for layout in layouts(inner, path):
        if len(layout) == 2 and layers is None:
            # As T5X sorts: of two equal dimensions the second counts as the larger.
            small, large = np.argsort(layout, kind="stable")
            reduced = {int(large) if slot == "v_row" else int(small)}
        else:
            column = 0 if embed == 0 else len(layout) - 1
            others = set(range(len(layout))) - {column}
            reduced = others if slot == "v_row" else {column}
        kept = [1 if axis in reduced else size for axis, size in enumerate(layout)]
        left = tuple(size for axis, size in enumerate(layout) if axis not in reduced)
        if layers is None and array.shape == left:
            return [to_ours(array.read().reshape(kept), inner, path)]
        for scan in SCAN_AXES:
            # The layer axis moves down by the reduced axes that stood before it.
            at = scan - len([axis for axis in reduced if axis < scan])
            if layers is not None and array.shape == (*left[:at], layers, *left[at:]):
                parts = np.moveaxis(array.read(), at, 0)
                return [to_ours(part.reshape(kept), inner, path) for part in parts]
    raise InputError(
        f"'{array.path}' in '{array.where}' is {array.shape}: no {slot} of '{path}' {inner}"
    )
