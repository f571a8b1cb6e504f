"""What layers keep of a text against the states of models that have read one."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from infini_train.config.attention import FullConfig, InfiniConfig, LocalConfig, MixedConfig
from infini_train.model.caching import cached_bytes, caching_layers, name_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARK_BYTES = 8 + 4  # document and write weight of a token: one tensor each for all layers of one layout
THREE = MixedConfig(
    variants={
        "memory": InfiniConfig(segment_tokens=8, update="gated_delta", read="token"),
        "near": LocalConfig(segment_tokens=4, overlap_tokens=2),
        "whole": FullConfig(),
    },
    pattern=("whole", "memory", "near", "whole", "memory"),
)


def held_bytes(state) -> int:
    """Memory that a state keeps alive: storages of several tensors count once, views as a whole."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(state) if leaf is not None
    }
    return sum(storage.nbytes() for storage in storages.values())


def read(model, tokens: int, tools):
    """The state after a text that is read in two calls, as generation does."""
    tokens_BT = tools.draw(tokens, lanes=1)
    _, state = tools.run(model, tokens_BT[:, : tokens // 2])
    starts_BT = torch.zeros(1, tokens - tokens // 2, dtype=torch.bool)
    return tools.run(model, tokens_BT[:, tokens // 2 :], starts_BT, state)[1]


@pytest.mark.parametrize("precision", DTYPES)
def test_a_state_grows_by_what_is_counted(variant, precision, tools):
    config = tools.tiny(variant, value_head_dim=12)
    model = tools.build(config).to(DTYPES[precision])
    with torch.no_grad():
        short, long = (held_bytes(read(model, tokens, tools)) for tokens in (64, 192))
    marks = MARK_BYTES * (len(caching_layers(config)) > 0)
    assert long - short == (192 - 64) * (cached_bytes(config, precision) + marks)
    assert (cached_bytes(config, precision) > 0) == (variant in ("full", "mixed"))


def test_the_layers_are_those_that_grow(tools):
    config = tools.tiny("full", num_layers=7, attention=THREE)
    model = tools.build(config)
    with torch.no_grad():
        short, long = (read(model, tokens, tools) for tokens in (64, 128))
    grown = [held_bytes(after[:2]) - held_bytes(before[:2]) for before, after in zip(short, long, strict=True)]
    assert caching_layers(config) == tuple(number for number, by in enumerate(grown) if by) == (0, 3, 5)
    keys = [
        layer.k_BKRD.nbytes + layer.v_BKRE.nbytes
        for number, layer in enumerate(long)
        if number in caching_layers(config)
    ]
    assert sum(keys) == 128 * cached_bytes(config, "fp32")


def test_layers_are_named_briefly():
    assert name_layers((3,)) == "layer 3"
    assert name_layers((3, 7)) == "layers 3, 7"
    assert name_layers(tuple(range(6))) == "layers 0, 1, 2, 3, 4, 5"
    assert name_layers(tuple(range(3, 32, 4))) == "layers 3, 7, 11, ..., 31"
