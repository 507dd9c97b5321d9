"""Floating-point operations of a model's matrix products, counted from its config.

The numerator of MFU (model FLOP utilisation; Chowdhery et al. 2022, appendix B): what the
mathematics needs, whatever rematerialisation or padding add. A multiply-add counts as 2.
"""

from __future__ import annotations

from t5x_lite import types
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.types import Batch

Shape = tuple[int, int]
_ABSENT = (0, 0)


def forward_flops(
    config: ModelConfig, encoder_shape: Shape, decoder_shape: Shape, slots: Shape | None = None
) -> int:
    """FLOPs of one forward pass on `[rows, length]` tokens of each stream (`(0, 0)` if absent).

    `slots` `[rows, slots]` are where the head answers; None: at every token of the last stack.
    """
    total, last = 0, _ABSENT
    if config.encoder is not None:
        total += _stack_flops(config.encoder, config.embed_dim, encoder_shape, 0)
        last = encoder_shape
    if config.decoder is not None:
        memory = encoder_shape[1] if config.encoder is not None else 0
        total += _stack_flops(config.decoder, config.embed_dim, decoder_shape, memory)
        last = decoder_shape
    return total + _head_flops(config, last, slots)


def train_flops(config: ModelConfig, batch: Batch, *, full: bool = True) -> int:
    """FLOPs of a training step on a batch of these shapes.

    Three forward passes' worth; two where the base weights are frozen and only gradients of
    activations flow through them (adapters themselves are not counted).
    """

    def shape(key: str) -> Shape:
        return (batch[key].shape[0], batch[key].shape[1]) if key in batch else _ABSENT

    streams = shape(types.ENCODER_INPUT_TOKENS), shape(types.DECODER_INPUT_TOKENS)
    slots = shape(types.MASKED_POSITIONS) if types.MASKED_POSITIONS in batch else None
    return (3 if full else 2) * forward_flops(config, *streams, slots)


def _head_flops(config: ModelConfig, last: Shape, slots: Shape | None) -> int:
    head, embed = config.head, config.embed_dim
    answers = last[0] if slots is None else slots[0] * slots[1]
    if isinstance(head, SequenceHead):
        return 2 * answers * embed * (head.num_labels + (embed if head.activation else 0))
    answers = last[0] * last[1] if slots is None else answers
    if isinstance(head, TokenHead):
        return 2 * answers * embed * head.num_labels
    if isinstance(head, LMHead):
        return 2 * answers * embed * (config.vocab_size + (embed if head.transform else 0))
    return 0


def _stack_flops(config: StackConfig, embed: int, shape: Shape, memory_length: int) -> int:
    rows, length = shape
    joined = config.num_heads * config.head_dim
    joined_kv = config.kv_heads * config.head_dim
    tokens = rows * length
    layer = 2 * tokens * embed * (joined + joined_kv)  # query and out, key and value
    layer += 2 * rows * length * length * joined  # q k^T, and weights times values
    layer += (len(config.mlp_activations) + 1) * tokens * embed * config.mlp_dim
    if memory_length:
        layer += 2 * tokens * embed * joined
        layer += 2 * rows * memory_length * embed * joined_kv
        layer += 2 * rows * length * memory_length * joined
    return 2 * config.num_layers * layer
