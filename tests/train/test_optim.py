"""Schedules and parameter groups."""

import pytest
import torch
from torch import nn

from infini_train.config.training import OptimConfig
from infini_train.model.parameters import constant, declare
from infini_train.train.optim import GATE_TRAVEL, gate_warning, learning_rates, parameter_groups, schedule_factor


def factors(optim: OptimConfig, total: int) -> list[float]:
    return [schedule_factor(step, total, optim) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_and_never_zero(schedule):
    optim = OptimConfig(schedule=schedule, warmup_steps=4)
    assert factors(optim, 20)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors(OptimConfig(schedule=schedule, warmup_steps=0), 20)[0] == 1.0


def test_cosine_falls_to_the_end_value():
    optim = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    found = factors(optim, 110)
    assert schedule_factor(110, 110, optim) == pytest.approx(0.1)
    assert schedule_factor(500, 110, optim) == pytest.approx(0.1)
    assert found[60] == pytest.approx(0.55)  # half of the way
    assert found[35] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert all(a > b for a, b in zip(found[10:], found[11:], strict=False))
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_wsd_warms_up_stays_and_decays():
    optim = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    found = factors(optim, 100)
    assert found[10:81] == [1.0] * 71
    assert found[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 100)])
    assert schedule_factor(100, 100, optim) == 0.0
    assert schedule_factor(100, 100, OptimConfig(schedule="wsd", warmup_steps=0, min_lr_ratio=0.3)) == 0.3
    last_fifth = OptimConfig(schedule="wsd", warmup_steps=10, min_lr_ratio=0.0)
    assert factors(last_fifth, 100) == found


def test_every_group_follows_the_schedule_from_its_own_peak():
    optim = OptimConfig(lr=1e-3, gate_lr=5e-2, warmup_steps=2)
    assert learning_rates(0, 10, optim) == {"matrices": 5e-4, "vectors": 5e-4, "gates": 2.5e-2}


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.Parameter(torch.ones(3))
        self.gate = nn.Parameter(torch.zeros(2))
        declare(self.gate, constant(0.0), is_gate=True)
        self.linear_gate = nn.Linear(3, 4, bias=False)  # of the feed-forward: no gate of the memory


def test_groups_hold_every_parameter_once():
    model, optim = nn.ModuleList([Part(), Part()]), OptimConfig(lr=1e-3, gate_lr=5e-2, weight_decay=0.2)
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), optim)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "matrices": (1e-3, 0.2),
        "vectors": (1e-3, 0.0),
        "gates": (5e-2, 0.0),
    }
    assert [id(p) for p in groups["gates"]["params"]] == [id(part.gate) for part in model]
    assert {p.dim() for p in groups["matrices"]["params"]} == {2} and len(groups["matrices"]["params"]) == 4
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def test_a_model_without_gates_has_no_group_of_them():
    assert [group["name"] for group in parameter_groups(nn.Linear(3, 4).named_parameters(), OptimConfig())] == [
        "matrices",
        "vectors",
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_gates_warning_comes_exactly_below_the_way_they_travel(schedule, steps):
    optim = OptimConfig(schedule=schedule, warmup_steps=5)
    enough = GATE_TRAVEL / sum(factors(optim, steps))
    assert gate_warning(OptimConfig(schedule=schedule, warmup_steps=5, gate_lr=enough * 1.0001), steps) is None
    warning = gate_warning(OptimConfig(schedule=schedule, warmup_steps=5, gate_lr=enough * 0.999), steps)
    assert warning is not None and warning.startswith("optim.gate_lr: ") and f"{steps} steps" in warning
    advice = float(warning.split("raise it to ")[1].split()[0])
    assert enough < advice < 1.2 * enough
    assert gate_warning(OptimConfig(schedule=schedule, warmup_steps=5, gate_lr=advice), steps) is None


def test_the_reach_is_how_far_adam_moves_a_gate():
    """A gradient that always points one way moves AdamW's parameter by the sum of the learning rates."""
    optim, total = OptimConfig(gate_lr=0.05, warmup_steps=3), 40
    gate = nn.Parameter(torch.zeros(1))
    adamw = torch.optim.AdamW([gate], weight_decay=0.0)
    for step in range(total):
        adamw.param_groups[0]["lr"] = learning_rates(step, total, optim)["gates"]
        gate.grad = torch.full_like(gate, 0.3)
        adamw.step()
    reach = optim.gate_lr * sum(factors(optim, total))
    assert -gate.item() == pytest.approx(reach, rel=1e-3)
    assert f"at most {reach:.2f}" in (gate_warning(optim, total) or "")
