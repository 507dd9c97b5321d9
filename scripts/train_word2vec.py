"""Learns vectors of words: `python scripts/train_word2vec.py --gin_file=runs/word2vec.gin`."""

from t5x_lite import configure
from t5x_lite.studies.word2vec import train_word2vec

if __name__ == "__main__":
    configure.main(train_word2vec)
