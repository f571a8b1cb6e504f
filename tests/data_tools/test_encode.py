"""Encoding a corpus: nothing lost, whole documents held out, the same bytes from any number of workers and parts."""

import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import encode, plan
from data_tools.combine import merge
from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, EncodeWork, encode_corpus, is_held_out
from data_tools.sources import find_files
from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import Manifest, hash_file
from infini_train.data.pairs import PairForm
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import tokenizer_of


def corpus(n: int, prefix: str = "d") -> list[dict[str, str]]:
    return [{"id": f"{prefix}{i}", "text": f"Text {i}: grün\n" * (i % 7 + 1), "title": f"T{i}"} for i in range(n)]


def write(folder: Path, rows: list[dict[str, str]], name: str = "c.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(source: str, out: Path, **options) -> dict[Path, Manifest]:
    return encode_corpus([source], "byte", out, EncodeOptions(**options))[0]


def read(folder: Path) -> list[dict[str, str]]:
    dataset, tokenizer = Dataset.open(folder), tokenizer_of(folder)
    found = []
    for i, n in enumerate(dataset.lengths_tokens):
        text, m = tokenizer.decode(dataset.read(i, 0, int(n))), dataset.metadata(i)
        assert (m["n_bytes"], m["n_tokens"]) == (len(text.encode()), n)
        found.append({"id": m["id"], "text": text, "title": m["title"]})
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_tasks(monkeypatch) -> None:
    """Many tasks of a small corpus. Worker processes read the plan, they don't make it."""
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 3000)


def test_all_documents_are_there_in_order(tmp_path, small_tasks) -> None:
    written = run(write(tmp_path, corpus(200)), tmp_path / "set", max_shard_bytes=50_000)
    assert read(tmp_path / "set") == corpus(200)
    manifest = written[tmp_path / "set"]
    assert len(manifest.shards) > 3 and sum(manifest.length_histogram) == 200
    lengths = Dataset.open(tmp_path / "set").lengths_tokens
    assert manifest.length_histogram[5] == ((lengths >= 16) & (lengths < 32)).sum() > 0


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 30), share=st.floats(0.001, 0.999), prefix=st.text("abc"), size=st.sampled_from([300, 10**6]))
def test_holdout_splits_whole_documents_and_neither_is_empty(tmp_path_factory, n, share, prefix, size) -> None:
    folder, documents = tmp_path_factory.mktemp("e"), corpus(n, prefix)
    source = write(folder, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_MIN_TASK_BYTES", size)
        run(source, folder / "out", holdout=share)
    train, validation = read(folder / "out" / "train"), read(folder / "out" / "validation")
    assert train and validation
    assert sorted([*train, *validation], key=lambda d: d["text"] + d["id"]) == sorted(
        documents, key=lambda d: d["text"] + d["id"]
    )
    assert sum(is_held_out(d["id"], share) != (d in validation) for d in documents) <= 1  # moved so that none is empty
    assert [p.name for p in sorted(folder.iterdir())] == ["c.jsonl", "out"]


def test_the_share_is_met_and_stays_when_the_corpus_grows(tmp_path) -> None:
    for n in (1000, 1500):
        run(write(tmp_path, corpus(n)), tmp_path / str(n), holdout=0.1)
    small, large = ({d["id"] for d in read(tmp_path / n / "validation")} for n in ("1000", "1500"))
    assert 60 < len(small) < 140 and small < large


def test_workers_and_parts_give_the_same_bytes(tmp_path, small_tasks) -> None:
    source = write(tmp_path, corpus(300))
    run(source, tmp_path / "one", holdout=0.2)
    run(source, tmp_path / "two", holdout=0.2, workers=2)
    for part in ("3/3", "1/3"):
        assert run(source, tmp_path / "parts", holdout=0.2, part=part) == {} and not (tmp_path / "parts").exists()
    assert len(run(source, tmp_path / "parts", holdout=0.2, part="2/3")) == 2
    one = hashes(tmp_path / "one")
    assert hashes(tmp_path / "two") == one == hashes(tmp_path / "parts") and len(one) > 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "one", "parts", "two"]


def test_a_part_that_comes_when_all_is_done_finds_it(tmp_path, small_tasks) -> None:
    """A job that Slurm starts again, or one for which no task is left; but not if the sources have changed since."""
    source = write(tmp_path, corpus(9))  # one task
    made = run(source, tmp_path / "set", part="1/2")
    before = hashes(tmp_path / "set")
    assert run(source, tmp_path / "set", part="2/2") == made == run(source, tmp_path / "set", part="1/2")
    assert hashes(tmp_path / "set") == before and sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "set"]
    with pytest.raises(ConfigError, match="a dataset is there already"):
        run(source, tmp_path / "set")
    write(tmp_path, corpus(10))
    with pytest.raises(ConfigError, match="a dataset is there already"):
        run(source, tmp_path / "set", part="2/2")


class Stop(Exception):
    """Ends a run in the midst of its tasks."""


