"""What a run leaves beside its checkpoints."""

import dataclasses
from pathlib import Path

import sentencepiece

from infini_train.config.data import DataConfig, NeedlesConfig
from infini_train.config.files import load_run
from infini_train.data.source import open_source
from infini_train.data.tokenizer import find_tokenizer
from infini_train.train.session import write_identity


def test_a_runs_copy_of_the_tokenizer_is_found_whatever_its_file_was_called(tmp_path):
    path, run = tmp_path / "things.model", tmp_path / "run"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" The pass key of the lamp is 12."] * 50), model_writer=file, vocab_size=300,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, model_type="bpe"
        )  # fmt: skip
    config = load_run("passkey_linear")
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
