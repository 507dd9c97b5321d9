"""Layouts said by naming axes."""

import numpy as np
import pytest

from t5x_lite.interop import axes

SIZES = {"embed": 3, "heads": 2, "kv": 5, "vocab": 7}


@pytest.mark.parametrize(
    ("description", "their_shape", "einsum"),
    [
        ("embed heads kv -> (heads kv) embed", (10, 3), "ehk->hke"),
        ("heads kv embed -> embed (heads kv)", (3, 10), "hke->ehk"),
        ("embed vocab -> vocab embed", (7, 3), "ev->ve"),
        ("vocab -> 0/1 vocab", (1, 7), "v->v"),
    ],
)
def test_a_view_is_theirs_in_our_order(description, their_shape, einsum):
    layout = axes.parse(description)
    shape = [SIZES[name] for name in description.split("->")[0].split()]
    ours = np.arange(np.prod(shape)).reshape(shape)
    assert layout.their_shape(shape) == their_shape
    theirs = np.einsum(einsum, ours).reshape(their_shape)
    np.testing.assert_array_equal(layout.view(theirs, shape), ours)
    # Written through the view, it is the same array again.
    written = np.zeros_like(theirs)
    layout.view(written, shape)[...] = ours
    np.testing.assert_array_equal(written, theirs)


@pytest.mark.parametrize("order", ["{} heads kv", "heads {} kv", "heads kv {}"])
def test_fused_parts_fill_the_whole(order):
    shape = (3, 2, 5)
    whole = np.zeros((30, 3), int)
    parts = []
    for index in range(3):
        layout = axes.parse(f"embed heads kv -> ({order.format(f'{index}/3')}) embed")
        assert layout.their_shape(shape) == whole.shape
        parts.append(np.random.default_rng(index).integers(1, 99, shape))
        layout.view(whole, shape)[...] = parts[-1]
    assert whole.all()
    at = order.replace("{}", "part").split().index("part")
    stacked = np.stack([np.moveaxis(part, 0, -1) for part in parts], axis=at)
    np.testing.assert_array_equal(whole, stacked.reshape(30, 3))


def test_same_axes():
    x = np.ones((2, 3))
    assert axes.same(2).their_shape((2, 3)) == (2, 3)
    assert np.shares_memory(axes.same(2).view(x, (2, 3)), x)


@pytest.mark.parametrize("text", ["a b", "a b -> (b c)", "a b -> (b a", "a a -> a", "a b -> b"])
def test_what_is_no_description(text):
    with pytest.raises(ValueError, match="the same names on both sides"):
        axes.parse(text)
