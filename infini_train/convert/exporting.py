"""A checkpoint into a folder in Hugging Face's layout, as far as that can hold it."""

import functools
import json
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
from infini_train.convert.card import CARD, describe_run
from infini_train.convert.family import describe_model, list_weights
from infini_train.convert.folder import (
    CONFIG,
    MAX_FILE_BYTES,
    name_dtype,
    new_folder,
    require_finite,
    size_bytes,
    write_weights,
)
from infini_train.convert.tokenizer import export_tokenizer
from infini_train.convert.with_memory import CODE, MODEL_TYPE, describe_with_memory, list_all_weights, read_code


class Exported(NamedTuple):
    """What was written, and what was lost on the way."""

    model: ModelConfig
    dtype: torch.dtype
    parameters: int
    keeps_memory: bool
    notes: tuple[str, ...]


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    plain: bool = False,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_tensor: Callable[[int, int], object] = lambda done, total: None,
) -> Exported:
    """Writes config.json, weights and tokenizer. Tensors go through memory file by file.

    A model whose layers all have full attention becomes a plain Llama, Qwen2 or Qwen3. Any other one keeps its memory,
    and the code that it needs is written beside it.

    Args:
        checkpoint: opened, and better verified.
        folder: it must not exist; appears complete, or not at all.
        plain: write a plain model in any case; what is lost is told.
        dtype: of the weights; None: as they are stored (fp32 of a run, the given ones of an import).
        max_file_bytes: tensors are spread over files of about this size.
        on_tensor: called with the elements written so far and those of all.

    Raises:
        ConfigError: the model has what the other side lacks, a weight is NaN or infinity, or the folder exists.
    """
    check_new(folder)
    config = validate(checkpoint.config)
    model = config.model
    keeps_memory = not plain and any(layer.kind != "full" for layer in model.layers)
    if keeps_memory:
        table, losses = list_all_weights(model), {}
    else:
        losses = {each.kind: loss for each in model.layers if (loss := each.check_export()) is not None}
        table = list_weights(model)
    stored = {entry.name: DTYPES[entry.dtype] for entry in checkpoint.index.fragments if entry.kind == "master"}
    # Of a bf16 run what is trained is stored in fp32, and what is not in bf16.
    used = dtype or functools.reduce(torch.promote_types, (stored[name] for name in table))
    sizes = {theirs: size_bytes(shape, used) for theirs, shape in table.values()}
    total = sum(size // used.itemsize for size in sizes.values())

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for piece, values in checkpoint.read(checkpoint.whole(ours, "master", used) for ours in table):
            done += piece.numel
            on_tensor(done, total)
            theirs = table[piece.name].theirs
            yield theirs, require_finite(values, f"{checkpoint.path}: {theirs}").view(piece.global_shape)

    described = {**_describe(config, checkpoint, keeps_memory), "torch_dtype": name_dtype(used)}
    with new_folder(folder) as aside:
        write_weights(aside, weights(), sizes, max_file_bytes)
        told = export_tokenizer(checkpoint, aside, described)
        write_synced(aside / CONFIG, json.dumps(described, indent=2) + "\n")
        if keeps_memory:
            write_synced(aside / CODE, read_code())
            write_synced(aside / CARD, describe_run(config, checkpoint.state, total))
    notes = [f"the weights are those of attention {kind}; the model there {loss}" for kind, loss in losses.items()]
    return Exported(model, used, total, keeps_memory, (*notes, *told))


def _describe(config: RunConfig, checkpoint: Checkpoint, keeps_memory: bool) -> dict[str, Any]:
    """What config.json says; of an imported checkpoint what it said before."""
    described = describe_with_memory(config.model) if keeps_memory else describe_model(config.model)
    original = checkpoint.state.get("imported")
    if original is not None and (original["model_type"] == MODEL_TYPE) == keeps_memory:
        if keeps_memory:  # ours first: the code that a folder names is run by whoever trusts it
            original = {**original, **described}
        return {name: value for name, value in original.items() if name != "dtype"}
    if keeps_memory:
        return described
    attention = config.model.attention
    segment = attention.segment_tokens
    positions = config.train.window_tokens if segment is None else segment + attention.seen_tokens
    return {**described, "max_position_embeddings": positions}
