"""How the next token is to be chosen, and the command-line options that say so. Imports no torch.

`generation.choose_token` chooses it, for `infini-train generate`, summaries and the lm-evaluation-harness alike.
"""

import argparse
import math
from dataclasses import dataclass

from infini_train.command_line import MAX_SEED, non_negative, positive
from infini_train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 takes the most likely token.

    Raises:
        ConfigError: a field has no meaning; the message begins with its name.
    """

    temperature: float = 0.8
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    top_k: int = 0  # keep this many; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("temperature: must be a number, and not negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p: must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError("top_k: must not be negative")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed: must lie between 0 and {MAX_SEED}")


def add_sampling(
    parser: argparse.ArgumentParser,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    may_be_silent: bool = False,
) -> None:
    """Gives a parser the options of generation, with these defaults; see `read_sampling`."""
    parser.add_argument(
        "--max-new-tokens",
        type=non_negative if may_be_silent else positive,
        default=max_new_tokens,
        metavar="N",
        help="write at most N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="sampling temperature: below 1 favours likely tokens, 0 takes the most likely one (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help="choose among the most likely tokens that together reach this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="choose among the K most likely tokens; 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed; the same seed gives the same text (default: %(default)s)",
    )


def read_sampling(options: argparse.Namespace) -> Sampling:
    """The sampling that a command line asks for.

    Raises:
        ConfigError: an option has no meaning; the message begins with its name.
    """
    try:
        return Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed)
    except ConfigError as error:
        field, problem = str(error).split(": ", 1)
        raise ConfigError(f"--{field.replace('_', '-')}: {problem}") from error
