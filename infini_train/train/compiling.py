"""Compiling the layers (`train.compile`)."""

from collections.abc import Iterable

import torch

from infini_train.config.errors import ConfigError
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh

# All layers share the code of one class, and each kind of window, of layer and of evaluation is compiled for itself;
# torch would give up after eight.
RECOMPILE_LIMIT = 64


def compile_layers(models: Iterable[Transformer]) -> None:
    """Has the layers compiled, each as a whole, when they are first called. All ranks call it together.

    Raises:
        ConfigError: nothing can be compiled on one of the ranks; on all of them.
    """
    reason = _find_fault()
    if mesh.max_over_world(float(bool(reason))):
        raise ConfigError(
            f"train.compile: torch.compile does not work {'here' if reason else 'on another rank'}"
            f"{f' ({reason})' if reason else ''}; set it to false"
        )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # noqa: SLF001 (its documented place)
    for model in models:
        for layer in model.layers.values():
            layer.compile(dynamic=False)


def _find_fault() -> str:
    """What keeps torch.compile from working on this process's device, found by trying; empty: nothing."""
    try:
        torch.compile(lambda x: x.square() + 1, dynamic=False)(torch.ones(8, device=device.current()))
    except Exception as error:  # noqa: BLE001 (whatever a compiler or a driver says)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
