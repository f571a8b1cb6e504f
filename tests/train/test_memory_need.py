"""What can't fit is refused before anything is allocated, and nothing that fits is."""

import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.parallel import device
from infini_train.train.memory_need import least_bytes
from infini_train.train.opening import open_session


def test_a_model_that_no_machine_holds_is_refused(configure):
    wide = configure("model.hidden_size=65536", "model.num_layers=100")
    with pytest.raises(
        ConfigError, match=r"^model: .* parameters and \d+ lanes' memories need more than .* GB on each"
    ):
        open_session(wide)


def test_memories_count_as_well(configure, monkeypatch):
    few, many = (configure(f"train.batch_lanes={lanes}", f"train.micro_batch_lanes={lanes}") for lanes in (4, 8))
    assert least_bytes(few) < least_bytes(many)
    monkeypatch.setattr(device, "memory_bytes", lambda: least_bytes(many) - 1)
    open_session(few)
    with pytest.raises(ConfigError, match="8 lanes' memories"):
        open_session(many)


def test_what_is_counted_is_what_training_holds(configure):
    config = configure()
    session = open_session(config)
    parameters = sum(parameter.numel() for parameter in session.stages.parameters())
    carried = least_bytes(config) - 12 * parameters  # weights and two moments in fp32
    assert carried > 0 and carried % config.train.batch_lanes == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["infini", "local", "transformer_xl", "memorizing, stored_tokens: 4096", "rmt"])
def test_no_more_is_counted_than_lanes_carry(configure, kind, precision):
    cache = ", cache_tokens: 8" if kind.startswith(("transformer_xl", "memorizing")) else ""
    attention = f"model.attention={{kind: {kind}, segment_tokens: 8{cache}}}"
    config = configure(attention, f"train.precision={precision}")
    without = configure(attention, f"train.precision={precision}", "train.carry_memory=false")
    carried = sum(tensor.nbytes for tensor in tensors(open_session(config).carried))
    assert least_bytes(config) - least_bytes(without) <= carried


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for inner in tree:
            yield from tensors(inner)
