"""Floating-point operations of a model's matrix products, counted from its config.

The numerator of MFU (model FLOP utilisation; Chowdhery et al. 2022, appendix B): what the
mathematics needs, whatever rematerialisation or padding add. A multiply-add counts as 2.
"""

from __future__ import annotations

from t5x_lite import types
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.types import Batch


def forward_flops(config: ModelConfig, encoder_shape: tuple, decoder_shape: tuple) -> int:
    """FLOPs of one forward pass on `[rows, length]` tokens of each stream (`(0, 0)` if absent)."""
    total, last = 0, (0, 0)
    if config.encoder is not None:
        total += _stack_flops(config.encoder, config.embed_dim, encoder_shape, 0)
        last = encoder_shape
    if config.decoder is not None:
        memory = encoder_shape[1] if config.encoder is not None else 0
        total += _stack_flops(config.decoder, config.embed_dim, decoder_shape, memory)
        last = decoder_shape
    return total + 2 * last[0] * last[1] * config.embed_dim * config.vocab_size


def train_flops(config: ModelConfig, batch: Batch, *, full: bool = True) -> int:
    """FLOPs of a training step on a batch of these shapes.

    Three forward passes' worth; two where the base weights are frozen and only gradients of
    activations flow through them (adapters themselves are not counted).
    """
    shapes = [
        tuple(batch[key].shape) if key in batch else (0, 0)
        for key in (types.ENCODER_INPUT_TOKENS, types.DECODER_INPUT_TOKENS)
    ]
    return (3 if full else 2) * forward_flops(config, *shapes)


def _stack_flops(config: StackConfig, embed: int, shape: tuple, memory_length: int) -> int:
    rows, length = shape
    joined = config.num_heads * config.head_dim
    tokens = rows * length
    layer = 4 * tokens * embed * joined  # query, key, value, out
    layer += 2 * rows * length * length * joined  # q k^T, and weights times values
    layer += (len(config.mlp_activations) + 1) * tokens * embed * config.mlp_dim
    if memory_length:
        layer += 2 * (tokens + rows * memory_length) * embed * joined
        layer += 2 * rows * length * memory_length * joined
    return 2 * config.num_layers * layer
