"""`infini-train selftest`: cases one after the other in the same processes, and a table that grows meanwhile."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infini_train import __version__
from infini_train.checkpoint import store
from infini_train.child_processes import ending_with_parent
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.environment import BOARD_FD, STORE_FD
from infini_train.parallel import device, mesh
from infini_train.selftest.cases import STEPS, TIMEOUT_S, Case, configure, reference_of
from infini_train.selftest.parity import Errors, compare_runs
from infini_train.selftest.program import run_program

REFERENCE_S = 1800.0  # for the single process; a machine with too little memory may hang
EXPLANATION = f"""\
Relative errors against one process: gradients of step 1 (the worst parameter is named at the end), losses and
gradient norms of {STEPS} steps, then weights and carried memory."""
COLUMNS = ("gradient", "loss", "grad norm", "weights", "memory")


@dataclass(frozen=True)
class Row:
    """A finished case: its errors, or why there are none."""

    case: Case
    seconds: float
    errors: Errors | None
    failure: str = ""

    @property
    def passed(self) -> bool:
        return self.errors is not None and not self.errors.exceeding(self.case.precision)


class Reference:
    """The single process that computes what all cases are compared with, while they run.

    Args:
        runs: what it does, in this order.
        folder: for their config files.
    """

    def __init__(self, runs: list[RunConfig], folder: Path) -> None:
        files = []
        for number, run in enumerate(runs):
            files.append(folder / f"reference-{number}.yaml")
            files[-1].write_text(dump(run), encoding="utf-8")
        wanted = "cuda" if device.uses_cuda() else "cpu"  # as here
        several = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            STORE_FD,
            BOARD_FD,
        )
        self._log = folder / "reference.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "infini_train.selftest.reference", wanted, *map(str, files)],
                env={name: value for name, value in os.environ.items() if name not in several},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=ending_with_parent(),
            )

    def wait_for(self, run: RunConfig) -> Path:
        """The folder of one of its runs, when it is there.

        Raises:
            RuntimeError: the process has failed, or takes too long.
        """
        deadline = time.monotonic() + REFERENCE_S
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            with contextlib.suppress(store.CheckpointError):
                store.find_step(run.directory, STEPS)
                return run.directory
            if ended:
                lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise RuntimeError(f"the single process failed: {lines[-1] if lines else 'it printed nothing'}")
            time.sleep(0.05)
        raise RuntimeError(f"the single process was not done within {REFERENCE_S:g} s")

    def stop(self) -> None:
        """Ends it, done or not."""
        self._process.kill()
        self._process.wait()


def run_selftest(cases: list[Case], folder: Path | None = None, as_json: bool = False) -> int:
    """Runs the cases and prints a row for each as soon as it is done; all ranks call it together.

    Args:
        cases: for the number of processes there are.
        folder: where the temporary folder is made, on a disk that all ranks share; None: this machine's.
        as_json: print lines of JSON instead of a table.

    Returns:
        The number of cases that failed; on all ranks.

    Raises:
        UnsharedFolderError: the ranks don't see the same files.
    """
    rank, size = mesh.world()
    mesh.start(ParallelConfig(data_size=size, timeout_s=TIMEOUT_S))
    show = (_show_json if as_json else _show_row) if rank == 0 else _show_nothing
    if rank == 0:
        _show_heading(cases, size, as_json)
    failed = 0
    with _shared_folder(folder) as shared, _references(cases, shared) as reference:
        for case in cases:
            row = _run_case(case, shared, reference)
            failed += round(mesh.sum_over_world([float(reference is not None and not row.passed)])[0])
            show(row)
    return failed


class UnsharedFolderError(ConfigError):
    """The folder for temporary files is not on a disk that all ranks share."""


@contextlib.contextmanager
def _shared_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder that rank 0 makes, and removes at the end."""
    first = mesh.world()[0] == 0
    made = ""
    if first:
        with contextlib.suppress(OSError):  # reported below, by all ranks
            made = tempfile.mkdtemp(prefix="infini-train-selftest-", dir=parent)
    folder = Path(mesh.broadcast_text(made))
    try:
        if mesh.sum_over_world([float(bool(folder.name) and folder.is_dir())])[0] < mesh.world()[1]:
            raise UnsharedFolderError(
                f"{parent or tempfile.gettempdir()} is not a folder that all ranks can write and see;"
                " give one on a shared disk"
            )
        yield folder
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _references(cases: list[Case], folder: Path) -> Iterator[Reference | None]:
    """On rank 0 the single process; None on the others."""
    if mesh.world()[0] != 0:
        yield None
        return
    runs = {run.directory: run for run in (reference_of(configure(case, folder)) for case in cases)}
    reference = Reference(list(runs.values()), folder)
    try:
        yield reference
    finally:
        reference.stop()


