"""Random generators' states as JSON-able values, without pickle."""

import base64
import random
from typing import Any

import numpy as np
import torch


def encode_generator(generator: torch.Generator) -> str:
    """A torch generator's state as base64 text."""
    return base64.b64encode(generator.get_state().numpy().tobytes()).decode("ascii")


def decode_generator(text: str, generator: torch.Generator) -> None:
    """Puts the generator into the state that `encode_generator` described."""
    generator.set_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))


def capture_rng() -> dict[str, Any]:
    """The states of the default generators of torch (CPU), Python and numpy."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": encode_generator(torch.default_generator),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts the default generators into the states that `capture_rng` returned."""
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    decode_generator(state["torch"], torch.default_generator)
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
