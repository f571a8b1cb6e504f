"""All that a run holds in memory, opened new or from its newest checkpoint, and saved whole."""

import contextlib
import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from infini_train.checkpoint import compat, rng, store
from infini_train.checkpoint.background import BackgroundSaver
from infini_train.checkpoint.fragments import CheckpointError, Fragment, Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.checkpoint.weights import load_weights
from infini_train.config.attention import InfiniConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump, to_tree
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig, divide_processes
from infini_train.data.lanes import Batch, prefetch
from infini_train.data.shards import Dataset
from infini_train.data.source import Position, Reader, Source, open_reader, open_source
from infini_train.model.init import initialise
from infini_train.model.slices import find_slice
from infini_train.parallel import device, mesh
from infini_train.parallel.mesh import Place
from infini_train.parallel.pipeline import Carried, Stages
from infini_train.parallel.zero import Engine, Shard
from infini_train.train.carry import KIND as CARRY
from infini_train.train.carry import Lanes, carry_fragments, join_lanes, read_carried
from infini_train.train.guards import Guard
from infini_train.train.optim import parameter_groups
from infini_train.train.step import StepResult

Notify = Callable[[str], None]


@dataclass
class Session:
    """A run between two steps. `step`, `tokens`, `lanes`, `carried` and `guard` move on together."""

    config: RunConfig
    place: Place
    stages: Stages
    engine: Engine
    source: Source
    reader: Reader
    validation: Dataset | None
    saver: BackgroundSaver
    parameters: int  # of the whole model
    step: int
    tokens: int
    lanes: Position
    carried: Carried
    saved: bool = False  # whether there is a checkpoint to go back to
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.config.guard)

    def batches(self) -> Iterator[tuple[Batch, Position]]:
        """Batches of this rank's lanes from the present position on, read ahead in the background where they can be."""
        if not self.reader.adaptive:
            yield from prefetch(self.reader, self.lanes)
            return
        while True:
            batch, lanes = self.reader.next(self.lanes)
            assert batch is not None
            yield batch, lanes

    def advance(self, result: StepResult, lanes: Position) -> None:
        """A step is over: counters, data position and memory go on. One that was left out leaves empty memories."""
        self.step += 1
        self.tokens += self.config.train.tokens_per_step
        self.guard.record(result.loss, result.problem)
        if result.problem:
            self.lanes, self.carried = lanes, empty_carried(self.config, self.stages)
            return
        self.lanes = self.reader.observe_loss(lanes, result.loss)
        if self.config.train.carry_memory:
            self.carried = result.states


def open_sources(config: RunConfig) -> tuple[Source, Dataset | None]:
    """The text to train on, and the held-out text.

    Raises:
        ConfigError: one can't be opened or has more token ids than the model's vocabulary, or their tokenizers differ.
    """
    source, validation, folder = open_source(config), None, config.data.validation
    _check_vocabulary("data.train", source.name, source.vocab_size, config)
    if folder is not None:
        try:
            validation = Dataset.open(folder, config.data.cache_dir)
        except ConfigError as error:
            raise ConfigError(f"data.validation: {error}") from error
        _check_vocabulary("data.validation", folder, validation.manifest.vocab_size, config)
        if validation.manifest.tokenizer.sha256 != source.tokenizer_sha256:
            raise ConfigError(
                f"data.validation: {folder} was encoded with another tokenizer than {source.name};"
                " encode both with the same one"
            )
    return source, validation


def _check_vocabulary(field: str, name: str, vocab_size: int, config: RunConfig) -> None:
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {vocab_size} token ids"
            f" of {name} ({field}); pass --set model.vocab_size={vocab_size} (or more)"
        )


