"""A folder in Hugging Face's layout into the folder of a run: checkpoint, tokenizer, and a config to go on with."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from infini_train.checkpoint.fragments import Fragment, whole_fragment
from infini_train.checkpoint.resharding import write_whole
from infini_train.checkpoint.store import FOLDER, open_checkpoint
from infini_train.checkpoint.sync import check_new
from infini_train.config.attention import FullConfig, InfiniConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump, load_run, to_tree, validate
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig
from infini_train.config.yaml_text import dump_tree
from infini_train.convert.family import parse_model
from infini_train.convert.fields import note_fields, show
from infini_train.convert.folder import CONFIG, INDEX, MAX_FILE_BYTES, WeightsFolder, new_folder
from infini_train.convert.with_memory import CODE, MODEL_TYPE, list_all_weights, parse_with_memory, whole_segments
from infini_train.data.model_files import (
    GENERATION_CONFIG,
    find_tokenizer_files,
    parse_end_ids,
    read_json,
    read_small,
    write_small,
)
from infini_train.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

STEP = "step-00000000"
CONTINUE = "continue.yaml"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there
OF_MODEL = (".json", ".jinja", ".model", ".py", ".txt")  # suffixes of files that may be a part of the model
FULL_TOKENS = 8192  # window of a full model that is evaluated; its cost grows with the square
SEGMENT_TOKENS, SEGMENTS = 2048, 16  # of the training that goes on: the paper's segment and training length
GATE_INIT = -3.0  # new gates read 5 % from the memory, and can still open
CONTINUE_HEAD = """\
# Goes on with the imported model, {attention}:
#   infini-data encode TEXT --tokenizer {run}/TOKENIZER --out data --holdout 0.01
#   infini-train train {run}/continue.yaml
# The model's shape must stay; all else is a beginning, to be edited (docs/continual.md). Rate, lanes and steps are the
# paper's for 1B, but its texts were of 4K; not tuned here.{gates}
"""


class TokenizerError(ConfigError):
    """The model's tokenizer is missing, or another one; the caller knows how its user names one."""


class Imported(NamedTuple):
    """What an import found."""

    model: ModelConfig
    dtype: torch.dtype
    parameters: int
    tokenizer: Tokenizer
    notes: tuple[str, ...]  # what was passed over


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
    has_memory = described.get("model_type") == MODEL_TYPE
    model = (parse_with_memory if has_memory else parse_model)(described, str(folder / CONFIG))
    weights = WeightsFolder(folder)
    dtype = _check_weights(weights, model)
    file, used = _find_tokenizer(folder, tokenizer, model.vocab_size)
    small = _small_files(folder, file, described, used)
    notes = [] if has_memory else [f"{folder / CONFIG}: {note}" for note in note_fields(described)]
    notes += _left_behind(folder, {file, *(str(folder / name) for name in (*small, *[CODE] * has_memory))})
    total = sum(math.prod(weight.shape) for weight in list_all_weights(model).values())
    with new_folder(run_dir) as aside:
        fragments = _fragments(weights, model, lambda done: on_tensor(done, total))
        positions = described.get("max_position_embeddings")
        known = positions if isinstance(positions, int) and positions > 0 else FULL_TOKENS
        unit = whole_segments(model)  # of a model that comes with its memory
        config = _own_config(model, run_dir, unit or min(known, FULL_TOKENS))
        write_whole(aside / FOLDER / STEP, 0, fragments, _state(used, described), to_tree(config), max_file_bytes)
        (aside / "config.yaml").write_text(dump(config), encoding="utf-8")
        text = _continuing_config(model, run_dir, unit or min(known, SEGMENT_TOKENS))
        (aside / CONTINUE).write_text(text, encoding="utf-8")
        for name, content in small.items():
            write_small(aside / name, content)
        _check_readable(aside, run_dir, used)
    return Imported(model, dtype, total, used, tuple(notes))


