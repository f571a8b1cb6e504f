"""All that a run holds in memory, opened new or from its newest checkpoint, and saved whole."""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infini_train.checkpoint import compat, rng, store
from infini_train.checkpoint.fragments import Fragment, Wanted, whole_fragment
from infini_train.checkpoint.reader import Checkpoint
from infini_train.checkpoint.weights import load_weights
from infini_train.config import ConfigError, RunConfig, dump, to_tree
from infini_train.data.lanes import Batch, LaneReader, LaneState, initial_state, prefetch
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import tokenizer_of
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh
from infini_train.parallel.zero import Engine, Shard
from infini_train.train.carry import join_lanes, split_lanes
from infini_train.train.optim import parameter_groups
from infini_train.train.step import Carried

Notify = Callable[[str], None]


@dataclass
class Session:
    """A run between two steps. `step`, `tokens`, `lanes` and `carried` move on together, after a step was accepted."""

    config: RunConfig
    model: Transformer
    engine: Engine
    dataset: Dataset
    reader: LaneReader
    validation: Dataset | None
    step: int
    tokens: int
    lanes: LaneState
    carried: Carried

    def batches(self) -> Iterator[tuple[Batch, LaneState]]:
        """Batches from the present position on, read ahead in the background."""
        return prefetch(self.reader, self.lanes)

    def advance(self, states: Carried, lanes: LaneState) -> None:
        """Accepts a step: counters, data position and memory go on."""
        self.step += 1
        self.tokens += self.config.train.tokens_per_step
        self.lanes = lanes
        if self.config.train.carry_memory:
            self.carried = states


def open_dataset(folder: str, field: str, config: RunConfig) -> Dataset:
    """A dataset whose tokens fit the model.

    Raises:
        ConfigError: it can't be opened, or has more token ids than the model's vocabulary.
    """
    try:
        dataset = Dataset.open(folder)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    if dataset.manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {dataset.manifest.vocab_size} token ids"
            f" of {folder} ({field}); set it to {dataset.manifest.vocab_size} or more"
        )
    return dataset


