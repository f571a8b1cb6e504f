"""What Slurm itself says of the ready scripts, on a cluster that advertises 8 GPUs a node."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
READY = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))


CASES = [(name, nodes) for name in READY for nodes in ((1, 4, 16, 64) if name.startswith("train_") else (1,))]


def ask(slurm, *arguments: str) -> str:
    command = ["sbatch", "--test-only", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True)
    return done.stderr if done.returncode == 0 else f"refused: {done.stderr}"


@pytest.mark.parametrize(("name", "nodes"), CASES)
def test_a_ready_script_is_taken(slurm, name: str, nodes: int) -> None:
    """For all its numbers of nodes. The cluster has 64 such nodes; 60 of them exist in its configuration only."""
    assert "#SBATCH --nodes=1\n" in (ROOT / "slurm" / name).read_text()
    more = [f"--nodes={nodes}"] if nodes > 1 else []
    wide = ["--partition=wide"] if nodes > 4 else []
    said = [""]

    def is_taken() -> bool:  # the controller needs a while to count the GPUs of nodes that never answered
        said[0] = ask(slurm, *more, *wide, str(ROOT / "slurm" / name))
        return "to start at" in said[0]

    slurm.wait_until(is_taken, 60 if wide else 5, lambda: said[0], every_s=1.0)


def test_what_does_not_fit_is_refused(slurm) -> None:
    script = str(ROOT / "slurm" / "train_8b.sbatch")
    assert ask(slurm, "--gres=gpu:9", script).startswith("refused")
    assert ask(slurm, "--partition=none", script).startswith("refused")
    assert ask(slurm, "--nodes=65", "--partition=wide", script).startswith("refused")


def test_a_dry_run_asks_slurm(slurm) -> None:
    fields = ("--set-cluster=sbatch=[]", "--set-cluster=cores_per_node=96", "--set-cluster=memory=900G")
    said = slurm.run("infini-launch", "submit", "8b", "--cluster=h100", *fields, "--dry-run", cwd=ROOT)
    assert "#SBATCH --gres=gpu:h100:8" in said
