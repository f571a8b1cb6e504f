"""Which rank `infini-launch status` names, from files as training writes them."""

import json
import os
import time
from pathlib import Path

from infini_train.resilience.rank_status import RankStatus
from launch import folder, status
from launch.ranks import describe_trouble, read_ranks


def write_rank(run_dir: Path, rank: int, operation: str, world_size: int = 4, age_s: float = 1.0) -> None:
    """By the class that training uses."""
    rank_status = RankStatus(run_dir / "launch" / "ranks", rank, world_size, f"n{rank}, process {100 + rank}")
    rank_status.start(lambda: (1, operation))
    rank_status.close(10.0)
    os.utime(rank_status.path, (time.time() - age_s,) * 2)


def stand_still(run_dir: Path, for_s: float) -> None:
    for path in (run_dir / "launch" / "ranks").glob("*.json"):
        times = path.stat()
        path.write_text(json.dumps({**json.loads(path.read_text()), "for_s": for_s}))
        os.utime(path, (times.st_atime, times.st_mtime))


def test_a_silent_rank_is_named(tmp_path: Path) -> None:
    for rank in range(4):
        write_rank(tmp_path, rank, "step 7, backward", age_s=130 if rank == 2 else 5)
    said = describe_trouble(read_ranks(tmp_path))
    assert said == "1 of 4 ranks silent: 2; rank 2 (n2, process 102) for 130 s, last in 'step 7, backward'"
    (tmp_path / "status.json").write_text(json.dumps({"state": "training", "step": 7, "heartbeat": time.time()}))
    (row,) = status.describe_runs(folder.find_runs(tmp_path), {})
    assert row["note"] == said
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 9, "heartbeat": time.time()}))
    (row,) = status.describe_runs(folder.find_runs(tmp_path), {})
    assert row["note"] == ""


def test_ranks_that_stand_still_are_told_the_odd_one_first(tmp_path: Path) -> None:
    for rank in range(4):
        write_rank(tmp_path, rank, "step 7, waiting for data" if rank == 3 else "step 7, gradients")
    assert describe_trouble(read_ranks(tmp_path)) == ""
    stand_still(tmp_path, for_s=89.0)
    said = describe_trouble(read_ranks(tmp_path))
    assert (
        said
        == "no rank made progress for 90 s: rank 3 in 'step 7, waiting for data'; rank 0, 1, 2 in 'step 7, gradients'"
    )


def test_ranks_of_an_earlier_larger_start_are_left_out(tmp_path: Path) -> None:
    for rank in range(8):
        write_rank(tmp_path, rank, "step 3", world_size=8, age_s=1000)
    for rank in range(4):
        write_rank(tmp_path, rank, "step 5", world_size=4)
    (tmp_path / "launch" / "ranks" / "2.json").write_text("{")  # never whole, but a disk may be full
    assert [entry.rank for entry in read_ranks(tmp_path)] == [0, 1, 3]
    assert describe_trouble(read_ranks(tmp_path)) == ""


def test_ranks_before_the_newest_start_of_the_job_are_left_out(tmp_path: Path, monkeypatch) -> None:
    """By its number, not by time: clocks of nodes differ."""
    monkeypatch.setenv("INFINI_TRAIN_START", "7.0")
    for rank in range(4):
        write_rank(tmp_path, rank, "step 3", age_s=-1000)
    (tmp_path / "launch" / "fence").write_text("7.0\n")
    assert len(read_ranks(tmp_path)) == 4
    (tmp_path / "launch" / "fence").write_text("7.1\n")
    assert read_ranks(tmp_path) == []
    monkeypatch.setenv("INFINI_TRAIN_START", "7.1")
    write_rank(tmp_path, 2, "step 4", age_s=-2000)
    os.utime(tmp_path / "launch" / "ranks" / "2.json", (time.time() + 2000,) * 2)
    assert [entry.operation for entry in read_ranks(tmp_path)] == ["step 4"]


def set_pace(run_dir: Path, own_s: list[float], step_s: float) -> None:
    for rank, seconds in enumerate(own_s):
        write_rank(run_dir, rank, "step 9, backward", world_size=len(own_s))
        path = run_dir / "launch" / "ranks" / f"{rank}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "own_s": seconds, "step_s": step_s}))


def test_a_slow_rank_is_named_with_its_node(tmp_path: Path) -> None:
    set_pace(tmp_path, [0.1, 0.3, 0.11, 0.1], step_s=0.5)
    said = describe_trouble(read_ranks(tmp_path))
    assert said == "rank 1 on n1 slow: 0.3 s of own work per step, the others 0.1 s"
    set_pace(tmp_path, [0.1, 0.3], step_s=0.5)
    assert describe_trouble(read_ranks(tmp_path)).startswith("rank 1 on n1 slow")
    set_pace(tmp_path, [0.1, 0.14, 0.1, 0.1], step_s=0.5)
    assert describe_trouble(read_ranks(tmp_path)) == "", "not that much slower"
    set_pace(tmp_path, [0.01, 0.03, 0.01, 0.01], step_s=0.5)
    assert describe_trouble(read_ranks(tmp_path)) == "", "of no account in a step"


def test_many_silent_ranks_stay_one_line(tmp_path: Path) -> None:
    for rank in range(7):
        write_rank(tmp_path, rank, "start", world_size=7, age_s=100 + rank)
    assert describe_trouble(read_ranks(tmp_path)).startswith("7 of 7 ranks silent: 0, 1, 2, 3 and 3 more; rank 6 (")
