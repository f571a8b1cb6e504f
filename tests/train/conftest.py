"""A tiny run over shards of bytes, and its steps driven by hand."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from infini_train.config.files import override, validate
from infini_train.config.run import RunConfig
from infini_train.data.lanes import Batch
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.parallel import device
from infini_train.train.carry import join_lanes
from infini_train.train.optim import learning_rates
from infini_train.train.session import Session
from infini_train.train.step import train_step
from infini_train.train.variation import draw_variation

torch.set_num_threads(1)

LENGTHS = (5, 13, 40, 100, 3, 61, 22, 9, 150, 31, 17, 48)  # documents begin at all places of windows and segments
ATTENTION = {
    "linear": "{kind: infini, segment_tokens: 8, update: linear, overlap_tokens: 3}",
    "delta": "{kind: infini, segment_tokens: 8, update: delta, overlap_tokens: 3, conv_tokens: 2}",
    "local": "{kind: local, segment_tokens: 8, overlap_tokens: 3}",
    "full": "{kind: full}",
}


class Step(NamedTuple):
    loss: float
    grad_norm: float
    batch: Batch


def write_shards(folder: Path, lengths: Iterable[int], seed: int = 0) -> Path:
    """Documents of bytes that mostly count up in steps of the document's own, so that there is something to learn."""
    random = np.random.default_rng(seed)
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number, length in enumerate(lengths):
            noise = random.integers(0, 2, length) * random.integers(0, 256, length)
            tokens = (np.arange(length) * (number % 3 + 1) + noise) % 64
            writer.add(tokens, n_bytes=length, id=f"document {number}")
    return folder


def drive(session: Session, steps: int) -> list[Step]:
    """Does steps as the training loop does them."""
    seen = []
    with contextlib.closing(session.batches()) as batches:
        for batch, lanes in itertools.islice(batches, steps):
            rates = learning_rates(session.step, session.config.train.total_steps, session.config.optim)
            variation = draw_variation(session.config, session.step)
            result = train_step(session.stages, session.engine, batch, session.carried, rates, variation=variation)
            session.advance(result, lanes)
            seen.append(Step(result.loss, result.grad_norm, batch))
    return seen


def capture(session: Session) -> dict[str, Tensor]:
    """Copies of weights, masters, moments and carried memory, by name."""
    tensors = {f"weight {name}": value for name, value in session.stages.transformers()[0].named_parameters()}
    tensors |= {f"{shard.kind} {shard.name}": shard.values for shard in session.engine.shards()}
    tensors |= {f"carry {name}": value for name, value in join_lanes(session.stages, session.carried).items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    assert not different, f"{len(different)} of {len(found)} differ: {different[:5]}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train", LENGTHS)


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "validation", (30, 70, 11), seed=1)


@pytest.fixture
def configure(shards: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Config of a tiny run in `tmp_path`; arguments are --set assignments, `run` names its folder."""
    tree = {
        "model": {
            "vocab_size": 259,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "attention": {"kind": "infini", "segment_tokens": 8},
        },
        "data": {"train": str(shards)},
        "train": {"window_tokens": 32, "batch_lanes": 4, "micro_batch_lanes": 2, "max_steps": 6},
        "optim": {"lr": 3e-3, "gate_lr": 5e-2, "warmup_steps": 2},
        "log": {"every_steps": 1, "memory_every_steps": 2},
        "checkpoint": {"every_steps": 3},
    }

    def build(*assignments: str, run: str = "run") -> RunConfig:
        return validate(override({**tree, "run_dir": str(tmp_path / run)}, assignments))

    return build


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Notes and warnings of training, as they come."""
    logger, handler = logging.getLogger("infini_train.train"), _Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that measures the machine's peak takes seconds at its full size."""
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)


class Tools(NamedTuple):
    """What tests of several files call."""

    drive: Callable[[Session, int], list[Step]] = drive
    capture: Callable[[Session], dict[str, Tensor]] = capture
    assert_same: Callable[[dict[str, Tensor], dict[str, Tensor]], None] = assert_same
    write_shards: Callable[..., Path] = write_shards
    attention: dict[str, str] = ATTENTION


@pytest.fixture
def tools() -> Tools:
    return Tools()
