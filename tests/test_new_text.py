"""A new kind of synthetic texts is its config class, its maker and two lines of registration.

Both are defined here, and nothing of the package knows them: they train, resume, and are known by their identity.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from infini_train.checkpoint.store import open_checkpoint, resolve
from infini_train.config.data import SYNTHETIC_KINDS, SyntheticConfig
from infini_train.config.errors import ConfigError, require
from infini_train.config.files import dump, load_run, validate
from infini_train.data.source import open_source
from infini_train.data.synthetic.makers import MAKERS, Kind
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class CopyConfig(SyntheticConfig):
    """Letters, then the same letters again."""

    kind: Literal["copy"] = "copy"
    letters: int = 8

    def __post_init__(self) -> None:
        require(self.letters > 0, "data.synthetic.letters", "must be positive")


class CopyMaker:
    noun = "texts"
    bos_id, pad_id = ByteTokenizer.bos_id, ByteTokenizer.pad_id
    min_size = max_size = 1
    harder_below_loss: float | None = None
    grow_below_loss = 0.1

    def __init__(self, config: CopyConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        assert 2 * config.letters < segment_tokens
        self.letters = config.letters

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        if room_segments < 1:
            return None
        ids = np.tile(random.integers(97, 123, self.letters), 2).astype(np.int32)
        weights = np.ones(len(ids), np.float32)
        return Text(ids, ids, weights / len(ids), weights, 1, len(ids))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNTHETIC_KINDS, "copy", CopyConfig)
    monkeypatch.setitem(MAKERS, "copy", Kind(CopyMaker, text_version=3, extra_ids=5))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    tree = {
        "name": "new",
        "run_dir": str(tmp_path / "whole"),
        "model": {
            **{"vocab_size": 264, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2},
            **{"ffn_size": 48, "attention": {"kind": "infini", "segment_tokens": 32}},
        },
        "data": {"synthetic": {"kind": "copy", "letters": 9}},
        "train": {"window_tokens": 64, "batch_lanes": 2, "max_steps": 2},
        "optim": {"lr": 3e-3, "warmup_steps": 0},
        "checkpoint": {"every_steps": 1},
    }
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(run: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(resolve(run))
    wanted = [checkpoint.whole(name, "master") for name in checkpoint.names("master")]
    return {piece.name: values for piece, values in checkpoint.read(wanted)}


def test_it_trains_and_a_resumed_run_is_the_run(run_file: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    stopped = ("--set", f"run_dir={tmp_path / 'stopped'}")
    assert call("train", run_file) == 0
    assert call("train", run_file, *stopped) == 0
    last = resolve(tmp_path / "stopped")
    (last / "index.json").unlink()  # back to step 1
    assert call("train", run_file, *stopped) == 0
    once, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert once and once.keys() == resumed.keys()
    assert [name for name, value in once.items() if not torch.equal(value, resumed[name])] == []


def test_it_is_described_by_its_identity(run_file: Path) -> None:
    config = load_run(str(run_file))
    source = open_source(config)
    described = json.loads(source.identity)
    assert (described["kind"], described["texts"], described["fields"]) == ("copy", 3, {"letters": 9})
    assert source.earlier_identities == () and source.vocab_size == 264
    assert validate(yaml.safe_load(dump(config))) == config


def test_its_mistakes_are_named(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.synthetic.letters: must be positive"):
        load_run(str(run_file), ["data.synthetic.letters=0"])
    with pytest.raises(ConfigError, match=r"^data.synthetic.letter: unknown key; did you mean letters\?"):
        load_run(str(run_file), ["data.synthetic.letter=3"])
    with pytest.raises(ConfigError, match=r"^data.synthetic.kind: unknown value .*; did you mean copy\?"):
        load_run(str(run_file), ["data.synthetic.kind=copi"])
    with pytest.raises(ConfigError, match=r"^data.copy: unknown key"):  # never was a section of its own
        load_run(str(run_file), ["data.copy={letters: 3}"])


def test_without_registration_it_is_unknown(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SYNTHETIC_KINDS, "copy")
    with pytest.raises(ConfigError, match=r"^data.synthetic.kind: unknown value .*copy"):
        load_run(str(run_file))


def test_both_tables_name_the_same_kinds() -> None:
    assert SYNTHETIC_KINDS.keys() == MAKERS.keys()
    assert all(config(kind=kind).kind == kind for kind, config in SYNTHETIC_KINDS.items())
