"""Parameter groups and learning rates, as pure functions of the config and the step."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from infini_train.config.training import OptimConfig
from infini_train.model.parameters import is_gate

# How far a gate has to travel to become local (sigmoid(-4) = 0.02) or global (0.98).
GATE_TRAVEL = 4.0


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups: matrices (with weight decay), vectors, and gates with a learning rate of their own and no decay.

    Those for which a rule holds are groups of their own, ``matrices/2`` for rule 2; what is not trained is in none.
    """
    rates = peak_rates(optim)
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in named:
        kind = "gates" if is_gate(parameter) else "matrices" if parameter.dim() > 1 else "vectors"
        if optim.trains(name):
            members[_group(kind, optim.rule_of(name))].append(parameter)
    return [
        {
            "name": group,
            "params": parameters,
            "weight_decay": optim.weight_decay if group.startswith("matrices") else 0.0,
            "lr": rates[group],
            "sleeps": group.endswith(asleep_groups(0, optim)),
        }
        for group, parameters in members.items()
        if parameters
    ]


def _group(kind: str, rule: int | None) -> str:
    return kind if rule is None else f"{kind}/{rule}"


def peak_rates(optim: OptimConfig) -> dict[str, float]:
    """The highest learning rate of each group."""
    plain = {"matrices": optim.lr, "vectors": optim.lr, "gates": optim.gate_lr}
    of_rules = {
        _group(kind, number): rate if rule.lr is None else rule.lr
        for number, rule in enumerate(optim.rules)
        if rule.train
        for kind, rate in plain.items()
    }
    return plain | of_rules


def learning_rates(step: int, total_steps: int, optim: OptimConfig) -> dict[str, float]:
    """Learning rate of each group at a step (0 is the first); 0 before the first step of its rule."""
    factor = schedule_factor(step, total_steps, optim)
    asleep = asleep_groups(step, optim)
    return {group: 0.0 if group.endswith(asleep) else rate * factor for group, rate in peak_rates(optim).items()}


def asleep_groups(step: int, optim: OptimConfig) -> tuple[str, ...]:
    """How the names of the groups end whose training begins after this step."""
    return tuple(f"/{number}" for number, rule in enumerate(optim.rules) if step < rule.from_step)


def schedule_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """The share of the peak learning rate: linear warm-up, then cosine, or stable and a linear decay (wsd)."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        decay_steps = optim.decay_steps or max(1, total_steps // 5)
        shape = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape


def gate_warning(optim: OptimConfig, total_steps: int) -> str | None:
    """A warning if the gates can't become local or global: Adam moves a parameter by at most about lr a step.

    None where rules say how parameters are trained.
    """
    if optim.rules:
        return None
    reach = optim.gate_lr * sum(schedule_factor(step, total_steps, optim) for step in range(total_steps))
    if reach >= GATE_TRAVEL:
        return None
    needed = 1.1 * optim.gate_lr * GATE_TRAVEL / max(reach, 1e-12)  # a little more, so that its rounding is enough
    return (
        f"optim.gate_lr: {optim.gate_lr:g} over {total_steps} steps moves a gate by at most {reach:.2f}, and it takes"
        f" about {GATE_TRAVEL:g} to become local or global; raise it to {needed:.2g} or train longer"
    )
