"""What a run, a checkpoint and a dataset survive: signals, kill -9 between any two changes to the disk, flipped bits.

    python benchmarks/faults.py                         all of it, about half an hour on one core
    python benchmarks/faults.py kills --points 20 --seed 3
    python benchmarks/faults.py --out benchmarks/results/faults/faults.json
    python benchmarks/faults_report.py                  writes docs/results/faults.md from the kept counts

Trains a tiny model on this project's own documentation. A run that was hit is started again until it is done, and must
then equal, bit for bit, one that nothing happened to: losses of all steps, files and state of the last checkpoint. Each
run is a fork of this process, which has imported torch once; `--nproc 2` runs are processes of their own.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads of its parent's

from data_tools import cli as data_cli
from data_tools.verify import verify as verify_dataset
from infini_train import cli as train_cli
from infini_train.atomic_files import write_atomic
from infini_train.checkpoint.damage import find_damage
from infini_train.checkpoint.fragments import CheckpointError
from infini_train.config.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
name: tiny
model:
  vocab_size: 259
  hidden_size: 32
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  ffn_size: 48
  attention: {{kind: infini, segment_tokens: 16, update: delta, overlap_tokens: 4, conv_tokens: 2}}
data: {{train: {data}}}
train: {{window_tokens: 64, batch_lanes: 4, micro_batch_lanes: 2, max_steps: {steps}}}
optim: {{lr: 3e-3, gate_lr: 5e-2, warmup_steps: 2}}
log: {{every_steps: 1, memory_every_steps: 1000}}
checkpoint: {{every_steps: 3, keep_last: 3}}
parallel: {{timeout_s: 60}}
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSTOP)
CHANGES = ("os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
LIMIT_S = 120.0  # for a run of seconds: longer is a hang
TRACEBACK = "Traceback (most recent call last)"
ROUNDS = 12  # starts after which a run counts as lost


# ------------------------------------------------------------------------------------------------------------ processes


def start(main: Callable[[Sequence[str]], Any], arguments: Sequence[str], log: Path, before: int = 0) -> int:
    """Forks a process that runs a command; returns its id.

    Args:
        main: of the command.
        arguments: of the command.
        log: where its output goes.
        before: kill it (SIGKILL) before this change to the file system, counted from 1; 0 for never.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if before:
            sys.addaudithook(Executioner(before))
        code = main(list(arguments)) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Executioner:
    """An audit hook that counts changes to the file system, and kills the process before one of them."""

    def __init__(self, before: int) -> None:
        self.count, self.before = 0, before

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE != os.O_RDONLY
        if writes or event in CHANGES:
            self.count += 1
            if self.count == self.before:
                os.kill(os.getpid(), signal.SIGKILL)


def wait(child: int) -> int:
    """A process's exit code as a shell reports it.

    Raises:
        TimeoutError: it did not end; it was killed.
    """
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError


# ------------------------------------------------------------------------------------------------------------- the runs


