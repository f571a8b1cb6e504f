"""A folder in Hugging Face's layout into the folder of a run: checkpoint, tokenizer, and a config to go on with."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from infini_train.checkpoint.fragments import Fragment, whole_fragment
from infini_train.checkpoint.resharding import write_whole
from infini_train.checkpoint.store import FOLDER
from infini_train.checkpoint.sync import check_new
from infini_train.config.attention import InfiniConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump, to_tree, validate
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig
from infini_train.config.yaml_text import dump_tree
from infini_train.convert.family import list_weights, parse_model
from infini_train.convert.folder import CONFIG, MAX_FILE_BYTES, WeightsFolder, new_folder, read_json
from infini_train.data.tokenizer import Tokenizer, load_tokenizer

STEP = "step-00000000"
CONTINUE = "continue.yaml"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there
TOKENIZER_CONFIG = "tokenizer_config.json"  # names bos and eos of a tokenizer.json
FULL_TOKENS = 8192  # window of a full model that is evaluated; its cost grows with the square
SEGMENT_TOKENS, SEGMENTS = 2048, 16  # of the training that goes on: the paper's segment and training length
GATE_INIT = -3.0  # new gates read 5 % from the memory, and can still open
CONTINUE_HEAD = """\
# Goes on with the imported model, with Infini-attention in place of full attention:
#   infini-data encode TEXT --tokenizer {run}/TOKENIZER --out data --holdout 0.01
#   infini-train train {run}/continue.yaml
# The model's shape must stay; all else is a beginning, to be edited (docs/continual.md). Rate, lanes and steps are the
# paper's for 1B, but its texts were of 4K; not tuned here. New gates begin nearly closed (gate_init).
"""


class TokenizerError(ConfigError):
    """The model's tokenizer is missing, or another one; the caller knows how its user names one."""


class Imported(NamedTuple):
    """What an import found."""

    model: ModelConfig
    dtype: torch.dtype
    parameters: int
    tokenizer: Tokenizer


def import_folder(
    folder: Path,
    run_dir: Path,
    *,
    tokenizer: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_tensor: Callable[[int, int], object] = lambda done, total: None,
) -> Imported:
    """Writes a run's folder whose checkpoint has the weights of a model, bit for bit as they are stored.

    Tensors go through memory one after the other. The folder appears under its name complete, or not at all.

    Args:
        folder: config.json and safetensors files in Hugging Face's layout, with or without a tokenizer.
        run_dir: the new run's folder; it must not exist.
        tokenizer: a file, or byte; None: the folder's.
        max_file_bytes: tensors are spread over files of about this size.
        on_tensor: called with the elements written so far and those of all.

    Raises:
        ConfigError: the model, its weights or its tokenizer can't be used; nothing was written.
    """
    check_new(run_dir)
    described = read_json(folder / CONFIG)
    model = parse_model(described, str(folder / CONFIG))
    weights = WeightsFolder(folder)
    dtype = _check_weights(weights, model)
    file, used = _find_tokenizer(folder, tokenizer)
    if used.vocab_size > model.vocab_size:
        raise TokenizerError(
            f"{file}: has {used.vocab_size} ids, more than vocab_size {model.vocab_size} of {folder / CONFIG};"
            " name the model's own tokenizer"
        )
    positions = described.get("max_position_embeddings")
    known = positions if isinstance(positions, int) and positions > 0 else FULL_TOKENS
    config = _own_config(model, run_dir, min(known, FULL_TOKENS))
    total = sum(math.prod(weight.shape) for weight in list_weights(model).values())
    special_ids = [used.bos_id, used.eos_id, used.pad_id]
    tokens = {"tokenizer": used.sha256, "special_ids": special_ids}
    state = {"step": 0, "tokens": 0, "data": "imported", **tokens, "imported": described}
    with new_folder(run_dir) as aside:
        fragments = _fragments(weights, model, lambda done: on_tensor(done, total))
        write_whole(aside / FOLDER / STEP, 0, fragments, state, to_tree(config), max_file_bytes)
        (aside / "config.yaml").write_text(dump(config), encoding="utf-8")
        text = _continuing_config(model, run_dir, min(known, SEGMENT_TOKENS))
        (aside / CONTINUE).write_text(text, encoding="utf-8")
        if used.file_name is not None:
            (aside / used.file_name).write_bytes(used.model_bytes)
            beside = Path(file).with_name(TOKENIZER_CONFIG)
            if beside.is_file():
                shutil.copyfile(beside, aside / TOKENIZER_CONFIG)
    return Imported(model, dtype, total, used)


