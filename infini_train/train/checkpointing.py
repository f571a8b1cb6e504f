"""A session saved to checkpoints, restored from them, and rolled back to one."""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from infini_train.checkpoint import rng, store
from infini_train.checkpoint.fragments import CheckpointError, Fragment, Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.command_errors import first_line
from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.model.slices import find_slice
from infini_train.parallel import mesh
from infini_train.parallel.pipeline import Carried, Stages
from infini_train.parallel.zero import Engine, Shard
from infini_train.train.building import empty_carried
from infini_train.train.carry import Lanes, carry_fragments, read_carried
from infini_train.train.session import Session

LOG = logging.getLogger(__name__)


def save_session(session: Session) -> None:
    """Begins a checkpoint of this step: copies the state, and writes it in the background.

    Raises:
        CheckpointError: the save before it failed (the disk is full or not writable); earlier checkpoints stay.
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
    fragments = own_fragments(session.config, session.stages, session.engine, session.carried)
    session.saver.start(session.step, fragments, state, lambda folder: LOG.info("saved %s", folder))
    session.saved = True


def own_fragments(config: RunConfig, stages: Stages, engine: Engine, carried: Carried) -> Iterator[Fragment]:
    """The part of a run's state that this rank writes."""
    is_first_replica = stages.place.data[0] == stages.place.context[0] == 0
    for shard in itertools.chain(engine.shards(), frozen_shards(stages) if is_first_replica else ()):
        piece = find_slice(shard.parameter)
        if piece.owned:
            place = (piece.global_shape, piece.start, piece.shape)
            yield Fragment(shard.name, shard.kind, *place, shard.flat_start, shard.values)
    yield from carry_fragments(stages, carried, Lanes.of(config, stages.place.data[0]))


def frozen_shards(stages: Stages) -> Iterator[Shard]:
    """This rank's parameters that are not trained, as their own masters: each replica holds them whole."""
    for name, parameter in stages.named_globally():
        if not parameter.requires_grad:
            yield Shard(name, parameter, "master", 0, parameter.detach().view(-1))


def restore_session(session: Session, checkpoint: Checkpoint) -> None:
    """Takes over weights, optimizer state, carried memory, counters, data position and random generators.

    Raises:
        CheckpointError: tensors or state are not those of such a run.
    """
    state = checkpoint.state
    shards = list(session.engine.shards())
    values = (values for _, values in checkpoint.read(_wanted(shard) for shard in shards))
    with reading_state(checkpoint):
        optimizer_steps = state["optimizer_steps"]
    session.engine.restore(zip(shards, values, strict=True), optimizer_steps)
    frozen = list(frozen_shards(session.stages))
    for shard, (_, found) in zip(frozen, checkpoint.read(_wanted(shard) for shard in frozen), strict=True):
        shard.values.copy_(found)
    lanes = Lanes.of(session.config, session.place.data[0])
    session.carried = read_carried(session.stages, session.carried, lanes, checkpoint)
    with reading_state(checkpoint):
        session.step, session.tokens = state["step"], state["tokens"]
        session.lanes = session.reader.parse(state["lanes"])
        session.guard.restore(state.get("guard", {}))
        rng.restore_rng(state["rng"])
    session.saved = True


@contextlib.contextmanager
def reading_state(checkpoint: Checkpoint) -> Iterator[None]:
    """What another program wrote may lack values, or hold others than this one writes.

    Raises:
        CheckpointError: so it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{checkpoint.path}: its state can't be read ({problem}); use another one") from error


def _wanted(shard: Shard) -> Wanted:
    global_shape, start, shape, _ = find_slice(shard.parameter)
    return Wanted(shard.name, shard.kind, global_shape, start, shape, shard.flat_start, shard.values.numel())


def warn_of_checkpoint(problem: str) -> None:
    """The line for a checkpoint that is passed over, for `store.find_latest`."""
    LOG.warning("warning: %s", problem)


def set_damaged_aside(damaged: list[Path], used: Checkpoint) -> None:
    """Renames damaged checkpoints, and says so; they stay in the way where the folder can't be written."""
    try:
        for aside in store.set_aside(damaged, used):
            LOG.warning("warning: the damaged checkpoint is now %s; delete it if you don't need it", aside)
    except OSError as error:
        LOG.warning("warning: %s: a damaged checkpoint can't be renamed: %s", used.path.parent, error.strerror)


def roll_back(session: Session) -> None:
    """Returns to weights and step of the newest checkpoint, but skips the text read since; memories start empty.

    All ranks call it together. If no checkpoint can be read, nothing changes.
    """
    found, damaged = None, []
    if session.place.is_first:
        try:
            found = store.find_latest(session.config.directory, warn_of_checkpoint, damaged.append)
        except store.CheckpointError as error:  # none is valid; the other ranks wait for what is found
            warn_of_checkpoint(str(error))
    if found is not None:
        set_damaged_aside(damaged, found)
    checkpoint = share_checkpoint(found)
    if checkpoint is None:
        LOG.warning("warning: no checkpoint can be read to go back to; only step %d is left out", session.step)
        return
    lanes, skipped, rollbacks = session.lanes, session.guard.skipped, session.guard.rollbacks
    restore_session(session, checkpoint)
    session.lanes, session.carried = lanes, empty_carried(session.config, session.stages)
    session.guard.skipped, session.guard.rollbacks = skipped, rollbacks + 1
    LOG.info("rolled back to %s (step %d); the text read since is left out", checkpoint.path, session.step)


def share_checkpoint(found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that rank 0 found and verified, opened by all ranks, even if a newer one has appeared since."""
    path = mesh.broadcast_text("" if found is None else str(found.path))
    return found if found is not None or not path else store.open_checkpoint(Path(path), verify=False)
