"""Shows the parameters: `python scripts/inspect_params.py --gin_file=runs/demo_pretrain.gin`."""

from t5x_lite import configure
from t5x_lite.train.inspect import inspect_params

if __name__ == "__main__":
    configure.main(inspect_params)
