"""Weights of other libraries in and out: Hugging Face's models."""

from t5x_lite.interop.hf import ARCHITECTURES, load_hf, save_hf

__all__ = ["ARCHITECTURES", "load_hf", "save_hf"]
