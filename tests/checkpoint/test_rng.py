"""Random states survive JSON exactly."""

import json
import random

import numpy as np
import torch

from infini_train.checkpoint.rng import capture_rng, decode_generator, encode_generator, restore_rng


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_default_generators_go_on_where_they_were() -> None:
    draw()  # leaves the second half of a Gaussian pair in Python's and numpy's state
    state = json.loads(json.dumps(capture_rng()))
    expected = draw()
    assert draw() != expected
    restore_rng(state)
    assert draw() == expected


def test_a_generator_of_ones_own() -> None:
    generator = torch.Generator().manual_seed(3)
    text = encode_generator(generator)
    expected = torch.rand(4, generator=generator)
    other = torch.Generator()
    decode_generator(text, other)
    assert torch.equal(torch.rand(4, generator=other), expected)
