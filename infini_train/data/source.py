"""Where training text comes from: shards on disk, or texts made while training."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infini_train.config.data import DataConfig
from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.data.cache import check_space
from infini_train.data.corpus import Corpus, Part
from infini_train.data.lanes import Batch, LaneReader
from infini_train.data.needle_reader import NeedleMaker
from infini_train.data.passkey_reader import PasskeyReader
from infini_train.data.recall import VOCABULARY, RecallMaker
from infini_train.data.shards import Dataset
from infini_train.data.text_windows import TextReader
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_of


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

    def mix(self, position: Any) -> dict[str, float]:
        """What was read of each part so far, as numbers to log; nothing to tell of a single source."""
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
    special_ids: tuple[int, int, int]  # bos, eos and pad, as the text was encoded with
    corpus: Corpus | None = None  # None: texts made while training
    tokenizer_of_texts: Tokenizer | None = None  # of such texts

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the text; that of a corpus is read when it is asked for."""
        if self.tokenizer_of_texts is not None:
            return self.tokenizer_of_texts
        assert self.corpus is not None
        return tokenizer_of(self.corpus.parts[0].dataset.folder)


def open_source(config: RunConfig) -> Source:
    """The training text of a run.

    Raises:
        ConfigError: shards can't be opened, don't go together, or end before the run does.
    """
    data = config.data
    for name, texts in (("passkey", data.passkey), ("needles", data.needles), ("recall", data.recall)):
        if texts is not None:
            tokenizer = _tokenizer_of_texts(data)
            special_ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
            vocab_size = tokenizer.vocab_size if texts is not data.recall else VOCABULARY
            identity = f"{name} {texts}"
            if texts is data.needles:  # a version, for when they are made another way; the tokenizer may move
                identity = f"needles 2 {dataclasses.replace(data.needles, tokenizer=None)} {tokenizer.sha256}"
            # Told apart here, so that earlier runs go on.
            if texts is data.recall and not data.recall.joined:
                identity += ", two tokens a pair"
            if texts is data.passkey:
                identity = identity.replace("varied_wording=False, ", "")
            return Source(f"data.{name}", vocab_size, identity, tokenizer.sha256, special_ids, None, tokenizer)
    seed = config.seed if data.order_seed is None else data.order_seed
    corpus = Corpus(_open_parts(data), seed, data.curriculum)
    reads = config.train.total_steps * config.train.tokens_per_step
    if corpus.total_positions < reads:
        raise ConfigError(
            f"data.mixture: with these epochs there are {corpus.total_positions:,.0f} tokens, and the run reads"
            f" {reads:,}; raise epochs, or lower train.max_steps"
        )
    name = ", ".join(part.folder for part in data.mixture) or str(data.train)
    manifest = corpus.manifest
    special_ids = (manifest.bos_id, manifest.eos_id, manifest.pad_id)
    return Source(name, manifest.vocab_size, corpus.identity, manifest.tokenizer.sha256, special_ids, corpus)


def _tokenizer_of_texts(data: DataConfig) -> Tokenizer:
    if data.needles is None or data.needles.tokenizer is None:
        return ByteTokenizer()
    try:
        return load_tokenizer(data.needles.tokenizer)
    except ConfigError as error:
        raise ConfigError(f"data.needles.tokenizer: {error}") from error


def _open_parts(data: DataConfig) -> list[Part]:
    field = "data.mixture" if data.mixture else "data.train"
    try:
        if data.train is not None:
            return [Part(data.train, Dataset.open(data.train, data.cache_dir))]
        parts = [
            Part(part.folder, Dataset.open(part.folder, data.cache_dir), part.weight, part.epochs)
            for part in data.mixture
        ]
        if data.cache_dir is not None:  # each has found room for itself; now for all together
            check_space(Path(data.cache_dir), {part.name: part.dataset.missing_bytes() for part in parts})
        return parts
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith("data.") else f"{field}: {error}") from error


def text_segment(config: RunConfig) -> int:
    """Tokens of the grid on which made texts begin: the model's segments, or without any the largest part up to 64."""
    window = config.train.window_tokens
    return config.model.segment_tokens or next(size for size in range(64, 0, -1) if window % size == 0)


def open_reader(source: Source, config: RunConfig, rows: slice, on_corrupt: Callable[[str], None]) -> Reader:
    """Reads the lanes `rows` of the global batch; tells `on_corrupt` of damaged documents."""
    data, train = config.data, config.train
    seed = config.seed if data.order_seed is None else data.order_seed
    segment = text_segment(config)
    lanes = (train.batch_lanes, train.window_tokens, segment, seed, rows)
    if data.passkey is not None:
        return PasskeyReader(data.passkey, *lanes)
    if data.needles is not None:
        hidden = NeedleMaker(data.needles, train.window_tokens, segment, source.tokenizer)
        return TextReader(hidden, "texts", data.needles.grow_below_loss, *lanes)
    if data.recall is not None:
        maker = RecallMaker(data.recall, train.window_tokens, segment)
        return TextReader(maker, "pairs", data.recall.grow_below_loss, *lanes)
    assert source.corpus is not None
    return LaneReader(source.corpus, train.batch_lanes, train.window_tokens, rows=rows, on_corrupt=on_corrupt)
