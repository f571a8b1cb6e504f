"""Compiling the layers (`train.compile`): their code is the same on every device, only who runs it differs."""

import logging
from collections.abc import Iterable

import torch

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig, find_hindrance
from infini_train.model.transformer import Transformer
from infini_train.parallel import device

logger = logging.getLogger(__name__)
# All layers share the code of one class, and each kind of window, of layer and of evaluation is compiled for itself;
# torch would give up after eight.
RECOMPILE_LIMIT = 64


def compile_layers(config: RunConfig, models: Iterable[Transformer]) -> bool:
    """Compiles the layers, each as a whole, when they are first called; whether it does.

    Raises:
        ConfigError: `train.compile` is true, and nothing can be compiled here.
    """
    wanted = config.train.compile
    if wanted is False or (wanted == "auto" and (not device.uses_cuda() or find_hindrance(config))):
        return False
    reason = _find_fault()
    if reason and wanted is True:
        raise ConfigError(f"train.compile: torch.compile does not work here ({reason}); set it to false")
    if reason:
        logger.warning("warning: train.compile: layers are not compiled, torch.compile does not work here (%s)", reason)
        return False
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # noqa: SLF001 (its documented place)
    for model in models:
        for layer in model.layers.values():
            layer.compile(dynamic=False)
    return True


def _find_fault() -> str:
    """What keeps torch.compile from working on this process's device, found by trying; empty: nothing."""
    try:
        torch.compile(lambda x: x.square() + 1, dynamic=False)(torch.ones(8, device=device.current()))
    except Exception as error:  # noqa: BLE001 (whatever a compiler or a driver says)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
