"""bfloat16 parameters learn: unbiased and compensated updates, whatever the mesh and the stops."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import trees
from t5x_lite.sharding import Partitioner
from t5x_lite.train import loop
from t5x_lite.train import run as runs
from t5x_lite.train.optim import Adafactor, AdamW, Lion
from t5x_lite.train.rounding import ROUNDINGS, Compensated, rounded, stochastic
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

BF16 = jnp.bfloat16
MODEL = dataclasses.replace(harness.MODEL, param_dtype="bfloat16")


def neighbours(x):
    """The two bfloat16 numbers around float32 `x`."""
    low = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    up = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(low, jnp.uint32) + jnp.uint32(0x10000), jnp.float32
    )
    return low, up


def test_the_mean_of_many_roundings_is_the_number():
    x = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32) * 2.0 ** jnp.arange(
        -30, 34, dtype=jnp.float32
    )
    draws = 4096
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jax.vmap(stochastic, (None, 0))(x, keys), np.float64)
    low, up = (np.asarray(side, np.float64) for side in neighbours(x))
    assert ((found == low) | (found == up)).all()
    share = (np.asarray(x, np.float64) - low) / (up - low)  # how often up
    error = np.abs(found.mean(0) - np.asarray(x, np.float64)) / np.abs(up - low)
    assert (error <= 4 * np.sqrt(share * (1 - share) / draws)).all()
    assert (found != found[0]).any(0).mean() > 0.9


def test_what_bfloat16_has_stays():
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16  # all of them
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    for seed in range(3):
        found = stochastic(x, jax.random.key(seed))
        assert found.dtype == BF16
        np.testing.assert_array_equal(found.astype(jnp.float32), x)
    last = jnp.float32(jnp.finfo(BF16).max)
    above = jnp.full(4096, jnp.finfo(jnp.float32).max)
    odd = jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32)  # a NaN of all ones
    assert set(np.unique(stochastic(above, jax.random.key(0)).astype(jnp.float32))) <= {
        float(last),
        np.inf,
    }
    assert jnp.isnan(stochastic(odd, jax.random.key(0)))


def apply(optimizer, params, gradients, steps):
    """Parameters and state after so many steps of the same gradients."""

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params, key=key)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0])
    return run(params)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_small_updates_add_up_unless_rounded_to_the_nearest(optimizer):
    """512 updates of 2^-11 where a number's neighbour is 2^-7 away."""
    params, gradients = {"x": jnp.ones(1024, BF16)}, {"x": -jnp.ones(1024, BF16)}
    rate, steps = 2.0**-11, 512
    found = {}
    for rounding in ROUNDINGS:
        made = (
            rounded(optax.sgd(rate), rounding, "rounding")
            if optimizer == "sgd"
            else AdamW(rate, rounding=rounding).make({"x": ("embed",)})
        )
        found[rounding], state = apply(made, params, gradients, steps)
        if rounding == "compensated":
            assert isinstance(state, Compensated)
            whole = found[rounding]["x"].astype(jnp.float32) + state.compensation["x"]
            np.testing.assert_allclose(whole, 1.25, rtol=2**-16)
        assert found[rounding]["x"].dtype == BF16
    assert (found["nearest"]["x"] == 1).all()
    np.testing.assert_allclose(found["compensated"]["x"].astype(jnp.float32), 1.25, atol=2**-8)
    mean = found["stochastic"]["x"].astype(jnp.float32).mean()
    # Of a step the variance is at most share (1 - share) of a gap of 2^-7, share 1/16.
    error = 2**-7 * np.sqrt(steps * (1 / 16) * (15 / 16) / 1024)
    assert abs(mean - 1.25) <= 4 * error


def test_compensation_follows_float32_on_random_gradients():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=(16, 64)), BF16)
    exact, held = {"x": start.astype(jnp.float32)}, {"x": start}
    axes = {"x": ("embed", "mlp")}
    config = Adafactor(1e-3, weight_decay_rate=1e-4)
    narrow = dataclasses.replace(config, rounding="compensated")
    wide, narrow = (one.make(axes) for one in (config, narrow))
    wide_state, state = wide.init(exact), narrow.init(held)
    updates = [jax.jit(one.update) for one in (wide, narrow)]
    for _ in range(100):
        gradients = {"x": jnp.asarray(rng.normal(size=start.shape), jnp.float32)}
        change, wide_state = updates[0](gradients, wide_state, exact)
        exact = optax.apply_updates(exact, change)
        change, state = updates[1](gradients, state, held)
        held = optax.apply_updates(held, change)
    whole = held["x"].astype(jnp.float32) + state.compensation["x"]
    # A step's compensation is off by 2^-18 of a parameter, and a hundred by ten times that.
    rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
    assert rms(whole - exact["x"]) < 2**-14 * rms(exact["x"])
    assert rms(held["x"] - exact["x"]) > 2**-10 * rms(exact["x"])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_not_finite_stays_so(rounding):
    params = {"x": jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0, 1.0, 1.0], BF16)}
    gradients = {"x": jnp.asarray([0.5, 0.5, 0.5, jnp.inf, jnp.nan, 0.0], BF16)}
    found, state = apply(rounded(optax.sgd(0.1), rounding, ""), params, gradients, 1)
    want = [np.inf, -np.inf, np.nan, -np.inf, np.nan, 1.0]
    np.testing.assert_array_equal(found["x"].astype(jnp.float32), want)
    if rounding == "compensated":
        np.testing.assert_array_equal(state.compensation["x"].astype(jnp.float32), np.zeros(6))