def open_session(config: RunConfig, notify: Notify) -> Session:
    """Builds this rank's part of model, engine and data; continues from the run's newest checkpoint if there is one.

    All ranks call it together; rank 0 alone looks for the checkpoint, verifies it, and writes into the run's folder.

    Raises:
        ConfigError: data, checkpoint, processes or config don't fit each other; nothing was written.
    """
    config = divide_processes(config, mesh.world()[1])
    mesh.connect(config.parallel.timeout_s)
    source, validation = open_sources(config)
    first = mesh.world()[0] == 0
    checkpoint = store.find_latest(config.directory, notify) if first else None
    if checkpoint is not None:
        _check_checkpoint(checkpoint, config, source, notify)
    origin = _open_origin(config, source) if first and checkpoint is None else None
    if first:
        _check_space(config.directory)
    checkpoint = _share(checkpoint)
    origin = _share(origin)
    place = mesh.start(config.parallel)
    stages, engine, parameters = build(config, place, origin)
    rows = Lanes.of(config, place.data[0])
    mine = slice(rows.first, rows.first + config.lanes_per_rank)
    reader = open_reader(source, config, mine, warn)
    carried = empty_carried(config, stages)
    saver = BackgroundSaver(
        config.directory,
        to_tree(config),
        config.checkpoint,
        rank=place.world[0],
        world_size=place.world[1],
        barrier=mesh.background_barrier,
    )
    session = Session(
        config, place, stages, engine, source, reader, validation, saver, parameters, 0, 0, reader.start(), carried
    )
    if checkpoint is not None:
        _restore(session, checkpoint)
        notify(f"resumed from {checkpoint.path} (step {session.step})")
        if join_lanes(stages, carried) and not checkpoint.names(CARRY):
            notify(f"warning: {checkpoint.path} holds no carried memory; the lanes go on with an empty one")
    elif origin is not None:
        kinds = (origin.attention_kind, config.model.attention.kind)
        change = "" if kinds[0] == kinds[1] else f"; model.attention.kind: {kinds[0]} -> {kinds[1]}"
        notify(f"new run with the weights of {origin.path}{change}")
    return session


def warn(what: str) -> None:
    """Tells the person at the console, from any rank."""
    print(f"warning: {what}", file=sys.stderr, flush=True)


def empty_carried(config: RunConfig, stages: Stages) -> Carried:
    """The memory of lanes that have read nothing yet."""
    micro_batches = config.lanes_per_rank // config.micro_lanes
    return stages.initial_carried(config.micro_lanes, micro_batches, config.train.carry_memory)


def _check_checkpoint(checkpoint: Checkpoint, config: RunConfig, source: Source, notify: Notify) -> None:
    for note in compat.check_resumable(checkpoint.config, to_tree(config)):
        notify(f"changed since the checkpoint: {note}")
    compat.check_same_data(source.upgrade_identity(checkpoint.state["data"]), source.identity, source.name)


