"""Merges an adapter: `python scripts/merge_adapter.py --base=t5-small --adapter=out/adapter ...`.

Writes the whole model, and says by how much merging changes its logits; see docs/peft.md.
"""

from t5x_lite import configure
from t5x_lite.train.merging import merge_adapter

if __name__ == "__main__":
    configure.main(merge_adapter)