@pytest.mark.parametrize("config", [AdamW(1e-3), Lion(1e-3), Adafactor(1e-3, beta1=0.9)])
def test_moments_are_float32_and_float32_parameters_as_ever(config):
    axes = {"held": ("embed",), "wide": ("embed",)}
    params = {"held": jnp.ones(8, BF16), "wide": jnp.ones(8)}
    with pytest.raises(InputError, match=rf"bfloat16 \(held .*{type(config).__name__}.rounding"):
        config.make(axes).init(params)
    made = dataclasses.replace(config, rounding="compensated").make(axes)
    state = made.init(params)
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert set(moments) == {jnp.dtype("float32")}
    assert list(trees.flatten(state.compensation)) == ["held"]
    alone = {"wide": params["wide"]}
    plain = config.make({"wide": ("embed",)})
    gradients = {"held": jnp.full(8, 0.5), "wide": jnp.full(8, 0.5)}
    updates, _ = made.update(gradients, state, params)
    want, _ = plain.update({"wide": gradients["wide"]}, plain.init(alone), alone)
    np.testing.assert_array_equal(updates["wide"], want["wide"])


def test_an_unknown_rounding_is_named():
    with pytest.raises(InputError, match=r"AdamW\.rounding='up'"):
        AdamW(0.1, rounding="up")


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_an_update_is_the_same_on_any_mesh(rounding):
    """Of the same gradients, to the bit: on 2 x 2 x 2 devices and on one."""
    optimizer = AdamW(0.01, weight_decay=0.1, rounding=rounding)
    found = []
    for partitioner in (harness.one_device(), Partitioner(data=2, fsdp=2, model=2)):
        session = Session(MODEL, partitioner=partitioner)
        made = session.optimizer(optimizer)
        state, _ = harness.start(session, made, common.host_params(MODEL))
        place = functools.partial(jax.tree.map, lambda x: x.sharding)

        @functools.partial(jax.jit, out_shardings=(place(state.params), place(state.opt_state)))
        def update(params, opt_state, key, made=made):
            gradients = jax.tree.map(lambda x: jnp.cos(x.astype(jnp.float32) * 99), params)
            updates, opt_state = made.update(gradients, opt_state, params, key=key)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = state.params, state.opt_state
        for step in range(3):
            params, opt_state = update(params, opt_state, jax.random.key(step))
        found.append(jax.device_get((params, opt_state)))
        kernel = params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        assert kernel.dtype == BF16
    assert not kernel.sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, *found)
    if rounding == "compensated":
        placed = opt_state.compensation["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        assert placed.sharding == kernel.sharding


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_run_stopped_and_resumed_is_one_never_stopped(rounding, tmp_path, monkeypatch):
    optimizer = AdamW(0.01, weight_decay=0.1, clip_norm=1.0, rounding=rounding)
    changes = {"model": MODEL, "optimizer": optimizer, "evaluations": ()}
    arguments = functools.partial(harness.tiny_run, data_dir=tmp_path, **changes)
    loop.train(**arguments(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with monkeypatch.context() as patch:
        harness.stop_at(5, stop, patch.setattr)
        with pytest.raises(Stop):
            loop.train(**arguments(tmp_path / "stopped"))
    loop.train(**arguments(tmp_path / "stopped"))
    whole, resumed = (
        runs.load(runs.RunCheckpoint(str(tmp_path / name)), harness.one_device())[1]
        for name in ("whole", "stopped")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_gradients_of_microbatches_are_added_up_in_float32():
    """512 times the same row: in bfloat16 the sum would stand still at 256 times."""
    model = common.with_stacks(MODEL, dropout=0.0)
    session = Session(model, partitioner=harness.one_device())
    optimizer = session.optimizer(AdamW(0.01, rounding="stochastic"))
    row = harness.uneven_batch(model, rows=1)
    norms = []
    for rows in (1, 512):
        batch = {key: np.repeat(value, rows, axis=0) for key, value in row.items()}
        state, frozen = harness.start(session, optimizer, common.host_params(model))
        step = harness.compile_step(session, optimizer, state, frozen, batch, microbatches=rows)
        norms.append(float(step(state, frozen, batch)[1]["gradient_norm"]))
    np.testing.assert_allclose(*norms, rtol=1e-5)
