"""A checkpoint's tokenizer in Hugging Face's layout: what encodes there as the texts of the training were encoded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infini_train.checkpoint.reader import Checkpoint
from infini_train.checkpoint.sync import write_synced
from infini_train.data.huggingface import HuggingFaceTokenizer
from infini_train.data.model_files import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    copy_model_files,
    parse_end_ids,
    read_json,
)
from infini_train.data.tokenizer import SentencePieceTokenizer, find_tokenizer

GENERIC_CLASS = "PreTrainedTokenizerFast"
ADDING_BOS = {"add_bos_token": True, "add_eos_token": False}
INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}  # generic classes of transformers 4 would give more
KEEPS_TEXT = "ByteLevel"  # the one post-processor that adds no tokens
SENTENCEPIECE_TYPES = ("llama", "mistral", "infini")  # model types whose tokenizer there may be a SentencePiece model


def export_tokenizer(checkpoint: Checkpoint, folder: Path, described: dict[str, Any]) -> list[str]:
    """Writes the checkpoint's tokenizer and the files that go with it.

    Those of an imported model that was not trained here stay as they are. Elsewhere every document of the training
    began with bos, so the tokenizer there is made to add it.

    Args:
        checkpoint: opened.
        folder: is there.
        described: the values of config.json; gets the ids of bos and eos if it has none.

    Returns:
        Lines about what could not be done, and what was changed.

    Raises:
        ConfigError: a file can't be read.
    """
    path = checkpoint.path.resolve()
    is_original = "imported" in checkpoint.state
    found = find_tokenizer(path, checkpoint.state.get("tokenizer"), checkpoint.special_ids)
    if found is None:
        return [f"no tokenizer is written: that of the weights is neither in {path} nor in {path.parent.parent}"]
    tokenizer, file = found
    if "bos_token_id" not in described:
        described |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    home = path.parent.parent if file is None else file.parent
    copy_model_files(home, folder, of_tokenizer=file is not None)
    if (folder / GENERATION_CONFIG).exists() and not is_original:
        _add_end(folder / GENERATION_CONFIG, tokenizer.eos_id)
    if file is None:
        return ["no tokenizer is written: ids are bytes, bos 256, eos 257; each document begins with bos"]
    (folder / file.name).write_bytes(tokenizer.model_bytes)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _export_json(tokenizer, folder, is_original)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return [] if is_original else _export_sentencepiece(tokenizer, folder, described["model_type"])


def _add_end(path: Path, end: int) -> None:
    tree = read_json(path)
    ends = parse_end_ids(tree, path)
    if ends and end not in ends:
        write_synced(path, json.dumps({**tree, "eos_token_id": [*ends, end]}, indent=2) + "\n")


def _export_json(tokenizer: HuggingFaceTokenizer, folder: Path, is_original: bool) -> list[str]:
    bos, eos = tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)
    names = {"tokenizer_class": GENERIC_CLASS, "bos_token": bos, "eos_token": eos, **INPUTS}
    config = _read_config(folder)
    if is_original:
        if config is None:
            _write_config(folder, names)
        return []
    if bos is None:
        return [f"each document began with id {tokenizer.bos_id}, which the tokenizer there can't add"]
    _write_config(folder, {**names, **(config or {}), "bos_token": bos, **ADDING_BOS})
    if _begins_with_bos(tokenizer):
        return []
    tree = json.loads(tokenizer.model_bytes)
    tree["post_processor"] = _adding_bos(bos, tokenizer.bos_id, tree.get("post_processor"))
    write_synced(folder / tokenizer.file_name, json.dumps(tree, ensure_ascii=False))
    return [f"{tokenizer.file_name} there adds bos ({bos}) before each text, as each document of the training had it"]


def _begins_with_bos(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether the file itself makes the library put bos before a text, and nothing after it."""
    import tokenizers

    ids = tokenizers.Tokenizer.from_buffer(tokenizer.model_bytes).encode("a text").ids
    return bool(ids == [tokenizer.bos_id, *tokenizer.encode("a text").tolist()])


def _adding_bos(bos: str, bos_id: int, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """A post-processor of the tokenizers library that begins each text with bos, and adds nothing else."""

    def text(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    adding = {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    if earlier is None or earlier.get("type") != KEEPS_TEXT:
        return adding
    return {"type": "Sequence", "processors": [dict(earlier), adding]}


def _export_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path, model_type: str) -> list[str]:
    names = {f"{name}_token": token for name, token in tokenizer.special_tokens().items()}
    _write_config(
        folder, {"tokenizer_class": GENERIC_CLASS, **INPUTS, **names, **(_read_config(folder) or {}), **ADDING_BOS}
    )
    note = f"{tokenizer.file_name}: each document of the training began with bos"
    if model_type not in SENTENCEPIECE_TYPES:
        note += f"; transformers can't read a SentencePiece model for {model_type}: encode with sentencepiece itself"
    return [note]


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / TOKENIZER_CONFIG
    return read_json(path) if path.exists() else None


def _write_config(folder: Path, tree: Mapping[str, Any]) -> None:
    write_synced(folder / TOKENIZER_CONFIG, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
