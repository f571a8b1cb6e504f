"""infini-data as people call it: a process of its own, its exit status, its screen, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infini_train.data.corpus import Corpus
from infini_train.data.lanes import LaneReader
from infini_train.data.shards import Dataset

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "data_tools"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


def write_books(folder: Path, n: int = 12) -> None:
    (folder / "books").mkdir()
    for i in range(n):
        words = " ".join(f"word{(i * k) % 37} and\n" for k in range(400))
        (folder / "books" / f"{i:02d}.txt").write_text(f"Book {i}\n\n{words}", encoding="utf-8")


def test_from_text_to_lanes(tmp_path) -> None:
    write_books(tmp_path)
    trained = call(tmp_path, "tokenizer", "books", "--out", "t.model", "--vocab-size", "290")
    assert (trained.returncode, trained.stderr) == (0, ""), trained.stderr
    assert trained.stdout.startswith("t.model: 290 tokens (bpe), trained on ")
    encoded = call(tmp_path, "encode", "books", "--tokenizer", "t.model", "--out", "data", "--holdout", "0.2")
    assert (encoded.returncode, encoded.stderr) == (0, ""), encoded.stderr
    assert [line.split(":")[0] for line in encoded.stdout.splitlines()] == ["data/train", "data/validation"]
    looked = call(tmp_path, "inspect", "data/train")
    assert looked.returncode == 0 and "sources\n  books: " in looked.stdout
    first = call(tmp_path, "inspect", "data/train", "--document", "0").stdout
    assert '"id": "books/' in first and "\nBook " in first and "more tokens)" in first
    assert call(tmp_path, "verify", "data/train").returncode == 0
    manifest = json.loads(call(tmp_path, "inspect", "data/train", "--json").stdout)
    reader = LaneReader(Corpus.of(Dataset.open(tmp_path / "data" / "train"), 0), 2, 64)
    batch, _ = reader.next(reader.start())
    assert batch is not None and batch.tokens_BT[:, 0].tolist() == [manifest["bos_id"]] * 2


def test_help_shows_examples(tmp_path) -> None:
    assert "1. infini-data tokenizer" in call(tmp_path, "--help").stdout
    for command in ("tokenizer", "encode", "inspect", "verify", "stats", "merge", "split"):
        shown = call(tmp_path, command, "--help")
        assert shown.returncode == 0 and f"  infini-data {command} " in shown.stdout


MISTAKES = {
    "error: nothing: no such file or folder": ["encode", "nothing", "--tokenizer", "byte", "--out", "data"],
    "error: no.model: the tokenizer can't be read": ["encode", "books", "--tokenizer", "no.model", "--out", "data"],
    "error: books/00.txt: is not a SentencePiece model": [
        "encode",
        "books",
        "--tokenizer",
        "books/00.txt",
        "--out",
        "data",
    ],
    "error: --vocab-size: too little text": ["tokenizer", "books", "--out", "t.model", "--vocab-size", "9999"],
    "error: data: no such dataset folder": ["inspect", "data"],
    "error: s3://bucket/data: only training and evaluation read datasets at URLs; copy it first": [
        "verify",
        "s3://bucket/data",
    ],
    "error: bad.txt:1: byte 0 is not valid UTF-8": ["encode", "bad.txt", "--tokenizer", "byte", "--out", "data"],
    "error: books: is not empty": ["encode", "books", "--tokenizer", "byte", "--out", "books"],
    "error: --holdout: 2.0 is not a share": ["encode", "books", "--tokenizer", "byte", "--out", "d", "--holdout", "2"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line_and_status_2(tmp_path, message) -> None:
    write_books(tmp_path, 2)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    before = sorted(tmp_path.rglob("*"))
    result = call(tmp_path, *MISTAKES[message])
    error = result.stderr
    assert (result.returncode, result.stdout) == (2, "") and error.startswith(message), error
    assert str(tmp_path) not in error and error.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_bad_text_is_skipped_on_demand_and_told(tmp_path) -> None:
    write_books(tmp_path, 2)
    (tmp_path / "books" / "bad.txt").write_bytes(b"ab\xff")
    result = call(tmp_path, "encode", "books", "--tokenizer", "byte", "--out", "d", "--on-bad-record", "skip")
    assert result.returncode == 0 and "d: 2 documents" in result.stdout
    assert "left out 1 bad records" in result.stderr and "books/bad.txt:1: byte 2 is not valid UTF-8" in result.stderr


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path, sent, status) -> None:
    """The source is a pipe that stays open: the run is in the midst of it when the signal comes."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    arguments = [*COMMAND, "encode", "pipe.jsonl", "--tokenizer", "byte", "--out", "data", "--holdout", "0.5"]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "pipe.jsonl").open("wb") as pipe:
        pipe.write(b'{"text": "x"}\n')
        pipe.flush()
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".data.partial/.task*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(tmp_path.glob(".data.partial/.task*"))
        process.send_signal(sent)
        _, screen = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in screen
    assert [p.name for p in tmp_path.iterdir()] == ["pipe.jsonl"]


def start_encoding(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A process stopped in the midst of its source, a pipe: it opens that when it has begun to write."""
    pipe = folder / "pipe.jsonl"
    if not pipe.exists():
        os.mkfifo(pipe)
    command = [*COMMAND, "encode", "pipe.jsonl", "--tokenizer", "byte", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT)
    with pipe.open("wb"):
        process.send_signal(signal.SIGSTOP)
    return process


def test_a_second_run_waits_for_the_first_to_end(tmp_path) -> None:
    """A living process holds its work, although it is stopped; what a killed one left is taken over or thrown away."""
    write_books(tmp_path, 3)
    living = start_encoding(tmp_path, "--out", "data")
    try:
        refused = call(tmp_path, "encode", "books", "--tokenizer", "byte", "--out", "data")
        assert (refused.returncode, refused.stdout) == (2, "") and "another process is at this work" in refused.stderr
    finally:
        living.kill()
        living.wait(30)
    assert (tmp_path / ".data.partial").exists()
    refused = call(tmp_path, "encode", "books", "--tokenizer", "byte", "--out", "data")
    assert "another command (sources differs)" in refused.stderr and "--restart" in refused.stderr
    encoded = call(tmp_path, "encode", "books", "--tokenizer", "byte", "--out", "data", "--restart")
    assert encoded.returncode == 0, encoded.stderr
    assert not list(tmp_path.rglob(".*partial*"))


def test_interrupted_training_leaves_nothing(tmp_path) -> None:
    """In the C++ training the signal ends the process itself; a shell shows 130 for it, too."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    arguments = [*COMMAND, "tokenizer", "pipe.jsonl", "--out", "t.model"]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "pipe.jsonl").open("wb"):
        process.send_signal(signal.SIGINT)
        _, screen = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in screen
    assert [p.name for p in tmp_path.iterdir()] == ["pipe.jsonl"]
