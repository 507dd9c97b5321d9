"""Cross entropy against plain float64 numpy, its gradient, and the three normalisations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.train import losses
from t5x_lite.types import InputError

BATCH, LENGTH, VOCAB = 2, 5, 11


def _inputs(dtype=jnp.float32, scale=3.0):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(BATCH, LENGTH, VOCAB), scale=scale), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 2.0, (BATCH, LENGTH)), jnp.float32)
    return logits, targets, weights.at[1, 3:].set(0.0)


def _naive(logits, targets, weights, z_loss, label_smoothing):
    """The definition, term by term, in float64 with one-hot targets; also d loss / d logits."""
    x = np.asarray(logits, np.float64)
    w = np.asarray(weights, np.float64)
    hot = np.eye(VOCAB)[np.asarray(targets)]
    log_z = np.log(np.exp(x).sum(-1))
    log_p = x - log_z[..., None]
    on, off = 1 - label_smoothing, label_smoothing / (VOCAB - 1)
    q = np.where(hot, on, off)
    entropy = -sum(v * np.log(v) for v in [on] + [off] * (VOCAB - 1) if v)
    nll = -(hot * log_p).sum(-1)
    loss = -(q * log_p).sum(-1) - entropy + z_loss * log_z**2
    gradient = w[..., None] * ((1 + 2 * z_loss * log_z)[..., None] * np.exp(log_p) - q)
    sums = {
        "loss": (w * loss).sum(),
        "cross_entropy": (w * nll).sum(),
        "z_loss": (w * z_loss * log_z**2).sum(),
        "accuracy": (w * (x.argmax(-1) == np.asarray(targets))).sum(),
        "weight": w.sum(),
    }
    return sums, gradient


CASES = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.01, 0.2)]


@pytest.mark.parametrize(("z_loss", "label_smoothing"), CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_definition_in_float64(dtype, z_loss, label_smoothing):
    logits, targets, weights = _inputs(dtype)
    want, gradient = _naive(logits, targets, weights, z_loss, label_smoothing)

    def loss(x):
        sums = losses.cross_entropy(
            x, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
        )
        return sums["loss"], sums

    (_, got), got_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.dtype == jnp.float32, key
        assert value.shape == (), key
        np.testing.assert_allclose(value, want[key], rtol=1e-5, atol=1e-5, err_msg=key)
    assert got_gradient.dtype == dtype
    # A bfloat16 gradient is the exact one rounded once: 8 bits of mantissa.
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (2**-8, 1e-6)
    np.testing.assert_allclose(np.asarray(got_gradient, np.float64), gradient, rtol, atol)


def test_masked_positions_have_exactly_no_gradient():
    logits, targets, weights = _inputs()
    gradient = jax.grad(
        lambda x: losses.cross_entropy(x, targets, weights, z_loss=0.1, label_smoothing=0.1)["loss"]
    )(logits)
    assert (gradient[1, 3:] == 0.0).all()
    assert (gradient[1, :3] != 0.0).all()


def test_gradients_of_every_part_and_of_the_weights_agree_with_autodiff():
    logits, targets, weights = _inputs()

    def plain(x, w):
        log_z = jax.nn.logsumexp(x, axis=-1)
        target = jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(w * (log_z - target)) + 3.0 * jnp.sum(w * 0.1 * log_z**2)

    def ours(x, w):
        sums = losses.cross_entropy(x, targets, w, z_loss=0.1)
        return sums["cross_entropy"] + 3.0 * sums["z_loss"]

    want, got = (jax.grad(f, argnums=(0, 1))(logits, weights) for f in (plain, ours))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_huge_logits_stay_finite():
    logits, targets, weights = _inputs(scale=3e4)
    sums = losses.cross_entropy(logits, targets, weights)
    assert np.isfinite(list(sums.values())).all()


def test_smoothed_loss_of_the_smoothed_distribution_is_zero():
    targets = jnp.asarray([[4]], jnp.int32)
    probabilities = jnp.full((1, 1, VOCAB), 0.1 / (VOCAB - 1)).at[0, 0, 4].set(0.9)
    sums = losses.cross_entropy(
        jnp.log(probabilities), targets, jnp.ones((1, 1)), label_smoothing=0.1
    )
    np.testing.assert_allclose(sums["loss"], 0.0, atol=1e-6)


def test_equal_logits_count_as_correct_for_the_first_token_only():
    targets = jnp.arange(VOCAB, dtype=jnp.int32)[None]
    logits = jnp.zeros((1, VOCAB, VOCAB), jnp.bfloat16)
    assert losses.cross_entropy(logits, targets, jnp.ones((1, VOCAB)))["accuracy"] == 1.0


def test_no_float32_copy_of_the_logits_beyond_the_gradient():
    shape = (4, 64, 2048)
    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    weights = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    loss = lambda x, t, w: losses.cross_entropy(x, t, w, z_loss=1e-4)["loss"]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(logits, targets, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * np.prod(shape)


def test_exponentials_are_computed_once_where_both_passes_are_in_one_program():
    shape = (2, 4, 384)
    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    weights = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    loss = lambda x, t, w: losses.cross_entropy(x, t, w)["loss"]
    program = jax.jit(jax.value_and_grad(loss)).lower(logits, targets, weights).compile()
    assert program.as_text().count(" exponential(") == 1


def test_bad_input_is_named():
    logits, targets, weights = _inputs()
    with pytest.raises(InputError, match="weights"):
        losses.cross_entropy(logits, targets, weights[:, :2])
    with pytest.raises(InputError, match="label_smoothing is 1"):
        losses.cross_entropy(logits, targets, weights, label_smoothing=1.0)
    with pytest.raises(InputError, match="z_loss is -1"):
        losses.cross_entropy(logits, targets, weights, z_loss=-1)


WEIGHTS = jnp.asarray([[1, 1, 1, 1, 2, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)


def test_normalisations_by_real_and_total_tokens():
    weights, denominator = losses.by_real_tokens(WEIGHTS)
    assert denominator == 7.0
    assert (weights == WEIGHTS).all()
    weights, denominator = losses.by_total_tokens(WEIGHTS)
    assert denominator == 18.0
    assert (weights == WEIGHTS).all()


def test_normalisation_by_sequence_gives_rows_equal_say():
    weights, denominator = losses.by_sequence(WEIGHTS)
    assert denominator == 2.0  # the last row has no tokens
    np.testing.assert_allclose(weights.sum(-1), [1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[0], WEIGHTS[0] / 6, rtol=1e-6)


def test_normalisation_by_sequence_gives_packed_segments_equal_say():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]], jnp.int32)
    weights, denominator = jax.jit(losses.by_sequence)(WEIGHTS, segments)
    assert denominator == 3.0  # of row 1's three segments, one has weight
    np.testing.assert_allclose(weights[0], [1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [1, 0, 0, 0, 0, 0], rtol=1e-6)
    assert np.isfinite(weights).all()
    # Padding is no sequence, whatever its weight.
    weights, denominator = losses.by_sequence(jnp.ones((1, 4)), jnp.asarray([[1, 1, 0, 0]]))
    assert denominator == 1.0
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0, 0]])


@pytest.mark.parametrize(
    "normalise", [losses.by_real_tokens, losses.by_total_tokens, losses.by_sequence]
)
def test_sums_do_not_depend_on_how_the_batch_was_split(normalise):
    logits, targets, weights = _inputs()

    def sums(rows):
        shares, denominator = normalise(weights[rows])
        return losses.cross_entropy(logits[rows], targets[rows], shares)["loss"], denominator

    whole = sums(slice(None))
    halves = [sums(slice(0, 1)), sums(slice(1, 2))]
    np.testing.assert_allclose(np.sum(halves, axis=0), whole, rtol=1e-5)
