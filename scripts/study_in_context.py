"""Accuracy by shots: `python scripts/study_in_context.py --gin_file=runs/in_context.gin`."""

from t5x_lite import configure
from t5x_lite.studies.in_context import study_in_context

if __name__ == "__main__":
    configure.main(study_in_context)
