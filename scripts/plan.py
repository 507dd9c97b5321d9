"""Plans a run on TPUs: `python scripts/plan.py --gin_file=runs/two_minutes.gin --topology=v5e:2x2`.

Takes the gin files of scripts/train.py and compiles that run's step with libtpu, on any machine:
memory of each kind, collectives, and an estimate of the step's time. See docs/planning.md.
"""

from t5x_lite import configure
from t5x_lite.planning.plan import plan
from t5x_lite.train.loop import train

if __name__ == "__main__":
    configure.main(plan, like=train)
