"""Fuzz: every command with hostile input; what each call did, and whether it ended as a command should.

    python benchmarks/fuzz.py --inputs 10000 --seed 1 --out fuzz.json

Each input is one call of a command's main() in a forked process, in a folder of its own, with a limit on memory and
time. A fault is a traceback, an exit code that is not documented, exit code 2 without an error line, more than 30 s, or
more than 2 GB. Prints faults as they are found; writes counts and faults as JSON. Ends with 1 if there are any. The
tests run a few hundred inputs.
"""

import argparse
import collections
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", DS_ACCELERATOR="cpu")
for name in ("RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

import fuzz_home  # noqa: E402
import torch  # noqa: E402
from fuzz_inputs import Generator, Input  # noqa: E402
from tqdm import tqdm  # noqa: E402

import infini_train.train.loop  # noqa: E402, F401 (once, not in each process)
from data_tools.cli import main as infini_data  # noqa: E402
from infini_train.cli import main as infini_train_  # noqa: E402
from infini_train.parallel import device  # noqa: E402
from launch.cli import main as infini_launch  # noqa: E402

PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "infini-train": infini_train_,
    "infini-data": infini_data,
    "infini-launch": infini_launch,
}
CODES = {0, 1, 2, 3, 4}  # documented ones of a command that nobody stops
TIME_S, MEMORY_MB, ADDRESS_BYTES = 30, 2048, 4 * 2**30
SHOWN = 200_000  # characters of a call's output that are looked at


class Outcome(NamedTuple):
    """How a call ended."""

    code: int
    text: str  # standard output and error
    errors: str  # standard error
    seconds: float
    memory_mb: float  # more than the parent had
    hangs: bool


def call(given: Input, work: Path) -> Outcome:
    """Calls the command in a process forked from this one, and ends everything that it started."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.monotonic()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _behave(given, work, out.fileno(), err.fileno())
        done, hangs = 0, False
        while not done:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done and time.monotonic() - begin > TIME_S:
                hangs = True
                _end(pid)
                done, status, usage = os.wait4(pid, 0)
            time.sleep(0 if done else 0.002)
        _end(pid)  # whatever it left in its session
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(SHOWN).decode("utf-8", "replace"))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - begin
    return Outcome(code, "".join(texts), texts[1], seconds, (usage.ru_maxrss - own) / 1024, hangs)


def _end(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _behave(given: Input, work: Path, out: int, err: int) -> None:
    """The child: as a command of its own would run. Never returns."""
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
        os.chdir(work)
        os.environ.update({"HOME": str(work), "PATH": "/usr/bin:/bin", **given.environment})
        limit = _address_bytes() + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            PROGRAMS[given.program](given.arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 255)


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def judge(outcome: Outcome) -> list[str]:
    """What is wrong with it."""
    faults = ["runs for more than 30 s"] if outcome.hangs else []
    if "Traceback (most recent call last)" in outcome.text:
        lines = [line for line in outcome.text.splitlines() if line and not line.startswith((" ", "Traceback"))]
        places = [line.strip() for line in outcome.text.splitlines() if line.startswith('  File "')]
        faults.append(f"traceback: {lines[-1][:160] if lines else ''} ({places[-1][-90:] if places else ''})")
    elif outcome.code not in CODES and not outcome.hangs:
        faults.append(f"exit code {outcome.code}")
    if outcome.code == 2 and "error: " not in outcome.errors:
        faults.append("exit code 2 without an error line")
    if outcome.memory_mb > MEMORY_MB:
        faults.append(f"{outcome.memory_mb:.0f} MB")
    if any(len(line) > 20_000 for line in outcome.errors.splitlines()):
        faults.append("an error line of more than 20,000 characters")
    return faults


def fuzz(scratch: Path, inputs: int, seed: int, seconds: float) -> dict[str, Any]:
    """Counts and faults of this many inputs, or of those that fit into so many seconds."""
    torch.set_num_threads(1)
    device.MATMUL_PROBE_SIZE = 64
    home, work = scratch / "home", scratch / "work"
    work.mkdir(parents=True)

    def run(program: str, arguments: Sequence[str]) -> int:
        outcome = call(Input("valid", program, list(arguments), {}), work)
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
        outcome = call(given, work)
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
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder) / "fuzz", options.inputs, options.seed, options.seconds)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key != "faults"}, len(result["faults"]), "faults")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
