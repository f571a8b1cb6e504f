"""Layers under torch.compile: each is one graph, and what it computes is what it computes uncompiled."""

import pytest
import torch

from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.model.write_cost import charge_writing

LANES, TOKENS = 2, 40
FAST = ("gated-token",)
OTHERS = ("delta-sharp", "linear-overlap", "memorizing", "rmt", "mixed")  # what is left is made of the same pieces


@pytest.fixture(autouse=True)
def _compiler(process_groups):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: Transformer, starts_BT: torch.Tensor, *, windows: int = 2) -> list[torch.Tensor]:
    """Losses and gradients of some windows in a row, the memory carried."""
    random, state, found = torch.Generator().manual_seed(1), model.initial_state(LANES), []
    model.zero_grad()
    for _ in range(windows):
        tokens, labels = torch.randint(0, 40, (2, LANES, TOKENS), generator=random)
        grids = model.make_grids(starts_BT, torch.ones(LANES, TOKENS), state)
        loss, following = model(tokens, grids, state, labels, torch.ones(LANES, TOKENS))
        loss.backward()
        found.append(loss.detach())
        state = model.carry_over(following)
    return found + [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "variant",
    [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    indirect=True,
)
def test_a_layer_is_one_graph_and_computes_the_same(tiny, variant) -> None:
    """By the compiler's own tracing and differentiation; its code for the CPU: tests/train/test_compiling.py."""
    config = tiny(variant)
    model = Transformer(config).double()
    initialise(model, config, seed=0)
    starts_BT = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    starts_BT[0, 13] = True
    expected = run(model, starts_BT)
    for layer in model.layers.values():
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(model, starts_BT), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_changes_from_step_to_step_compiles_nothing_again(tiny) -> None:
    config = tiny("gated-token")
    model = Transformer(config)
    initialise(model, config, seed=0)
    for layer in model.layers.values():
        layer.compile(dynamic=False, backend="aot_eager")
    none = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    charge_writing([model], 0.1)
    run(model, none)
    torch._dynamo.utils.counters.clear()
    for cost in (0.2, 0.3, 0.4):
        charge_writing([model], cost)
        run(model, none)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
