"""One Transformer for every family."""
