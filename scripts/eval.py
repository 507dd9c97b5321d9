"""Evaluates a run's checkpoints: `python scripts/eval.py --gin_file=runs/demo_lora.gin`."""

from t5x_lite import configure
from t5x_lite.train.offline import evaluate_run

if __name__ == "__main__":
    configure.main(evaluate_run)
