"""`infini-launch status` of jobs that have ended, where Slurm keeps accounts and where it does not."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def submit_run(slurm, folder, name: str, script: str) -> int:
    """A run whose job does something else; the number of the job."""
    launch = folder / name / "launch"
    launch.mkdir(parents=True)
    job = int(slurm.run("sbatch", "--parsable", "--nodes=1", "--output=/dev/null", f"--wrap={script}"))
    (launch / "job").write_text(f"{job}\n")
    (folder / name / "status.json").write_text(json.dumps({"state": "training", "step": 5, "total_steps": 9}))
    return job


def read_rows(slurm, folder) -> dict[str, dict]:
    said = slurm.run("infini-launch", "status", str(folder), "--json")
    return {row["run"].rpartition("/")[2]: row for row in map(json.loads, said.splitlines())}


def test_ended_jobs_are_told_by_the_accounts(accounting_slurm, tmp_path):
    slurm = accounting_slurm
    failed = submit_run(slurm, tmp_path, "failed", "sleep 1; exit 3")
    killed = submit_run(slurm, tmp_path, "killed", "sleep 100")
    slurm.wait_until(lambda: slurm.job_state(killed) == "RUNNING", 60, slurm.controller_log)
    slurm.run("scancel", str(killed))
    for job in (failed, killed):
        slurm.wait_until(lambda job=job: slurm.job_state(job) in ("FAILED", "CANCELLED"), 60, slurm.controller_log)
    slurm.wait_until(lambda: read_rows(slurm, tmp_path)["killed"]["slurm"] is not None, 60, slurm.controller_log)
    rows = read_rows(slurm, tmp_path)
    assert (rows["failed"]["state"], rows["killed"]["state"]) == ("failed", "cancelled")
    ended = rows["failed"]["slurm"]
    assert (ended["id"], ended["exit_code"], ended["nodes"]) == (failed, "3:0", "n1")
    assert rows["failed"]["note"].startswith("Slurm: FAILED, exit code 3:0, after 00:00:0")
    assert "Slurm: CANCELLED by " in rows["killed"]["note"]


def test_without_accounts_the_table_is_there_all_the_same(slurm, tmp_path):
    job = submit_run(slurm, tmp_path, "failed", "exit 3")
    slurm.wait_until(lambda: slurm.job_state(job) == "FAILED", 60, slurm.controller_log)
    row = read_rows(slurm, tmp_path)["failed"]
    assert (row["state"], row["slurm"], row["note"]) == ("ended without a word", None, "")
