"""Where training text comes from: shards on disk, or synthetic texts made while training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infini_train.config.data import DataConfig, SyntheticConfig
from infini_train.config.errors import ConfigError, naming
from infini_train.config.run import RunConfig
from infini_train.data.cache import check_space
from infini_train.data.corpus import Corpus, WeightedDataset
from infini_train.data.lanes import Batch, LaneReader
from infini_train.data.shards import Dataset
from infini_train.data.synthetic.identity import identify, identify_1
from infini_train.data.synthetic.makers import count_ids, make_maker, open_tokenizer
from infini_train.data.synthetic.reader import SyntheticReader
from infini_train.data.tokenizer import Tokenizer, tokenizer_of


class Position(Protocol):
    """How far a reader has come; the same on all ranks."""

    def to_json(self) -> dict[str, Any]: ...


class Reader(Protocol):
    """Windows of one rank's lanes, as a pure function of the position."""

    @property
    def corrupt_documents(self) -> int:
        """Damaged documents met so far."""
        ...

    @property
    def adaptive(self) -> bool:
        """Whether the next batch depends on `observe_loss`, so that nothing can be read ahead."""
        ...

    def mix(self, position: Any) -> dict[str, float]:
        """What has been read of each dataset so far, or how large the texts are, as numbers to log."""
        ...

    def observe_loss(self, position: Any, loss: float) -> Any:
        """The position after the last batch was trained on with this loss."""
        ...

    def start(self) -> Any:
        """The position before the first batch."""
        ...

    def parse(self, tree: Mapping[str, Any]) -> Any:
        """The position of a `to_json`."""
        ...

    def name_documents(self, position: Any) -> list[str]:
        """Names of the documents in the next batch, of all ranks' lanes."""
        ...

    def next(self, position: Any) -> tuple[Batch | None, Any]:
        """Next batch (None at the end) and following position."""
        ...


@dataclass(frozen=True)
class Source:
    """What a run needs to know about its training text before it reads any.

    Attributes:
        name: as the config has it.
        vocab_size: number of token ids.
        identity: equal for the same text in the same order; checkpoints store it.
        tokenizer_sha256: identifies the tokenizer.
        special_ids: bos, eos and pad that the text is encoded with.
        corpus: documents on disk; None: synthetic texts.
        synthetic_tokenizer: of synthetic texts; None: documents on disk.
        earlier_identities: what earlier versions stored for the same text.
    """

    name: str
    vocab_size: int
    identity: str
    tokenizer_sha256: str
    special_ids: tuple[int, int, int]
    corpus: Corpus | None = None
    synthetic_tokenizer: Tokenizer | None = None
    earlier_identities: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text; that of a corpus is read at every call."""
        if self.synthetic_tokenizer is not None:
            return self.synthetic_tokenizer
        assert self.corpus is not None
        return tokenizer_of(self.corpus.datasets[0].dataset.folder)

    def upgrade_identity(self, saved: str) -> str:
        """The present identity, if an earlier version stored `saved` for the same text; else `saved` itself."""
        return self.identity if saved in self.earlier_identities else saved


def open_source(config: RunConfig) -> Source:
    """The training text of a run.

    Raises:
        ConfigError: shards can't be opened, don't belong together, or end before the run does.
    """
    data = config.data
    if data.synthetic is not None:
        return _describe_synthetic(data.synthetic)
    datasets = _open_datasets(data)
    with naming("data.mixture"):
        corpus = Corpus(datasets, _order_seed(config), data.curriculum)
    reads = config.train.total_steps * config.train.tokens_per_step
    if corpus.total_positions < reads:
        raise ConfigError(
            f"data.mixture: with these epochs there are {corpus.total_positions:,.0f} tokens, and the run reads"
            f" {reads:,}; raise epochs, or lower train.max_steps"
        )
    name = ", ".join(part.folder for part in data.mixture) or str(data.train)
    manifest = corpus.manifest
    return Source(
        name,
        manifest.vocab_size,
        corpus.identity,
        manifest.tokenizer.sha256,
        manifest.special_ids,
        corpus,
        earlier_identities=(corpus.earlier_identity,),
    )


def _describe_synthetic(synthetic: SyntheticConfig) -> Source:
    tokenizer = open_tokenizer(synthetic)
    earlier = identify_1(synthetic, tokenizer)
    return Source(
        "data.synthetic",
        count_ids(synthetic, tokenizer),
        identify(synthetic, tokenizer),
        tokenizer.sha256,
        (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id),
        synthetic_tokenizer=tokenizer,
        earlier_identities=() if earlier is None else (earlier,),
    )


def _order_seed(config: RunConfig) -> int:
    return config.seed if config.data.order_seed is None else config.data.order_seed


def _open_datasets(data: DataConfig) -> list[WeightedDataset]:
    field = "data.mixture" if data.mixture else "data.train"
    try:
        if data.train is not None:
            return [WeightedDataset(data.train, Dataset.open(data.train, data.cache_dir))]
        datasets = [
            WeightedDataset(part.folder, Dataset.open(part.folder, data.cache_dir), part.weight, part.epochs)
            for part in data.mixture
        ]
        if data.cache_dir is not None:  # each has found room for itself; now for all together
            check_space(Path(data.cache_dir), {each.name: each.dataset.missing_bytes() for each in datasets})
        return datasets
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith("data.") else f"{field}: {error}") from error


def text_segment(config: RunConfig) -> int:
    """Tokens of the grid that synthetic texts start on.

    The model's segment; without segments, the largest divisor of the window up to 64.
    """
    window = config.train.window_tokens
    return config.model.segment_tokens or next(size for size in range(64, 0, -1) if window % size == 0)


def open_reader(source: Source, config: RunConfig, rows: slice, on_corrupt: Callable[[str], None]) -> Reader:
    """A reader of the lanes `rows` of the global batch.

    Args:
        source: from `open_source`.
        config: of the run.
        rows: the lanes that this rank reads.
        on_corrupt: called with a message for each damaged document.
    """
    train = config.train
    if source.corpus is not None:
        return LaneReader(source.corpus, train.batch_lanes, train.window_tokens, rows=rows, on_corrupt=on_corrupt)
    assert config.data.synthetic is not None
    segment = text_segment(config)
    maker = make_maker(config.data.synthetic, train.window_tokens, segment, source.tokenizer)
    return SyntheticReader(maker, train.batch_lanes, train.window_tokens, segment, _order_seed(config), rows)
