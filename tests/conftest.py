"""Settings that must hold before torch or DeepSpeed is imported; what tests of several rooms share; GPU skips."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import yaml
from hypothesis import settings

from infini_train.config.attention import (
    FullConfig,
    InfiniConfig,
    LocalConfig,
    MemorizingConfig,
    MixedConfig,
    RmtConfig,
    TransformerXLConfig,
)
from infini_train.config.model import ModelConfig
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from infini_train.model.transformer import Transformer

settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")

HAS_GPU = Path("/dev/nvidiactl").exists()  # asked without torch: many tests never import it

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes; the models are tiny
os.environ.setdefault("MPLBACKEND", "Agg")
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for one, and say so


# A suite started with nohup, or in the background of a script, would hand its deafness to every process that it starts.
for deaf, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(deaf) is signal.SIG_IGN:
        signal.signal(deaf, usual)

SEGMENT = 8
VARIANTS = {
    "linear": InfiniConfig(segment_tokens=SEGMENT),
    "delta": InfiniConfig(segment_tokens=SEGMENT, update="delta"),
    "linear-overlap": InfiniConfig(segment_tokens=SEGMENT, overlap_tokens=3),
    "delta-overlap": InfiniConfig(segment_tokens=SEGMENT, update="delta", overlap_tokens=8),
    "delta-sharp": InfiniConfig(segment_tokens=SEGMENT, update="delta", features="sharp"),
    "linear-conv": InfiniConfig(segment_tokens=SEGMENT, conv_tokens=3),
    "delta-overlap-conv": InfiniConfig(segment_tokens=SEGMENT, update="delta", overlap_tokens=3, conv_tokens=2),
    "gated": InfiniConfig(segment_tokens=SEGMENT, update="gated_delta"),
    "gated-token": InfiniConfig(
        segment_tokens=SEGMENT,
        update="gated_delta",
        read="token",
        read_norm=True,
        maps=True,
        gate="query",
        overlap_tokens=3,
        sink_tokens=2,
        conv_tokens=2,
        decay_init=3.0,
    ),
    "local": LocalConfig(segment_tokens=SEGMENT),
    "local-overlap": LocalConfig(segment_tokens=SEGMENT, overlap_tokens=3),
    "transformer-xl": TransformerXLConfig(segment_tokens=SEGMENT, cache_tokens=5),
    "memorizing": MemorizingConfig(segment_tokens=SEGMENT, cache_tokens=5, stored_tokens=20, top_k=3),
    "rmt": RmtConfig(segment_tokens=SEGMENT, memory_tokens=3),
    "full": FullConfig(),
    "mixed": MixedConfig(
        variants={"memory": InfiniConfig(segment_tokens=SEGMENT, update="delta", conv_tokens=2), "whole": FullConfig()},
        pattern=("memory", "whole"),
    ),
}


def tiny_config(variant: str = "linear", **changes: object) -> ModelConfig:
    """Config of a tiny model; `changes` are fields of ModelConfig."""
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48}
    return ModelConfig(**{**shape, "attention": VARIANTS[variant], **changes})


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of a variant; `tiny` makes its config."""
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ModelConfig]:
    return tiny_config


@pytest.fixture(scope="session")
def train_one_step(call: Callable[..., int]) -> Callable[..., Path]:
    """Trains a tiny model of these fields one step over bytes, in an empty folder, and gives the run's."""

    def train(home: Path, window_tokens: int, **fields: object) -> Path:
        from infini_train.parallel import device

        with ShardWriter(home / "train", ByteTokenizer()) as writer:
            writer.add(ByteTokenizer().encode("The grass is green. " * 20), n_bytes=400, id="document")
        shape = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48}
        tree = {
            "run_dir": str(home / "run"),
            "model": {**shape, **fields},
            "data": {"train": str(home / "train"), "validation": str(home / "train")},
            "train": {"window_tokens": window_tokens, "batch_lanes": 2, "max_steps": 1},
            "optim": {"warmup_steps": 0, "gate_lr": 3.0},
        }
        (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "MATMUL_PROBE_SIZE", 64)
            assert call("train", home / "tiny.yaml") == 0
        return home / "run"

    return train


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """Calls `infini-train` with arguments in this process, and gives its exit code."""

    def run(*arguments: object) -> int:
        from infini_train.cli import main

        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return 0 if stop.code is None else int(stop.code)
        return 0

    return run


@pytest.fixture(scope="session")
def process_groups() -> None:
    """Those of one process, which models need."""
    import torch

    from infini_train.parallel import device, mesh

    torch.set_num_threads(1)
    device.prepare()
    mesh.start()


class Tools(NamedTuple):
    """Tiny models over bytes, and shards for them."""

    tiny: Callable[..., ModelConfig]

    def build(self, variant: str) -> "Transformer":
        """A model whose context matters: large weights, so that greedy text does not repeat one token."""
        from infini_train.model.init import initialise
        from infini_train.model.transformer import Transformer

        config = self.tiny(variant, vocab_size=259, init_std=0.3)
        model = Transformer(config)
        initialise(model, config, 3)
        return model.eval()

    def write(self, folder: Path, lengths: Iterable[int]) -> Dataset:
        """Documents of random bytes; a token stands for two bytes of text."""
        random = np.random.default_rng(0)
        with ShardWriter(folder, ByteTokenizer()) as writer:
            for number, length in enumerate(lengths):
                writer.add(random.integers(0, 256, length), n_bytes=2 * length, id=f"document {number}")
        return Dataset.open(folder)


@pytest.fixture(scope="session")
def tools(tiny: Callable[..., ModelConfig], process_groups: None) -> Tools:
    return Tools(tiny)


# Tests that start several processes, often once for a whole module: one worker runs them, one after the other, so that
# nothing is started twice and ranks don't wait for ranks of another test.
SEVERAL_PROCESSES = {"test_layouts", "test_relayout", "test_processes", "test_context", "test_watchdog", "test_run"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SEVERAL_PROCESSES and item.path.parent.name != "checkpoint":
            item.add_marker(pytest.mark.xdist_group("several processes"))
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))
