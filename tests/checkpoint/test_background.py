"""Saving in a thread: what is written, when, and who hears of a failure. Threads stand for ranks here."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.checkpoint.background import BackgroundSaver, HostBuffers
from infini_train.checkpoint.fragments import CheckpointError, Fragment, whole_fragment
from infini_train.checkpoint.store import open_checkpoint
from infini_train.config.training import CheckpointConfig

KEEP_ALL = CheckpointConfig(keep_last=100)


class Gate:
    """A barrier of one rank that stays shut until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self) -> None:
        assert self.opened.wait(20), "nobody opened the gate"


def weights(value: float) -> list[Fragment]:
    return [whole_fragment("w", "master", torch.full((4, 3), value))]


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def values_of(path: Path, name: str = "w", kind: str = "master") -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    ((_, tensor),) = checkpoint.read([checkpoint.whole(name, kind)])
    return tensor


def test_training_goes_on_while_the_values_of_the_start_are_written(tmp_path: Path) -> None:
    gate, tensor, state = Gate(), torch.arange(6.0), {"lanes": [{"offset": 1}]}
    saved: list[Path] = []
    with BackgroundSaver(tmp_path, {"name": "run"}, KEEP_ALL, barrier=gate) as saver:
        saver.start(7, [whole_fragment("w", "master", tensor)], state, saved.append)
        assert "latest" not in steps_of(tmp_path) and saved == []  # start is over, the save is not
        tensor.mul_(-1)
        state["lanes"][0]["offset"] = 2
        gate.opened.set()
    (folder,) = saved
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert torch.equal(values_of(folder), torch.arange(6.0))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.state, checkpoint.config) == ({"lanes": [{"offset": 1}]}, {"name": "run"})


