"""An imported model computes what transformers computes; with closed gates, or in one segment, it still does."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from infini_train.checkpoint.store import open_checkpoint, resolve
from infini_train.checkpoint.weights import load_weights
from infini_train.config.attention import InfiniConfig, LocalConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.convert.importing import GATE_INIT, import_folder
from infini_train.inference.loading import open_trained
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer

TOKENS_BT = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, all heads": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama, wide heads": {"head_dim": 12},
    "llama, 3.1": {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama, in files": {"shard": "20KB"},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def logits_of(model, tokens_BT=TOKENS_BT):
    """(B, T, V) of one call."""
    grid = model.make_grids(torch.zeros(tokens_BT.shape, dtype=torch.bool), torch.ones(tokens_BT.shape), None)
    with torch.no_grad():
        return model.logits(model.decode(tokens_BT, grid, None)[0]).transpose(0, 1)


def with_attention(run_dir, attention):
    """The imported model with another attention, as `train.init_from` builds it."""
    checkpoint = open_checkpoint(resolve(run_dir))
    config = dataclasses.replace(open_trained(run_dir).config.model, attention=attention)
    model = Transformer(config)
    initialise(model, config, 0, added=load_weights(model, checkpoint))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, save, tmp_path, process_groups):
    theirs = save(tmp_path / "hf", name.split(",")[0], **MODELS[name])
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    with torch.no_grad():
        expected = theirs(TOKENS_BT).logits
    found = logits_of(open_trained(tmp_path / "run").model)
    assert expected.std() > 0.3  # there is something to compare
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_within_a_segment_infini_attention_changes_nothing(save, tmp_path, process_groups):
    """Its memory is empty, and so the gate is not applied, wherever it stands."""
    theirs = save(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    model = with_attention(tmp_path / "run", InfiniConfig(segment_tokens=48, gate_init=GATE_INIT))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model), theirs(TOKENS_BT).logits, rtol=1e-4, atol=1e-4)


def test_closed_gates_leave_the_segments_alone(save, tmp_path, process_groups):
    save(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    closed = with_attention(tmp_path / "run", InfiniConfig(segment_tokens=16, gate_init=-60.0))
    ajar = with_attention(tmp_path / "run", InfiniConfig(segment_tokens=16, gate_init=GATE_INIT))
    local = logits_of(with_attention(tmp_path / "run", LocalConfig(segment_tokens=16)))
    torch.testing.assert_close(logits_of(closed), local, rtol=1e-5, atol=1e-5)
    later = slice(16, None)
    shift = (logits_of(ajar)[:, later] - local[:, later]).std() / local[:, later].std()
    assert 0.001 < shift < 0.3  # near it, and not without the memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_kept_as_they_are_stored(dtype, save, tmp_path, process_groups):
    save(tmp_path / "hf", dtype=dtype)
    found = import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    assert found.dtype == getattr(torch, dtype)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    checkpoint = open_checkpoint(resolve(tmp_path / "run"))
    (_, values), *_ = checkpoint.read([checkpoint.whole("layers.1.attention.projections.linear_k.weight", "master")])
    assert torch.equal(values.view(16, 32), stored["model.layers.1.self_attn.k_proj.weight"])
    assert found.parameters == sum(tensor.numel() for tensor in stored.values())
    assert checkpoint.names("master")[0] == "embedding.weight"


def test_large_models_go_through_memory_file_by_file(save, tmp_path, monkeypatch):
    """No more tensors are alive at a time than fit into one file of the checkpoint, and one."""
    import weakref

    from infini_train.convert import folder

    save(tmp_path / "hf")
    alive, most = weakref.WeakSet(), 0
    read = folder.WeightsFolder.read

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, sum(one.nbytes for one in alive))
        return tensor

    monkeypatch.setattr(folder.WeightsFolder, "read", counted)
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte", max_file_bytes=2**13)
    largest = 263 * 32 * 4
    assert most <= 2 * largest
    assert len(list((tmp_path / "run" / "checkpoints" / "step-00000000").glob("*.safetensors"))) > 5


def test_the_run_folder_has_what_it_needs(save, tmp_path, process_groups):
    tokenizers = pytest.importorskip("tokenizers")
    save(tmp_path / "hf")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=262,
        special_tokens=["<start>", "<stop>", "<|eot_id|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["a text"], trainer)
    model.save(str(tmp_path / "hf" / "tokenizer.json"))
    names = {"bos_token": "<start>", "eos_token": {"content": "<stop>"}}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(names))
    found = import_folder(tmp_path / "hf", tmp_path / "run")
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "continue.yaml", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json"
    }  # fmt: skip
    trained = open_trained(run)
    assert (trained.tokenizer.bos_id, trained.tokenizer.eos_id) == (0, 1) and trained.step == 0
    assert found.tokenizer.sha256 == trained.tokenizer.sha256 == open_checkpoint(resolve(run)).state["tokenizer"]
    assert trained.config.train.window_tokens == 64 and trained.config.model.attention.kind == "full"
    (run / "tokenizer_config.json").unlink()  # a run that goes on has tokenizer.json only
    assert open_trained(run).tokenizer.eos_id == 1
    config = load_run(str(run / "continue.yaml"))
    assert config.train.init_from == str(run) and config.model.attention == InfiniConfig(
        segment_tokens=64, gate_init=GATE_INIT
    )
    assert dataclasses.replace(config.model, attention=trained.config.model.attention) == trained.config.model
    assert config.train.window_tokens == 16 * 64


# ------------------------------------------------------------------------------------------------------------- refused


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


WEIGHTS = {
    "missing": (drop("model.norm.weight"), "model.norm.weight is missing among the weights"),
    "unknown": (
        lambda tensors: tensors.update({"model.layers.0.experts": torch.zeros(1)}),
        "model.layers.0.experts is a weight that this model doesn't have",
    ),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 32)}),
        "lm_head.weight is [7, 32], but config.json asks for [263, 32]",
    ),
    "eight bits": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
        "model.norm.weight is stored as I8; take the model in bf16, fp16 or fp32",
    ),
    "not a number": (
        lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 2:4].fill_(float("nan")),
        "model.layers.1.mlp.up_proj.weight holds NaN or infinity, so its output would be NaN; use an undamaged"
        " checkpoint",
    ),
    "infinite": (
        lambda tensors: tensors["lm_head.weight"][-1, -1].fill_(-float("inf")),
        "lm_head.weight holds NaN or infinity, so its output would be NaN; use an undamaged checkpoint",
    ),
    "mixed": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}),
        "the weights are stored as torch.bfloat16, torch.float32; save the model in one of them",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name, save, tmp_path):
    save(tmp_path / "hf")
    change, line = WEIGHTS[name]
    rewrite(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(ConfigError) as refused:
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    assert str(refused.value) == f"{tmp_path / 'hf'}: {line}"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_frequencies_and_a_copy_of_the_embedding_are_passed_over(save, tmp_path, process_groups):
    theirs = save(tmp_path / "hf", tie_word_embeddings=True)
    embedding = theirs.model.embed_tokens.weight.detach().clone()
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": embedding}
    rewrite(tmp_path / "hf" / "model.safetensors", lambda tensors: tensors.update(more))
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    with torch.no_grad():
        found = logits_of(open_trained(tmp_path / "run").model)
        torch.testing.assert_close(found, theirs(TOKENS_BT).logits, rtol=1e-4, atol=1e-4)
    rewrite(tmp_path / "hf" / "model.safetensors", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from the embedding that config.json ties it to"):
        import_folder(tmp_path / "hf", tmp_path / "again", tokenizer="byte")


def test_tokenizers_that_do_not_fit_are_refused(save, tmp_path):
    save(tmp_path / "hf", vocab_size=250)
    with pytest.raises(ConfigError, match=r"holds no tokenizer.json or tokenizer.model; name one$"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^byte: has 259 ids, more than vocab_size 250 of .*/config.json"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")


def test_a_failure_leaves_nothing(save, tmp_path):
    """Stopped in the middle, and done again."""
    save(tmp_path / "hf")

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte", on_tensor=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    with pytest.raises(ConfigError, match=r"run: exists already; name a new folder"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_infinity_is_seen_in_every_dtype(dtype, save, tmp_path):
    save(tmp_path / "hf", dtype=dtype)
    rewrite(tmp_path / "hf" / "model.safetensors", lambda tensors: tensors["model.norm.weight"][0].fill_(float("inf")))
    with pytest.raises(ConfigError, match=r"model.norm.weight holds NaN or infinity"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_could_not_be_read_again_is_not_written(save, edit, tmp_path):
    """Whatever it is: here a field that is nested more deeply than a checkpoint's index may be."""
    save(tmp_path / "hf")
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    edit(tmp_path / "hf", note_of_the_author=deep)
    with pytest.raises(ConfigError, match=r"run: was not written, since it couldn't be read again: .*recursion"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama", "note": "\\udc80"}')
    with pytest.raises(ConfigError, match=r"config.json: holds '.udc80', which can't be written as UTF-8; remove it"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "chat_template.jinja",
                                  "tokenizer_config.json", "special_tokens_map.json"])  # fmt: skip
