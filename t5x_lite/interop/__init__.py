"""Weights in the formats of other projects."""

from t5x_lite.interop.t5x import load_t5x

__all__ = ["load_t5x"]