class Laboratory:
    """A dataset, and reference runs that nothing happened to.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.data = folder / "data"
        sources = sorted((ROOT / "docs").glob("*.md"))[:6]
        self.encode = ["encode", *map(str, sources), "--tokenizer", "byte", "--shard-mb", "0.05", "--workers", "1"]
        assert self.run(data_cli.main, [*self.encode, "--out", str(self.data)]) == 0, self.log.read_text()

    def run(self, main: Callable[[Sequence[str]], Any], arguments: Sequence[str], before: int = 0) -> int:
        """Runs a command to its end; its exit code."""
        return wait(start(main, arguments, self.log, before))

    def last_line(self) -> str:
        """What the last command said at its end."""
        return self.log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]

    def arguments(self, run: Path, steps: int, more: Sequence[str] = ()) -> list[str]:
        """Of `infini-train` for a run in this folder."""
        config = self.folder / f"{steps}.yaml"
        if not config.exists():
            config.write_text(CONFIG.format(data=self.data, steps=steps), encoding="utf-8")
        return ["train", str(config), "--set", f"run_dir={run}", *more]

    def result(self, run: Path) -> dict[str, Any]:
        """What must be the same however often a run was interrupted."""
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [
            (row["step"], row["loss/train"], row["grad_norm"], row["tokens"]) for row in rows if "grad_norm" in row
        ]
        newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        index = json.loads((newest / "index.json").read_text(encoding="utf-8"))
        files = {path.name: sha256(path) for path in sorted(newest.glob("*.safetensors"))}
        state = {key: value for key, value in index["state"].items() if key != "rng"}  # torch's own is never seeded
        return {"losses": losses, "files": files, "state": state}

    def finish(self, run: Path, steps: int, more: Sequence[str], draw: random.Random, signals: int) -> Counter[str]:
        """Starts a run until it is done, hitting it with this many signals; what was sent."""
        sent: Counter[str] = Counter()
        for _ in range(ROUNDS):
            child = start(train_cli.main, self.arguments(run, steps, more), self.log)
            while sent.total() < signals:
                time.sleep(draw.uniform(0.02, 1.5) * (6 if more else 1))
                number = draw.choice(SIGNALS)
                try:
                    os.killpg(child, number) if number == signal.SIGKILL else os.kill(child, number)
                except ProcessLookupError:
                    break
                sent[number.name] += 1
                if number == signal.SIGSTOP:
                    time.sleep(0.3)
                    os.kill(child, signal.SIGCONT)
                elif draw.random() < 0.6:  # else another one follows at once
                    break
            if wait(child) == 0:
                return sent
        raise AssertionError(f"{run} was not done after {ROUNDS} starts")


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tally(label: str, outcomes: dict[str, Any]) -> dict[str, Any]:
    """Prints a part's outcome and returns it."""
    print(f"{label}: " + ", ".join(f"{name} {value}" for name, value in outcomes.items()), flush=True)
    return outcomes


def attempt(faults: list[str], label: str, check: Callable[[], bool]) -> None:
    """Counts a check that is false, hangs or fails as a fault."""
    try:
        if not check():
            faults.append(f"{label}: differs")
            print(f"FAULT {faults[-1]}", flush=True)
    except (TimeoutError, AssertionError, OSError, KeyError, ValueError) as error:
        faults.append(f"{label}: {type(error).__name__} {error}")
        print(f"FAULT {faults[-1]}", flush=True)


# ------------------------------------------------------------------------------------------------------------ the parts


def hit_with_signals(lab: Laboratory, runs: int, pairs: int, draw: random.Random) -> dict[str, Any]:
    """Runs hit by signals at random moments; `pairs` more of two processes."""
    faults: list[str] = []
    sent: Counter[str] = Counter()
    kinds: tuple[tuple[Sequence[str], int], ...] = (
        ((), runs),
        (("--nproc", "2", "--set", "parallel.data_size=2"), pairs),
    )
    for more, number in kinds:
        reference = lab.folder / f"reference-{len(more)}"
        if number:
            assert lab.run(train_cli.main, lab.arguments(reference, 60, more)) == 0
            expected = lab.result(reference)
        for index in range(number):
            run = lab.folder / "run"
            shutil.rmtree(run, ignore_errors=True)

            def check(run: Path = run, more: Sequence[str] = more, expected: Any = expected) -> bool:
                sent.update(lab.finish(run, 60, more, draw, draw.randint(1, 4)))
                return lab.result(run) == expected

            attempt(faults, f"signals {index}", check)
    return tally(
        "signals", {"runs": runs, "runs_of_two": pairs, "signals": sent.total(), **dict(sent), "faults": faults}
    )


def kill_everywhere(lab: Laboratory, points: int) -> dict[str, Any]:
    """Training and encoding killed before each of so many changes to the disk, spread over all of them."""
    faults: list[str] = []
    run, out = lab.folder / "run", lab.folder / "out"

    def encoded() -> list[tuple[str, str]]:
        return [(str(path.relative_to(out)), sha256(path)) for path in sorted(out.rglob("*")) if path.is_file()]

    training = Job(lab, train_cli.main, lab.arguments(run, 9), run, lambda: lab.result(run))
    encoding = Job(lab, data_cli.main, [*lab.encode, "--out", str(out)], out, encoded)
    counted: dict[str, int] = {}
    for name, job in (("train", training), ("encode", encoding)):
        counted[f"{name}_points"], counted[f"{name}_changes"] = job.kill_at(points, name, faults)
    return tally("kills", {**counted, "faults": faults})


