"""Fuzz: every command with hostile input; what each call did, and whether it ended as a command should.

    python benchmarks/fuzz.py --inputs 10000 --seed 1 --out fuzz.json

Each input is one call of a command's main() in a forked process, in a folder of its own, with a limit on memory and
time. A fault is a traceback, an exit code that is not documented, exit code 2 without an error line, more than 30 s
(raise --limit-s on a busy machine), or more than 2 GB. Prints faults as they are found; writes counts and faults as
JSON. Ends with 1 if there are any. The tests run the first inputs of seed 0.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", DS_ACCELERATOR="cpu")
for name in ("RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

import fuzz_home  # noqa: E402
import torch  # noqa: E402
from fuzz_calls import LIMIT_S, Main, call, judge  # noqa: E402
from fuzz_inputs import Generator  # noqa: E402
from tqdm import tqdm  # noqa: E402

import infini_train.train.loop  # noqa: E402, F401 (once, not in each process)
from data_tools.cli import main as infini_data  # noqa: E402
from infini_train.cli import main as infini_train_  # noqa: E402
from infini_train.parallel import device  # noqa: E402
from launch.cli import main as infini_launch  # noqa: E402

PROGRAMS: dict[str, Main] = {
    "infini-train": infini_train_,
    "infini-data": infini_data,
    "infini-launch": infini_launch,
}


def fuzz(scratch: Path, inputs: int, seed: int, seconds: float, limit_s: float) -> dict[str, Any]:
    """Counts and faults of this many inputs, or of those that fit into so many seconds."""
    torch.set_num_threads(1)
    device.MATMUL_PROBE_SIZE = 64
    home, work = scratch / "home", scratch / "work"
    work.mkdir(parents=True)
    path = {"PATH": f"{home / fuzz_home.PROGRAMS}:/usr/bin:/bin"}

    def run(program: str, arguments: Sequence[str]) -> int:
        outcome = call(PROGRAMS[program], arguments, work, path)
        if outcome.code:
            print(outcome.text, file=sys.stderr)
        return outcome.code

    fuzz_home.build(home, run)
    generator = Generator(home, Random(seed))
    counts: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    slowest, most_mb, found, end = 0.0, 0.0, [], time.monotonic() + seconds
    for number in tqdm(range(inputs), disable=None):
        if time.monotonic() > end:
            break
        shutil.rmtree(work)
        work.mkdir()
        given = generator.draw(work)
        outcome = call(PROGRAMS[given.program], given.arguments, work, {**path, **given.environment}, limit_s)
        counts[given.kind] += 1
        codes[str(outcome.code)] += 1
        slowest, most_mb = max(slowest, outcome.seconds), max(most_mb, outcome.memory_mb)
        if faults := judge(outcome):
            fault = {**given._asdict(), "number": number, "faults": faults, "seconds": round(outcome.seconds, 1)}
            found.append({**fault, "output": outcome.text[-2000:]})
            print(json.dumps({key: str(value)[:300] for key, value in fault.items()}), flush=True)
    return {
        "seed": seed,
        "inputs": sum(counts.values()),
        "kinds": dict(sorted(counts.items())),
        "exit_codes": dict(sorted(codes.items())),
        "slowest_s": round(slowest, 1),
        "most_mb": round(most_mb),
        "faults": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long (default: no limit)")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="kill a call after so long (default: 30)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder) / "fuzz", options.inputs, options.seed, options.seconds, options.limit_s)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key != "faults"}, len(result["faults"]), "faults")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
