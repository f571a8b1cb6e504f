"""The training loop."""

import contextlib
import logging

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.data.source import Position
from infini_train.parallel import mesh
from infini_train.resilience.signals import Stopped, StopRequest
from infini_train.resilience.watchdog import OPENING, Watchdog
from infini_train.train.checkpointing import roll_back, save_session
from infini_train.train.clock import Clock, profiled
from infini_train.train.guards import DivergedError, find_non_finite_tensors, list_names
from infini_train.train.metrics import Metrics
from infini_train.train.opening import failing_together, open_session
from infini_train.train.optim import learning_rates
from infini_train.train.reports import announce, is_validation_due, report_memory, report_step, report_validation
from infini_train.train.run_folder import check_fence, hold_folder, write_identity
from infini_train.train.session import Session
from infini_train.train.status import append_finding, end_status, mark_failure
from infini_train.train.step import StepResult, train_step
from infini_train.train.variation import draw_variation

LOG = logging.getLogger(__name__)


def train(config: RunConfig) -> Session:
    """Trains until the budget is spent or a signal asks to stop; saves in either case. All ranks call it together.

    Raises:
        ConfigError: something about data, checkpoint or config is wrong; nothing was trained.
        DivergedError: too many steps had to be skipped (`guard`); the last checkpoint stays.
        Stopped: a signal asked for it; a checkpoint of the last step is there.
    """
    mesh.complete_environment()
    rank, world_size = mesh.world()
    # the folder is held until the watchdog has seen the other ranks leave it
    with contextlib.ExitStack() as held, Watchdog(rank, world_size, config.parallel.timeout_s) as watchdog:
        watchdog.set_operation(OPENING)
        mesh.connect(config.parallel.timeout_s)  # before the lock, which may take longer to get than others wait here
        with failing_together():
            held.enter_context(hold_folder(config.directory, is_first=rank == 0))
        session = open_session(config)
        with failing_together():
            if rank == 0:
                write_identity(session.config, session.source)
        watchdog.write_to(config.directory)
        announce(session)
        with mark_failure(session), StopRequest(confirms=rank == 0) as stop:
            while run_steps(session, stop, watchdog):
                watchdog.set_operation(OPENING)  # reads a checkpoint, however long that takes
                roll_back(session)
            end_status(session, f"stopped by {stop.agreed}")
    total = session.config.train.total_steps
    if stop.agreed and session.step < total:
        LOG.info(f"stopped by {stop.agreed} at step {session.step} of {total}; the same command goes on from there")
        raise Stopped(stop.agreed)
    return session


def run_steps(session: Session, stop: StopRequest, watchdog: Watchdog) -> bool:
    """Runs steps to the end of the budget, or until a signal arrives.

    Returns:
        Whether to roll back to the last checkpoint and continue from there, because of a loss spike.

    Raises:
        ConfigError: the text ended before the run; DivergedError: see `end_step`.
    """
    config, total = session.config, session.config.train.total_steps
    set_operation = session.saver.on_wait = watchdog.set_operation

    def set_phase(phase: str) -> None:
        set_operation(f"step {session.step + 1}, {phase}")

    with Metrics(session, total) as metrics, session.saver, contextlib.closing(session.batches()) as batches:
        clock = Clock(session)
        for batch, lanes in batches if session.step < total else ():
            rates = learning_rates(session.step, total, config.optim)
            clock.start_step()
            with profiled(session):
                ours = session.stages, session.engine, batch, session.carried
                variation = draw_variation(config, session.step)
                result = train_step(*ours, rates, set_phase, session.guard.find_problem, variation)
            watchdog.record_step(*clock.end_step(result))
            metrics.tick()
            end_step(session, result, lanes)
            if session.saved and session.guard.must_roll_back(result.comparable_loss, result.problem):
                return True
            stop.agree()
            last = session.step == total or stop.agreed is not None
            if not result.problem and (last or session.step % config.log.every_steps == 0):
                report_step(session, metrics, clock, result, rates)
            if not result.problem and (last or session.step % config.log.memory_every_steps == 0):
                report_memory(session, metrics, result)
            if last or config.checkpoint.is_due(session.step):
                check_fence(config.directory, session.place.is_first)
                save_session(session)
            if stop.agreed is None and is_validation_due(session):
                report_validation(session, metrics, stop, set_operation)
            set_phase("waiting for data")
            clock.pause()
            if last:
                break
        else:
            if session.step < total:
                save_session(session)
                raise ConfigError(
                    f"data.mixture: the text ended at step {session.step} of {total}; raise the epochs of a part, or"
                    f" lower train.max_steps to {session.step}"
                )
    return False


def end_step(session: Session, result: StepResult, lanes: Position) -> None:
    """Advances after a step; reports one that was skipped, or whose loss spiked.

    Raises:
        DivergedError: too many steps were skipped.
    """
    guard, before = session.guard, session.lanes
    finding = result.problem or guard.describe_spike(result.comparable_loss)
    session.advance(result, lanes)
    if not finding:
        return
    if session.place.is_first:
        documents = session.reader.name_documents(before)
        outcome = f"left out, {guard.skipped} so far" if result.problem else "learned from all the same"
        LOG.warning(f"WARNING: step {session.step}: {finding}; {outcome}; documents: {list_names(documents)}")
        append_finding(session, finding, documents)
    if guard.gives_up:
        bad = find_non_finite_tensors(session.engine)
        if bad:
            LOG.error("rank %d: not finite: %s", session.place.world[0], list_names(bad))
        end_status(session, "diverged")
        raise DivergedError(f"{finding}; {guard.diagnose(mesh.max_over_world(float(bool(bad))) > 0)}")
