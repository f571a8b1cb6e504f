"""Writes the ready scripts of this folder from its templates: python slurm/generate.py. A test keeps them in step."""

from pathlib import Path

from launch.cluster import load_cluster
from launch.job import plan_scales
from launch.render import render_encoding, render_evaluation, render_training

FOLDER = Path(__file__).resolve().parent
CLUSTER = "plain"
RUNS = ("1b", "3b", "8b")  # each script runs all scales of its config: sbatch --nodes=16 slurm/train_8b.sbatch

ENCODE = ("text/", "--tokenizer", "tokenizer.model", "--out", "data", "--holdout", "0.001")
ENCODE_PARTS = 16


def render_all() -> dict[str, str]:
    """Name and text of every ready script."""
    cluster = load_cluster(CLUSTER)
    scripts = {f"train_{name}.sbatch": render_training(plan_scales(name, cluster), cluster) for name in RUNS}
    scripts |= {
        f"eval_{model}.sbatch": render_evaluation(
            f"eval-{model}", [f"runs/{model}", "--stream", "--precision=bf16", "--json"], cluster
        )
        for model in RUNS
    }
    scripts["encode.sbatch"] = render_encoding(ENCODE, ENCODE_PARTS, cluster)
    return scripts


if __name__ == "__main__":
    for name, text in render_all().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
