"""A small run's config, as a file."""

from pathlib import Path

import pytest

BASE = """
model: {vocab_size: 259, hidden_size: 64, num_layers: 2, num_heads: 4, ffn_size: 160,
        attention: {kind: infini, segment_tokens: 32}}
data: {train: shards/train}
train: {window_tokens: 128, batch_lanes: 4, max_steps: 20}
optim: {warmup_steps: 5}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
