"""What a model remembers of a text, in a file: read a book once, ask later.

A safetensors file holds the state after the text, and says which model it belongs to. Everything in it is checked
before it is used: it may come from elsewhere.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.inference.loading import Trained
from infini_train.inference.reading import advance
from infini_train.model.transformer import ModelState, Transformer
from infini_train.ops.grid import Recent
from infini_train.ops.state import Leaf, name_leaves, rebuild
from infini_train.parallel import device
from infini_train.regular_files import require_regular

FORMAT = "infini_train memory 1"
ANY_NUMBER = "tokens"  # the dimension that grows inside a segment, and with full attention


class Remembered(NamedTuple):
    """The state after a text (None: nothing was read), and how many tokens it had."""

    state: ModelState | None
    tokens: int


def save_memory(path: Path, trained: Trained, remembered: Remembered) -> int:
    """Writes the file, whole or not at all; returns its bytes.

    Raises:
        ConfigError: it can't be written.
    """
    tensors = {leaf.name: leaf.tensor.cpu().clone().contiguous() for leaf in _leaves(remembered.state)}
    facts = {"format": FORMAT, "model": digest(trained.model), "tokens": str(remembered.tokens)}
    content = save(tensors, metadata=facts)
    try:
        write_atomic(path, content)
    except OSError as error:
        raise ConfigError(f"--save-memory: {path} can't be written: {error.strerror or error}") from error
    return len(content)


@torch.no_grad()
def load_memory(path: Path, trained: Trained) -> Remembered:
    """What `save_memory` wrote, on the model's device.

    Raises:
        ConfigError: it is no such file, is damaged, or belongs to another model.
    """
    name = f"--memory: {path}"
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it can't be iterated)
    except OSError as error:
        raise ConfigError(f"{name} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{name} is damaged, or not written by --save-memory: {error}") from error
    if facts.get("format") != FORMAT or not facts.get("tokens", "").isdecimal():
        raise ConfigError(f"{name} was not written by --save-memory of this version")
    if facts.get("model") != digest(trained.model):
        raise ConfigError(f"{name} is the memory of another model, or of other weights of it; read the text again")
    # A state of the same form, for the names and sizes.
    _, like = advance(trained.model, torch.tensor([[trained.tokenizer.bos_id]]), None)
    expected = {leaf.name: leaf for leaf in _leaves(like)}
    if tensors.keys() != expected.keys():
        odd = min(tensors.keys() ^ expected.keys())
        raise ConfigError(f"{name} is damaged: {odd} is missing, or should not be there")
    for key, leaf in expected.items():
        _check(f"{name} is damaged: {key}", tensors[key], leaf)
    state = tuple(
        rebuild(layer, str(number), lambda key, _: tensors[key].to(device.current()))
        for number, layer in enumerate(like)
    )
    _check_open_tokens(f"{name} is damaged", trained.model, state, like)
    return Remembered(state, int(facts["tokens"]))


def digest(model: Transformer) -> str:
    """Of the model's shape and weights, as they are in memory: other weights, or another precision, differ."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _leaves(state: ModelState | None) -> Iterator[Leaf]:
    for number, layer in enumerate(state or ()):
        yield from name_leaves(layer, str(number))


def _check(what: str, found: Tensor, leaf: Leaf) -> None:
    sizes = zip(found.shape, leaf.tensor.shape, leaf.dims, strict=False)
    fits = found.dim() == leaf.tensor.dim() and all(a == b for a, b, dim in sizes if dim != ANY_NUMBER)
    if not fits or found.dtype != leaf.tensor.dtype:
        raise ConfigError(f"{what} is {found.dtype} {list(found.shape)}, not {leaf.tensor.dtype} of the model's sizes")
    if found.is_floating_point() and not found.isfinite().all():
        raise ConfigError(f"{what} holds NaN or infinity")


def _check_open_tokens(what: str, model: Transformer, state: ModelState, like: ModelState) -> None:
    """Layers that cut the text alike have the same segment open; keys, values and marks are of the same tokens."""
    counts: dict[object, int] = {}
    for mixer, layer, like_layer in zip(model.mixers(), state, like, strict=True):
        recent, usual = mixer.recent(layer), mixer.recent(like_layer)
        if recent is None or usual is None:
            continue
        (keys, marks), (usual_keys, usual_marks) = _count(recent), _count(usual)
        size = -1 if keys is None or marks is None else marks - mixer.layout.overlap_tokens
        most = mixer.layout.segment_tokens
        is_whole = size >= 0 and (most is None or size < most) and keys - marks == usual_keys - usual_marks
        if not is_whole or counts.setdefault(mixer.layout, size) != size or bool((recent.weight_BR < 0).any()):
            raise ConfigError(f"{what}: the tokens of its open segment don't fit together")
        sinks = recent.sinks
        if sinks is None:
            continue
        counted = {sinks.k_BKZD.shape[2], sinks.v_BKZE.shape[2]}
        if counted != {mixer.layout.sink_tokens} or bool((sinks.start_B > 0).any()):
            raise ConfigError(f"{what}: its first tokens don't fit together")


def _count(recent: Recent) -> tuple[int | None, int | None]:
    """Keys (memory tokens are among them) and marks; None where two that belong together differ in number."""
    keys, marks = (
        {recent.k_BKRD.shape[2], recent.v_BKRE.shape[2]},
        {recent.document_BR.shape[1], recent.weight_BR.shape[1]},
    )
    return (keys.pop() if len(keys) == 1 else None), (marks.pop() if len(marks) == 1 else None)
