"""Weights of other libraries in and out: Hugging Face's models, PEFT's adapters, T5X's too."""

from t5x_lite.interop.hf import ARCHITECTURES, load_hf, read_hf_config, save_hf
from t5x_lite.interop.peft_adapters import load_peft, save_peft
from t5x_lite.interop.t5x import load_t5x

__all__ = [
    "ARCHITECTURES",
    "load_hf",
    "load_peft",
    "load_t5x",
    "read_hf_config",
    "save_hf",
    "save_peft",
]
