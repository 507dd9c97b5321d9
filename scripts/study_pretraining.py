"""Learning by examples: `python scripts/study_pretraining.py --gin_file=...` (runs/study_*.gin)."""

from t5x_lite import configure
from t5x_lite.studies.transfer import study_pretraining

if __name__ == "__main__":
    configure.main(study_pretraining)
