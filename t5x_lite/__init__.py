"""Pretrain, fine-tune, evaluate and ship Transformers of all three families, in JAX."""