@dataclass(frozen=True)
class Job:
    """A command that can be killed and started again.

    Attributes:
        main: of the command.
        arguments: of the command.
        folder: that it writes.
        result: reads what must be the same however often it was killed.
    """

    lab: Laboratory
    main: Callable[[Sequence[str]], Any]
    arguments: Sequence[str]
    folder: Path
    result: Callable[[], Any]

    def kill_at(self, points: int, name: str, faults: list[str]) -> tuple[int, int]:
        """Kills it at this many points; their number (there may be fewer), and that of all changes."""
        assert self.start_anew() == 0
        expected, last = self.result(), self.count_changes()
        chosen = sorted({1 + number * (last - 1) // max(points - 1, 1) for number in range(points)})
        for before in chosen:
            attempt(faults, f"{name} killed before change {before}", partial(self.survives, before, expected))
        return len(chosen), last

    def survives(self, before: int, expected: Any) -> bool:
        """Whether a second start, after it was killed before this change, gives what is expected."""
        assert self.start_anew(before) == 128 + signal.SIGKILL
        code = self.lab.run(self.main, self.arguments)
        # the kill may have come after the folder had appeared, which a second `infini-data encode` leaves alone
        assert code == 0 or "is there already" in self.lab.last_line(), self.lab.last_line()
        return bool(self.result() == expected)

    def start_anew(self, before: int = 0) -> int:
        """Removes what it wrote, also aside, and runs it; its exit code."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for aside in self.folder.parent.glob(f".{self.folder.name}.*"):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        return self.lab.run(self.main, self.arguments, before)

    def count_changes(self) -> int:
        """The number of changes to the file system that it makes: the last before which it can be killed."""
        low, high = 1, 2
        while self.start_anew(high) != 0:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.start_anew(middle) != 0 else (low, middle)
        return low


def flip_bits(lab: Laboratory, flips: int, draw: random.Random) -> dict[str, Any]:
    """Single bits of a checkpoint's and a dataset's files, drawn by file and then by place: does verify find each?"""
    faults: list[str] = []
    run = lab.folder / "flipped"
    assert lab.run(train_cli.main, lab.arguments(run, 6)) == 0
    checkpoint = max((run / "checkpoints").glob("step-*"))
    found: Counter[str] = Counter()
    targets: tuple[tuple[str, Path, Callable[[Path], Any]], ...] = (
        ("checkpoint", checkpoint, find_damage),
        ("dataset", lab.data, verify_dataset),
    )
    for name, folder, verify in targets:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
        assert not list(verify(folder)), f"{folder} is damaged before anything was done to it"
        for number in range(flips):
            path = files[number % len(files)]
            sound = path.read_bytes()
            place = draw.randrange(8 * len(sound))
            damaged = bytearray(sound)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)

            def check(verify: Callable[[Path], Any] = verify, folder: Path = folder) -> bool:
                try:
                    return bool(list(verify(folder)))
                except (CheckpointError, ConfigError):
                    return True

            attempt(faults, f"bit {place} of {folder.name}/{path.name}", check)
            path.write_bytes(sound)
            found[f"{name}_flips"] += 1
        found[f"{name}_files"] = len(files)
    return tally("flips", {**found, "faults": faults})


def main() -> None:
    """Runs the chosen parts; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["signals", "kills", "flips"], help="signals, kills, flips")
    parser.add_argument("--runs", type=int, default=60, help="runs of one process that are hit by signals")
    parser.add_argument("--pairs", type=int, default=6, help="runs of two processes that are hit by signals")
    parser.add_argument("--points", type=int, default=126, help="kill points of training, and of encoding")
    parser.add_argument("--flips", type=int, default=500, help="bits of a checkpoint, and of a dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder))
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "signals": lambda: hit_with_signals(lab, options.runs, options.pairs, draw),
            "kills": lambda: kill_everywhere(lab, options.points),
            "flips": lambda: flip_bits(lab, options.flips, draw),
        }
        outcome: dict[str, Any] = {"seed": options.seed}
        for name in options.parts:
            outcome[name] = parts[name]()
            outcome["tracebacks"] = lab.log.read_text(encoding="utf-8", errors="replace").count(TRACEBACK)
            if options.out:
                write_atomic(options.out, json.dumps(outcome, indent=2) + "\n")
    print(f"tracebacks: {outcome['tracebacks']}")
    sys.exit(outcome["tracebacks"] > 0 or any(outcome[name]["faults"] for name in options.parts))


if __name__ == "__main__":
    main()
