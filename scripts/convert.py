"""Converts weights: `python scripts/convert.py --source=t5-small --output=runs/t5 --to=run`.

Hugging Face's models, PEFT's adapters, T5X's checkpoints and runs' folders; see docs/convert.md.
"""

from t5x_lite import configure
from t5x_lite.train.convert import convert

if __name__ == "__main__":
    configure.main(convert)