def open_session(config: RunConfig, notify: Notify) -> Session:
    """Builds model, engine and data, and continues from the run's newest checkpoint if there is one.

    Raises:
        ConfigError: data, checkpoint or config don't fit each other; nothing was written.
    """
    dataset = open_dataset(config.data.train, "data.train", config)
    validation = open_dataset(config.data.validation, "data.validation", config) if config.data.validation else None
    if validation is not None and validation.manifest.tokenizer.sha256 != dataset.manifest.tokenizer.sha256:
        raise ConfigError(
            f"data.validation: {config.data.validation} was encoded with another tokenizer than {config.data.train};"
            " encode both with the same one"
        )
    checkpoint = store.find_latest(config.directory, notify)
    if checkpoint is not None:
        for note in compat.check_resumable(checkpoint.config, to_tree(config)):
            notify(f"changed since the checkpoint: {note}")
        compat.check_same_data(checkpoint.state["data"], dataset.identity, config.data.train)
    origin = _open_origin(config, dataset) if checkpoint is None and config.train.init_from else None
    _check_space(config.directory)
    mesh.start()
    model, engine = _build(config, origin)
    carried: Carried = (None,) * (config.train.batch_lanes // config.train.micro_lanes)
    if config.train.carry_memory:
        carried = tuple(model.initial_state(config.train.micro_lanes) for _ in carried)
    train = config.train
    reader = LaneReader(dataset, train.batch_lanes, train.window_tokens, config.seed)
    lanes = initial_state(train.batch_lanes)
    session = Session(config, model, engine, dataset, reader, validation, 0, 0, lanes, carried)
    if checkpoint is not None:
        _restore(session, checkpoint)
        notify(f"resumed from {checkpoint.path} (step {session.step})")
    elif origin is not None:
        notify(f"new run with the weights of {origin.path}")
    _write_identity(config)
    return session


def _build(config: RunConfig, origin: Checkpoint | None) -> tuple[Transformer, Engine]:
    train, optim = config.train, config.optim
    recompute = train.activation_checkpointing == "layer"
    model = Transformer(config.model, recompute_layers=recompute)
    if origin is None:
        initialise(model, config.model, config.seed)
    else:
        load_weights(model, origin)
    engine = Engine(
        model.to(device.current()),
        parameter_groups(model, optim),
        precision=train.precision,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        clip_norm=optim.clip_norm,
        micro_batch_lanes=train.micro_lanes,
    )
    return model, engine


def _open_origin(config: RunConfig, dataset: Dataset) -> Checkpoint:
    assert config.train.init_from is not None
    origin = store.open_checkpoint(store.resolve(Path(config.train.init_from)))
    compat.check_same_model(origin.config, to_tree(config), f"train.init_from: {origin.path}")
    if origin.state["tokenizer"] != dataset.manifest.tokenizer.sha256:
        raise ConfigError(
            f"train.init_from: {origin.path} was trained with another tokenizer than {config.data.train};"
            f" encode the text with {origin.path.parent.parent / 'tokenizer.model'}"
        )
    return origin


# ------------------------------------------------------------------------------------------------------ save and
# restore


def save_session(session: Session) -> Path:
    """Writes a checkpoint and deletes those that the config no longer keeps; returns its folder.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints stay.
    """
    config = session.config
    state = {
        "step": session.step,
        "tokens": session.tokens,
        "lanes": session.lanes.to_json(),
        "data": session.dataset.identity,
        "optimizer_steps": session.engine.optimizer_steps(),
        "rng": rng.capture_rng(),
        "tokenizer": session.dataset.manifest.tokenizer.sha256,
    }
    folder = store.save(config.directory, session.step, _fragments(session), state, to_tree(config))
    store.prune(config.directory, config.checkpoint.keep_last, config.checkpoint.milestone_every_steps)
    return folder


def _fragments(session: Session) -> Iterator[Fragment]:
    for shard in session.engine.shards():
        shape = tuple(shard.parameter.shape)
        yield Fragment(shard.name, shard.kind, shape, (0,) * len(shape), shape, shard.flat_start, shard.values)
    for name, value in join_lanes(session.carried).items():
        yield whole_fragment(name, "carry", value)


def _wanted(shard: Shard) -> Wanted:
    shape = tuple(shard.parameter.shape)
    return Wanted(shard.name, shard.kind, shape, (0,) * len(shape), shape, shard.flat_start, shard.values.numel())


def _restore(session: Session, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    shards = list(session.engine.shards())
    values = (values for _, values in checkpoint.read(_wanted(shard) for shard in shards))
    session.engine.restore(zip(shards, values, strict=True), state["optimizer_steps"])
    stored = {
        piece.name: values.view(piece.global_shape)
        for piece, values in checkpoint.read(checkpoint.whole(n, "carry") for n in checkpoint.names("carry"))
    }
    if stored:
        template = session.model.initial_state(session.config.train.micro_lanes)
        assert template is not None
        session.carried = split_lanes(stored, template, len(session.carried))
    session.step, session.tokens = state["step"], state["tokens"]
    session.lanes = LaneState.from_json(state["lanes"])
    rng.restore_rng(state["rng"])


# ------------------------------------------------------------------------------------------------------- run directory


def _check_space(directory: Path) -> None:
    """Finds out now, not at the first checkpoint, that the run's folder can't be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} can't be written: {error.strerror}") from error
    if free_bytes < 2**20:
        raise ConfigError(f"run_dir: no space left on device for {directory}; free space or choose another run_dir")


@contextlib.contextmanager
def hold_folder(directory: Path) -> Iterator[None]:
    """Keeps a second process from training in the same folder; the lock ends with the process, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    with (directory / ".lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir: another process is training in {directory}; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _write_identity(config: RunConfig) -> None:
    """The resolved config and the tokenizer, so that the run's folder is enough to go on, evaluate and generate."""
    try:
        (config.directory / "config.yaml").write_text(dump(config), encoding="utf-8")
        copy_tokenizer(Path(config.data.train), config.directory)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.directory} can't be written: {error.strerror}") from error


def copy_tokenizer(dataset: Path, directory: Path) -> None:
    """Lays the dataset's tokenizer into the run's folder as tokenizer.model; the byte tokenizer needs no file."""
    tokenizer: Any = tokenizer_of(dataset)
    path = getattr(tokenizer, "path", None)
    if path is not None:
        shutil.copyfile(path, directory / "tokenizer.model")
