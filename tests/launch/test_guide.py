"""docs/slurm.md as a newcomer follows it, on a real Slurm: each command of its first block, then the ready scripts.

The clone is a copy whose 1B model is tiny, since no GPU is there. Not run: the installation of the CUDA build.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(4000)]
ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = "make install CONSTRAINTS=constraints-cuda.txt"
WAIT_S = 900  # on a busy machine
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "attention": {"kind": "infini", "segment_tokens": 8},
}
SCALES = {4: {"name": "1b_2nodes", "parallel": {"data_size": 4}}}  # two nodes of the two tasks below
SMALL = {
    "train": {"window_tokens": 64, "batch_lanes": 4, "max_tokens": 4 * 64 * 6, "precision": "fp32"},
    "parallel": {"context_size": 1, "data_size": 2, "timeout_s": 60},
    "optim": {"lr": 3e-3, "warmup_steps": 2},
    "eval": {"every_steps": 3, "max_tokens": 512},
    "checkpoint": {"every_steps": 3},
    "log": {"every_steps": 1},
}
FILLED_IN = {
    "gpus_per_node": 0,
    "tasks_per_node": 2,
    "cores_per_node": 4,
    "memory": "1G",
    "network_interface": "lo",
    "min_free_gib": 0,  # this machine's disk may have less than the 50 that are asked of a cluster's
}


def commands() -> list[str]:
    """The lines of the page's first block."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    return re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1].strip().splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a 1B model of a few thousand parameters, an environment, and a text."""
    folder = tmp_path_factory.mktemp("guide") / "clone"
    for name in ("configs", "slurm", "launch", "infini_train", "data_tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "configs" / "model" / "1b.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    path = folder / "configs" / "run" / "1b.yaml"
    tree = yaml.safe_load(path.read_text())
    for section, fields in SMALL.items():
        tree[section] = {**tree.get(section, {}), **fields}
    tree["scales"], tree["device"] = SCALES, "cpu"
    path.write_text(yaml.safe_dump(tree))
    (folder / "text").mkdir()
    lines = [f"Document {i} says that {i} times {i} is {i * i}, which nobody doubts." for i in range(3000)]
    (folder / "text" / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def run(slurm, clone: Path, *lines: str) -> str:
    done = subprocess.run(
        ["timeout", str(WAIT_S), "bash", "-euo", "pipefail", "-c", "\n".join(lines)],  # ends `logs -f` as well
        cwd=clone,
        env={**slurm.environment, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    logs = [path.read_text() for path in sorted(clone.glob("runs/*/launch/**/*.log"))]
    assert done.returncode == 0, "\n".join([done.stdout, *logs, slurm.controller_log()])
    return done.stdout


def read_status(clone: Path, name: str = "1b") -> dict:
    return json.loads((clone / "runs" / name / "status.json").read_text())


@pytest.fixture(scope="module")
def said(slurm, clone) -> str:
    """What the page's commands say; then the job has trained, which every test of this file needs, on any worker."""
    lines = commands()
    assert lines[0] == NOT_RUN
    (clone / "fill_in.py").write_text(
        "import sys, yaml\n"
        "tree = yaml.safe_load(open('mine.yaml'))\n"
        f"yaml.safe_dump({{**tree, **{FILLED_IN!r}}}, open('mine.yaml', 'w'))\n"
    )
    (copied,) = (i for i, line in enumerate(lines) if line.startswith("cp "))
    lines.insert(copied + 1, "python fill_in.py")
    return run(slurm, clone, *(line.replace("--vocab-size 32000", "--vocab-size 300") for line in lines[1:]))


def test_the_page_leads_from_clone_to_a_job_that_trains(clone, said):
    assert "to start at" in said, "sbatch --test-only has answered"
    assert re.search(r"^job \d+; see: infini-launch status", said, flags=re.MULTILINE)
    assert re.search(r"^runs/1b +\d+ +(pending|starting|training|configuring)", said, flags=re.MULTILINE)
    assert read_status(clone)["state"] == "finished" and f"step {read_status(clone)['total_steps']}" in said


def submit_ready(slurm, clone: Path, name: str, **changes: str) -> str:
    """Fills in the head of a ready script, submits it, waits for its end; its own output."""
    path = clone / "slurm" / f"{name}.sbatch"
    text = path.read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    job = int(run(slurm, clone, f"sbatch --parsable slurm/{name}.sbatch"))
    state = slurm.wait_for_end(job, WAIT_S, slurm.controller_log)
    (output,) = clone.glob(f"*-{job}.out")
    assert state == "COMPLETED", output.read_text()
    return output.read_text()


def test_the_ready_scripts_work_once_they_are_filled_in(slurm, clone, said):
    shutil.rmtree(clone / "runs" / "1b")
    cpu = {"tasks": ("--ntasks-per-node=8", "--ntasks-per-node=2"), "gpus": ("--gpus=8", "--gpus=0")}
    assert "finished" in submit_ready(slurm, clone, "train_1b", **cpu, space=("--min-free-gib=50", "--min-free-gib=0"))
    assert read_status(clone)["state"] == "finished"
    last = submit_ready(slurm, clone, "eval_1b").strip().splitlines()[-1]
    assert json.loads(last)["loss"] > 0


def test_one_script_trains_at_the_scale_of_the_nodes_that_it_gets(slurm, clone, said):
    """As rendered for this cluster, and as submitted; both name the run after the scale."""
    submit = "sbatch --parsable --nodes=2 --job-name=1b_2nodes train.sbatch"
    lines = run(slurm, clone, "infini-launch render 1b --cluster mine.yaml > train.sbatch", submit)
    job = int(lines.split()[-1])
    state = slurm.wait_for_end(job, WAIT_S, slurm.controller_log)
    (output,) = clone.glob(f"*-{job}.out")
    assert state == "COMPLETED" and "4 ranks" in output.read_text(), output.read_text()
    assert read_status(clone, "1b_2nodes")["state"] == "finished"
    config = yaml.safe_load((clone / "runs" / "1b_2nodes" / "config.yaml").read_text())
    assert (config["name"], config["parallel"]["data_size"]) == ("1b_2nodes", 4)
    shutil.rmtree(clone / "runs" / "1b_2nodes")
    job = int(run(slurm, clone, "infini-launch submit 1b --cluster mine.yaml --nodes 2").split()[1].rstrip(";"))
    assert slurm.wait_for_end(job, WAIT_S, slurm.controller_log) == "COMPLETED"
    assert read_status(clone, "1b_2nodes")["state"] == "finished"
