"""Pretrains or fine-tunes: `python scripts/train.py --gin_file=runs/demo_pretrain.gin`."""

from t5x_lite import configure
from t5x_lite.train.loop import train

if __name__ == "__main__":
    configure.main(train, save_config=configure.save_operative_config)
