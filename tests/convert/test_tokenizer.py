"""Exported tokenizers, read by transformers, encode as the documents of the training were encoded."""

import json

import pytest
import sentencepiece
import torch

from infini_train.checkpoint.fragments import whole_fragment
from infini_train.checkpoint.resharding import write_whole
from infini_train.checkpoint.store import open_checkpoint
from infini_train.convert.tokenizer import export_tokenizer
from infini_train.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = ["hi  you", "é\n x 123", " a", "🙂"]
ADDING = tokenizers.processors
PROCESSORS = {
    "none": None,
    "offsets": ADDING.ByteLevel(trim_offsets=False),
    "bos": ADDING.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]),
    "eos": ADDING.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]),
    "both": ADDING.RobertaProcessing(("</s>", 1), ("<s>", 0)),
}


def byte_level(folder, processor=None, names=("<s>", "</s>")):
    """A tokenizer.json with all bytes, and the names of its bos and eos in a tokenizer_config.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(names), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["you and you"], trainer)
    if processor is not None:
        model.post_processor = processor
    folder.mkdir(parents=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": names[0], "eos_token": names[-1]}))
    return load_tokenizer(folder / "tokenizer.json")


def checkpoint_of(run, tokenizer, **state):
    """A checkpoint that was trained with this tokenizer, in the folder of a run."""
    ids = {"tokenizer": tokenizer.sha256, "special_ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]}
    path = run / "checkpoints" / "step-00000001"
    write_whole(path, 1, iter([whole_fragment("a", "master", torch.zeros(1))]), {**ids, **state}, {})
    if tokenizer.file_name is not None:
        (run / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
    return open_checkpoint(path)


def export(run, tokenizer, folder, model_type="llama", **state):
    """What transformers loads, and what was told."""
    described = {"model_type": model_type}
    folder.mkdir()
    told = export_tokenizer(checkpoint_of(run, tokenizer, **state), folder, described)
    (folder / "config.json").write_text(json.dumps(described))
    return transformers.AutoTokenizer.from_pretrained(folder), told


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_trained_tokenizer_adds_bos_and_nothing_else(name, model_type, tmp_path):
    own = byte_level(tmp_path / "t", PROCESSORS[name])
    theirs, told = export(tmp_path / "run", own, tmp_path / "x", model_type)
    for text in TEXTS:
        assert theirs(text).input_ids == [own.bos_id, *own.encode(text).tolist()], text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (own.bos_id, own.eos_id)
    kept = (tmp_path / "x" / "tokenizer.json").read_bytes() == own.model_bytes
    assert kept == (name == "bos")
    assert told == (
        []
        if kept
        else ["tokenizer.json there adds bos (<s>) before each text, as each document of the training had it"]
    )


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_config_that_says_otherwise_is_changed(name, tmp_path):
    """Some classes there go by it, and not by tokenizer.json."""
    byte_level(tmp_path / "run", PROCESSORS["bos"])
    said = {"tokenizer_class": name, "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True, "chat": "x"}
    (tmp_path / "run" / "tokenizer_config.json").write_text(json.dumps({**said, "bos_token": "<s>"}))
    own = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    theirs, _ = export(tmp_path / "run", own, tmp_path / "x")
    ids = theirs("you").input_ids
    assert ids[0] == own.bos_id and ids.count(own.bos_id) == 1 and own.eos_id not in ids
    assert json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())["chat"] == "x"


def test_one_token_may_be_bos_and_eos(tmp_path):
    """As in Qwen's, where tokenizer_config.json names no bos and says that none is added."""
    byte_level(tmp_path / "run", names=("<|endoftext|>",))
    (tmp_path / "run" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "add_bos_token": False, "eos_token": "<|endoftext|>"})
    )
    own = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    theirs, _ = export(tmp_path / "run", own, tmp_path / "x", "qwen2")
    assert own.bos_id == own.eos_id == 0
    assert theirs("you").input_ids == [0, *own.encode("you").tolist()]


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_tokenizer_of_an_imported_model_stays_as_it_is(name, tmp_path):
    own = byte_level(tmp_path / "t", PROCESSORS[name])
    _, told = export(tmp_path / "run", own, tmp_path / "x", imported={"eos_token_id": 1})
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == own.model_bytes and told == []


@pytest.mark.parametrize("model_type", ["llama", "infini"])
def test_a_sentencepiece_model_adds_bos(model_type, tmp_path):
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["you and you"] * 9), model_writer=file, vocab_size=300, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    own = load_tokenizer(tmp_path / "t.model")
    theirs, told = export(tmp_path / "run", own, tmp_path / "x", model_type)
    for text in TEXTS:
        assert theirs(text).input_ids == [own.bos_id, *own.encode(text).tolist()], text
    assert told == ["tokenizer.model: each document of the training began with bos"]
    (tmp_path / "y").mkdir()
    told = export_tokenizer(open_checkpoint(tmp_path / "run/checkpoints/step-00000001"), tmp_path / "y",
                            {"model_type": "qwen2"})  # fmt: skip
    assert "transformers can't read a SentencePiece model for qwen2" in told[0]


def test_bytes_have_no_tokenizer_there(tmp_path):
    (tmp_path / "x").mkdir()
    described = {"model_type": "llama"}
    told = export_tokenizer(checkpoint_of(tmp_path / "run", load_tokenizer("byte")), tmp_path / "x", described)
    assert told == ["no tokenizer is written: ids are bytes, bos 256, eos 257; each document begins with bos"]
    assert described == {"model_type": "llama", "bos_token_id": 256, "eos_token_id": 257}


def test_the_files_beside_the_tokenizer_go_along(tmp_path):
    own = byte_level(tmp_path / "run")
    files = {
        "special_tokens_map.json": '{"eos_token": "</s>"}',
        "added_tokens.json": '{"<s>": 0}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "chat_templates/rag.jinja": "{{ documents }}",
    }
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run" / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_p": 0.5}')
    theirs, _ = export(tmp_path / "run", own, tmp_path / "x")
    for name, text in files.items():
        assert (tmp_path / "x" / name).read_text() == text
    generation = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 8, own.eos_id], "top_p": 0.5}  # documents of the training end with eos
    assert theirs.chat_template["tools"] == "{{ tools }}" and theirs.chat_template["default"] == "{{ messages }}"
