"""Where training text comes from: shards on disk, or texts made while training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infini_train.config import ConfigError, DataConfig, RunConfig
from infini_train.data.lanes import Batch, LaneReader
from infini_train.data.passkey_reader import PasskeyReader
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import ByteTokenizer, tokenizer_of


class Position(Protocol):
    """How far a reader has come; the same on all ranks."""

    def to_json(self) -> dict[str, Any]: ...


class Reader(Protocol):
    """Windows of the lanes of one rank, as a pure function of the position."""

    @property
    def corrupt_documents(self) -> int: ...

    @property
    def learns(self) -> bool:
        """Whether what comes next depends on `learn`, so that nothing can be read ahead."""
        ...

    def learn(self, position: Any, loss: float) -> Any:
        """The position behind a window that was learned with this loss."""
        ...

    def start(self) -> Any:
        """The position before the first window."""
        ...

    def parse(self, tree: Mapping[str, Any]) -> Any:
        """The position of a `to_json`."""
        ...

    def name_documents(self, position: Any) -> list[str]:
        """What the window behind a position holds, in all ranks' lanes."""
        ...

    def next(self, position: Any) -> tuple[Batch | None, Any]:
        """The window behind a position (None at the end), and the position behind the window."""
        ...


@dataclass(frozen=True)
class Source:
    """What a run needs to know of its training text before it reads any."""

    name: str  # as the config has it
    vocab_size: int
    identity: str  # the same for the same text in the same order
    tokenizer_sha256: str
    dataset: Dataset | None = None

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer, if it is a file."""
        return None if self.dataset is None else getattr(tokenizer_of(self.dataset.folder), "path", None)


def open_source(data: DataConfig) -> Source:
    """The training text of a run.

    Raises:
        ConfigError: the shards can't be opened.
    """
    if data.passkey is not None:
        byte = ByteTokenizer()
        return Source("data.passkey", byte.vocab_size, f"passkey {data.passkey}", byte.sha256)
    assert data.train is not None
    try:
        dataset = Dataset.open(data.train)
    except ConfigError as error:
        raise ConfigError(f"data.train: {error}") from error
    manifest = dataset.manifest
    return Source(data.train, manifest.vocab_size, dataset.identity, manifest.tokenizer.sha256, dataset)


def open_reader(source: Source, config: RunConfig, rows: slice) -> Reader:
    """Reads the lanes `rows` of the global batch."""
    data, train = config.data, config.train
    seed = config.seed if data.order_seed is None else data.order_seed
    if data.passkey is not None:
        segment = config.model.segment_tokens or train.window_tokens
        return PasskeyReader(data.passkey, train.batch_lanes, train.window_tokens, segment, seed, rows)
    assert source.dataset is not None
    return LaneReader(source.dataset, train.batch_lanes, train.window_tokens, seed, rows=rows)
