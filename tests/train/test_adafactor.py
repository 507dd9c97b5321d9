"""Adafactor against the paper in float64, and against itself on stacked and split parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import trees
from t5x_lite.train.adafactor import Factoring, adafactor
from t5x_lite.train.schedules import FactorSchedule

SCHEDULE = FactorSchedule("constant * rsqrt_decay", base_learning_rate=0.3, warmup_steps=3)


def _gradients(shape, steps=10, seed=1):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))  # rows and columns differ, or factoring would be exact
    return [(scale * rng.normal(size=shape)).astype(np.float32) for _ in range(steps)]


def _paper(x, gradients, *, factored, rate, d=1.0, eps1=1e-30, eps2=1e-3):
    """Algorithms 4 (vectors) and 5 (matrices) of the paper, sums and all, in float64."""
    x = x.astype(np.float64)
    v = np.zeros(x.shape)
    row, column = np.zeros(x.shape[0]), np.zeros(x.shape[-1])
    rms = lambda a: np.sqrt(np.mean(a**2))
    for t, g in enumerate(gradients, start=1):
        g = g.astype(np.float64)
        alpha = max(eps2, rms(x)) * rate(t - 1)
        beta = 1 - t**-0.8
        if factored:
            row = beta * row + (1 - beta) * (g**2 + eps1).sum(1)
            column = beta * column + (1 - beta) * (g**2 + eps1).sum(0)
            v = np.outer(row, column) / row.sum()
        else:
            v = beta * v + (1 - beta) * (g**2 + eps1)
        u = g / np.sqrt(v)
        x = x - alpha * u / max(1, rms(u) / d)
    return x


def _run(x, gradients, axes, learning_rate=SCHEDULE, **kwargs):
    optimizer = adafactor(learning_rate, axes, **kwargs)
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    for g in gradients:
        updates, state = step(g, state, x)
        x = optax.apply_updates(x, updates)
    return x, state


def _array(shape, seed=0, scale=0.5):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "axes", "factored"),
    [
        ((130, 140), ("embed", "mlp"), True),
        ((130, 140), ("mlp", "embed"), True),
        ((130, 140), ("unknown", "other"), True),
        ((12, 140), ("embed", "mlp"), False),
        ((150,), ("embed",), False),
    ],
)
def test_equals_the_paper(shape, axes, factored):
    x, gradients = _array(shape), _gradients(shape)
    got, _ = _run({"w": x}, [{"w": g} for g in gradients], {"w": axes})
    rate = lambda t: 0.3 / np.sqrt(max(t, 3))
    want = _paper(x, gradients, factored=factored, rate=rate)
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-5)
    other = _paper(x, gradients, factored=not factored, rate=rate) if len(shape) > 1 else x
    assert np.abs(got["w"] - other).max() > 1e-2  # the comparison can tell


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("shape", [(3, 130, 4, 40), (3, 130, 2, 2), (3, 130)])
def test_stacked_layers_are_updated_as_each_alone(shape, beta1):
    axes = ("layers", "embed", "heads", "kv")[: len(shape)]
    # Layers of very different size: a statistic shared between them would show.
    size = np.asarray([0.1, 1.0, 10.0]).reshape(3, *[1] * (len(shape) - 1)).astype(np.float32)
    x, gradients = _array(shape) * size, [g * size**2 for g in _gradients(shape)]
    options = {"beta1": beta1, "weight_decay_rate": 0.01}
    stacked, _ = _run({"w": x}, [{"w": g} for g in gradients], {"w": axes}, **options)
    for layer in range(3):
        alone, _ = _run(
            {"w": x[layer]}, [{"w": g[layer]} for g in gradients], {"w": axes[1:]}, **options
        )
        np.testing.assert_allclose(stacked["w"][layer], alone["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [("embed", "heads", "kv"), ("heads", "kv", "embed")])
def test_split_heads_are_updated_as_the_joined_matrix(axes):
    shape = (130, 4, 40) if axes[0] == "embed" else (4, 40, 130)
    joined_shape, joined_axes = ((130, 160), ("embed", "joined"))
    if axes[0] != "embed":
        joined_shape, joined_axes = joined_shape[::-1], joined_axes[::-1]
    x, gradients = _array(shape), _gradients(shape)
    split, state = _run({"w": x}, [{"w": g} for g in gradients], {"w": axes})
    joined, _ = _run(
        {"w": x.reshape(joined_shape)},
        [{"w": g.reshape(joined_shape)} for g in gradients],
        {"w": joined_axes},
    )
    np.testing.assert_allclose(split["w"].reshape(joined_shape), joined["w"], rtol=1e-5, atol=1e-6)
    assert trees.count(state.v_row) + trees.count(state.v_col) == 130 + 160


def test_factoring_by_names():
    of = lambda axes, *shape: Factoring.of(axes, shape)
    plan = of(("layers", "embed", "heads", "kv"), 8, 512, 6, 64)
    assert (plan.rows, plan.columns, plan.batches) == ((2, 3), (1,), (0,))
    plan = of(("vocab", "embed"), 32128, 512)
    assert (plan.rows, plan.columns, plan.batches) == ((0,), (1,), ())
    plan = of((None, "other", "third"), 20, 10, 200)
    assert (plan.rows, plan.columns) == ((0, 1), (2,))
    assert not of(("layers", "embed"), 200, 512).factored
    assert not of(("layers", "embed", "rank"), 8, 512, 16).factored
    assert not of(("layers", "rank", "heads", "kv"), 8, 16, 6, 64).factored
    assert not of((), *()).factored
    with pytest.raises(ValueError, match="don't name"):
        of(("embed",), 3, 4)


def test_state_of_factored_kernels_is_far_smaller_than_they_are():
    shapes = {"layers": (4, 256, 4, 64), "norm": (4, 256)}
    axes = {"layers": ("layers", "embed", "heads", "kv"), "norm": ("layers", "embed")}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = adafactor(1.0, axes).init(params)
    assert trees.nbytes({"r": state.v_row["layers"], "c": state.v_col["layers"]}) < (
        trees.nbytes(params["layers"]) / 100
    )
    assert state.v_row["layers"].shape == (4, 1, 4, 64)
    assert state.v_col["layers"].shape == (4, 256, 1, 1)
    assert state.v_row["norm"].shape == (4, 256)
    assert state.v_col["norm"].shape == (1, 1)
    assert state.momentum is None


def test_momentum_is_kept_in_its_dtype():
    params, axes = {"w": _array((130, 140))}, {"w": ("embed", "mlp")}
    gradients = [{"w": g} for g in _gradients((130, 140), steps=3)]
    _, state = _run(params, gradients, axes, beta1=0.9, momentum_dtype=jnp.bfloat16)
    assert state.momentum["w"].dtype == jnp.bfloat16
    plain, _ = _run(params, gradients[:1], axes)
    heavy, _ = _run(params, gradients[:1], axes, beta1=0.9)
    np.testing.assert_allclose(
        heavy["w"] - params["w"], 0.1 * (plain["w"] - params["w"]), rtol=1e-4, atol=1e-6
    )


def test_weight_decay_takes_a_fraction_where_the_mask_says():
    params = {"w": _array((4, 5)), "scale": _array((5,))}
    axes = {"w": ("embed", "mlp"), "scale": ("embed",)}
    gradients = jax.tree.map(np.zeros_like, params)
    mask = {"w": True, "scale": False}
    got, _ = _run(params, [gradients], axes, weight_decay_rate=0.25, decay_mask=mask)
    np.testing.assert_allclose(got["w"], 0.75 * params["w"], rtol=1e-6)
    np.testing.assert_allclose(got["scale"], params["scale"], rtol=1e-6)


def test_learning_rate_is_absolute_without_a_parameter_scale():
    params, axes = {"w": 100 * _array((4, 5))}, {"w": ("embed", "mlp")}
    got, _ = _run(params, [{"w": _array((4, 5), 1)}], axes, 0.1, min_parameter_scale=None)
    # At the first step V = G^2, so every coordinate moves by the learning rate.
    np.testing.assert_allclose(np.abs(got["w"] - params["w"]), 0.1, rtol=1e-3)


def test_parameters_near_zero_still_move():
    params, axes = {"w": np.zeros((4, 5), np.float32)}, {"w": ("embed", "mlp")}
    got, _ = _run(params, [{"w": _array((4, 5), 1)}], axes, 0.1)
    np.testing.assert_allclose(np.abs(got["w"]), 0.1 * 1e-3, rtol=1e-3)


def test_clipping_bounds_the_rms_of_an_update():
    params, axes = {"w": _array((130, 140))}, {"w": ("embed", "mlp")}
    spike = [{"w": 1e-3 * g} for g in _gradients((130, 140), 9)] + [{"w": _array((130, 140), 5)}]
    options = {"learning_rate": 1.0, "min_parameter_scale": None}
    for threshold, most in ((1.0, 1.0), (0.1, 0.1)):
        optimizer = adafactor(axes=axes, clipping_threshold=threshold, **options)
        state = optimizer.init(params)
        for g in spike:
            updates, state = optimizer.update(g, state, params)
        assert np.sqrt(np.mean(np.square(updates["w"]))) == pytest.approx(most, rel=1e-4)


def test_chains_and_masks_and_takes_partial_trees():
    axes = {"a": {"w": ("embed", "mlp"), "b": ("mlp",)}, "gone": {"w": ("embed", "mlp")}}
    params = {"a": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    mask = {"a": {"w": True, "b": False}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(adafactor(0.1, axes), mask)
    )
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["w"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["a"]["b"], 0.25, rtol=1e-4)  # clipped, then passed on
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="no axes for the parameter 'new'"):
        adafactor(0.1, axes).init({"new": jnp.ones(3)})


def test_bfloat16_parameters_are_updated_in_float32():
    params = {"w": jnp.asarray(_array((130, 140)), jnp.bfloat16)}
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = adafactor(0.1, {"w": ("embed", "mlp")})
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert state.v_row["w"].dtype == jnp.float32
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16


def test_a_donated_step_needs_no_full_size_temporaries():
    shape = (2, 512, 8, 64)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    optimizer = adafactor(0.1, {"w": ("layers", "embed", "heads", "kv")}, weight_decay_rate=0.01)
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * np.prod(shape) / 4
