"""A session opened: built new, with the weights of another run, or resumed from the run's newest checkpoint."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from infini_train.checkpoint import compat, store
from infini_train.checkpoint.background import BackgroundSaver
from infini_train.checkpoint.reader import Checkpoint
from infini_train.config.errors import ConfigError
from infini_train.config.files import to_tree
from infini_train.config.run import RunConfig, divide_processes
from infini_train.data.model_files import copy_model_files
from infini_train.data.shards import Dataset
from infini_train.data.source import Source, open_reader
from infini_train.parallel import mesh
from infini_train.train.building import build, empty_carried, open_origin, open_sources
from infini_train.train.carry import KIND as CARRY
from infini_train.train.carry import Lanes, join_lanes
from infini_train.train.checkpointing import (
    reading_state,
    restore_session,
    set_damaged_aside,
    share_checkpoint,
    warn_of_checkpoint,
)
from infini_train.train.session import Session

LOG = logging.getLogger(__name__)
MAX_CHARACTERS = 1000  # of an error, of at most four bytes each; see mesh.broadcast_text
DATA_LOG = logging.getLogger("infini_train.data")  # damaged documents, which concern one rank


def open_session(config: RunConfig) -> Session:
    """Builds this rank's part of model, engine and data; resumes from the run's newest checkpoint if there is one.

    All ranks call it together; rank 0 alone looks for the checkpoint and verifies it, and the others wait for what it
    has found. Whoever trains holds the folder meanwhile (`run_folder.hold_folder`).

    Raises:
        ConfigError: data, checkpoint, processes and config don't fit each other; nothing was written.
    """
    config = divide_processes(config, mesh.world()[1])
    mesh.connect(config.parallel.timeout_s)
    source, validation = open_sources(config)
    checkpoint, origin, is_first = None, None, mesh.world()[0] == 0
    with failing_together():
        if is_first:
            checkpoint, origin = _find_start(config, source)
    checkpoint, origin = share_checkpoint(checkpoint), share_checkpoint(origin)
    session = _build_session(config, source, validation, origin)
    if checkpoint is not None:
        restore_session(session, checkpoint)
        LOG.info("resumed from %s (step %d)", checkpoint.path, session.step)
        if join_lanes(session.stages, session.carried) and not checkpoint.names(CARRY):
            LOG.warning("warning: %s holds no carried memory; the lanes go on with an empty one", checkpoint.path)
    elif origin is not None:
        kinds = (origin.attention_kind, config.model.attention.kind)
        change = "" if kinds[0] == kinds[1] else f"; model.attention.kind: {kinds[0]} -> {kinds[1]}"
        with failing_together():
            if is_first:
                _take_files(origin, config)
        LOG.info("new run with the weights of %s%s", origin.path, change)
    return session


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A context for what rank 0 does alone: its `ConfigError` ends all ranks, with its line, instead of their waiting.

    All ranks enter and leave it.
    """
    problem = None
    try:
        yield
    except ConfigError as error:
        problem = error
    text = mesh.broadcast_text("" if problem is None else str(problem)[:MAX_CHARACTERS])
    if problem is not None:
        raise problem
    if text:
        raise ConfigError(text)


def _find_start(config: RunConfig, source: Source) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The checkpoint to resume from; without any, the one whose weights a new run starts with, if it names one."""
    damaged: list[Path] = []
    checkpoint = store.find_latest(config.directory, warn_of_checkpoint, damaged.append)
    if checkpoint is None:
        return None, open_origin(config, source)
    _check_resumable(checkpoint, config, source)
    set_damaged_aside(damaged, checkpoint)
    return checkpoint, None


def _take_files(origin: Checkpoint, config: RunConfig) -> None:
    """Chat template, generation config and the like go on with the weights; the tokenizer is the same."""
    path = origin.path.resolve()
    try:
        for home in (path, path.parent.parent):
            copy_model_files(home, config.directory)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.directory} can't be written: {error.strerror}") from error


def _check_resumable(checkpoint: Checkpoint, config: RunConfig, source: Source) -> None:
    for note in compat.check_resumable(checkpoint.config, to_tree(config)):
        LOG.info("changed since the checkpoint: %s", note)
    if checkpoint.special_ids not in (None, source.special_ids):
        raise ConfigError(
            f"data.train: {source.name} has the ids {source.special_ids} for bos, eos and pad, and the checkpoint was"
            f" trained with {checkpoint.special_ids}; give the original data, or start a new run with train.init_from"
        )
    with reading_state(checkpoint):
        identity = source.upgrade_identity(checkpoint.state["data"])
    compat.check_same_data(identity, source.identity, source.name)


def _build_session(config: RunConfig, source: Source, validation: Dataset | None, origin: Checkpoint | None) -> Session:
    place = mesh.start(config.parallel)
    LOG.debug("joined the process groups as %s", place.describe())
    stages, engine, parameters = build(config, place, origin)
    rows = Lanes.of(config, place.data[0])
    own_rows = slice(rows.first, rows.first + config.lanes_per_rank)
    reader = open_reader(source, config, own_rows, lambda problem: DATA_LOG.warning("warning: %s", problem))
    saver = BackgroundSaver(
        config.directory,
        to_tree(config),
        config.checkpoint,
        rank=place.world[0],
        world_size=place.world[1],
        barrier=mesh.background_barrier,
    )
    return Session(
        config,
        place,
        stages,
        engine,
        source,
        reader,
        validation,
        saver,
        parameters,
        lanes=reader.start(),
        carried=empty_carried(config, stages),
    )
