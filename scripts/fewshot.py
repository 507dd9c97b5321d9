"""A task asked with k examples in the prompt: `python scripts/fewshot.py --gin_file=...`."""

from t5x_lite import configure
from t5x_lite.train.in_context import evaluate_in_context

if __name__ == "__main__":
    configure.main(evaluate_in_context)
