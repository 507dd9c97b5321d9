"""One adapter of several: `python scripts/combine_adapters.py --base=t5-small --adapters=a,b ...`.

Sums, TIES, DARE, concatenation and singular values; see docs/peft.md.
"""

from t5x_lite import configure
from t5x_lite.train.merging import combine_adapters

if __name__ == "__main__":
    configure.main(combine_adapters)
