"""infini-train import and export, from a model's folder through training to a folder again."""

import json

import pytest
from safetensors.torch import load_file, save_file

from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer, load_tokenizer
from infini_train.inference.loading import open_trained
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
    assert call("export", "hf", tmp_path / "on", tmp_path / "plain", "--plain", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "note: the weights are those of attention infini" in said and "bos 256, eos 257" in said
    described = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert described["model_type"] == "llama" and described["tie_word_embeddings"] and described["eos_token_id"] == 257
    assert call("export", "hf", tmp_path / "on", tmp_path / "again") == 0
    assert "with its memory: load it with trust_remote_code=True" in capsys.readouterr().out
    card = (tmp_path / "again" / "README.md").read_text()
    assert "512 tokens in 2 steps" in card and "infini, segments of 64 tokens" in card
    assert call("import", "hf", tmp_path / "again", tmp_path / "back", "--tokenizer", "byte") == 0
    assert "note:" not in capsys.readouterr().out
    assert call("train", run / "continue.yaml", *changes, "--set", f"run_dir={run}") == 2
    assert "start a new run with train.init_from" in capsys.readouterr().err
    assert call("import", "hf", tmp_path / "hf", run) == 2
    assert capsys.readouterr().err == f"error: {run}: exists already; name a new folder\n"


@pytest.fixture
def talker(save, save_text_files, edit, tmp_path):
    """A model that always says token 100, which one of its files names as an end."""
    save(tmp_path / "hf")
    save_text_files(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    weights["model.embed_tokens.weight"].fill_(1)
    weights["model.norm.weight"].fill_(1)
    weights["lm_head.weight"].fill_(-1)
    weights["lm_head.weight"][100] = 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "hf", bos_token_id=0, eos_token_id=1)
    (tmp_path / "hf" / "generation_config.json").unlink()
    return tmp_path / "hf"


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "both", "neither"])
def test_every_end_of_a_model_stops_generation(place, talker, edit, call, tmp_path, capsys):
    """In the run that is imported, and in a run that begins with it."""
    generation = {"eos_token_id": [1, 100] if place == "generation_config.json" else 1, "top_p": 0.9}
    if place in ("config.json", "both"):
        edit(talker, eos_token_id=[1, 100])
    if place != "config.json":
        (talker / "generation_config.json").write_text(json.dumps(generation))
    assert call("import", "hf", talker, tmp_path / "run") == 0
    capsys.readouterr()
    settings = ("--prompt", "hi", "--temperature", 0, "--max-new-tokens", 5, "--no-echo")
    assert call("generate", tmp_path / "run", *settings) == 0
    said = capsys.readouterr().out
    assert (said == "\n") == (place != "neither")
    assert call("generate", tmp_path / "run", *settings, "--ignore-end") == 0
    ignored = capsys.readouterr().out
    assert len(ignored) > 4 and (place != "neither" or said == ignored)


@pytest.mark.parametrize("generation", [None, {"top_p": 0.9}, {"eos_token_id": 1}, {"eos_token_id": [100]}])
def test_no_end_is_lost_on_the_way_out(generation, talker, edit, call, tmp_path):
    """transformers takes the ends of generation_config.json alone, where it names any."""
    edit(talker, eos_token_id=[1, 100])
    if generation is not None:
        (talker / "generation_config.json").write_text(json.dumps(generation))
    assert call("import", "hf", talker, tmp_path / "run") == 0
    assert call("export", "hf", tmp_path / "run", tmp_path / "again") == 0
    said = json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"]
    assert set(said) >= {1, 100} if generation != {"eos_token_id": [100]} else said == [100]


def test_what_lies_beside_the_weights_goes_along(talker, call, tmp_path, capsys, monkeypatch):
    """From a model to the run, to a run that begins with it, and out of both."""
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    (talker / "generation_config.json").write_text('{"eos_token_id": [1, 100]}')
    (talker / "merges.txt").write_text("")
    files = ["chat_template.jinja", "generation_config.json", "special_tokens_map.json"]
    assert call("import", "hf", talker, tmp_path / "run") == 0
    assert f"note: {talker}: not taken along: merges.txt\n" in capsys.readouterr().out
    assert call("export", "hf", tmp_path / "run", tmp_path / "again") == 0
    for name in [*files, "tokenizer.json", "tokenizer_config.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (talker / name).read_bytes(), name
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    with ShardWriter(tmp_path / "data", tokenizer) as writer:
        writer.add(tokenizer.encode("The grass is green. " * 20), n_bytes=400, id="document")
    settings = {
        "run_dir": tmp_path / "on",
        "data": f"{{train: {tmp_path / 'data'}, validation: null}}",
        "train": "{window_tokens: 64, batch_lanes: 1, max_steps: 1, precision: fp32}",
        "optim": "{warmup_steps: 0}",
        "eval": "{every_steps: null}",
    }
    changes = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert call("train", tmp_path / "run" / "continue.yaml", *changes) == 0
    for name in files:
        assert (tmp_path / "on" / name).read_bytes() == (talker / name).read_bytes(), name
    assert open_trained(tmp_path / "on").end_ids == (1, 100)
    capsys.readouterr()
    assert call("export", "hf", tmp_path / "on", tmp_path / "trained") == 0
    assert "note: tokenizer.json there adds bos (<s>) before each text" in capsys.readouterr().out
    for name in files:
        assert (tmp_path / "trained" / name).read_bytes() == (talker / name).read_bytes(), name
    template = json.loads((tmp_path / "trained" / "tokenizer_config.json").read_text())
    assert template["add_bos_token"] and template["bos_token"] == "<s>"


def test_exports_into_places_that_can_not_be_written_are_refused(talker, call, tmp_path, capsys):
    assert call("import", "hf", talker, tmp_path / "run") == 0
    (tmp_path / "file").write_text("")
    before = sorted(path for path in tmp_path.rglob("*"))
    places = [tmp_path / ("a" * 300), tmp_path / ("a" * 250), tmp_path / "file" / "x", "/proc/x", "/dev/full/x"]
    places += ["/dev/full", tmp_path / "run", tmp_path / "file"]
    for place in places:
        capsys.readouterr()
        code = call("export", "hf", tmp_path / "run", place)
        assert (code, capsys.readouterr().err.count("\n")) == (2, 1), place
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_missing_tokenizer_is_named_by_its_flag(save, call, tmp_path, capsys):
    save(tmp_path / "hf", vocab_size=250)
    assert call("import", "hf", tmp_path / "hf", tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith("tokenizer.json or tokenizer.model; name one with --tokenizer\n")
    assert call("import", "hf", tmp_path / "hf", tmp_path / "run", "--tokenizer", "byte") == 2
    assert capsys.readouterr().err.endswith("config.json; name the model's own tokenizer with --tokenizer\n")
