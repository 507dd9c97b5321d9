"""Shows what the model sees: `python scripts/inspect_data.py --gin_file=runs/demo_pretrain.gin`."""

from t5x_lite import configure
from t5x_lite.train.inspect import inspect_data

if __name__ == "__main__":
    configure.main(inspect_data)