def test_a_new_save_waits_for_the_one_before(tmp_path: Path) -> None:
    gate, events = Gate(), []

    def late() -> Iterator[Fragment]:
        events.append("copied 2")
        yield from weights(2.0)

    saver = BackgroundSaver(tmp_path, {}, KEEP_ALL, barrier=gate)
    saver.start(1, weights(1.0), {}, lambda folder: events.append(f"saved {folder.name}"))
    timer = threading.Timer(0.1, gate.opened.set)
    timer.start()
    saver.start(2, late(), {}, lambda folder: events.append(f"saved {folder.name}"))
    saver.wait()
    timer.join()
    assert events == ["saved step-00000001", "copied 2", "saved step-00000002"]
    for step in (1, 2):
        found = values_of(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert torch.equal(found, torch.full((12,), float(step)))


def test_older_checkpoints_are_pruned_before_the_save_is_told(tmp_path: Path) -> None:
    listings: list[list[str]] = []
    retention = CheckpointConfig(keep_last=1, milestone_every_steps=20)
    with BackgroundSaver(tmp_path, {}, retention) as saver:
        for step in (10, 20, 30, 40):
            saver.start(step, weights(1.0), {}, lambda folder: listings.append(steps_of(tmp_path)))
    assert listings[-1] == ["latest", "step-00000020", "step-00000040"]


def test_many_saves_of_changing_tensors(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    with BackgroundSaver(tmp_path, {}, KEEP_ALL) as saver:
        for step in range(1, 21):
            tensor.add_(1.0)
            saver.start(step, [whole_fragment("w", "master", tensor)], {})
    for step in range(1, 21):
        found = values_of(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert torch.equal(found, torch.full((1000,), float(step)))


def test_host_buffers_are_used_again_and_never_those_of_training() -> None:
    flat = torch.arange(10.0)
    fragments = [
        Fragment("a", "master", (10,), (0,), (10,), 0, flat[:4]),
        Fragment("a", "master", (10,), (0,), (10,), 4, flat[4:]),
        Fragment("a", "exp_avg", (10,), (0,), (10,), 0, flat[::3].to(torch.bfloat16)),
    ]
    buffers = HostBuffers()
    first = buffers.copy(fragments)
    places = [fragment.tensor.data_ptr() for fragment in first]
    assert len({*places, flat.data_ptr()}) == 4
    flat.add_(1.0)
    assert torch.equal(first[1].tensor, torch.arange(4.0, 10.0))
    second = buffers.copy(iter(fragments))
    assert [fragment.tensor.data_ptr() for fragment in second] == places
    assert all(torch.equal(one.tensor, two.tensor) for one, two in zip(second, fragments, strict=True))
    assert [fragment.tensor.dtype for fragment in second] == [torch.float32, torch.float32, torch.bfloat16]
    (third,) = buffers.copy([whole_fragment("a", "master", torch.ones(3))])  # another piece of the same name
    assert torch.equal(third.tensor, torch.ones(3))


# ------------------------------------------------------------------------------------------------------------ failures


def blocked_folder(run_dir: Path) -> Path:
    """A run whose checkpoints can't be written."""
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("a file, not a folder")
    return run_dir / "checkpoints"


def test_a_failure_is_told_once_by_the_next_start_or_wait(tmp_path: Path) -> None:
    blocker = blocked_folder(tmp_path / "run")
    saver = BackgroundSaver(tmp_path / "run", {}, KEEP_ALL)
    problem = rf"^{blocker}: file exists; the checkpoint of step 1 was not written"
    saver.start(1, weights(1.0), {})
    with pytest.raises(CheckpointError, match=problem):
        saver.start(2, iter([]), {})
    saver.wait()
    saver.start(1, weights(1.0), {})
    with pytest.raises(CheckpointError, match=problem):
        saver.wait()
    blocker.unlink()
    saver.start(3, weights(3.0), {})
    saver.wait()
    assert steps_of(tmp_path / "run") == ["latest", "step-00000003"]


def test_whatever_goes_wrong_becomes_one_line_that_names_the_step(tmp_path: Path) -> None:
    def barrier() -> None:
        raise RuntimeError("Connection closed by peer\n  at some place")

    for saver, state, problem in (
        (BackgroundSaver(tmp_path, {}, KEEP_ALL, barrier=barrier), {}, "RuntimeError: Connection closed by peer"),
        (BackgroundSaver(tmp_path, {}, KEEP_ALL), {"rng": torch.zeros(1)}, "TypeError: Object of type Tensor"),
        (BackgroundSaver(tmp_path, {}, KEEP_ALL), {"lock": threading.Lock()}, "TypeError: cannot pickle"),
    ):
        saver.start(4, weights(1.0), state)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: saving step 4 failed: {problem}") as caught:
            saver.wait()
        assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, CheckpointError)
        assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_leaving_with_an_error_waits_and_keeps_the_error(tmp_path: Path) -> None:
    blocked_folder(tmp_path / "run")
    with (
        pytest.raises(ZeroDivisionError) as caught,
        BackgroundSaver(tmp_path / "run", {}, KEEP_ALL) as saver,
    ):
        saver.start(1, weights(1.0), {})
        raise ZeroDivisionError
    assert "the checkpoint of step 1 was not written" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError), BackgroundSaver(tmp_path / "run", {}, KEEP_ALL) as saver:
        saver.start(1, weights(1.0), {})


def in_ranks(world_size: int, work: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
    """What `work(rank, barrier)` returns or raises on each rank."""
    barrier = threading.Barrier(world_size, timeout=20)

    def one(rank: int) -> Any:
        try:
            return work(rank, lambda: barrier.wait() and None)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def test_a_rank_whose_values_can_not_be_copied_fails_all(tmp_path: Path) -> None:
    def lost() -> Iterator[Fragment]:
        raise MemoryError("no memory for 12 GB")
        yield

    def work(rank: int, barrier: Callable[[], None]) -> None:
        with BackgroundSaver(tmp_path, {}, KEEP_ALL, rank=rank, world_size=3, barrier=barrier) as saver:
            saver.start(1, weights(1.0) if rank == 0 else [], {"by": rank})
            saver.start(2, lost() if rank == 1 else weights(2.0) if rank == 0 else [], {"by": rank})

    errors = in_ranks(3, work)
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert str(errors[1]) == f"{tmp_path}: saving step 2 failed: MemoryError: no memory for 12 GB"
    assert "rank 1 of 3 failed" in str(errors[0]) and "another rank failed" in str(errors[2])
    assert steps_of(tmp_path) == ["latest", "step-00000001"]
    assert json.loads((tmp_path / "checkpoints/step-00000001/index.json").read_text())["state"] == {"by": 0}
