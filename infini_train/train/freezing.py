"""Parameters that `optim.rules` keeps as they are for the whole run: they have no gradient and no optimizer state.

What is trained from a later step on has both, see `parallel.zero.Engine.begin`.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from infini_train.config.errors import ConfigError
from infini_train.config.training import OptimConfig
from infini_train.parallel import mesh
from infini_train.train.optim import parameter_groups

Named = Iterable[tuple[str, nn.Parameter]]


def freeze(named: Named, optim: OptimConfig) -> None:
    """Takes the gradients of what is not trained."""
    for name, parameter in named:
        if not optim.trains(name):
            parameter.requires_grad_(False)


def check_rules(named: Sequence[tuple[str, nn.Parameter]], optim: OptimConfig) -> None:
    """Whether each rule is about some parameter, and something is left to train; all ranks call it together.

    Raises:
        ConfigError: not so; on all ranks.
    """
    if not optim.rules:
        return
    found = [optim.rule_of(name) for name, _ in named]
    counts = mesh.sum_over_world([float(found.count(number)) for number in range(len(optim.rules))])
    for number, count in enumerate(counts):
        if count == 0:
            raise ConfigError(
                f"optim.rules: {optim.rules[number].match}: no parameter has such a name that no rule before it holds"
                " for; infini-train checkpoint inspect lists the names of a trained model's"
            )
    groups = [group["name"] for group in parameter_groups(named, optim)]
    if mesh.max_over_world(float(not groups)):
        raise ConfigError("optim.rules: nothing is left to train (on some pipeline stage); train something in each")
    # DeepSpeed's ranks meet once for each group, so ranks with other groups would wait for each other for ever.
    most, fewest = mesh.max_over_world(float(len(groups))), -mesh.max_over_world(-float(len(groups)))
    if most != fewest:
        raise ConfigError(
            "optim.rules: pipeline stages must have parameters of equally many groups (matrices, vectors and gates, of"
            f" each rule), and they have {fewest:.0f} to {most:.0f}; write rules that hold in every stage, or set"
            " parallel.pipeline_size to 1"
        )
