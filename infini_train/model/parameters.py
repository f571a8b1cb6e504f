"""What the rest of the program has to know of a parameter, said where the parameter is made and not by its name."""

from typing import NamedTuple

from torch import Tensor, nn


class Initial(NamedTuple):
    """How a parameter begins: normal with a mean and a standard deviation.

    std None is 1/sqrt(fan in). `follows_config`: `model.init_std` replaces std where it is set. `into_residual`: what
    the matrix gives is added to the residual stream, so it begins smaller by 1/sqrt(2 layers). std_if_added is that of
    a parameter added to a trained model, where it differs.
    """

    mean: float = 0.0
    std: float | None = None
    follows_config: bool = True
    into_residual: bool = False
    std_if_added: float | None = None


def constant(value: float) -> Initial:
    """A parameter that begins with the same number everywhere."""
    return Initial(value, 0.0, follows_config=False)


class Traits(NamedTuple):
    """initial: its first values. is_gate: it has the gates' learning rate and is watched. field: see `declare`."""

    initial: Initial
    is_gate: bool = False
    field: str | None = None


def declare(parameter: nn.Parameter, initial: Initial, *, is_gate: bool = False, field: str | None = None) -> None:
    """Notes the traits of a parameter, once it is made.

    Args:
        parameter: new.
        initial: its first values.
        is_gate: whether it holds a number per query head that a sigmoid makes a gate.
        field: the field of `model.attention` to which a model owes this parameter, `kind` or one of the variant's
            `adds_parameters`; None for a parameter that all models have. A trained model may lack it.
    """
    parameter.traits = Traits(initial, is_gate, field)  # type: ignore[attr-defined]


def owe_to_field(module: nn.Module, field: str) -> None:
    """Notes the field to which a model owes all parameters of a module, which are declared; see `declare`."""
    for parameter in module.parameters():
        parameter.traits = parameter.traits._replace(field=field)  # type: ignore[attr-defined]


def traits_of(parameter: Tensor) -> Traits | None:
    """What was declared of a parameter; every parameter of a model is declared (`init.initialise` checks it)."""
    return getattr(parameter, "traits", None)


def is_gate(parameter: Tensor) -> bool:
    """Whether it holds the gates of query heads."""
    traits = traits_of(parameter)
    return traits is not None and traits.is_gate
