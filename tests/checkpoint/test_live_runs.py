"""Reading the checkpoints of a run that goes on saving, pruning and replacing them."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.damage import find_damage
from infini_train.checkpoint.fragments import CheckpointError, VanishedError, whole_fragment
from infini_train.checkpoint.reader import open_checkpoint
from infini_train.checkpoint.store import dangling_pointer, find_latest, list_checkpoints, look_again, prune, save


def save_step(run_dir: Path, step: int) -> Path:
    tensors = (("a", torch.full((50,), float(step))), ("b", torch.full((50,), -float(step))))
    return save(run_dir, step, [whole_fragment(name, "weight", tensor) for name, tensor in tensors], {}, {})


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A run that keeps its last checkpoint only, and saves as fast as it can."""
    save_step(tmp_path, 1)
    end = threading.Event()

    def go_on() -> None:
        step = 2
        while not end.is_set():
            save_step(tmp_path, step)
            prune(tmp_path, 1, None)
            step += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    yield tmp_path
    end.set()
    thread.join()


def test_a_reader_raises_no_false_alarm(live: Path) -> None:
    steps: set[int] = set()
    while len(steps) < 40:
        problems: list[str] = []
        checkpoint = find_latest(live, problems.append)
        assert checkpoint is not None and problems == []
        steps.add(checkpoint.step)
        folders = list_checkpoints(live)
        assert [problem for folder in folders for problem in find_damage(folder)] == []
        assert dangling_pointer(live / "checkpoints") is None


def test_values_are_those_of_one_checkpoint(live: Path) -> None:
    def read() -> float:
        checkpoint = find_latest(live, pytest.fail)
        assert checkpoint is not None
        pieces = [checkpoint.whole(name, "weight") for name in ("a", "b")]
        (_, a), (_, b) = checkpoint.read(pieces)
        assert torch.equal(a, -b) and a[0] == checkpoint.step
        return float(a[0])

    steps: list[float] = []
    while len(set(steps)) < 20:
        steps.append(look_again(read))
    assert steps == sorted(steps)


def test_what_is_gone_is_not_damaged(tmp_path: Path) -> None:
    def two_files(step: int) -> Path:
        barrier = threading.Barrier(2)

        def one(rank: int) -> None:
            tensors = [whole_fragment(f"w{rank}", "weight", torch.ones(4))]
            save(tmp_path, step, tensors, {}, {}, rank=rank, world_size=2, barrier=lambda: barrier.wait() and None)

        other = threading.Thread(target=one, args=(1,))
        other.start()
        one(0)
        other.join()
        return tmp_path / "checkpoints" / f"step-{step:08d}"

    folder = two_files(1)
    away = folder.with_name("away")
    assert find_damage(folder, lambda size: folder.exists() and folder.rename(away) and None) == []
    assert find_damage(folder) == []
    two_files(1)
    shutil.rmtree(away)
    (folder / "rank-00001.safetensors").unlink()
    assert find_damage(folder) == ["rank-00001.safetensors is missing"]


def test_a_checkpoint_that_was_replaced_is_not_mixed_with_the_new_one(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    checkpoint = open_checkpoint(folder)
    pieces = [checkpoint.whole(name, "weight") for name in ("a", "b")]
    reading = checkpoint.read(pieces)
    next(reading)
    folder.rename(tmp_path / "old")
    save_step(tmp_path, 1)
    with pytest.raises(VanishedError, match=rf"^{folder}: was removed or replaced while it was read"):
        list(reading)
    reading = open_checkpoint(folder).read(pieces)
    shutil.rmtree(folder)
    with pytest.raises(VanishedError, match="was removed or replaced"):
        list(reading)


def test_looking_again_ends(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder$"):
        look_again(lambda: open_checkpoint(tmp_path / "nowhere"))


def test_of_a_checkpoint_that_is_a_link_the_link_is_pruned(tmp_path: Path) -> None:
    first = save_step(tmp_path, 1)
    first.rename(tmp_path / "kept")
    first.symlink_to(tmp_path / "kept")
    save_step(tmp_path, 2)
    prune(tmp_path, 1, None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert open_checkpoint(tmp_path / "kept").step == 1
