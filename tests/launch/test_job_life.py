"""Training jobs on a real Slurm: whatever happens to them, they end complete, with the loss curve of a quiet run."""

import os
import signal

import pytest

from launch.ranks import read_ranks

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
WAIT_S = 400  # on a busy machine
STEPS = 40


def test_four_nodes_and_two_tasks_a_node_finish_alike(submit, slurm):
    curves = []
    for nodes, tasks in ((4, 1), (2, 2)):
        run = submit(nodes=nodes, tasks=tasks, settings=("train.max_steps=8",))
        assert run.wait_for_end() == "COMPLETED", run.story()
        assert len(list((run.directory / "launch" / "logs").glob("*/train-*.exit"))) == 4
        assert [entry.rank for entry in read_ranks(run.directory)] == [0, 1, 2, 3]
        curves.append(run.losses())
        os.rename(run.directory, run.directory.with_name(f"{nodes}x{tasks}"))
    assert curves[0] == curves[1] and list(curves[0]) == list(range(1, 9))


def test_a_signal_before_the_limit_saves_and_resumes_at_the_next_step(submit, slurm, quiet_curve):
    run = submit()
    with run.hold(8):
        slurm.run("scancel", "--batch", "--signal=USR1", str(run.job))
    slurm.wait_until(lambda: run.starts() == 2, WAIT_S, run.story)
    stopped = run.step()
    assert (run.directory / "checkpoints" / f"step-{stopped:08d}").is_dir(), "the very last step was saved"
    run.assert_complete(quiet_curve, starts=2)
    (log,) = (run.directory / "launch" / "logs").glob("*.1/train-0.log")
    assert f"(step {stopped})" in log.read_text()


def test_a_time_limit_is_survived(submit, slurm, quiet_curve):
    run = submit()
    with run.hold(2):
        run.come_near_limit()
    slurm.wait_until(lambda: run.starts() == 2, WAIT_S, run.story)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    run.assert_complete(quiet_curve, starts=2)


def test_a_preempted_job_comes_back(submit, slurm, quiet_curve):
    run = submit()
    with run.hold(8):
        slurm.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        slurm.wait_until(lambda: "preemption or time limit: asking" in run.job_log(), WAIT_S, run.story)
    slurm.wait_until(lambda: run.starts() == 2, WAIT_S, run.story)
    run.assert_complete(quiet_curve, starts=2)


def test_a_killed_rank_is_named_and_the_job_retried(submit, quiet_curve):
    run = submit()
    with run.hold(8) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    run.assert_complete(quiet_curve, starts=2)
    assert "rank 1 on n2 failed first, exit code 137" in run.job_log()


def test_a_stopped_rank_is_named_and_the_job_retried(submit, quiet_curve):
    run = submit(settings=("parallel.timeout_s=20",))
    with run.hold(8) as ranks:
        del ranks[1]
    run.assert_complete(quiet_curve, starts=2)
    assert "error: rank 1 (n2, process" in run.job_log() and "stopped answering" in run.job_log()
    (logs,) = (run.directory / "launch" / "logs").glob("*.0")
    stacks = [(logs / f"stacks-{rank}.txt").read_text() for rank in range(2)]
    assert all("in run_steps" in text for text in stacks), "the stopped one was continued to write its own"


def test_a_crashed_node_is_survived_on_others(submit, slurm, quiet_curve):
    run = submit()
    try:
        with run.hold(8):
            slurm.kill_node("n2")
        assert run.wait_for_end() == "COMPLETED", run.story()
    finally:
        slurm.start_node("n2")
    assert run.losses() == quiet_curve
    assert run.starts() >= 2
    nodes = (run.directory / "launch" / "starts").read_text().splitlines()[-1].split()[-1]
    assert "n2" not in slurm.run("scontrol", "show", "hostnames", nodes).split()
    slurm.wait_until(lambda: slurm.run("sinfo", "-hNnn2", "-tidle", "-o%N").strip() != "", WAIT_S, "n2 is back")


def test_a_mistake_that_only_training_finds_is_not_retried(submit):
    run = submit(settings=("train.init_from=/nowhere",))
    assert run.wait_for_end() == "FAILED"
    assert run.starts() == 1
    assert "error: " in run.job_log() and "fix it" in run.job_log()


def test_cancel_saves_and_ends_and_the_run_can_be_submitted_again(submit, quiet_curve):
    run = submit()
    with run.hold(8):
        run.launch("cancel", str(run.directory))
    assert run.wait_for_end() == "COMPLETED", run.story()
    stopped = run.step()
    assert (run.directory / "checkpoints" / f"step-{stopped:08d}").is_dir() and stopped < STEPS
    assert run.status()["state"] == "stopped by SIGTERM"
    again = submit()
    assert again.wait_for_end() == "COMPLETED", again.story()
    assert again.losses() == quiet_curve
