"""Weights in 4 or 8 bits: `python scripts/quantize.py --source=runs/a --output=runs/a_nf4`.

The folder can be asked, and tuned beside (QLoRA); see docs/peft.md.
"""

from t5x_lite import configure
from t5x_lite.train.quantize import quantize

if __name__ == "__main__":
    configure.main(quantize)
