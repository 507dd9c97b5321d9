"""A vector for each text: `python scripts/embed.py --model_dir=RUN --input=in.txt --output=OUT`."""

from t5x_lite import configure
from t5x_lite.train.embed import embed

if __name__ == "__main__":
    configure.main(embed)
