"""A run that changes its layout on the way is the run of one process: checkpoints fit any layout.

Real runs by the command line, over shards of documents. A source trains to the middle and saves; a copy of its folder
goes on elsewhere. The rest of the pairs: `make test-layouts`.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infini_train.config.files import dump, override, validate

STOP, STEPS = 3, 5
TOLERANCE = 1e-5
TIMEOUT_S = 900
LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "dp2-zero3": (2, "zero_stage: 3"),
    "tp2-sp": (2, "tensor_size: 2, sequence_parallel: true"),
    "pp2-v2": (2, "pipeline_size: 2, virtual_stages: 2"),
    "tp4-sp": (4, "tensor_size: 4, sequence_parallel: true"),
    "tp2-sp-pp2": (4, "tensor_size: 2, sequence_parallel: true, pipeline_size: 2"),
    "cp2-dp2-zero3": (4, "context_size: 2, zero_stage: 3"),
}
PAIRS = [
    ("tp2-sp", "one"),
    ("tp2-sp", "dp2-zero3"),
    ("one", "pp2-v2"),
    ("tp2-sp-pp2", "one"),
    ("tp2-sp-pp2", "dp2"),
    ("tp2-sp-pp2", "pp2-v2"),
    ("tp2-sp-pp2", "tp4-sp"),
    ("tp2-sp-pp2", "cp2-dp2-zero3"),
    ("cp2-dp2-zero3", "tp2-sp"),
    ("dp2-zero3", "one"),
]
FAST = 1  # of the pairs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "relayout"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def train(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, int], None]:
    """Trains up to a step in a layout, in this folder."""
    tree = {
        "model": {
            "vocab_size": 264,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "qk_norm": True,
            "attention": {
                "kind": "infini",
                "segment_tokens": 8,
                "update": "delta",
                "overlap_tokens": 3,
                "conv_tokens": 2,
            },
        },
        "data": {"train": str(shards)},
        "train": {"window_tokens": 32, "batch_lanes": 4, "micro_batch_lanes": 1},
        # The rates don't depend on the run's length before its last step, and epsilon hides no rounding: cases.py.
        "optim": {"lr": 1e-2, "gate_lr": 5e-2, "warmup_steps": 2, "eps": 1e-2, "schedule": "wsd", "decay_steps": 1},
        "log": {"every_steps": 1},
    }

    def train(folder: Path, layout: str, steps: int) -> None:
        processes, parallel = LAYOUTS[layout]
        assignments = [f"run_dir={folder}", f"train.max_steps={steps}", f"parallel={{{parallel}}}"]
        config = tmp_path_factory.mktemp("config") / "run.yaml"
        config.write_text(dump(validate(override(tree, assignments))), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "infini_train.cli", "train", str(config)]
            + [f"--nproc={processes}"] * (processes > 1),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return train


@pytest.fixture
def source(folder: Path, train: Callable[[Path, str, int], None]) -> Callable[[str, int], Path]:
    """The folder of a run in a layout, done once."""

    def find(layout: str, steps: int) -> Path:
        run = folder / f"{layout}-{steps}"
        with Path(f"{run}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not run.exists():
                train(folder / "unfinished" / run.name, layout, steps)
                (folder / "unfinished" / run.name).rename(run)
        return run

    return find


def read_steps(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of all steps that a run has done."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["loss/train"], row["grad_norm"]) for row in rows if "grad_norm" in row]


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*pair, id=" to ".join(pair), marks=pytest.mark.layouts if number >= FAST else [])
        for number, pair in enumerate(PAIRS)
    ],
)
def test_a_run_that_changes_its_layout_is_the_run_of_one_process(before, after, source, train, tmp_path) -> None:
    expected = read_steps(source("one", STEPS))
    run = shutil.copytree(source(before, STOP), tmp_path / "run")
    train(run, after, STEPS)
    found = read_steps(run)
    assert len(found) == len(expected) == STEPS
    for (loss, grad_norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert grad_norm == pytest.approx(expected_norm, rel=TOLERANCE)
