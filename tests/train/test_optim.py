"""Optimizer configurations against optax, decay rules, and the placement of optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.train.optim import Adafactor, AdamW, Lion, decay_mask, state_specs
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.types import InputError

AXES = {
    "encoder": {
        "layers": {
            "query": {"kernel": ("layers", "embed", "heads", "kv"), "bias": ("layers", "heads")},
            "norm": {"scale": ("layers", "embed")},
        }
    },
    "token_embedding": {"embedding": ("vocab", "embed")},
}
SHAPES = {
    "encoder": {
        "layers": {
            "query": {"kernel": (2, 16, 4, 8), "bias": (2, 4)},
            "norm": {"scale": (2, 16)},
        }
    },
    "token_embedding": {"embedding": (32, 16)},
}
SPECS = {
    "encoder": {
        "layers": {
            "query": {"kernel": P(None, "fsdp", "model"), "bias": P(None, "model")},
            "norm": {"scale": P(None, "fsdp")},
        }
    },
    "token_embedding": {"embedding": P("model", "fsdp")},
}
IS_SHAPE = lambda x: isinstance(x, tuple)
SCHEDULE = FactorSchedule("constant * linear_warmup", base_learning_rate=0.1, warmup_steps=3)
OPTIMIZERS = [
    AdamW(SCHEDULE, weight_decay=0.1, clip_norm=1.0),
    Lion(SCHEDULE, weight_decay=0.1),
    Adafactor(SCHEDULE, min_dim_size_to_factor=8, beta1=0.9, clip_norm=1.0),
]


def _tree(seed):
    rng = np.random.default_rng(seed)
    random = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(random, SHAPES, is_leaf=IS_SHAPE)


def _run(optimizer, steps=4):
    params, state = _tree(0), optimizer.init(_tree(0))
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(_tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def _assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


MASK = {
    "encoder": {"layers": {"query": {"kernel": True, "bias": False}, "norm": {"scale": False}}},
    "token_embedding": {"embedding": True},
}


def test_adamw_is_optax_with_our_mask_and_clipping():
    ours = AdamW(SCHEDULE, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=1.0)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(SCHEDULE, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=MASK),
    )
    _assert_close(_run(ours.make(AXES)), _run(theirs))


def test_lion_is_optax_with_our_mask():
    ours = Lion(0.01, b1=0.8, b2=0.95, weight_decay=0.1)
    _assert_close(
        _run(ours.make(AXES)), _run(optax.lion(0.01, b1=0.8, b2=0.95, weight_decay=0.1, mask=MASK))
    )


def test_adafactor_has_its_clipping_and_its_decay():
    shrink = Adafactor(0.0, weight_decay_rate=0.5)
    want = jax.tree.map(lambda x, decays: x / 16 if decays else x, _tree(0), MASK)
    _assert_close(_run(shrink.make(AXES)), want)
    # Gradients far below sqrt(epsilon) hardly move anything; others move whatever their size.
    free, clipped = (_run(Adafactor(0.1, clip_norm=n).make(AXES)) for n in (None, 1e-20))
    moved = lambda tree: optax.global_norm(jax.tree.map(jnp.subtract, tree, _tree(0)))
    assert moved(clipped) < 1e-3 * moved(free)


def test_decay_rules_first_match_wins():
    assert decay_mask(AXES) == MASK
    mask = decay_mask(AXES, ((".*/query/bias", True), ("encoder/.*", False)))
    assert mask["encoder"]["layers"]["query"] == {"kernel": False, "bias": True}
    assert mask["token_embedding"]["embedding"] is True
    with pytest.raises(InputError, match=r"decay rule 'decoder/.*' matches no parameter"):
        AdamW(0.1, decay_rules=(("decoder/.*", False),)).make(AXES)


def test_lora_leaves_alone_are_a_tree_like_any_other():
    axes = {"query": {"kernel": {"a": ("layers", "embed", "rank"), "b": ("layers", "rank", "kv")}}}
    params = {"query": {"kernel": {"a": jnp.ones((2, 16, 4)), "b": jnp.zeros((2, 4, 8))}}}
    gradients = jax.tree.map(jnp.ones_like, params)
    for config in (AdamW(0.1), Lion(0.1), Adafactor(0.1)):
        optimizer = config.make(axes)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        assert jax.tree.all(jax.tree.map(lambda u: bool((u < 0).all()), updates)), config


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: type(c).__name__)
def test_a_configuration_is_a_value(config):
    assert hash(config) == hash(type(config)(**vars(config)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdamW(0.1, b1=1.0), "AdamW.b1 is 1"),
        (lambda: AdamW(-0.1), "AdamW.learning_rate is -0.1"),
        (lambda: AdamW(0.1, weight_decay=-1.0), "AdamW.weight_decay is -1"),
        (lambda: Lion(0.1, clip_norm=0.0), "Lion.clip_norm is 0"),
        (lambda: Adafactor(0.1, beta1=2.0), "Adafactor.beta1 is 2"),
        (lambda: Adafactor(0.1, epsilon=0.0), "Adafactor.epsilon is 0"),
    ],
)
def test_settings_out_of_range_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()


def _specs_of(optimizer):
    params = jax.eval_shape(lambda: _tree(0))
    state = jax.eval_shape(optimizer.init, params)
    return state, state_specs(state, params, SPECS)


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_state_is_placed_like_its_parameter():
    _, specs = _specs_of(AdamW(SCHEDULE, clip_norm=1.0).make(AXES))
    specs = _by_path(specs)
    for moment in ("mu", "nu"):
        of = {path: spec for path, spec in specs.items() if f"/{moment}/" in path}
        assert sorted(map(str, of.values())) == sorted(map(str, _by_path(SPECS).values()))
        (kernel,) = (spec for path, spec in of.items() if path.endswith("query/kernel"))
        assert kernel == P(None, "fsdp", "model")
    assert {spec for path, spec in specs.items() if path.endswith("count")} == {P()}


def test_factored_state_is_whole_where_a_mean_was_taken():
    _, specs = _specs_of(Adafactor(0.1, min_dim_size_to_factor=8, beta1=0.9).make(AXES))
    query, norm = (["encoder", "layers", name] for name in ("query", "norm"))
    at = lambda tree, path, leaf: tree[path[0]][path[1]][path[2]][leaf]
    assert at(specs.v_row, query, "kernel") == P(None, None, "model", None)
    assert at(specs.v_col, query, "kernel") == P(None, "fsdp", None, None)
    assert at(specs.v_row, norm, "scale") == P(None, "fsdp")
    assert at(specs.v_col, norm, "scale") == P(None, None)
    assert at(specs.momentum, query, "kernel") == P(None, "fsdp", "model")
    assert specs.v_row["token_embedding"]["embedding"] == P("model", None)
    assert specs.v_col["token_embedding"]["embedding"] == P(None, "fsdp")
    assert specs.count == P()


def test_state_of_other_sizes_is_replicated():
    params, specs = {"w": jnp.zeros((8, 4))}, {"w": P("fsdp", "model")}
    state = {
        "same": {"w": jnp.zeros((8, 4))},
        "mean": {"w": jnp.zeros((8, 1))},
        "other": {"w": jnp.zeros((8, 5))},
        "flat": {"w": jnp.zeros(32)},
        "stranger": {"v": jnp.zeros((8, 4))},
    }
    want = {"same": P("fsdp", "model"), "mean": P("fsdp", None)}
    got = state_specs(state, params, specs)
    assert {key: next(iter(leaf.values())) for key, leaf in got.items()} == {
        key: want.get(key, P()) for key in state
    }


def test_masked_and_partitioned_states_are_placed_too():
    labels = jax.tree.map(lambda decays: "ada" if decays else "adam", MASK)
    both = optax.multi_transform(
        {"ada": Adafactor(0.1).make(AXES), "adam": optax.adam(0.1)}, labels
    )
    masked = optax.masked(optax.adam(0.1), MASK)
    for optimizer in (both, masked):
        state, specs = _specs_of(optimizer)
        assert jax.tree.structure(state) == jax.tree.structure(
            jax.tree.map(lambda s: 0, specs, is_leaf=lambda x: isinstance(x, P))
        )
        flat = _by_path(specs)
        assert P(None, "fsdp", "model") in flat.values()
        assert P("model", "fsdp") in flat.values()
    assert P(None, "model") in _by_path(_specs_of(both)[1]).values()
    assert P(None, "model") not in _by_path(_specs_of(masked)[1]).values()


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: type(c).__name__)
def test_sharded_update_equals_one_device(config):
    mesh = jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    optimizer = config.make(AXES)
    params, gradients = _tree(0), _tree(1)
    is_spec = lambda x: isinstance(x, P)
    on_mesh = lambda specs: jax.tree.map(
        lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=is_spec
    )
    shardings = on_mesh(SPECS), on_mesh(_specs_of(optimizer)[1])

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    want = step(*step(params, state, gradients), _tree(2))
    state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
    sharded = jax.jit(
        step,
        in_shardings=(*shardings, shardings[0]),
        out_shardings=shardings,
        donate_argnums=(0, 1),
    )
    got = sharded(*sharded(jax.device_put(params, shardings[0]), state, gradients), _tree(2))
    _assert_close(got, want)
