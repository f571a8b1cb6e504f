"""A checkpoint into a folder in Hugging Face's layout, as far as that can hold it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from infini_train.checkpoint.index import DTYPES
from infini_train.checkpoint.reader import Checkpoint
from infini_train.checkpoint.sync import check_new, write_synced
from infini_train.config.files import validate
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig
from infini_train.convert.family import describe_model, list_weights
from infini_train.convert.folder import CONFIG, MAX_FILE_BYTES, name_dtype, new_folder, size_bytes, write_weights
from infini_train.convert.importing import TOKENIZER_CONFIG
from infini_train.data.huggingface import HuggingFaceTokenizer
from infini_train.data.tokenizer import find_tokenizer


class Exported(NamedTuple):
    """What was written, and what was lost on the way."""

    model: ModelConfig
    dtype: torch.dtype
    parameters: int
    notes: tuple[str, ...]


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_tensor: Callable[[int, int], object] = lambda done, total: None,
) -> Exported:
    """Writes config.json, weights and tokenizer. Tensors go through memory file by file.

    Args:
        checkpoint: opened, and better verified.
        folder: it must not exist; appears complete, or not at all.
        dtype: of the weights; None: as they are stored (fp32 of a run, the given ones of an import).
        max_file_bytes: tensors are spread over files of about this size.
        on_tensor: called with the elements written so far and those of all.

    Raises:
        ConfigError: the model has what the other side lacks, or the folder exists.
    """
    check_new(folder)
    config = validate(checkpoint.config)
    model = config.model
    losses = {each.kind: loss for each in model.layers if (loss := each.check_export()) is not None}
    table = list_weights(model)
    stored = {entry.name: DTYPES[entry.dtype] for entry in checkpoint.index.fragments if entry.kind == "master"}
    used = dtype or stored[next(iter(table))]
    sizes = {theirs: size_bytes(shape, used) for theirs, shape in table.values()}
    total = sum(size // used.itemsize for size in sizes.values())

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for piece, values in checkpoint.read(checkpoint.whole(ours, "master", used) for ours in table):
            done += piece.numel
            on_tensor(done, total)
            yield table[piece.name].theirs, values.view(piece.global_shape)

    described = {**_describe(config, checkpoint), "torch_dtype": name_dtype(used)}
    with new_folder(folder) as aside:
        write_weights(aside, weights(), sizes, max_file_bytes)
        note = _copy_tokenizer(checkpoint, aside, described)
        write_synced(aside / CONFIG, json.dumps(described, indent=2) + "\n")
    notes = [f"the weights are those of attention {kind}; the model there {loss}" for kind, loss in losses.items()]
    return Exported(model, used, total, (*notes, *([note] if note else [])))


def _describe(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says; of an imported checkpoint what it said before."""
    described = describe_model(config.model)
    original = checkpoint.state.get("imported")
    if original is not None:
        return {name: value for name, value in original.items() if name != "dtype"}
    attention = config.model.attention
    segment = attention.segment_tokens
    positions = config.train.window_tokens if segment is None else segment + attention.seen_tokens
    return {**described, "max_position_embeddings": positions}


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path, described: dict[str, Any]) -> str | None:
    """Copies the checkpoint's tokenizer, and names its bos and eos; a line if that can't be done."""
    path = checkpoint.path.resolve()
    found = find_tokenizer(path, checkpoint.state.get("tokenizer"), checkpoint.special_ids)
    if found is None:
        return f"no tokenizer is written: that of the weights is neither in {path} nor in {path.parent.parent}"
    tokenizer, file = found
    if "bos_token_id" not in described:
        described |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if file is None:
        return "no tokenizer is written: ids are bytes, bos 256, eos 257"
    shutil.copyfile(file, folder / file.name)
    names = file.parent / TOKENIZER_CONFIG
    if names.is_file():
        shutil.copyfile(names, folder / names.name)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        special = {"bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id)}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=2)
        write_synced(folder / TOKENIZER_CONFIG, text + "\n")
    return None
