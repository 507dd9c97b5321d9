"""Asks a model about texts: `python scripts/infer.py --model_dir=runs/demo/lora < in.txt`.

At a terminal it shows a prompt. docs/infer.md shows its modes.
"""

from t5x_lite import configure
from t5x_lite.train.infer import infer

if __name__ == "__main__":
    configure.main(infer)