def _run_case(case: Case, folder: Path, reference: Reference | None) -> Row:
    """The row is whole on rank 0 only; an exception is the case's failure."""
    config = configure(case, folder)
    began = time.monotonic()
    problem = folder / f"{case.name}.failed-{mesh.world()[0]}"
    try:
        run_program(config)
    except Exception as error:
        problem.write_text(f"{type(error).__name__}: {str(error).strip() or repr(error)}", encoding="utf-8")
    mesh.background_barrier()  # patient: others may still wait for a rank that has failed
    seconds = time.monotonic() - began
    if reference is None:
        return Row(case, seconds, None)
    problems = sorted(folder.glob(f"{case.name}.failed-*"), key=lambda path: path.stat().st_mtime_ns)
    if problems:
        rank = problems[0].name.rpartition("-")[2]
        return Row(case, seconds, None, f"rank {rank}: {problems[0].read_text(encoding='utf-8').splitlines()[0]}")
    try:
        expected = reference.wait_for(reference_of(config))
        return Row(case, seconds, compare_runs(config.directory, expected))
    except (RuntimeError, store.CheckpointError) as error:
        return Row(case, seconds, None, str(error))
    finally:
        shutil.rmtree(config.directory, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- showing


def describe_machine(processes: int) -> dict[str, Any]:
    """What the numbers were computed with."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")}
    return {
        "processes": processes,
        "device": device.describe(),
        "backend": device.backend(),
        "infini-train": __version__,
        **packages,
        "python": platform.python_version(),
    }


def _show_heading(cases: list[Case], processes: int, as_json: bool) -> None:
    machine = describe_machine(processes)
    if as_json:
        print(json.dumps(machine), flush=True)
        return
    versions = ", ".join(f"{name} {machine[name]}" for name in ("infini-train", "torch", "megatron-core", "deepspeed"))
    count = "1 process" if processes == 1 else f"{processes} processes"
    print(f"{count}, {machine['device']}, {machine['backend']}; {versions}, python {machine['python']}")
    print(EXPLANATION)
    print(f"\n{'case':<36} {' '.join(f'{c:>9}' for c in COLUMNS)} {'seconds':>8}", flush=True)


def _show_row(row: Row) -> None:
    name, verdict = f"{row.case.name:<36}", "ok" if row.passed else "FAIL"
    if row.errors is None:
        print(f"{name} FAIL  {row.failure}", flush=True)
        return
    numbers = " ".join(f"{worst.error:9.1e}" if worst.name != "-" else f"{'-':>9}" for worst in row.errors)
    print(f"{name} {numbers} {row.seconds:8.1f}  {verdict}  {row.errors.gradient.name}", flush=True)


def _show_json(row: Row) -> None:
    errors = {} if row.errors is None else {k: worst._asdict() for k, worst in row.errors._asdict().items()}
    values = {
        "case": row.case.name,
        "processes": row.case.processes,
        "precision": row.case.precision,
        "passed": row.passed,
        "seconds": round(row.seconds, 2),
        "failure": row.failure,
        "errors": errors,
    }
    print(json.dumps(values), flush=True)


def _show_nothing(row: Row) -> None:
    """Ranks other than 0."""
