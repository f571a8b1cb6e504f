"""infini-launch as a person on a login node meets it; Slurm itself: test_submit.py, test_batch_script.py."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import folder, status
from launch.slurm import EndedJob, QueuedJob

ROOT = Path(__file__).resolve().parents[2]
QUICK = """
import sys, resource
from launch.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "pydantic", "jinja2"} & set(sys.modules)), resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nonexistent"}  # no Slurm
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["status", "."], ["render", "1b", "--cluster", "plain"]])
def test_it_starts_quickly_and_without_torch(arguments: list[str]) -> None:
    """Processor time, which a busy machine does not stretch much."""
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    modules, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert "torch" not in modules and (arguments[0] == "render" or modules == "[]")
    assert float(seconds) < 0.5 if arguments[0] != "render" else 1.0


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, message in (
        (["render", "1b", "--cluster", "plane"], "error: plane: no cluster config of this name; did you mean "),
        (["render", "1b", "--cluster", "plain", "--nodes", "3"], "error: --nodes: 3 nodes x 8 tasks don't fit the run"),
        (["render", "1b", "--cluster", "plain", "--nodes", "3"], "; 1b has scales for 4, 16, 64 nodes"),
        (["render", "1b", "--cluster", "plain", "--set", "a\nb=1"], "error: --set: must be one line of printable text"),
        (["render", "1b", "--cluster", "plain", "--set-cluster", "memory"], "--set-cluster memory: write it as "),
        (["render", "1b", "--cluster", "plain", "--set-cluster", "requeue=1"], "requeue: must be a valid boolean"),
        (["submit", "1b", "--cluster", "plain", "--set", f"run_dir={tmp_path}/run"], "error: sbatch: not found"),
        (["render", "1b", "--cluster", "plain", "--set", "run_dir=-x"], "error: -x: looks like an option; write ./-x"),
        (["encode", "2", "--cluster", "plain", "--tasks", "2", "--", "a"], "error: --tasks: '2' does not name tasks"),
        (["encode", "2", "--cluster", "plain", "--", "a", "--restart"], "error: encode: --restart: "),
        (["encode", "2", "--cluster", "plain", "--", "a", "--out", "b"], "error: sbatch: not found"),
        (
            ["chain", "1001", "1b", "--cluster", "plain"],
            "error: N: must be at most 1000; see ",
        ),
        (["cancel", str(tmp_path)], "no job of it is in the queue"),
        (["logs", str(tmp_path)], "no job of it has started yet"),
        (["logs", str(tmp_path), "-f"], "no job of it has started yet"),
        (["logs", str(tmp_path / "nowhere"), "-f"], "there is no such folder"),
    ):
        done = launch(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_old_names_of_runs_still_work_and_say_what_to_write() -> None:
    done = launch("render", "8b_16nodes", "--cluster", "plain")
    (note,) = done.stderr.splitlines()
    assert note == ("warning: 8b_16nodes is an old name; write 8b --world-size 128 (infini-launch: --nodes 16)")
    assert "#SBATCH --nodes=16\n" in done.stdout and "\nrun_dir=runs/8b_16nodes\n" in done.stdout


def test_a_dry_run_is_at_the_scale_of_its_nodes() -> None:
    done = launch("submit", "8b", "--cluster", "plain", "--nodes", "16", "--dry-run")
    assert done.stderr == "no sbatch here: nothing was checked\n"
    assert "#SBATCH --job-name=8b_16nodes\n#SBATCH --nodes=16\n" in done.stdout
    assert launch("submit", "8b", "--cluster", "plain", "--dry-run", "--quiet").stderr == ""


SLOW_SLURM = """#!/bin/bash
sleep 1
echo "12|PENDING|0:00|2|(Resources)"
"""


def test_waiting_is_shown_on_a_terminal_once_it_takes_long(tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text(SLOW_SLURM)
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "run" / "launch").mkdir(parents=True)
    (tmp_path / "run" / "launch" / "job").write_text("12\n")
    script = "from launch import console; console.WAIT_IS_SHOWN_AFTER_S = 0.2; "
    script += f"from launch.cli import main; main(['status', {str(tmp_path)!r}, '-v'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    terminal, stderr = os.openpty()
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    shown = ""
    with contextlib.suppress(OSError):  # the end, once all of it is read
        while part := os.read(terminal, 1 << 16).decode():
            shown += part
    os.close(terminal)
    assert b" pending " in done.stdout and b"(Resources)" in done.stdout
    assert "squeue --me" in shown, "-v shows the commands of Slurm"
    assert "waiting for squeue (" in shown and shown.endswith("\r\x1b[2K")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert b"waiting" not in done.stderr, "no terminal"
    terminal, stderr = os.openpty()
    quiet = [sys.executable, "-c", script.replace("'-v'", "'-q'")]
    done = subprocess.run(quiet, env=environment, stdout=subprocess.PIPE, stderr=stderr)
    os.write(stderr, b"end")
    os.close(stderr)
    assert b" pending " in done.stdout and os.read(terminal, 1 << 16) == b"end", "--quiet"
    os.close(terminal)


def test_following_a_log_says_what_keeps_the_run(tmp_path: Path) -> None:
    """On a terminal: the queue, then preflight, then the log itself."""
    (tmp_path / "squeue").write_text(f"#!/bin/bash\ncat {tmp_path}/queue\n")
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "queue").write_text("12|PENDING|0:00|2|(Resources)\n")
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "job").write_text("12\n")
    script = "from launch import console, watch; console.WAIT_IS_SHOWN_AFTER_S = 0.1; "
    script += "watch.POLL_S = watch.ASK_SLURM_EVERY_S = 0.1; "
    script += f"from launch.cli import main; main(['logs', {str(run)!r}, '-f'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    terminal, stderr = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    shown = ""

    def wait_for(text: str) -> None:
        nonlocal shown
        until = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < until, shown
            shown += os.read(terminal, 1 << 16).decode()

    wait_for("job 12 is pending (Resources)")
    logs = run / "launch" / "logs" / "12.0"
    logs.mkdir(parents=True)
    (tmp_path / "queue").write_text("12|RUNNING|0:01|2|n[1-2]\n")
    wait_for("job 12: starting")
    (logs / "preflight-0.log").write_text("")
    wait_for("job 12: preflight checks its nodes")
    (logs / "train-0.log").write_text("step 1\n")
    (run / "status.json").write_text('{"state": "finished"}')
    assert process.stdout.readline() == b"step 1\n"
    time.sleep(1)  # ten looks at the queue
    assert process.poll() is None, "while the job runs, Slurm may still bring lines"
    with (logs / "train-0.log").open("a") as log:
        log.write("step 2\n")
    (tmp_path / "queue").write_text("12|COMPLETING|0:01|2|n[1-2]\n")
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, out) == (0, b"step 2\n")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = launch("submit", "1b", "--cluster", "plain", "--dry-run", "--set", f"run_dir={tmp_path}/run")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n#SBATCH ")
    assert list(tmp_path.iterdir()) == []


