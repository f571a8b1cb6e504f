"""Every command with hostile input: no traceback, no hang, no endless memory, no exit code that is not documented.

`python benchmarks/fuzz.py --inputs 10000 --seed 1` tries more of the same.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

PROGRAMS = Path(__file__).resolve().parent.parent / "benchmarks"
INPUTS, SECONDS = 200, 15  # whichever ends first


def test_hostile_input_ends_in_one_clear_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(PROGRAMS / "fuzz.py"),
        f"--inputs={INPUTS}",
        f"--seconds={SECONDS}",
        "--seed=0",
        "--limit-s=200",
    ]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'fuzz.json'}"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["faults"] == [] and result["inputs"] > 10
    assert set(result["exit_codes"]) & {"0", "2"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROGRAMS))
    module = importlib.import_module("fuzz_calls")
    monkeypatch.setattr(module, "MEMORY_MB", 100)
    return module


def fail(arguments: Sequence[str]) -> None:
    raise KeyError("a fault of the program")


def leave(arguments: Sequence[str]) -> None:
    sys.exit(7)


def say_nothing(arguments: Sequence[str]) -> None:
    sys.exit(2)


def hang(arguments: Sequence[str]) -> None:
    time.sleep(60)


def fill(arguments: Sequence[str]) -> None:
    print(len(b"x" * 300_000_000))


def print_much(arguments: Sequence[str]) -> None:
    sys.stderr.write("error: " + "x" * 30_000 + "\n")
    sys.exit(2)


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        (fail, "traceback: KeyError: 'a fault of the program'"),
        (leave, "exit code 7"),
        (say_nothing, "exit code 2 without an error line"),
        (hang, "killed after"),
        (fill, " MB"),
        (print_much, "an error line of more than 20,000 characters"),
    ],
)
def test_a_fault_is_seen(calls: ModuleType, tmp_path: Path, main: Callable[..., None], fault: str) -> None:
    limit_s = 1 if main is hang else 60
    assert [fault in found for found in calls.judge(calls.call(main, [], tmp_path, {}, limit_s))] == [True]


def refuse(arguments: Sequence[str]) -> None:
    sys.stderr.write(f"error: {arguments[0]} in {os.getcwd()} of {os.environ['RANK']}\n")
    sys.exit(2)


def test_what_a_command_should_do_is_no_fault(calls: ModuleType, tmp_path: Path) -> None:
    outcome = calls.call(refuse, ["--x"], tmp_path, {"RANK": "5"})
    assert calls.judge(outcome) == []
    assert (outcome.code, outcome.errors) == (2, f"error: --x in {tmp_path} of 5\n")
