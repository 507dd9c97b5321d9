"""Compares vectors of words: `python scripts/study_words.py --gin_file=runs/study_words.gin`."""

from t5x_lite import configure
from t5x_lite.studies.words import study_words

if __name__ == "__main__":
    configure.main(study_words)