def test_the_launch_folder_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "bad_nodes").write_text("n1\n")
    there = folder.prepare(tmp_path, {"train.sbatch": "text"}, ROOT)
    assert (there / "train.sbatch").read_text() == "text" and not (there / "bad_nodes").exists()
    assert "PATH=" in (there / "environment.txt").read_text()
    assert (there / "revision.txt").read_text().strip()


def write_run(root: Path, name: str, said: dict, job: int | None = None, failure: str = "") -> None:
    (root / name / "launch").mkdir(parents=True)
    (root / name / "status.json").write_text(json.dumps(said))
    if job is not None:
        (root / name / "launch" / "job").write_text(f"{job}\n")
    if failure:
        (root / name / "launch" / "last_failure").write_text(failure + "\n")


def test_the_table_joins_what_training_and_slurm_say(tmp_path: Path) -> None:
    said = {"step": 5, "total_steps": 9, "loss": 2.5, "tokens_per_s": 1234.0, "eta_s": 3700.0, "restarts": 1}
    now = {"heartbeat": time.time() - 65}
    write_run(tmp_path, "a", {**said, **now, "state": "training"}, 1)
    write_run(tmp_path, "b", {**said, **now, "state": "training"}, 2, "train: rank 1 on n2 failed first")
    write_run(tmp_path, "c", {**said, **now, "state": "finished"}, 3)
    write_run(tmp_path, "d", {**said, **now, "state": "stopped by SIGTERM"}, 4)
    (tmp_path / "e" / "launch").mkdir(parents=True)
    write_run(tmp_path, "f", {**said, **now, "state": "training"}, 5)
    write_run(tmp_path, "g", {**said, **now, "state": "training"}, 6)
    queue = {1: QueuedJob(1, "SIGNALING", "1:00", 2, "n[1-2]"), 4: QueuedJob(4, "PENDING", "0:00", 2, "(Resources)")}
    ended = {6: EndedJob(6, "NODE_FAIL", "0:0", "1:02:03", "n[1-2]")}
    rows = status.describe_runs(folder.find_runs(tmp_path), queue, ended)
    states = ["training", "failed", "finished", "pending", "unknown", "ended without a word", "node_fail"]
    assert [row["state"] for row in rows] == states
    assert rows[-1]["note"] == "Slurm: NODE_FAIL, exit code 0:0, after 1:02:03 on n[1-2]"
    assert rows[-1]["slurm"]["exit_code"] == "0:0" and rows[0]["slurm"]["nodes"] == 2
    unknown = status.describe_runs(folder.find_runs(tmp_path), None)
    assert [row["state"] for row in unknown][1] == "training", "nobody knows better"
    assert [row["eta_s"] for row in rows] == [3700.0, *[None] * 6], "only what runs has time left"
    table = status.format_table(rows)
    lines = table.splitlines()
    assert lines[0].split() == ["run", "job", "state", "step", "loss", "tok/s", "left", "restarts", "heard", "note"]
    assert lines[1].split() == [
        str(tmp_path / "a"),
        "1",
        "training",
        "5/9",
        "2.5000",
        "1,234",
        "1h01m",
        "1",
        "1m05s",
        "ago",
    ]
    assert lines[2].endswith("train: rank 1 on n2 failed first") and lines[4].endswith("(Resources)")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (4.9, "4s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert status.format_seconds(seconds) == text


def test_logs_are_those_of_the_newest_start(tmp_path: Path) -> None:
    for name, text in (("9.0", "old"), ("10.0", "newer"), ("10.2", "newest"), ("10.1", "older")):
        (tmp_path / "launch" / "logs" / name).mkdir(parents=True)
        (tmp_path / "launch" / "logs" / name / "train-0.log").write_text(text)
    assert launch("logs", str(tmp_path)).stdout == "newest"


def test_local_is_refused_like_a_job(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"include": ["run/debug.yaml"], "parallel": {"tensor_size": 2}}))
    done = launch("local", str(path), "--nproc", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: parallel: ")
