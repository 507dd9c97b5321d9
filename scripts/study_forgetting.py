"""Learned and forgotten: `python scripts/study_forgetting.py --gin_file=...` (runs/study_*.gin)."""

from t5x_lite import configure
from t5x_lite.studies.forgetting import study_forgetting

if __name__ == "__main__":
    configure.main(study_forgetting)
