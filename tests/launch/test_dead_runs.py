"""Runs that were killed, as `infini-launch status` shows them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infini_train.train.run_folder import hold_folder
from launch import folder, status

HOLDER = """
import sys, time
from pathlib import Path
from infini_train.train.run_folder import hold_folder
with hold_folder(Path(sys.argv[1]), is_first=True):
    print("held", flush=True)
    time.sleep(60)
"""


def write_status(run: Path, **changes: object) -> None:
    said = {"state": "training", "step": 5, "total_steps": 9, "eta_s": 105.0, "host": socket.gethostname()}
    (run / "status.json").write_text(json.dumps({**said, "heartbeat": time.time() - 90, **changes}))


def row_of(run: Path) -> dict[str, Any]:
    (row,) = status.describe_runs(folder.find_runs(run), {})
    return row


def test_a_killed_run_is_dead(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            write_status(tmp_path)
            row = row_of(tmp_path)
            assert (row["state"], row["eta_s"], row["note"]) == ("training", 105.0, "")
        finally:
            process.kill()
    row = row_of(tmp_path)
    assert (row["state"], row["eta_s"], row["note"]) == ("dead", None, "no process; start it again to resume")
    (line,) = status.format_table([row]).splitlines()[1:]
    assert line.split()[2:9] == ["dead", "5/9", "-", "-", "-", "-", "1m30s"]
    write_status(tmp_path, heartbeat=time.time() - 5)
    assert row_of(tmp_path)["state"] == "training", "its lock is not asked yet"
    with hold_folder(tmp_path, is_first=True):
        pass


@pytest.mark.parametrize("change", [{"host": "n7"}, {"host": None}])
def test_where_the_lock_says_nothing_a_run_is_silent(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / ".lock").touch()
    write_status(tmp_path, **change)
    assert row_of(tmp_path)["state"] == "training"
    write_status(tmp_path, heartbeat=time.time() - 400, **change)
    row = row_of(tmp_path)
    where = " from n7" if change["host"] else ""
    assert (row["state"], row["eta_s"], row["note"]) == ("silent", None, f"no report{where} for 6m40s")


@pytest.mark.parametrize("state", ["stopped by SIGINT", "failed", "diverged", "finished"])
def test_an_ended_run_has_no_time_left(tmp_path: Path, state: str) -> None:
    write_status(tmp_path, state=state)
    row = row_of(tmp_path)
    assert (row["state"], row["eta_s"], row["note"]) == (state, None, "")
