"""Tasks: shares of parts, and a worker whose parent has died."""

import contextlib
import multiprocessing
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import tasks
from data_tools.documents import FileRange
from data_tools.plan import plan_tasks, task_bytes
from data_tools.storage import SourceFile
from infini_train.config.errors import ConfigError


@given(number=st.integers(1, 9), n_tasks=st.integers(0, 40))
def test_parts_share_the_tasks(number, n_tasks) -> None:
    shares = [list(tasks.share(f"{part}/{number}", n_tasks)) for part in range(1, number + 1)]
    assert sorted(task for share in shares for task in share) == list(tasks.share(None, n_tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", ""])
def test_what_is_no_part_is_refused(part) -> None:
    with pytest.raises(ConfigError, match="part"):
        tasks.share(part, 10)


FILES = st.lists(st.tuples(st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".parquet"]), st.integers(0, 100)))


@given(files=FILES, size=st.integers(1, 50))
def test_a_plan_covers_every_byte_once_and_in_order(files, size) -> None:
    found = [SourceFile(f"{i}{suffix}", f"{i}", "s", n_bytes, "") for i, (suffix, n_bytes) in enumerate(files)]
    planned = list(plan_tasks(found, size))
    pieces = [piece for task in planned for piece in task]
    for file in found:
        own = [piece for piece in pieces if piece.path == file.path]
        assert own[0].start == 0 and own[-1].stop == file.bytes
        assert all(a.stop == b.start for a, b in zip(own[:-1], own[1:], strict=True))
        assert len(own) == 1 or file.path.endswith((".jsonl", ".parquet"))
    assert [piece.path for piece in pieces] == sorted(
        (piece.path for piece in pieces), key=lambda p: int(p.split(".")[0])
    )
    for task in planned:
        assert task and (sum(piece.stop - piece.start for piece in task) <= size or len(task) == 1)


def test_the_size_of_tasks() -> None:
    assert task_bytes(10, 512_000_000) == 8_000_000  # a small corpus is one task
    assert task_bytes(10**10, 512_000_000) == 10**10 // 64
    assert task_bytes(10**13, 512_000_000) == 512_000_000 and task_bytes(10**13, 1000) == 1000
    tiny = [SourceFile(f"{i}.txt", str(i), "s", 1, "") for i in range(25_000)]
    assert [len(task) for task in plan_tasks(tiny, 10**9)] == [10_000, 10_000, 5_000]  # held in memory
    stdin = plan_tasks([SourceFile("-", "stdin", "stdin", 0, "")], 10)
    assert list(stdin) == [[FileRange("-", "stdin", "stdin", 0, 0)]]


def test_a_worker_without_its_parent_finishes_nothing(tmp_path) -> None:
    """Its progress has nowhere to go. A reader that skips what it can't read would go on: to it that is a bad file."""

    def work(task, folder, threads, advance) -> None:
        for _ in range(3):
            with contextlib.suppress(OSError):
                advance(10**7)
        (folder / "half").touch()

    ours, theirs = multiprocessing.Pipe()
    ours.send(0)
    ours.close()
    old = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            tasks._serve(theirs, tmp_path, work)
    finally:
        signal.signal(signal.SIGINT, old)
    assert list(tmp_path.iterdir()) == []
