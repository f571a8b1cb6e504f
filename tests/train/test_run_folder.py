"""Who may write into a run's folder, and when; what a run leaves there beside its checkpoints."""

import dataclasses
import fcntl
import logging
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece

from infini_train.config.data import DataConfig, NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.data.source import open_source
from infini_train.data.tokenizer import find_tokenizer
from infini_train.train.loop import train
from infini_train.train.run_folder import LOCK, hold_folder, write_identity


def test_a_runs_copy_of_the_tokenizer_is_found_whatever_its_file_was_called(tmp_path):
    path, run = tmp_path / "things.model", tmp_path / "run"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" The pass key of the lamp is 12."] * 50), model_writer=file, vocab_size=300,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, model_type="bpe"
        )  # fmt: skip
    config = load_run("passkey_no_conv")
    for used in (path, run / "tokenizer.model"):  # then its own copy
        data = DataConfig(synthetic=NeedlesConfig(tokenizer=str(used)))
        given = dataclasses.replace(config, data=data, run_dir=str(run))
        source = open_source(given)
        run.mkdir(exist_ok=True)
        write_identity(given, source)
        found = find_tokenizer(run / "checkpoints" / "step-00000001", source.tokenizer_sha256, source.special_ids)
        assert found is not None
        tokenizer, file = found
        assert file == run / "tokenizer.model" and Path(file).read_bytes() == path.read_bytes()
        assert tokenizer.sha256 == source.tokenizer_sha256


def test_an_older_start_ends_before_it_writes(configure, monkeypatch):
    config = configure("log.every_steps=100", "checkpoint.every_steps=2")
    (config.directory / "launch").mkdir(parents=True)
    (config.directory / "launch" / "fence").write_text("7.1\n")
    monkeypatch.setenv("INFINI_TRAIN_START", "7.0")
    with pytest.raises(ConfigError, match=r"^run_dir: start 7\.1 of the job has taken .* over; this is 7\.0$"):
        train(config)
    assert not list((config.directory / "checkpoints").glob("step-*"))
    monkeypatch.setenv("INFINI_TRAIN_START", "7.1")
    assert train(config).step == config.train.total_steps


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_start_reads_and_writes_nothing(configure):
    """A broken checkpoint would be refused, and a pipe waited for, by whoever reads them."""
    config = configure()
    broken = config.directory / "checkpoints" / "step-00000001"
    broken.mkdir(parents=True)
    os.mkfifo(broken / "index.json")
    stacks = config.directory / "launch" / "logs" / "local" / "stacks-0.txt"
    stacks.parent.mkdir(parents=True)
    stacks.write_text("of the run that holds the folder")
    with hold_folder(config.directory, is_first=True):
        before = listing(config.directory)
        with pytest.raises(ConfigError, match=r"^run_dir: another process is training in .*; wait for it or stop it$"):
            train(config)
        assert listing(config.directory) == before


class _OnceItWaits(logging.Handler):
    """Lets the folder go, with a new checkpoint in it, when the second start waits for it."""

    def __init__(self, act) -> None:
        super().__init__()
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        if "still holds" in record.getMessage() and self.act is not None:
            act, self.act = self.act, None
            act()


def test_the_latest_start_of_a_job_waits_for_the_one_before_and_goes_on_from_it(
    configure, monkeypatch, tmp_path, lines
):
    train(configure("train.max_steps=3", "optim.schedule=wsd", run="other"))
    config = configure("optim.schedule=wsd")
    (config.directory / "launch").mkdir(parents=True)
    (config.directory / "launch" / "fence").write_text("7.1\n")
    monkeypatch.setenv("INFINI_TRAIN_START", "7.1")
    holder = (config.directory / LOCK).open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)

    def leave() -> None:
        shutil.copytree(tmp_path / "other" / "checkpoints", config.directory / "checkpoints")
        holder.close()

    logger, handler = logging.getLogger("infini_train.train"), _OnceItWaits(leave)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        assert train(config).step == config.train.total_steps
    finally:
        logger.removeHandler(handler)
    assert handler.act is None and any("resumed from" in line and "(step 3)" in line for line in lines)


def test_a_refused_run_leaves_no_folder(configure, tmp_path):
    config = configure("data.train=nowhere", run="a/b/run")
    with pytest.raises(ConfigError, match="nowhere"):
        train(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_planted_lock_is_refused(configure, tmp_path, kind):
    config = configure()
    config.directory.mkdir()
    (tmp_path / "victim").write_text("precious")
    if kind == "link":
        (config.directory / LOCK).symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(config.directory / LOCK)
    with pytest.raises(ConfigError, match=rf"^run_dir: {config.directory}/\.lock is a .*{kind}.*; remove it$"):
        train(config)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\0b", "is not a valid folder name"),
        ("a\ud800", "is not a valid folder name"),
        ("a\udcff", "is not a valid folder name"),
        ("x" * 300, "File name too long"),
        ("a/" * 3000, "File name too long"),
        ("new/" + "x" * 300, "File name too long"),
        ("/proc/x", "No such file or directory"),
        ("/dev/null", "Not a directory"),
        ("/dev/null/x", "Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_made(configure, tmp_path, monkeypatch, name, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^run_dir: [^\n]*{problem}[^\n]*$") as caught:
        train(dataclasses.replace(configure(), run_dir=name))
    assert len(str(caught.value)) < 500 and list(tmp_path.iterdir()) == []


def test_a_deep_folder_is_made(configure, tmp_path, monkeypatch):
    """Deeper than Python's own limit on nested calls."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), hold_folder(Path("a/" * 1200), is_first=True):
        assert (tmp_path / ("a/" * 1200) / LOCK).exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
