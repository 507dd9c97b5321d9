"""Fetches and builds a dataset: `python scripts/prepare_data.py --dataset=bible_text`."""

from t5x_lite import configure
from t5x_lite.data.builders.catalog import prepare

if __name__ == "__main__":
    configure.main(prepare)