def _check_weights(weights: WeightsFolder, model: ModelConfig) -> torch.dtype:
    """Whether the tensors are those of the model, of one dtype, which is returned."""
    table = list_weights(model)
    dtypes = set()
    for theirs, shape in table.values():
        if theirs not in weights.files:
            raise ConfigError(f"{weights.folder}: {theirs} is missing among the weights")
        found = weights.shape(theirs)
        if found != shape:
            raise ConfigError(f"{weights.folder}: {theirs} is {list(found)}, but {CONFIG} asks for {list(shape)}")
        dtypes.add(weights.dtype(theirs))
    known = {theirs for theirs, _ in table.values()}
    for name in weights.files:
        if name in known or name.endswith("rotary_emb.inv_freq"):  # old folders hold the frequencies, too
            continue
        if name == "lm_head.weight":  # of a tied model
            if not torch.equal(weights.read(name), weights.read(table["embedding.weight"].theirs)):
                raise ConfigError(f"{weights.folder}: {name} differs from the embedding that {CONFIG} ties it to")
            continue
        raise ConfigError(f"{weights.folder}: {name} is a weight that this model doesn't have")
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(f"{weights.folder}: the weights are stored as {names}; save the model in one of them")
    return dtypes.pop()


def _find_tokenizer(folder: Path, given: str | None) -> tuple[str, Tokenizer]:
    """The tokenizer, and the file or name that it was loaded from."""
    found = next((str(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    name = given or found
    if name is None:
        raise TokenizerError(f"{folder}: holds no {' or '.join(TOKENIZER_FILES)}; name one")
    return name, load_tokenizer(name)


def _fragments(weights: WeightsFolder, model: ModelConfig, on_tensor: Callable[[int], object]) -> Iterator[Fragment]:
    done = 0
    for ours, (theirs, _) in list_weights(model).items():
        fragment = whole_fragment(ours, "master", weights.read(theirs))
        done += fragment.numel
        on_tensor(done)
        yield fragment


def _own_config(model: ModelConfig, run_dir: Path, window_tokens: int) -> RunConfig:
    """Config of the imported checkpoint: enough to evaluate it, and to compare models of runs that go on from it."""
    return validate(
        {
            "name": run_dir.name,
            "run_dir": str(run_dir),
            "model": to_tree(model),
            "data": {"train": "imported"},
            "train": {"window_tokens": window_tokens, "batch_lanes": 1, "max_steps": 1},
            "optim": {"warmup_steps": 0},
        }
    )


def _continuing_config(model: ModelConfig, run_dir: Path, segment_tokens: int) -> str:
    """The text of a config that goes on with Infini-attention; batch and length are a beginning, to be edited."""
    attention = InfiniConfig(segment_tokens=segment_tokens, gate_init=GATE_INIT)
    tree: dict[str, Any] = {
        "name": f"{run_dir.name}-infini",
        "model": to_tree(dataclasses.replace(model, attention=attention)),
        "data": {"train": "data/train", "validation": "data/validation"},
        "train": {
            "init_from": str(run_dir),
            "window_tokens": SEGMENTS * segment_tokens,
            "batch_lanes": 64,
            "micro_batch_lanes": 1,
            "max_steps": 30_000,
            "precision": "bf16",
            "activation_checkpointing": "layer",
        },
        "optim": {"lr": 1e-4, "gate_lr": 1e-2, "warmup_steps": 1000},
        "eval": {"every_steps": 500, "max_tokens": 2**20},
        "checkpoint": {"every_steps": 250, "keep_last": 3},
    }
    validate(tree)
    return CONTINUE_HEAD.format(run=run_dir) + dump_tree(tree)
