"""The batch script on a real Slurm, around small programs that behave as training does: quick, and cheap to disturb.

`test_job_life.py` does the same with real training.
"""

import contextlib
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
WAIT_S, STEPS = 120, 100

# Counts steps, saves on a signal, resumes from its newest checkpoint; rank 0 writes the steps.
TRAINING = """\
#!{python} -SE
import os, pathlib, signal, sys, time
rank, run, stop = int(os.environ["SLURM_PROCID"]), pathlib.Path({run!r}), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
saved = run / "checkpoints"
saved.mkdir(exist_ok=True, parents=True)
step = max((int(path.name[5:]) for path in saved.iterdir()), default=0)
(run / ("secret-%d" % rank)).write_text(os.environ.get("SOME_API_KEY", ""))
while (run / "slow").exists() and not stop:  # a start that comes to nothing before it is told to stop
    time.sleep(0.1)
if (run / "slow").exists():
    sys.exit(143)
mistake = run / "mistake"
if mistake.exists():
    if rank:
        print("error: rank 0 has failed", file=sys.stderr)
        sys.exit(1)
    time.sleep(1)  # it exits after the others
    print("error: data.train: is wrong", file=sys.stderr)
    sys.exit(int(mistake.read_text()))
while step < {steps} and not stop:
    time.sleep(0.1)
    step += 1
    if rank == 0:
        (run / "status.json").write_text('{{"step": %d}}' % step)
        with open(run / "steps", "a") as file:
            file.write("%d\\n" % step)
if rank == 0:
    (saved / ("step-%08d" % step)).mkdir(exist_ok=True)
sys.exit(143 if stop else 0)
"""
# At the first start, the node of rank 0 is bad.
PREFLIGHT = """\
#!/bin/bash
[ "$SLURM_PROCID" = 1 ] || [ -e '{bad}' ] || echo "$SLURMD_NODENAME" > '{bad}'
sleep 1
[ "$SLURMD_NODENAME" != "$(cat '{bad}')" ] || {{ echo "error: preflight: 7 GPUs are seen, not 8"; exit 3; }}
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    training = TRAINING.format(python=sys.executable, run=str(tmp_path / "a run's folder"), steps=STEPS)
    for name, text in (("infini-train", training), ("python", PREFLIGHT.format(bad=tmp_path / "bad"))):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture
def start(submit, programs):
    return lambda **fields: submit(programs=str(programs), **fields)


def steps(run) -> list[int]:
    return [int(line) for line in (run.directory / "steps").read_text().split()]


def assert_each_step_once(run, starts: int) -> None:
    assert run.wait_for_end() == "COMPLETED", run.story()
    assert run.starts() == starts, run.story()
    assert steps(run) == list(range(1, STEPS + 1))


def test_a_signal_requeues_and_the_next_step_follows(start, slurm):
    run = start()
    with run.hold(5):
        slurm.run("scancel", "--batch", "--signal=USR1", str(run.job))
    assert_each_step_once(run, starts=2)
    assert "preemption or time limit: asking the ranks to save" in run.job_log() and "finished" in run.job_log()


def test_a_site_that_exports_nothing_gets_its_ranks_going(start):
    """sbatch --export=NONE, which srun in the job would follow; a secret reaches the ranks all the same."""
    run = start(sbatch=["--export=NONE"], environment={"SOME_API_KEY": "SeCrEt"})
    assert_each_step_once(run, starts=1)
    assert [(run.directory / f"secret-{rank}").read_text() for rank in (0, 1)] == ["SeCrEt"] * 2
    files = [path for path in (run.directory / "launch").rglob("*") if path.is_file()]
    assert [path.name for path in files if "SeCrEt" in path.read_text(errors="replace")] == []


def test_a_program_that_no_node_finds_is_not_retried(start):
    """An environment that did not come along, or a Python environment that is not there."""
    run = start(environment={"PATH": "/usr/bin:/bin"}, sbatch=["--export=NONE"])
    assert run.wait_for_end() == "FAILED", run.story()
    assert run.starts() == 1 and "exit code 127" in run.job_log(), run.story()
    assert "see venv and modules of the cluster's config" in run.launch("status", str(run.directory))


def test_starts_that_come_to_nothing_end_the_job(start, slurm, tmp_path):
    """A signal time over the limit would tell the job to stop as it starts, for ever."""
    (tmp_path / "a run's folder").mkdir()
    (tmp_path / "a run's folder" / "slow").touch()
    run = start()
    for number in (1, 2, 3):
        logs = run.directory / "launch" / "logs" / f"{run.job}.{number - 1}"
        slurm.wait_until((logs / "train-0.log").exists, WAIT_S, run.story)
        slurm.run("scancel", "--batch", "--signal=USR1", str(run.job))
        said = lambda number=number: run.job_log().count("is the time limit too short") == number  # noqa: E731
        slurm.wait_until(said, WAIT_S, run.story)
    assert run.wait_for_end() == "FAILED", run.story()
    assert run.starts() == 3 and "given up after 2 retries without a new checkpoint" in run.job_log()
    assert "is the time limit too short" in run.launch("status", str(run.directory))


def test_a_preemption_requeues(start, slurm):
    run = start()
    with run.hold(5):
        slurm.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        slurm.wait_until(lambda: "preemption or time limit: asking" in run.job_log(), WAIT_S, run.story)
    assert_each_step_once(run, starts=2)


def test_ranks_told_to_stop_by_others_requeue(start, slurm):
    """A preemption whose signal reaches only the ranks."""
    run = start()
    with run.hold(5):
        slurm.run("scancel", "--signal=TERM", str(run.job))
    assert_each_step_once(run, starts=2)


def test_a_signal_that_is_still_on_its_way_does_not_end_the_job(start, slurm):
    """Preemption sends SIGCONT first; until all nodes have answered, Slurm calls the running job SIGNALING."""
    run = start()
    with contextlib.ExitStack() as frozen:
        with run.hold(5) as ranks:
            frozen.enter_context(slurm.freeze_node("n2"))
            slurm.run("scancel", "--signal=CONT", str(run.job))
            slurm.wait_until(lambda: slurm.job_state(run.job) == "SIGNALING", WAIT_S, run.story)
            for process in ranks.values():
                os.kill(process, signal.SIGTERM)
        slurm.wait_until(lambda: "the ranks were asked to stop" in run.job_log(), WAIT_S, run.story)
    assert_each_step_once(run, starts=2)


def test_a_time_limit_requeues(start, slurm):
    run = start()
    with run.hold(2):  # so that it is not done before Slurm looks at limits again
        run.come_near_limit()
    slurm.wait_until(lambda: run.starts() == 2, WAIT_S, run.story)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    assert_each_step_once(run, starts=2)


def test_a_killed_rank_is_named_and_retried(start):
    run = start()
    with run.hold(5) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    assert run.wait_for_end() == "COMPLETED", run.story()
    assert run.starts() == 2
    assert "train: rank 1 on n2 failed first, exit code 137" in run.job_log(), run.story()


def test_a_crashed_node_is_left_behind(start, slurm):
    run = start()
    try:
        with run.hold(5):
            slurm.kill_node("n2")
        assert run.wait_for_end() == "COMPLETED", run.story()
    finally:
        slurm.start_node("n2")
    nodes = (run.directory / "launch" / "starts").read_text().splitlines()[-1].split()[-1]
    assert "n2" not in slurm.run("scontrol", "show", "hostnames", nodes).split()
    slurm.wait_until(lambda: slurm.run("sinfo", "-hNnn2", "-tidle", "-o%N").strip() != "", WAIT_S, "n2 is back")


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (4, 1), (1, 3)])
def test_failures_end_the_job_at_the_cap_and_mistakes_at_once(start, tmp_path, code, starts):
    (tmp_path / "a run's folder").mkdir()
    (tmp_path / "a run's folder" / "mistake").write_text(str(code))
    run = start(tasks=2)
    assert run.wait_for_end() == "FAILED", run.story()
    assert run.starts() == starts, run.story()
    reason = "rank 0 has failed" if code == 1 else "data.train: is wrong"
    assert f"failed first, exit code {code}: error: {reason}" in run.job_log(), run.story()
    said = {1: "given up after 2 retries", 2: "fix it and submit again", 4: "training would diverge again"}
    assert [text in run.job_log() for text in said.values()] == [each == code for each in said]


def test_a_drained_node_is_left_at_the_next_save(start, slurm):
    run = start()
    try:
        with run.hold(5):
            slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
            slurm.run("scancel", "--batch", "--signal=USR1", str(run.job))
        assert_each_step_once(run, starts=2)
    finally:
        slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    nodes = (run.directory / "launch" / "starts").read_text().splitlines()[-1].split()[-1]
    assert "n2" not in slurm.run("scontrol", "show", "hostnames", nodes).split()


def test_retries_that_cannot_be_counted_are_not_made(start, slurm, tmp_path):
    """A full disk: without the count a job would retry forever."""
    (tmp_path / "a run's folder").mkdir()
    (tmp_path / "a run's folder" / "mistake").write_text("1")
    run = start(preflight=True)  # which takes a second, in which the file becomes a folder
    slurm.wait_until((run.directory / "launch" / "starts").exists, WAIT_S, run.story, every_s=0.01)
    (run.directory / "launch" / "retries").mkdir()
    assert run.wait_for_end() == "FAILED", run.story()
    assert "can't be written" in run.job_log() and run.starts() == 1


def test_a_folder_that_has_gone_is_not_begun_anew(start):
    run = start()
    with run.hold(5) as ranks:
        shutil.rmtree(run.directory)
        os.kill(ranks[1], signal.SIGKILL)
    assert run.wait_for_end() == "FAILED"
    assert not (run.directory / "checkpoints").exists() and not (run.directory / "status.json").exists()


def test_a_second_submission_is_refused_while_there_is_a_job(start):
    run = start()
    with (
        run.hold(5),
        pytest.raises(AssertionError, match=rf"job {run.job} of this run is running; infini-launch cancel"),
    ):
        start()
    assert_each_step_once(run, starts=1)


def test_cancel_saves_and_ends_and_a_cancelled_job_is_not_revived(start, slurm):
    run = start()
    with run.hold(5):
        assert "saves and ends" in run.launch("cancel", str(run.directory))
    assert run.wait_for_end() == "COMPLETED", run.story()
    assert "stopped; submit again" in run.job_log() and run.starts() == 1
    again = start()
    again.wait_for_step(max(steps(run)) + 3)
    slurm.run("scancel", str(again.job))
    assert again.wait_for_end() == "CANCELLED", again.story()
    time.sleep(8)  # longer than a requeued job waits
    assert slurm.job_state(again.job) == "CANCELLED"
    assert_each_step_once(start(), starts=3)


def test_a_chain_goes_on_until_the_run_is_done(start, slurm):
    run = start(chain=3)
    with run.hold(5):
        slurm.run("scancel", "--batch", "--signal=USR1", str(run.job))
    assert run.wait_for_end() == "FAILED", "it did not finish the run"
    run.job += 1
    assert_each_step_once(run, starts=2)
    run.job += 1
    assert run.wait_for_end() == "CANCELLED"


def test_a_bad_node_is_named_and_left_out(start, slurm, tmp_path):
    run = start(preflight=True)
    assert_each_step_once(run, starts=2)
    bad = (tmp_path / "bad").read_text().strip()
    assert f"bad nodes: {bad}" in run.job_log()
    assert f"preflight: rank 0 on {bad} failed first, exit code 3: error: preflight: 7 GPUs" in run.job_log()
    nodes = (run.directory / "launch" / "starts").read_text().splitlines()[-1].split()[-1]
    assert bad not in slurm.run("scontrol", "show", "hostnames", nodes).split()


def test_an_image_without_gpus_ends_the_job_and_leaves_no_node_out(start, programs):
    """The real preflight: Slurm gives each node a GPU, and this environment's torch finds none."""
    (programs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    run = start(preflight=True, gpus_per_node=1)
    assert run.wait_for_end() == "FAILED", run.story()
    assert run.starts() == 1 and not (run.directory / "launch" / "bad_nodes").exists(), run.story()
    assert "all 2 nodes have this problem: 0 GPUs are seen, not 1: " in run.job_log()
    assert "nothing to retry: fix it and submit again" in run.job_log() and "bad nodes" not in run.job_log()
