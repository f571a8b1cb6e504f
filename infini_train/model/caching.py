"""Which layers keep the keys and values of a whole text, and what that takes: from the config alone."""

from infini_train.config.model import ModelConfig

NUMBER_BYTES = {"fp32": 4, "bf16": 2}  # of a weight or an activation, by precision
NAMED_LAYERS = 6


def caching_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers, counted from 0, whose state grows with the text outside training."""
    return tuple(number for number, layer in enumerate(config.layers) if layer.cached_numbers(config.shape))


def cached_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of keys and values that all layers together keep of a token of a lane, in fp32 or bf16; all heads."""
    return NUMBER_BYTES[precision] * sum(layer.cached_numbers(config.shape) for layer in config.layers)


def name_layers(numbers: tuple[int, ...]) -> str:
    """Layers by their numbers, such as layers 3, 7; of more than six the first three and the last."""
    shown = [str(number) for number in numbers]
    if len(shown) > NAMED_LAYERS:
        shown = [*shown[:3], "...", shown[-1]]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"