def _state(tokenizer: Tokenizer, described: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint says besides weights and config."""
    special_ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    tokens = {"tokenizer": tokenizer.sha256, "special_ids": special_ids}
    return {"step": 0, "tokens": 0, "data": "imported", **tokens, "imported": described}


def _small_files(folder: Path, file: str, described: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer, what lies beside it, and generation_config.json, by their names in the run's folder."""
    small = {}
    if tokenizer.file_name is not None:
        beside = Path(file).parent
        small = {name: read_small(beside / name) for name in find_tokenizer_files(beside)}
        small[tokenizer.file_name] = tokenizer.model_bytes
    path = folder / GENERATION_CONFIG
    own = read_json(path) if path.exists() else {}
    ends = parse_end_ids(own, path)
    more = [end for end in parse_end_ids(described, folder / CONFIG) if end not in ends]
    if set(more) - {tokenizer.eos_id}:  # config.json stays with the checkpoint, this file goes on to later runs
        own["eos_token_id"] = [*ends, *more]  # all: where this file names any, transformers reads no others
        small[GENERATION_CONFIG] = (json.dumps(own, indent=2) + "\n").encode()
    elif own:
        small[GENERATION_CONFIG] = read_small(path)
    return small


def _left_behind(folder: Path, taken: set[str]) -> list[str]:
    """A line about files that may matter to the model and are not taken along; README, licence and the like may not."""
    known = {os.path.abspath(name) for name in (*taken, folder / CONFIG, folder / INDEX)}
    files = sorted(path for path in folder.iterdir() if path.suffix in OF_MODEL)
    names = [path.name for path in files if os.path.abspath(path) not in known]
    return [f"{folder}: not taken along: {show(', '.join(names))}"] if names else []


def _check_readable(written: Path, run_dir: Path, tokenizer: Tokenizer) -> None:
    """That what was written opens again, under the eyes of the user who has the original.

    Raises:
        ConfigError: it doesn't.
    """
    try:
        checkpoint = open_checkpoint(written / FOLDER / STEP)
        validate(checkpoint.config)
        found = find_tokenizer(checkpoint.path, tokenizer.sha256, checkpoint.special_ids)
        again = load_run(str(written / CONTINUE)).train.init_from
    except ConfigError as error:
        raise ConfigError(f"{run_dir}: was not written, since it couldn't be read again: {error}") from error
    assert found is not None and again == str(run_dir)


def _check_weights(weights: WeightsFolder, model: ModelConfig) -> torch.dtype:
    """Whether the tensors are those of the model, of one dtype, which is returned."""
    table = list_all_weights(model)
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


def _find_tokenizer(folder: Path, given: str | None, vocab_size: int) -> tuple[str, Tokenizer]:
    """The tokenizer, and the file or name that it was loaded from."""
    found = next((str(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    name = given or found
    if name is None:
        raise TokenizerError(f"{folder}: holds no {' or '.join(TOKENIZER_FILES)}; name one")
    used = load_tokenizer(name)
    if used.vocab_size > vocab_size:
        raise TokenizerError(
            f"{name}: has {used.vocab_size} ids, more than vocab_size {vocab_size} of {folder / CONFIG};"
            " name the model's own tokenizer"
        )
    return name, used


def _fragments(weights: WeightsFolder, model: ModelConfig, on_tensor: Callable[[int], object]) -> Iterator[Fragment]:
    done = 0
    for ours, (theirs, _) in list_all_weights(model).items():
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
    told = {"attention": "with the attention that it has", "gates": ""}
    if isinstance(model.attention, FullConfig):
        told = {
            "attention": "with Infini-attention in place of full attention",
            "gates": " New gates begin nearly closed (gate_init).",
        }
        attention = InfiniConfig(segment_tokens=segment_tokens, gate_init=GATE_INIT)
        model = dataclasses.replace(model, attention=attention)
    tree: dict[str, Any] = {
        "name": f"{run_dir.name}-infini",
        "model": to_tree(model),
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
    name = str(run_dir) if str(run_dir).isprintable() else ascii(str(run_dir))  # a comment must stay on its line
    return CONTINUE_HEAD.format(run=name, **told) + dump_tree(tree)
