"""Encoding as a job array on a real Slurm: the bytes of one process, whatever happens to a task."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from infini_train.data.manifest import hash_file
from tests.launch.private_slurm import ENDS

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
WAIT_S = 400  # on a busy machine
CLUSTER = {"gpus_per_node": 0, "tasks_per_node": 1, "cores_per_node": 2, "memory": "1G", "time_limit": "30:00"}
ENCODE = ["text.jsonl", "--tokenizer", "byte", "--holdout", "0.1", "--out"]


def write_corpus(path: Path) -> None:
    """26 MB: four tasks of 8 MB, so that one part of three has two of them."""
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(260):
            file.write(json.dumps({"id": f"document {i}", "text": random.bytes(50_000).hex()}) + "\n")


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def hold_task(slurm, task: int) -> bool:
    """Stops the processes that encode in this task of the array; whether there is one."""
    mine, held = {f"SLURM_ARRAY_TASK_ID={task}", f"SLURM_CONF={slurm.environment['SLURM_CONF']}"}, False
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
            if mine <= words and (path / "comm").read_text().startswith(("python", "infini")):
                os.kill(int(path.name), signal.SIGSTOP)
                held = True
    return held


def test_an_array_gives_the_bytes_of_one_process(slurm, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text.jsonl")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    slurm.run("infini-data", "encode", *ENCODE, "one", cwd=tmp_path)
    encode = ["infini-launch", "encode", "3", "--cluster=cluster.yaml", "--", *ENCODE, "a folder"]
    job = int(slurm.run(*encode, cwd=tmp_path).split()[1].rstrip(","))

    def outputs() -> str:
        return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(tmp_path.glob("encode-*.out")))

    def states() -> list[str]:
        return slurm.run("squeue", "-h", "-r", "-tall", f"-j{job}", "-o%T").split()

    def restarts(task: int) -> str:
        return slurm.run("scontrol", "show", "job", "--oneliner", f"{job}_{task}").split("Restarts=")[1].split()[0]

    def wait_for_end() -> None:
        slurm.wait_until(lambda: len(states()) == 3 and set(states()) <= set(ENDS), WAIT_S, outputs, every_s=0.5)
        assert states() == ["COMPLETED"] * 3, outputs()

    slurm.wait_until(lambda: hold_task(slurm, 0), WAIT_S, outputs, every_s=0.02)
    assert not (tmp_path / "a folder").exists(), "too late to disturb it"
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")  # as before a time limit
    wait_for_end()
    assert restarts(0) == "1" and "part 1/3 goes back into the queue" in outputs()
    assert hashes(tmp_path / "a folder") == hashes(tmp_path / "one")

    slurm.run("scontrol", "requeue", f"{job}_1")  # as after a crash of its node, but when all is done
    slurm.wait_until(lambda: restarts(1) == "1", WAIT_S, outputs)
    wait_for_end()
    assert hashes(tmp_path / "a folder") == hashes(tmp_path / "one")
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_failed_task_is_submitted_again_alone(slurm, tmp_path: Path) -> None:
    """Each keeps the part that it has in the whole array; the last one assembles the dataset."""
    write_corpus(tmp_path / "text.jsonl")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "sbatch": ["--export=NONE"], "venv": sys.prefix}))
    slurm.run("infini-data", "encode", *ENCODE, "one", cwd=tmp_path)
    for tasks in ("0,2", "1"):
        assert not (tmp_path / "data").exists()
        command = ["infini-launch", "encode", "3", "--cluster=cluster.yaml", "--tasks", tasks, "--", *ENCODE, "data"]
        said = slurm.run(*command, cwd=tmp_path)
        assert f", tasks {tasks} of 3;" in said
        job = int(said.split()[1].rstrip(","))
        states = lambda job=job: set(slurm.run("squeue", "-h", "-r", "-tall", f"-j{job}", "-o%T").split())  # noqa: E731
        slurm.wait_until(lambda states=states: states() <= set(ENDS), WAIT_S, slurm.controller_log, every_s=0.5)
        assert states() == {"COMPLETED"}, [path.read_text() for path in tmp_path.glob("encode-*.out")]
    assert hashes(tmp_path / "data") == hashes(tmp_path / "one")
