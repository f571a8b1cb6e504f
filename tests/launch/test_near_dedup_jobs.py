"""Near duplicates by jobs on a real Slurm: datatrove's executor submits them, one depending on the other."""

import json
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
WAIT_S = 300  # on a busy machine


def test_jobs_give_what_one_machine_gives(slurm, tmp_path: Path) -> None:
    with (tmp_path / "c.jsonl").open("w") as file:
        for i in range(300):
            words = random.Random(i % 200).choices(["one", "two", "three", "four", "five", "six", "seven"], k=300)
            file.write(json.dumps({"id": f"d{i}", "text": " ".join([*words, str(i)])}) + "\n")
    command = ["infini-data", "near-dedup", "c.jsonl", "--task-mb", "0.1", "--out"]
    slurm.run(*command, "here", "--workers", "1", cwd=tmp_path)
    slurm_options = ["--slurm", "batch", "--time", "20:00", "--memory-gb", "1"]
    said = slurm.run(*command, "there", *slurm_options, cwd=tmp_path)
    assert said.startswith("submitted jobs ") and not (tmp_path / "there").exists()
    again = subprocess.run(
        [*command, "there", *slurm_options], cwd=tmp_path, env=slurm.environment, capture_output=True, text=True
    )
    assert again.returncode == 2 and "are queued or running" in again.stderr
    assert (tmp_path / ".there.partial" / "logs").is_dir(), "the refusal leaves the jobs their folder"

    def logs() -> str:
        found = sorted(tmp_path.glob(".there.partial/logs/*/slurm_logs/*"))
        return slurm.run("squeue") + "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in found)

    def is_empty() -> bool:
        queue = slurm.ask("squeue", "-h")  # on a busy machine the controller may have no time to answer
        return queue.returncode == 0 and not queue.stdout.strip()

    slurm.wait_until(is_empty, WAIT_S, logs, every_s=1.0)
    done = slurm.run(*command, "there", *slurm_options, cwd=tmp_path)
    assert done.startswith("there: 200 documents"), done + logs()
    here, there = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("here", "there"))
    assert here == there
    assert not list(tmp_path.glob(".*partial"))
