"""What vectors know of labels: `python scripts/probe.py --vectors=OUT --labels=in.jsonl`."""

from t5x_lite import configure
from t5x_lite.train.probing import probe

if __name__ == "__main__":
    configure.main(probe)
