"""TensorBoard files are read in the order of their names, whatever the clock said when they were made."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.train.board import Board, choose_name
from infini_train.train.loop import train

DAY_S = 86_400


def shown_steps(folder: Path) -> list[int]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("loss/train")]


@pytest.mark.parametrize("ahead_s", [0, DAY_S, 20 * 365 * DAY_S])
def test_a_name_sorts_after_all_before_it(tmp_path: Path, ahead_s: int) -> None:
    now_s = int(time.time())
    for stamp in (now_s - DAY_S, now_s + ahead_s):
        (tmp_path / f"events.out.tfevents.{stamp:010d}.zzz.999.0").touch()
    (tmp_path / "eval").mkdir()
    for _ in range(3):
        before = [path.name for path in tmp_path.iterdir() if path.is_file()]
        name = choose_name(tmp_path, now_s)
        assert name > max(before)
        (tmp_path / name).touch()


def test_all_steps_are_shown_after_a_resume_with_the_clock_a_day_behind(configure) -> None:
    config = configure("train.max_steps=3")
    train(config)
    folder = config.directory / "tensorboard"
    (file,) = folder.glob("events*")
    parts = file.name.split(".")
    parts[3] = str(int(parts[3]) + DAY_S)  # what an earlier start wrote while the clock was a day ahead
    file.rename(folder / ".".join(parts))
    for steps in (4, 6):
        train(configure(f"train.max_steps={steps}"))
        assert shown_steps(folder) == list(range(1, steps + 1))


def test_steps_after_the_checkpoint_are_hidden(tmp_path: Path) -> None:
    for purge, steps in ((1, range(1, 7)), (4, range(4, 6))):
        board = Board(str(tmp_path), purge_step=purge)
        for step in steps:
            board.add_scalar("loss/train", purge, step)
        board.close()
    assert shown_steps(tmp_path) == [1, 2, 3, 4, 5]
