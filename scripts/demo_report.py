"""Prints the demo's table and samples, and draws its curves: `python scripts/demo_report.py`."""

from t5x_lite import configure
from t5x_lite.studies.demo import report

if __name__ == "__main__":
    configure.main(report)
