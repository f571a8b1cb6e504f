"""Former name of `infini_train.resilience.preflight`, which batch scripts of earlier releases run."""

import runpy
import sys

from infini_train.environment import world

OLD, NEW = "infini_train.parallel.preflight", "infini_train.resilience.preflight"

if __name__ == "__main__":
    if world()[0] == 0:
        print(f"note: {OLD} has moved to {NEW}; render the batch script again", file=sys.stderr)
    runpy.run_module(NEW, run_name="__main__", alter_sys=True)
