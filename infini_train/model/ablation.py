"""A trained model without one of its parts: what is the memory worth, or a layer's?"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from infini_train.config.errors import ConfigError
from infini_train.model.mixer import SequenceMixer
from infini_train.model.transformer import Transformer


class Part(NamedTuple):
    """A part of the attention, in one layer or (None) in all that have it."""

    name: str
    layer: int | None = None


def parse_parts(texts: Iterable[str]) -> list[Part]:
    """Parts as they are written: memory, or memory:3 in layer 3 alone.

    Raises:
        ConfigError: a layer is no number.
    """
    parts = []
    for text in texts:
        name, colon, layer = text.partition(":")
        if colon and not (layer.isascii() and layer.isdigit()):
            raise ConfigError(f"{text}: write a part, or a part and a layer, as in memory:3")
        parts.append(Part(name, int(layer) if colon else None))
    return parts


@contextmanager
def leaving_out(models: Sequence[Transformer], parts: Sequence[Part]) -> Iterator[None]:
    """In the block this rank's models work without these parts; other ranks may have them, so they are not checked."""
    mixers = [(int(number), layer.attention) for model in models for number, layer in model.layers.items()]
    before = [mixer.left_out for _, mixer in mixers]
    for number, mixer in mixers:
        mixer.left_out |= {part.name for part in parts if part.layer in (None, number) and part.name in mixer.parts}
    try:
        yield
    finally:
        for (_, mixer), left_out in zip(mixers, before, strict=True):
            mixer.left_out = left_out


def leave_out(model: Transformer, parts: Sequence[Part]) -> None:
    """A whole model works without these parts from here on.

    Raises:
        ConfigError: no layer has one of them; the message says which parts there are.
    """
    mixers: dict[int, SequenceMixer] = {int(number): layer.attention for number, layer in model.layers.items()}
    for part in parts:
        if part.layer is not None and part.layer not in mixers:
            raise ConfigError(f"{part.name}:{part.layer}: the model has layers 0 to {len(mixers) - 1}")
        chosen = [mixer for number, mixer in mixers.items() if part.layer in (None, number)]
        having = [mixer for mixer in chosen if part.name in mixer.parts]
        if not having:
            known = ", ".join(dict.fromkeys(name for mixer in chosen for name in mixer.parts)) or "nothing"
            where = "the model" if part.layer is None else f"layer {part.layer}"
            raise ConfigError(f"{part.name}: {where} has no such part; what can be left out: {known}")
        for mixer in having:
            mixer.left_out |= {part.name}