def stopped_run(source: str, out: Path, monkeypatch, after: int, **options) -> None:
    """A run that does so many tasks."""
    done, work = [], EncodeWork.__call__

    def limited(self, *arguments) -> None:
        if len(done) == after:
            raise Stop
        done.append(work(self, *arguments))

    with monkeypatch.context() as patch:
        patch.setattr(EncodeWork, "__call__", limited)
        with pytest.raises(Stop):
            run(source, out, **options)


def test_a_stopped_run_goes_on_and_does_nothing_twice(tmp_path, small_tasks, monkeypatch) -> None:
    source = write(tmp_path, corpus(100))
    run(source, tmp_path / "whole")
    stopped_run(source, tmp_path / "set", monkeypatch, 2)
    tasks = sorted((tmp_path / ".set.partial").glob("task-*"))
    assert len(tasks) == 2 and not (tmp_path / "set").exists()
    (tmp_path / ".set.partial" / ".task-000002.x").mkdir()  # what a killed worker leaves
    seen, work = [], EncodeWork.__call__
    monkeypatch.setattr(EncodeWork, "__call__", lambda self, task, *rest: (seen.append(task), work(self, task, *rest)))
    run(source, tmp_path / "set")
    assert seen[0] == 2 and len(seen) == len(set(seen))
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "set", "whole"]


def test_unfinished_work_of_another_command_is_refused(tmp_path, small_tasks, monkeypatch) -> None:
    source = write(tmp_path, corpus(100))
    stopped_run(source, tmp_path / "set", monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"unfinished work of another command \(holdout differs\).*restart"):
        run(source, tmp_path / "set", holdout=0.5)
    write(tmp_path, corpus(101))
    with pytest.raises(ConfigError, match=r"the sources have changed since \(.*c.jsonl\)"):
        run(source, tmp_path / "set")
    with pytest.raises(ConfigError, match="restart: other parts may be at work"):
        run(source, tmp_path / "set", restart=True, part="1/2")
    run(source, tmp_path / "set", restart=True)
    assert len(read(tmp_path / "set")) == 101


def test_files_that_change_at_equal_size_are_noticed(tmp_path, small_tasks, monkeypatch) -> None:
    """Over fsspec by what the file system tells of a version; beside a .bin of Megatron's its .idx counts, too."""
    memory = fsspec.filesystem("memory")
    rows = "".join(json.dumps(row) + "\n" for row in corpus(100)).encode()
    memory.pipe_file("/changing/c.jsonl", rows)
    url = "memory://changing/c.jsonl"
    stopped_run(url, tmp_path / "set", monkeypatch, 1)
    run(url, tmp_path / "other")  # as it was, it can be read twice
    memory.pipe_file("/changing/c.jsonl", rows.replace(b"Text", b"Next"))
    with pytest.raises(ConfigError, match=r"the sources have changed since \(memory://.*c.jsonl\)"):
        run(url, tmp_path / "set")
    for name in ("a.bin", "a.idx"):
        (tmp_path / name).write_bytes(b"four")
    (before,) = find_files([str(tmp_path / "a.bin")])
    os.utime(tmp_path / "a.idx", ns=(1, 1))
    (after,) = find_files([str(tmp_path / "a.bin")])
    assert before != after and before.bytes == after.bytes


def stop(*_, **__) -> None:
    raise Stop


def stop_at_the_end(path: Path, **options) -> None:
    """With the marker deleted first, the worst order; not where a task removes its own folder."""
    if (path / "publishing").exists():
        (path / "publishing").unlink()
        raise Stop
    remove(path, **options)


remove = shutil.rmtree
LAST_STEPS = {"join.finish_dataset": stop, "workplace.replace_folder": stop, "workplace.shutil.rmtree": stop_at_the_end}


@pytest.mark.parametrize("step", LAST_STEPS)
def test_a_run_killed_in_its_last_step_goes_on(tmp_path, small_tasks, monkeypatch, step) -> None:
    source = write(tmp_path, corpus(100))
    run(source, tmp_path / "whole", holdout=0.2)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(f"data_tools.{step}", LAST_STEPS[step])
        run(source, tmp_path / "set", holdout=0.2)
    assert list(tmp_path.glob(".set.partial*"))
    run(source, tmp_path / "set", holdout=0.2, overwrite=True)
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "set", "whole"]


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_nothing_is_left_of_a_run_that_finished_no_task(tmp_path, holdout) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError):
        run(str(tmp_path / "a.txt"), tmp_path / "set", holdout=holdout)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_runs_at_once_are_refused(tmp_path, small_tasks) -> None:
    source = write(tmp_path, corpus(30))
    with encode.Workplace(tmp_path / "set") as folder:
        (folder / "task-0").touch()
        for restart in (False, True):
            with pytest.raises(ConfigError, match="another process is at this work"):
                run(source, tmp_path / "set", restart=restart)
        assert (folder / "task-0").exists()


