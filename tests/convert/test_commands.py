"""infini-train import and export, from a model's folder through training to a folder again."""

import json

from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.parallel import device


def test_import_goes_on_and_comes_back(save, call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    save(tmp_path / "hf", tie_word_embeddings=True)
    run = tmp_path / "run"
    assert call("import", "hf", tmp_path / "hf", run, "--tokenizer", "byte") == 0
    said = capsys.readouterr().out
    assert "tokenizer byte, 259 ids" in said and f"infini-train train {run / 'continue.yaml'}" in said
    for part in ("train", "validation"):
        with ShardWriter(tmp_path / part, ByteTokenizer()) as writer:
            writer.add(ByteTokenizer().encode("The grass is green. " * 40), n_bytes=800, id="document")
    settings = {
        "run_dir": tmp_path / "on",
        "data": f"{{train: {tmp_path / 'train'}, validation: {tmp_path / 'validation'}}}",
        "train": "{window_tokens: 128, batch_lanes: 2, max_steps: 2, precision: fp32}",
        "optim": "{warmup_steps: 0}",
    }
    changes = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert call("train", run / "continue.yaml", *changes) == 0
    said = capsys.readouterr().out
    assert f"new run with the weights of {run / 'checkpoints' / 'step-00000000'}; model.attention.kind: full" in said
    assert "gates 0.0" in said
    assert call("export", "hf", tmp_path / "on", tmp_path / "again", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "note: the weights are those of attention infini" in said and "bos 256, eos 257" in said
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert described["model_type"] == "llama" and described["tie_word_embeddings"] and described["eos_token_id"] == 257
    assert call("train", run / "continue.yaml", *changes, "--set", f"run_dir={run}") == 2
    assert "start a new run with train.init_from" in capsys.readouterr().err
    assert call("import", "hf", tmp_path / "hf", run) == 2
    assert capsys.readouterr().err == f"error: {run}: exists already; name a new folder\n"


def test_a_missing_tokenizer_is_named_by_its_flag(save, call, tmp_path, capsys):
    save(tmp_path / "hf", vocab_size=250)
    assert call("import", "hf", tmp_path / "hf", tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith("tokenizer.json or tokenizer.model; name one with --tokenizer\n")
    assert call("import", "hf", tmp_path / "hf", tmp_path / "run", "--tokenizer", "byte") == 2
    assert capsys.readouterr().err.endswith("config.json; name the model's own tokenizer with --tokenizer\n")