def _share(found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that rank 0 found and verified, opened by all ranks, whatever has become the newest since."""
    path = mesh.broadcast_text("" if found is None else str(found.path))
    return found if found is not None or not path else store.open_checkpoint(Path(path), verify=False)


def build(config: RunConfig, place: Place, origin: Checkpoint | None) -> tuple[Stages, Engine, int]:
    """This rank's stages inside their engine, new or with the weights of `origin`; parameters of the whole model."""
    train = config.train
    recompute = train.activation_checkpointing == "layer"
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    stages = Stages(config.model, config.parallel, place, dtype=dtype, recompute_layers=recompute)
    for stage in stages.transformers():
        if origin is None:
            initialise(stage, config.model, config.seed)
        else:
            initialise(stage, _keep_queries(config.model), config.seed, only=load_weights(stage, origin))
    parameters = count_parameters(stages)
    engine = Engine(
        stages.to(device.current()),
        stages.named_globally(),
        parameter_groups(stages.named_globally(), config.optim),
        optim=config.optim,
        parallel=config.parallel,
        precision=train.precision,
        micro_batch_lanes=config.micro_lanes,
    )
    return stages, engine, parameters


def count_parameters(stages: Stages) -> int:
    """Of the whole model; all ranks call it together."""
    owned = (
        0
        if stages.place.is_replica
        else sum(parameter.numel() for _, parameter in stages.named_globally() if find_slice(parameter).owned)
    )
    return round(mesh.sum_over_world([float(owned)])[0])


def _keep_queries(model: ModelConfig) -> ModelConfig:
    """With a new convolution of zeros, which changes no query or key, unless its spread was chosen."""
    attention = model.attention
    if not isinstance(attention, InfiniConfig) or attention.conv_std is not None:
        return model
    return replace(model, attention=replace(attention, conv_std=0.0))


def _open_origin(config: RunConfig, source: Source) -> Checkpoint | None:
    """The checkpoint whose weights a new run begins with, if it asks for one."""
    if config.train.init_from is None:
        return None
    try:
        origin = store.open_checkpoint(store.resolve(Path(config.train.init_from)))
    except CheckpointError as error:
        raise ConfigError(f"train.init_from: {error}") from error
    compat.check_same_model(origin.config, to_tree(config), f"train.init_from: {origin.path}")
    if origin.state["tokenizer"] != source.tokenizer_sha256:
        raise ConfigError(
            f"train.init_from: {origin.path} was trained with another tokenizer than {source.name};"
            f" encode the text with the tokenizer in {origin.path.parent.parent}"
        )
    return origin


# ---------------------------------------------------------------------------------------------------- save and restore


def save_session(session: Session, notify: Notify) -> None:
    """Begins a checkpoint of this step: copies the state, and writes it in the background.

    Raises:
        CheckpointError: the one begun before failed (the disk is full or not writable); earlier checkpoints stay.
    """
    session.guard.rollbacks = 0
    state = {
        "step": session.step,
        "tokens": session.tokens,
        "lanes": session.lanes.to_json(),
        "data": session.source.identity,
        "optimizer_steps": session.engine.optimizer_steps(),
        "guard": session.guard.to_json(),
        "rng": rng.capture_rng(),
        "tokenizer": session.source.tokenizer_sha256,
        "special_ids": list(session.source.special_ids),
    }
    on_saved = (lambda folder: notify(f"saved {folder}")) if session.place.is_first else (lambda folder: None)
    fragments = own_fragments(session.config, session.stages, session.engine, session.carried)
    session.saver.start(session.step, fragments, state, on_saved)
    session.saved = True


def own_fragments(config: RunConfig, stages: Stages, engine: Engine, carried: Carried) -> Iterator[Fragment]:
    """What this rank writes of a run's state."""
    for shard in engine.shards():
        piece = find_slice(shard.parameter)
        if piece.owned:
            place = (piece.global_shape, piece.start, piece.shape)
            yield Fragment(shard.name, shard.kind, *place, shard.flat_start, shard.values)
    yield from carry_fragments(stages, carried, Lanes.of(config, stages.place.data[0]))


def _wanted(shard: Shard) -> Wanted:
    global_shape, start, shape, _ = find_slice(shard.parameter)
    return Wanted(shard.name, shard.kind, global_shape, start, shape, shard.flat_start, shard.values.numel())


def _restore(session: Session, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    shards = list(session.engine.shards())
    values = (values for _, values in checkpoint.read(_wanted(shard) for shard in shards))
    session.engine.restore(zip(shards, values, strict=True), state["optimizer_steps"])
    lanes = Lanes.of(session.config, session.place.data[0])
    session.carried = read_carried(session.stages, session.carried, lanes, checkpoint)
    session.step, session.tokens = state["step"], state["tokens"]
    session.lanes = session.reader.parse(state["lanes"])
    session.guard.restore(state.get("guard", {}))
    session.saved = True
    rng.restore_rng(state["rng"])


def roll_back(session: Session, notify: Notify) -> None:
    """Back to weights and step of the newest checkpoint, but on behind the text read since, with empty memories.

    All ranks call it together. If no checkpoint can be read, all stays as it is.
    """
    checkpoint = _share(store.find_latest(session.config.directory, notify) if session.place.is_first else None)
    if checkpoint is None:
        notify(f"no checkpoint can be read to go back to; step {session.step} is left out only")
        return
    lanes, skipped, rollbacks = session.lanes, session.guard.skipped, session.guard.rollbacks
    _restore(session, checkpoint)
    session.lanes, session.carried = lanes, empty_carried(session.config, session.stages)
    session.guard.skipped, session.guard.rollbacks = skipped, rollbacks + 1
    notify(f"rolled back to {checkpoint.path} (step {session.step}); the text read since is left out")


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
def hold_folder(session: Session) -> Iterator[None]:
    """Keeps a second run from training in the same folder; the lock ends with rank 0's process, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    directory = session.config.directory
    if not session.place.is_first:
        yield
        return
    with (directory / ".lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir: another process is training in {directory}; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks
        write_identity(session.config, session.source)
        yield


def write_identity(config: RunConfig, source: Source) -> None:
    """The resolved config and the tokenizer, so that the run's folder is enough to evaluate and generate."""
    try:
        (config.directory / "config.yaml").write_text(dump(config), encoding="utf-8")
        tokenizer = source.tokenizer
        if tokenizer.file_name is not None:  # the byte tokenizer needs none
            copy = config.directory / tokenizer.file_name
            if not copy.is_file() or copy.read_bytes() != tokenizer.model_bytes:  # never its own source
                copy.write_bytes(tokenizer.model_bytes)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.directory} can't be written: {error.strerror}") from error