def test_a_link_planted_as_a_lock_is_refused(tmp_path, small_tasks) -> None:
    source = write(tmp_path, corpus(300))
    run(source, tmp_path / "set", part="1/2")
    lock = tmp_path / ".set.partial" / "lock-2-of-2"
    lock.symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="set: can't be written: is a link; a file of its own is expected here"):
        run(source, tmp_path / "set", part="2/2")
    assert not (tmp_path / "victim").exists()


def test_a_killed_worker_is_told(tmp_path, small_tasks) -> None:
    source = write(tmp_path, corpus(100))
    with pytest.raises(ConfigError, match="ended by SIGKILL: perhaps memory ran out"):
        encode_corpus([source], "byte", tmp_path / "set", KilledOptions(workers=2))


class KilledOptions(EncodeOptions):
    """Its processes end as soon as they have it."""

    def __setstate__(self, state) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_refusals(tmp_path) -> None:
    source = write(tmp_path, corpus(3))
    with pytest.raises(ConfigError, match="holdout: needs two documents"):
        run(write(tmp_path, corpus(1), "one.jsonl"), tmp_path / "one", holdout=0.5)
    with pytest.raises(ConfigError, match="holdout: 1.5 is not a share"):
        EncodeOptions(holdout=1.5)
    with pytest.raises(ConfigError, match="part: '0/3' is not I/N"):
        run(source, tmp_path / "part", part="0/3")
    with pytest.raises(ConfigError, match=r"no documents found \(left out 1 empty documents\)"):
        run(write(tmp_path, [{"text": ""}], "empty.jsonl"), tmp_path / "empty")
    run(source, tmp_path / "set")
    with pytest.raises(ConfigError, match="is itself a dataset"):
        run(source, tmp_path / "set", holdout=0.5, overwrite=True)
    run(source, tmp_path / "two", holdout=0.5)
    with pytest.raises(ConfigError, match="datasets are there already"):
        run(source, tmp_path / "two", holdout=0.5)
    with pytest.raises(ConfigError, match="not empty and not a dataset"):
        run(source, tmp_path / "two", overwrite=True)
    run(write(tmp_path, corpus(9), "nine.jsonl"), tmp_path / "two", holdout=0.5, overwrite=True)
    assert len(read(tmp_path / "two" / "train")) + len(read(tmp_path / "two" / "validation")) == 9
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["set", "two"]


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs(n: int) -> list[dict[str, str]]:
    return [
        {"id": f"p{i}", "book": f"Book {i}. " * (i % 9 + 1), "summary": f"It is {i}.", "title": "t"} for i in range(n)
    ]


PAIRS = ReadOptions(text_field="book", summary_field="summary")


def read_pairs(folder: Path) -> list[tuple[str, str, str]]:
    """Id, what is read and what is learned."""
    dataset, tokenizer, found = Dataset.open(folder), tokenizer_of(folder), []
    for i, n in enumerate(dataset.lengths_tokens.tolist()):
        start = dataset.loss_start(i)
        texts = [tokenizer.decode(dataset.read(i, *cut)) for cut in ((0, start), (start, n))]
        found.append((dataset.metadata(i)["id"], *texts))
    return found


def test_pairs_keep_their_place_through_tasks_holdout_and_merge(tmp_path, small_tasks) -> None:
    form = PairForm(prompt="Read. ", separator="\n=>")
    source = write(tmp_path, pairs(200))
    run(source, tmp_path / "set", read=PAIRS, form=form, holdout=0.3, max_shard_bytes=30_000)
    expected = {row["id"]: (f"Read. {row['book']}\n=>", row["summary"]) for row in pairs(200)}
    merge([tmp_path / "set" / "train", tmp_path / "set" / "validation"], tmp_path / "all")
    found = read_pairs(tmp_path / "all")
    assert len(found) == 200 and {id: texts for id, *texts in found} == {id: list(t) for id, t in expected.items()}
    assert verify(tmp_path / "all") == []


def test_a_long_book_is_cut_and_its_summary_is_not(tmp_path) -> None:
    run(write(tmp_path, pairs(9)), tmp_path / "set", read=PAIRS, max_tokens=40)
    assert Dataset.open(tmp_path / "set").lengths_tokens.max() == 40
    for (_, before, summary), row in zip(read_pairs(tmp_path / "set"), pairs(9), strict=True):
        book = before.removesuffix("\n\nSummary:\n")
        assert row["book"].startswith(book) and book and summary == row["summary"]


def test_options_of_pairs_need_a_summary_field(tmp_path) -> None:
    with pytest.raises(ConfigError, match="^prompt, separator and max_tokens: are for pairs"):
        EncodeOptions(max_tokens=40)
    (tmp_path / "a.txt").write_text("no fields")
    with pytest.raises(ConfigError, match="has no fields, so no 'summary'; give JSON lines"):
        run(str(tmp_path / "a.txt"), tmp_path / "set", read=PAIRS)
