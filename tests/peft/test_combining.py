"""Combined adapters: what each method promises, and the numbers that Hugging Face PEFT computes.

tests/fixtures/peft/make.py makes combined.npz with PEFT itself.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.interop import load_hf, load_peft
from t5x_lite.peft.combining import (
    Concatenation,
    Dare,
    Linear,
    Pruning,
    Ties,
    Truncation,
    combine,
)
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.types import InputError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
QUERY, OUT, TABLE = (
    "encoder/layers/attention/query/kernel",
    "encoder/layers/attention/out/kernel",
    "token_embedding/embedding",
)
SHAPES = {  # of a and b, without the rank
    QUERY: ((2, 6), (2, 3, 4)),
    OUT: ((2, 3, 4), (2, 6)),
    TABLE: ((9,), (6,)),
}


def adapter(rank, alpha, *paths, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {}
    for path in paths:
        a, b = SHAPES[path]
        layers = len(a) > 1
        leaves[f"{path}/a"] = rng.normal(size=(*a, rank)).astype("f4")
        leaves[f"{path}/b"] = rng.normal(size=(*b[:layers], rank, *b[layers:])).astype("f4")
    return LoRA(rank=rank, alpha=alpha, targets=(".*",)), trees.unflatten(leaves)


def updates(transform, tree):
    """What is added to each weight."""
    flat = trees.flatten(tree)
    base = {path: np.zeros(0) for path in flat}
    for path in flat:
        weight = path.removesuffix("/a")
        if path.endswith("/a"):
            layers = "/layers/" in path
            b = flat[f"{weight}/b"]
            shape = (*flat[path].shape[:-1], *b.shape[layers + 1 :])
            base[weight] = np.zeros(shape, "f4")
    base = {path: value for path, value in base.items() if value.size}
    return trees.flatten(transform.merge(tree, trees.unflatten(base)))


def test_concatenation_is_the_weighted_sum_of_the_updates_whatever_their_ranks():
    one, other = adapter(2, 3.0, QUERY, OUT), adapter(3, 1.0, QUERY, TABLE, seed=1)
    transform, tree = combine([one, other], [0.7, -2.0], Concatenation())
    found, first, second = updates(transform, tree), updates(*one), updates(*other)
    np.testing.assert_allclose(found[QUERY], 0.7 * first[QUERY] - 2 * second[QUERY], 1e-5, 1e-5)
    np.testing.assert_allclose(found[OUT], 0.7 * first[OUT], 1e-5, 1e-5)
    np.testing.assert_allclose(found[TABLE], -2 * second[TABLE], 1e-5, 1e-5)
    # It has the leaves that training makes of the transform.
    flat = trees.flatten(tree)
    assert flat[f"{QUERY}/a"].shape == (2, 6, 5)
    assert flat[f"{OUT}/b"].shape == (2, 2, 6)
    assert (transform.rank, transform.scale(QUERY), transform.scale(OUT)) == (5, 1.0, 1.0)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype("f4")}


def test_truncation_is_exact_from_the_updates_rank_on_and_the_nearest_below():
    both = [adapter(2, 3.0, QUERY, TABLE), adapter(3, 1.0, QUERY, TABLE, seed=1)]
    whole = updates(*combine(both, [1.0, 0.5], Concatenation()))
    exact = updates(*combine(both, [1.0, 0.5], Truncation(rank=7)))
    for path, value in whole.items():
        np.testing.assert_allclose(exact[path], value, 1e-4, 1e-4, err_msg=path)
    low = updates(*combine(both, [1.0, 0.5], Truncation(rank=2)))
    u, s, v = np.linalg.svd(whole[TABLE], full_matrices=False)
    np.testing.assert_allclose(low[TABLE], (u[:, :2] * s[:2]) @ v[:2], 1e-4, 1e-4)
    assert combine(both, [1.0, 0.5], Truncation())[0].rank == 3  # the largest


def test_one_adapter_alone_comes_back_through_every_method_that_drops_nothing():
    one = adapter(2, 3.0, QUERY, OUT, TABLE)
    expected = updates(*one)
    kept = [Linear(), Pruning(1.0), Ties(1.0), Dare(1.0), Dare(1.0, "frequency")]
    whole = [Concatenation(), Truncation(), *(Truncation(mixing=mixing) for mixing in kept)]
    for method in [*kept, *whole]:
        found = updates(*combine([one], [1.0], method))
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, 1e-4, 1e-4, err_msg=f"{method} {path}")


def test_ties_keeps_the_largest_and_averages_those_of_the_elected_sign():
    tensors = np.array([[4.0, -1.0, 3.0, 0.1], [2.0, 5.0, -9.0, 0.2]])
    found = Ties(density=0.75).mix(tensors, np.ones(2), None)
    # Trimmed: 0.1 and 0.2. Signs elected: + + -. Means of those that agree.
    np.testing.assert_allclose(found, [3.0, 5.0, -9.0, 0.0])
    np.testing.assert_allclose(Pruning(0.5).mix(tensors, np.ones(2), None), [4, 5, -6, 0])


def test_dare_drops_by_path_and_seed_and_keeps_what_is_expected():
    tensors, weights = np.ones((2, 200, 50)), np.array([1.0, 0.5])
    found = Dare(density=0.3).mix(tensors, weights, np.random.default_rng(0))
    np.testing.assert_allclose(found.mean(), 1.5, atol=0.05)
    assert set(np.round(np.unique(found), 3)) == {0.0, 1.667, 3.333, 5.0}
    both = [adapter(2, 2.0, QUERY, OUT), adapter(2, 2.0, QUERY, OUT, seed=1)]
    drawn = [
        trees.flatten(combine(both, [1.0, 1.0], Dare(seed=seed))[1])[f"{QUERY}/a"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    alone = [adapter(2, 2.0, QUERY), adapter(2, 2.0, QUERY, seed=1)]
    again = trees.flatten(combine(alone, [1.0, 1.0], Dare())[1])[f"{QUERY}/a"]
    assert ((drawn[0] == 0) == (again == 0)).all()


WAYS = {
    "linear": Linear(),
    "concatenation": Concatenation(),
    "pruning": Pruning(0.4),
    "ties": Ties(0.4),
    "ties_frequency": Ties(0.7, "frequency"),
    "svd": Truncation(2),
    "ties_svd": Truncation(4, Ties(0.4)),
    "pruning_svd": Truncation(mixing=Pruning(0.5)),
}


def test_logits_of_combined_adapters_are_pefts():
    model, base = load_hf(str(FIXTURES / "t5/base"))
    both = [load_peft(str(FIXTURES / "t5" / name), model) for name in ("adapter", "second")]
    rng = np.random.default_rng(0)
    batch = {
        f"{stream}_input_tokens": np.int32(rng.integers(2, 48, (2, length)))
        for stream, length in (("encoder", 9), ("decoder", 7))
    }
    apply = jax.jit(lambda params: model.apply({"params": params}, batch)[:, -1])
    with np.load(FIXTURES / "combined.npz") as file:
        expected = dict(file)
    plain = apply(base)
    for way, method in WAYS.items():
        transform, tree = combine(both, [0.7, -0.4], method)
        # Merged: one compilation for all ranks.
        found = apply(transform.merge(tree, base))
        np.testing.assert_allclose(found, expected[way], 1e-4, 1e-4, err_msg=way)
        assert np.abs(found - plain).max() > 0.03, way


def test_dare_mixes_what_is_kept_as_peft_does():
    with np.load(FIXTURES / "combined.npz") as file:
        arrays = dict(file)
    for way, method in {"dare_linear": Dare(0.6), "dare_ties": Dare(0.6, "total")}.items():
        found = method.mix_kept(arrays["tensors"], arrays["weights"], arrays[f"{way}_kept"])
        np.testing.assert_allclose(found, arrays[way], 1e-5, 1e-6, err_msg=way)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: combine([], [], Linear()), "0 adapters and 0 weights: expected one weight"),
        (lambda: combine([adapter(2, 2.0, QUERY)], [1.0, 2.0]), "1 adapters and 2 weights"),
        (
            lambda: combine([adapter(2, 2.0, QUERY), adapter(3, 2.0, QUERY)], [1, 1], Ties()),
            r"have ranks \[2, 3\], and Ties mixes factors of one rank: use Concatenation",
        ),
        (lambda: combine([(Full(), {})], [1.0]), "Full is no sum of low-rank updates"),
        (lambda: combine([adapter(2, 2.0, QUERY)], [1.0], "ties"), "combine.method='ties': expec"),
        (lambda: Ties(density=0.0), "Ties.density=0.0: expected more than 0, at most 1"),
        (lambda: Dare(election="most"), "Dare.election='most': expected 'total' or"),
        (lambda: Truncation(rank=0), "Truncation.rank=0: expected at least 1"),
        (lambda: Truncation(mixing=Concatenation()), r"Truncation.mixing=Concatenation\(\): exp"),
    ],
)
def test_what_cannot_be_combined_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_adapters_of_different_models_are_named():
    transform, tree = adapter(2, 2.0, QUERY)
    wide = jax.tree.map(lambda x: np.concatenate([x, x]), tree)  # twice the layers
    with pytest.raises(InputError, match="they belong to different models"):
        combine([(transform, tree), (transform, wide)], [1.0, 1.0])
