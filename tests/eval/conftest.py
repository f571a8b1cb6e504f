"""A run to evaluate."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.parallel import device


@pytest.fixture(scope="session")
def trained_run(call: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step over bytes."""
    home = tmp_path_factory.mktemp("home")
    with ShardWriter(home / "train", ByteTokenizer()) as writer:
        writer.add(ByteTokenizer().encode("The grass is green. " * 20), n_bytes=400, id="document")
    shape = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48, "init_std": 0.3}
    tree = {
        "run_dir": str(home / "run"),
        "model": {**shape, "attention": {"kind": "infini", "segment_tokens": 16}},
        "data": {"train": str(home / "train"), "validation": str(home / "train")},
        "train": {"window_tokens": 32, "batch_lanes": 2, "max_steps": 1},
        "optim": {"warmup_steps": 0, "gate_lr": 3.0},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "MATMUL_PROBE_SIZE", 64)
        assert call("train", home / "tiny.yaml") == 0
    return home / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))
