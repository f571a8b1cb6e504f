"""A variant of attention that plan has never heard of, defined here, is planned all the same."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from infini_train.config.attention import LocalConfig
from infini_train.config.files import validate
from infini_train.config.run import RunConfig
from infini_train.model.mixer import LayerSpec, SequenceMixer
from infini_train.model.variants import MIXERS
from infini_train.ops.grid import Grid, Layout, Recent, no_recent
from infini_train.ops.state import Stored
from infini_train.parallel import device, mesh
from infini_train.plan import rehearsal, tracing
from infini_train.plan.dry_run import dry_run
from infini_train.plan.rehearsal import find_costs

D, F, TOKENS, LANES = 48, 80, 64, 2


class SumState(NamedTuple):
    total_BD: Annotated[Tensor, Stored("total_BD", "lanes hidden")]
    recent: Annotated[Recent, Stored("recent")]


class SumMixer(SequenceMixer):
    """A linear map of the sum of all tokens so far."""

    def __init__(self, spec: LayerSpec) -> None:
        nn.Module.__init__(self)  # without the projections
        self.layout, self.ranks, hidden = Layout(8, 0), spec.ranks, spec.model.hidden_size
        self.weight = nn.Parameter(torch.empty(hidden, hidden, dtype=spec.parallel.params_dtype))

    def initial_state(self, lanes: int, like: Tensor) -> SumState:
        return SumState(like.new_zeros(lanes, self.weight.shape[0]), no_recent((lanes, 1, 2), 2, 0, like))

    def forward(self, hidden_TBD: Tensor, state: SumState | None, grid: Grid) -> tuple[Tensor, SumState]:
        state = self.initial_state(hidden_TBD.shape[1], hidden_TBD) if state is None else state
        sum_TBD = hidden_TBD.cumsum(0) + state.total_BD
        if self.ranks is not None:
            sum_TBD = sum_TBD + self.ranks.gather(sum_TBD[-1])()[: grid.shard[0]].sum(0)
        return sum_TBD @ self.weight, SumState(sum_TBD[-1].detach(), state.recent)


@pytest.fixture(autouse=True)
def with_the_variant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    device.prepare()
    monkeypatch.setitem(MIXERS, LocalConfig, SumMixer)
    yield
    mesh.start()


def make_config(**parallel: int) -> RunConfig:
    """Its sizes are no other test's: plans of equal configs are kept."""
    model = {"vocab_size": 96, "hidden_size": D, "num_layers": 3, "num_heads": 4, "ffn_size": F}
    train = {"window_tokens": TOKENS, "batch_lanes": LANES, "max_steps": 1}
    return validate(
        {
            "model": {**model, "attention": {"kind": "local", "segment_tokens": 8}},
            "data": {"train": "-"},
            "train": train,
            "optim": {"warmup_steps": 0},
            "parallel": {"data_size": 1, **parallel},
        }
    )


def test_work_and_memory_are_those_of_a_count_by_hand() -> None:
    tokens, costs = LANES * TOKENS, find_costs(make_config(), on_cuda=True)
    layer = costs.layers[0]
    assert layer.forward.matmul_flops == 2 * tokens * (D * D + 3 * D * F)
    assert layer.backward.matmul_flops == 2 * layer.forward.matmul_flops
    assert layer.forward.attention_flops == {}
    # two norms (input, and a number for each row), the inputs of mixer and feed-forward; gate, up, silu, product
    assert layer.kept_bytes == 4 * (tokens * (4 * D + 4 * F) + 2 * tokens)
    assert layer.working_bytes > 4 * tokens * D
    assert costs.layers[1] is layer  # equal layers are run once


def test_a_plan_has_its_parameters_state_and_memory() -> None:
    plan = dry_run(make_config())
    (rank,) = plan.ranks
    assert plan.parameters == rank.parameters == 2 * 96 * D + D + 3 * (D * D + 3 * D * F + 2 * D)
    assert plan.carried_lane_bytes == 3 * 4 * D
    assert (
        rank.memory.activations == 3 * find_costs(plan.config, on_cuda=True).layers[0].kept_bytes + 8 * LANES * TOKENS
    )
    assert rank.heads is None and rank.kv_heads is None
    assert plan.prediction.step_s > 0


def test_what_it_sends_is_asked_of_it() -> None:
    plan = dry_run(make_config(context_size=2))
    (rank,) = plan.ranks
    state_bytes = 4 * D
    assert rank.sent_bytes == (state_bytes, state_bytes)  # of one lane: to the other rank, and back
    found = {each.kind: each for each in rank.collectives if each.name == "context: layers"}
    assert set(found) == {"all-gather", "reduce-scatter"}
    for each in found.values():
        assert (each.calls, each.buffer_bytes) == (3, 3 * 2 * LANES * state_bytes)


def test_operations_that_are_not_run_again_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    for is_pure in (tracing._is_pure, tracing._is_pure, lambda func: False):  # fills the table, reads it, has none
        monkeypatch.setattr(tracing, "_is_pure", is_pure)
        rehearsal._extrapolate.cache_clear()
        rehearsal._rehearse.cache_clear()
        costs.append(find_costs(make_config(), on_cuda=True))
    assert costs[0] == costs[1] == costs[2]
