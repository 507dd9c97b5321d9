"""T5X's Adafactor state: training goes on from it as from our own."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from t5x_lite import trees
from t5x_lite.interop.t5x import load_t5x_adafactor
from t5x_lite.models import transformer
from t5x_lite.train.imported import adafactor_state
from t5x_lite.train.optim import Adafactor, AdamW
from t5x_lite.types import InputError
from tests.common import T5, build
from tests.interop.t5x_writer import adafactor_tree, t5x_tree, write_native

FACTORED = functools.partial(Adafactor, learning_rate=1e-2, min_dim_size_to_factor=2)
FULL = functools.partial(Adafactor, learning_rate=1e-2)  # nothing in the tiny model is of 128


@pytest.fixture(scope="module")
def t5():
    """`(params, axes, gradients of three steps)`."""
    model, params = build(T5)

    def gradient(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: rng.normal(0, seed + 1, x.shape).astype("f4"), params)

    return params, transformer.axes(model), [gradient(seed) for seed in range(3)]


def trained(config, t5):
    """`(optimizer, params, state)` after two steps."""
    params, axes, gradients = t5
    optimizer = config.make(axes)
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for gradient in gradients[:2]:
        updates, state = step(gradient, state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return optimizer, params, state


def second_moments(gradients, decay_rate=0.8):
    """The full ones after these gradients, by the paper's equation."""
    v = jax.tree.map(np.zeros_like, gradients[0])
    for step, gradient in enumerate(gradients):
        decay = 1 - (step + 1.0) ** -decay_rate
        v = jax.tree.map(lambda v, g, d=decay: d * v + (1 - d) * (g * g + 1e-30), v, gradient)
    return jax.tree.map(np.float32, v)


def load(folder, t5, *, scanned=False, momentum=None, min_size=128, own_bias=False):
    layout = functools.partial(t5x_tree, scanned=scanned, own_bias=own_bias)
    tree = adafactor_tree(
        layout(second_moments(t5[2][:2])),
        2,
        # T5X's sign: what is subtracted.
        momentum=momentum and layout(jax.tree.map(lambda m: -np.asarray(m), momentum)),
        min_size=min_size,
    )
    return load_t5x_adafactor(str(write_native(folder, layout(t5[0]), tree)))


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (FULL(), {}),
        (FULL(beta1=0.9), {}),
        (FACTORED(), {"min_size": 2}),
        (FACTORED(), {"scanned": True}),  # factors within layers, full moments outside of them
        (FACTORED(), {}),  # of full moments ours keeps the means
    ],
    ids=["full", "momentum", "factored", "scanned", "full to factored"],
)
def test_a_step_goes_on_as_from_our_own_state(tmp_path, t5, config, layout):
    optimizer, params, state = trained(config, t5)
    moments = load(tmp_path / "c", t5, momentum=state.momentum, **layout)
    assert moments.step == 2
    found = adafactor_state(optimizer.init(params), params, moments)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for path, leaf in trees.flatten(found).items():
        ours = trees.flatten(state)[path]
        assert (leaf.dtype, leaf.shape) == (ours.dtype, ours.shape), path
        np.testing.assert_allclose(leaf, ours, 1e-5, err_msg=path)
    step = jax.jit(optimizer.update)
    wanted, _ = step(t5[2][2], state, params)
    got, _ = step(t5[2][2], found, params)
    for path, leaf in trees.flatten(got).items():
        np.testing.assert_allclose(leaf, trees.flatten(wanted)[path], 1e-5, err_msg=path)


def test_it_is_found_among_other_transformations(tmp_path, t5):
    optimizer = FULL(clip_norm=1.0).make(t5[1])
    moments = load(tmp_path / "c", t5)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        jax.jit(optimizer.init)(t5[0]),
    )
    found = adafactor_state(shapes, t5[0], moments)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    assert int(found[1].count) == 2
    jax.eval_shape(optimizer.update, t5[2][2], found, t5[0])


def test_what_cannot_be_taken_over_is_refused(tmp_path, t5):
    params, axes, _ = t5
    factored = load(tmp_path / "a", t5, min_size=2)
    for config, expected in (
        (AdamW(learning_rate=1.0), "train with an Adafactor"),
        (FACTORED(beta1=0.9), "without momentum"),
        (FULL(), r"set Adafactor.min_dim_size_to_factor to \d+ or less"),
    ):
        with pytest.raises(InputError, match=expected):
            adafactor_state(jax.eval_shape(config.make(axes).init, params), params, factored)
    with pytest.raises(InputError, match="nothing for the parameter 'x/"):
        adafactor_state(FULL().make(axes).init(params), {"x": params}, factored)
    with pytest.raises(InputError, match=r"coder/relpos_bias/rel_embedding/v.*one layer"):
        load(tmp_path / "b", t5, scanned=True, own_bias=True)


def test_damaged_and_other_states_are_refused(tmp_path, t5):
    tree = adafactor_tree(t5x_tree(second_moments(t5[2])), 3)
    target = t5x_tree(t5[0])
    name = "state/param_states/encoder/layers_0/mlp/wo/kernel"
    for change, expected in (
        ({f"{name}/v": np.ones((3, 3), "f4")}, r"mlp/wo/kernel/v is \(3, 3\)"),
        ({f"{name}/v": np.zeros(1, "f4")}, "mlp/wo/kernel of layer 0"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(InputError, match=expected):
            load_t5x_adafactor(str(write_native(folder, target, tree | change)))
    adam = {"state/step": np.int32(1), "state/param_states/0/mu/x": np.ones(3, "f4")}
    with pytest.raises(InputError, match="another optimizer"):
        load_t5x_adafactor(str(write_native(tmp_path / "adam", target, adam)))
    assert load_t5x_adafactor(str(write_native(tmp_path / "none", target))) is None