@pytest.mark.parametrize("make", ["pipe", "device"])
def test_pipes_and_devices_in_a_folder_are_refused(name, make, save, save_text_files, tmp_path):
    save(tmp_path / "hf")
    save_text_files(tmp_path / "hf")
    (tmp_path / "hf" / name).unlink()
    if make == "pipe":
        os.mkfifo(tmp_path / "hf" / name)
    else:
        (tmp_path / "hf" / name).symlink_to("/dev/zero")
    kind = {"pipe": "a named pipe", "device": "a device"}[make]
    with pytest.raises(ConfigError, match=rf"hf/{name}: .*is {kind}, not a file"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_pipe_among_the_weights_is_refused(save, tmp_path):
    save(tmp_path / "hf", shard="20KB")
    file = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=rf"{file.name}: is torn, or no safetensors file .*is a named pipe"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")


def test_a_header_that_claims_too_much_is_refused(save, tmp_path):
    save(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    for header in (b"[" * 100_000, b'{"a": ' * 100_000, b"{}" + b" " * 100_000):
        for size in (len(header), 2**62):
            file.write_bytes(size.to_bytes(8, "little") + header)
            with pytest.raises(ConfigError, match=r"model.safetensors: is torn|is missing among the weights"):
                import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")


@pytest.mark.parametrize("name", ["a: b #c", "'", "{x}", "ünï"])
def test_odd_names_of_runs_are_kept(name, save, tmp_path, process_groups):
    save(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / name, tokenizer="byte")
    assert open_trained(tmp_path / name).config.name == name
    assert load_run(str(tmp_path / name / "continue.yaml")).train.init_from == str(tmp_path / name)


def test_names_that_no_file_can_have_are_refused(save, call, tmp_path, capsys):
    save(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    places = [tmp_path / ("a" * 300), tmp_path / ("a" * 250), tmp_path / "file" / "run", "/proc/run", "/dev/null/run"]
    places += [tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "a\nb", tmp_path / "\u2028"]
    capsys.readouterr()
    for place in places:
        assert call("import", "hf", tmp_path / "hf", place, "--tokenizer", "byte") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]
