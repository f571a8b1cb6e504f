"""A trained model, its config and its tokenizer, from a run's folder or a checkpoint."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from infini_train.checkpoint.reader import Checkpoint, open_checkpoint
from infini_train.checkpoint.store import FOLDER, find_latest, look_again, resolve
from infini_train.checkpoint.weights import load_weights
from infini_train.config.errors import ConfigError
from infini_train.config.files import validate
from infini_train.config.run import RunConfig
from infini_train.data.model_files import GENERATION_CONFIG, parse_end_ids, read_json
from infini_train.data.tokenizer import SentencePieceTokenizer, Tokenizer, find_tokenizer, tokenizer_files
from infini_train.inference.reading import segment_of
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh
from infini_train.parallel.pipeline import Stages

LOG = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A trained model, ready for use, with all that its checkpoint says about it."""

    stages: Stages
    config: RunConfig
    step: int
    checkpoint: Path
    tokenizer: Tokenizer
    tokenizer_file: Path | None  # None: bytes
    precision: str  # of weights and activations: fp32 or bf16
    end_ids: tuple[int, ...]  # each ends a text: the tokenizer's eos first, then those of generation_config.json
    without: tuple[str, ...] = ()  # parts of the attention that are left out, to see what they are worth

    @property
    def model(self) -> Transformer:
        """The whole model: inference runs in one process."""
        return self.stages.transformers()[0]

    @property
    def step_tokens(self) -> int:
        """Tokens by which texts advance that are read side by side; see `reading.segment_of`."""
        return segment_of(self.model)


def _open(path: Path) -> Checkpoint:
    """The checkpoint at this path; in a run's folder, the newest that is whole."""
    if (path / FOLDER).is_dir():
        checkpoint = find_latest(path, lambda problem: LOG.warning("warning: %s", problem))
        if checkpoint is not None:
            return checkpoint
    return open_checkpoint(resolve(path))


def open_trained(path: Path, precision: str = "fp32") -> Trained:
    """Loads a model for evaluation or generation; its run may go on saving and pruning meanwhile.

    Args:
        path: a run's folder (its newest checkpoint), or one checkpoint's.
        precision: "fp32" or "bf16" weights and activations.

    Raises:
        ConfigError: there is no usable checkpoint or tokenizer, or its generation_config.json can't be read.
    """
    return look_again(lambda: _load(_open(path), precision))


def _load(checkpoint: Checkpoint, precision: str) -> Trained:
    config = validate(checkpoint.config)
    folder = checkpoint.path.resolve()
    found = find_tokenizer(folder, checkpoint.state.get("tokenizer"), checkpoint.special_ids)
    if found is None:
        file = next(iter(tokenizer_files(folder)), None)
        problem = "is not the tokenizer the model was trained with" if file else "is missing"
        place = file or folder.parent.parent / SentencePieceTokenizer.file_name
        raise ConfigError(f"{place}: {problem}; put the right one there")
    mesh.start()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stages = Stages(config.model, dtype=dtype)
    added = load_weights(stages.transformers()[0], checkpoint)
    assert not added, f"{checkpoint.path}: lacks {added[0]}, a parameter of its own config"
    stages = stages.to(device.current(), dtype).eval()
    return Trained(stages, config, checkpoint.step, checkpoint.path, *found, precision, _end_ids(checkpoint, found[0]))


def _end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = [tokenizer.eos_id, *parse_end_ids(checkpoint.state.get("imported", {}), checkpoint.path)]
    folder = checkpoint.path.resolve()
    for path in (home / GENERATION_CONFIG for home in (folder, folder.parent.parent)):
        if path.exists():
            ids += parse_end_ids(read_json(path), path)
    return tuple(dict.fromkeys(ids))
