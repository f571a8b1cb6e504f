"""The way back: bit for bit what was imported, what transformers computes with it, and what is said to be lost."""

import json

import pytest
import torch
from safetensors.torch import load_file

from infini_train.checkpoint.store import open_checkpoint, resolve
from infini_train.config.errors import ConfigError
from infini_train.config.model import RopeScaling
from infini_train.convert.exporting import export_checkpoint
from infini_train.convert.importing import import_folder


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"dtype": "bfloat16", "tie_word_embeddings": True}),
        ("llama", {"shard": "20KB"}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"dtype": "float16"}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_there_and_back_is_the_same_model(kind, changes, save, tmp_path):
    """Every bit of the weights, and every field of config.json."""
    save(tmp_path / "hf", kind, **changes)
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="byte")
    found = export_checkpoint(open_checkpoint(resolve(tmp_path / "run")), tmp_path / "again", max_file_bytes=20_000)
    before, after = weights_of(tmp_path / "hf"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys() and found.parameters == sum(tensor.numel() for tensor in after.values())
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert old.pop("dtype", None) == new.pop("torch_dtype") and old == new
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "rope_theta": 500.0},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"rope_scaling": RopeScaling(factor=4.0, original_tokens=40)},
    ],
)
def test_transformers_computes_the_same(changes, tiny, write_checkpoint, tmp_path, process_groups):
    transformers = pytest.importorskip("transformers")
    model = write_checkpoint(tmp_path / "run", tiny("full", **changes))
    checkpoint = open_checkpoint(resolve(tmp_path / "run"))
    found = export_checkpoint(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert next(theirs.parameters()).dtype == torch.float32
    tokens_BT = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(1))
    grid = model.make_grids(torch.zeros(tokens_BT.shape, dtype=torch.bool), torch.ones(tokens_BT.shape), None)
    with torch.no_grad():
        expected = model.logits(model.decode(tokens_BT, grid, None)[0]).transpose(0, 1)
        torch.testing.assert_close(theirs(tokens_BT).logits, expected, rtol=1e-4, atol=1e-4)
    places = f"neither in {checkpoint.path} nor in {tmp_path / 'run'}"
    assert found.notes == (f"no tokenizer is written: that of the weights is {places}",)
    assert theirs.config.max_position_embeddings == 32


def test_a_model_with_a_convolution_is_refused(tiny, write_checkpoint, tmp_path, process_groups):
    write_checkpoint(tmp_path / "run", tiny("linear-conv"))
    checkpoint = open_checkpoint(resolve(tmp_path / "run"))
    with pytest.raises(
        ConfigError, match="model.attention.conv_tokens: 3: queries and keys are made of several tokens"
    ):
        export_checkpoint(checkpoint, tmp_path / "hf", plain=True)
    assert not (tmp_path / "hf").exists()


def test_what_is_lost_is_told(tiny, write_checkpoint, tmp_path, process_groups):
    write_checkpoint(tmp_path / "run", tiny("linear-overlap"))
    checkpoint = open_checkpoint(resolve(tmp_path / "run"))
    found = export_checkpoint(checkpoint, tmp_path / "hf", plain=True, dtype=torch.bfloat16)
    assert found.notes[0] == (
        "the weights are those of attention infini; the model there has no memory: it attends to the whole text, not to"
        " segments, and the gates are left out"
    )
    weights = weights_of(tmp_path / "hf")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert len(weights) == len(checkpoint.names("master")) - 2  # a gate vector a layer
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["torch_dtype"] == "bfloat16" and described["max_position_embeddings"] == 11
    with pytest.raises(ConfigError, match="hf: exists already; name a new folder"):
        export_checkpoint(checkpoint, tmp_path / "hf")


def test_memory_tokens_can_not_be_left_out(tiny, write_checkpoint, tmp_path, process_groups):
    write_checkpoint(tmp_path / "run", tiny("rmt"))
    with pytest.raises(ConfigError, match=r"^model\.attention\.kind: rmt reads memory tokens between segments"):
        export_checkpoint(open_checkpoint(resolve(tmp_path / "run")), tmp_path / "hf", plain=True)
    assert not (tmp_path / "hf").exists()


def test_the_tokenizer_goes_along(save, tmp_path):
    """Also where only tokenizer.json lies in the run's folder, as training leaves it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    save(tmp_path / "hf")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(["a text"], trainer)
    model.save(str(tmp_path / "hf" / "tokenizer.json"))
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert export_checkpoint(open_checkpoint(resolve(tmp_path / "run")), tmp_path / "again").notes == ()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.encode("a text", add_special_tokens=False) == model.encode("a text").ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.decode(tokenizer.encode("a text", add_special_tokens=False)) == "a text"
