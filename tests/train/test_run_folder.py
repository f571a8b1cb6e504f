"""What a run leaves beside its checkpoints, and the fence that ends an older start of its job."""

import dataclasses
from pathlib import Path

import pytest
import sentencepiece

from infini_train.config.data import DataConfig, NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.data.source import open_source
from infini_train.data.tokenizer import find_tokenizer
from infini_train.train.loop import train
from infini_train.train.run_folder import write_identity


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
