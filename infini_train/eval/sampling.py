"""How the next token is chosen. Imports no torch."""

from dataclasses import dataclass

from infini_train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 takes the most likely token."""

    temperature: float = 0.8
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    top_k: int = 0  # keep this many; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError("--temperature: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError("--top-p: must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError("--top-k: must not be negative")
