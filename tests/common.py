"""Tiny models and batches that several test files share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import trees, types
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead
from t5x_lite.models.config_positions import Learned, Rotary

STACK = StackConfig(num_layers=2, num_heads=4, head_dim=8, mlp_dim=64)
T5 = ModelConfig(vocab_size=96, embed_dim=32, encoder=STACK, decoder=STACK)
GPT = ModelConfig(vocab_size=96, embed_dim=32, decoder=STACK)
BERT = ModelConfig(vocab_size=96, embed_dim=32, encoder=STACK, head=LMHead(tied=True, scaled=True))


def family(**changes) -> StackConfig:
    """`STACK` without what is T5's alone."""
    return dataclasses.replace(STACK, attention_scale=None, **changes)


ALL_BIASES = ("query", "key", "value", "out", "wi", "wo")
_POST = family(
    residual="post",
    norm="layer",
    norm_epsilon=1e-5,
    biases=ALL_BIASES,
    mlp_activations=("gelu_exact",),
    positions=Learned(max_length=32, offset=2),
    embedding_norm=True,
)
_NEOX = family(
    residual="parallel",
    norm="layer",
    biases=ALL_BIASES,
    mlp_activations=("gelu_exact",),
    positions=Rotary(fraction=0.5),
)
# One of each shape that a published family has; tests/models/test_families.py runs them all.
FAMILIES = {
    "t5_1_0": ModelConfig(
        vocab_size=96,
        embed_dim=32,
        encoder=dataclasses.replace(STACK, mlp_activations=("relu",)),
        decoder=dataclasses.replace(STACK, mlp_activations=("relu",)),
        head=LMHead(tied=True, scaled=True),
    ),
    "bert": ModelConfig(
        vocab_size=96,
        embed_dim=32,
        encoder=dataclasses.replace(_POST, num_token_types=2),
        head=LMHead(tied=True, bias=True, transform="gelu_exact"),
        pair_head=SequenceHead(num_labels=2),
        initializer_stddev=0.02,
    ),
    "gpt2": ModelConfig(
        vocab_size=96,
        embed_dim=32,
        decoder=family(
            norm="layer",
            norm_epsilon=1e-5,
            biases=ALL_BIASES,
            mlp_activations=("gelu",),
            positions=Learned(max_length=32),
        ),
        head=LMHead(tied=True),
        initializer_stddev=0.02,
    ),
    "llama": ModelConfig(
        vocab_size=96,
        embed_dim=32,
        decoder=family(
            num_kv_heads=2,
            norm_epsilon=1e-5,
            mlp_activations=("silu", "linear"),
            positions=Rotary(),
        ),
        initializer_stddev=0.02,
    ),
    "neox": ModelConfig(vocab_size=96, embed_dim=32, decoder=_NEOX, initializer_stddev=0.02),
    "bart": ModelConfig(
        vocab_size=96,
        embed_dim=32,
        encoder=_POST,
        decoder=_POST,
        head=LMHead(tied=True, bias=True),
        initializer_stddev=0.02,
    ),
}


def with_stacks(config: ModelConfig, **changes) -> ModelConfig:
    """`config` with the same change in each of its stacks."""
    stacks = {
        name: dataclasses.replace(stack, **changes)
        for name in ("encoder", "decoder")
        if (stack := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **stacks)


@functools.cache
def _shapes(config: ModelConfig):
    model = transformer.Transformer(config)
    return jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))


def host_params(config: ModelConfig, seed: int = 0) -> types.Params:
    """Random parameters as numpy arrays, of about the scale of fresh ones; nothing is compiled.

    Norms are off their start, so that no test leans on ones.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.normal(size=shape.shape)
        return (1 + 0.1 * noise if path.endswith("scale") else 0.2 * noise).astype(shape.dtype)

    return trees.map_with_path(draw, _shapes(config))


def build(config: ModelConfig, seed: int = 0):
    """`(model, params)`, these as `host_params` draws them."""
    return transformer.Transformer(config), jax.tree.map(jnp.asarray, host_params(config, seed))


def call(model, params, batch, method=None, **settings):
    """`model.apply`, compiled once: what runs op by op compiles each of its operations."""
    return _call(model, method, tuple(settings.items()))(params, batch)


@functools.cache
def _call(model, method, settings):
    return jax.jit(
        lambda params, batch: model.apply(
            {"params": params}, batch, method=method, **dict(settings)
        )
    )


def random_batch(
    config: ModelConfig, rows: int = 4, encoder: int = 12, decoder: int = 10, seed: int = 0
) -> dict[str, np.ndarray]:
    """Packed rows: segments 1 1 1 ... 2 2 ... and padding 0 at the end, in both streams."""
    rng = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {}

    def segments(length: int) -> np.ndarray:
        ids = np.zeros((rows, length), np.int32)
        for row in ids:
            first = int(rng.integers(2, length - 3))
            row[:first] = 1
            row[first : int(rng.integers(first + 2, length + 1))] = 2
        return ids

    def tokens(ids: np.ndarray) -> np.ndarray:
        return (rng.integers(2, config.vocab_size, ids.shape) * (ids > 0)).astype(np.int32)

    if config.encoder is not None:
        ids = segments(encoder)
        batch |= {types.ENCODER_INPUT_TOKENS: tokens(ids), types.ENCODER_SEGMENT_IDS: ids}
    if config.decoder is not None:
        ids = segments(decoder)
        batch |= {
            types.DECODER_INPUT_TOKENS: tokens(ids),
            types.DECODER_TARGET_TOKENS: tokens(ids),
            types.DECODER_LOSS_WEIGHTS: (ids > 0).astype(np.float32),
            types.DECODER_SEGMENT_IDS: ids,
        }
    return batch


@contextlib.contextmanager
def compiled():
    """Names of the programs that XLA is asked for inside, in order."""
    names: list[str] = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
