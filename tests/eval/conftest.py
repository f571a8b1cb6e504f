"""A run to evaluate."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_run(train_one_step: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step over bytes."""
    attention = {"kind": "infini", "segment_tokens": 16}
    return train_one_step(tmp_path_factory.mktemp("home"), 32, attention=attention, init_std=0.3)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))
