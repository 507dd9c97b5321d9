"""Trains a vocabulary: `python scripts/train_vocab.py --gin_file=tasks/bible_vocabulary.gin`."""

from t5x_lite import configure
from t5x_lite.data.vocabulary_training import train_vocabulary

if __name__ == "__main__":
    configure.main(train_vocabulary)
