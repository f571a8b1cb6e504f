"""Saving in the background: training waits for a copy to host memory, a thread writes while it goes on."""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from infini_train.checkpoint import store
from infini_train.checkpoint.fragments import CheckpointError, Fragment
from infini_train.command_errors import first_line
from infini_train.config.training import CheckpointConfig

LOG = logging.getLogger(__name__)

POLL_S = 1.0


class HostBuffers:
    """Copies of fragments in host memory. The same pieces get the same buffers each time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with values of their own, valid until the next call; buffers no longer asked for are freed."""
        buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        copies: list[Fragment] = []
        for fragment in fragments:
            values = fragment.tensor.detach()
            place = (fragment.kind, fragment.name, fragment.start, fragment.flat_start, fragment.numel, values.dtype)
            buffer = self._buffers.get(place)
            if buffer is None:
                buffer = torch.empty(fragment.numel, dtype=values.dtype, device="cpu")
            buffers[place] = buffer.copy_(values)
            copies.append(replace(fragment, tensor=buffer))
        self._buffers = buffers
        return copies


class BackgroundSaver:
    """Writes, publishes and prunes a run's checkpoints in a thread; at most one save is under way.

    Every rank has one, and calls `start` and `wait` at the same steps. A failure, of this rank or of another, is raised
    by the next `start` or `wait` and leaves earlier checkpoints as they were. The thread keeps the process alive until
    its checkpoint is complete. Leaving the context waits too, unless it is left by an interrupt.

    Args:
        run_dir: the run's folder, seen by all ranks.
        config_tree: the run's config as plain values (`infini_train.config.files.to_tree`).
        retention: which checkpoints rank 0 keeps when a new one is there.
        rank: this process among `world_size`.
        world_size: the number of processes that save together.
        barrier: returns when all ranks have called it. It is called in the thread while the main thread may be in a
            collective, so it needs a process group that nothing else uses, and the patience to wait for the slowest
            rank's files.

    Attributes:
        on_wait: called every second or so while this rank waits for its thread, for whoever watches the run.
    """

    def __init__(
        self,
        run_dir: Path,
        config_tree: dict[str, Any],
        retention: CheckpointConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config_tree = config_tree
        self._retention = retention
        self._place: dict[str, Any] = {"rank": rank, "world_size": world_size, "barrier": barrier}
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.on_wait: Callable[[str], None] = lambda operation: None

    def start(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: dict[str, Any],
        on_saved: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Copies the values and returns while they are being written; waits for the save before it, if there is one.

        Args:
            step: optimizer steps done.
            fragments: what this rank owns (see `store.save`); the tensors may change as soon as this returns.
            state: JSON-able values of rank 0; the same holds for them.
            on_saved: receives the checkpoint's folder when it is complete and older ones are pruned; called in the
                thread.

        Raises:
            CheckpointError: the save before failed; nothing was started.
        """
        self.wait()
        try:
            copies: Iterable[Fragment] = self._buffers.copy(fragments)
            state = copy.deepcopy(state)
        except Exception as error:  # the other ranks have begun: they must hear of it, not wait for this one
            copies = _fail(error)
        # Not a daemon: the interpreter's exit waits for it.
        self._thread = threading.Thread(target=self._run, args=(step, copies, state, on_saved), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            CheckpointError: the last save failed, and this was not reported yet.
        """
        if self._thread is not None:
            begin = time.monotonic()
            while self._thread.is_alive():
                self._thread.join(POLL_S)
                self.on_wait(f"waiting for a checkpoint to be written, {time.monotonic() - begin:.0f} s")
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(str(failure)) from failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):
            try:
                self.wait()
            except CheckpointError as failure:  # the first error is the one to report
                error.add_note(str(failure))

    def _run(
        self, step: int, fragments: Iterable[Fragment], state: dict[str, Any], on_saved: Callable[[Path], None]
    ) -> None:
        try:
            folder = store.save(self._run_dir, step, fragments, state, self._config_tree, **self._place)
            if self._place["rank"] == 0:
                self._prune()
            on_saved(folder)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # a lost rank, say: barriers raise whatever their library does
            problem = f"{type(error).__name__}: {first_line(error)}"
            self._failure = CheckpointError(f"{self._run_dir}: saving step {step} failed: {problem}")
            self._failure.__cause__ = error

    def _prune(self) -> None:
        """Removes old checkpoints; a file system that refuses it does not fail the new one, which is complete."""
        try:
            store.prune(self._run_dir, self._retention.keep_last, self._retention.milestone_every_steps)
        except OSError as error:
            LOG.warning("warning: %s: old checkpoints can't be removed: %s", self._run_dir, error.strerror)


def _fail(error: Exception) -> Iterator[Fragment]:
    """Fragments that can't be had: raises in the place where they are written."""
    raise error
    yield
