"""Said before a text is read: what layers that attend to all of it keep, or do not see.

The other layers of a mixed stack have a state of constant size, which is what a user expects of a memory.
"""

import logging

from infini_train.checkpoint.contents import format_size
from infini_train.config.model import ModelConfig
from infini_train.model.caching import cached_bytes, caching_layers, name_layers

MILLION_TOKENS = 2**20
LOG = logging.getLogger(__name__)


def warn_of_growth(config: ModelConfig, precision: str) -> None:
    """Warns that some layers keep the keys and values of a whole text while others do not; silent if all or none do."""
    caching = caching_layers(config)
    if len(caching) in (0, config.num_layers):
        return
    token_bytes = cached_bytes(config, precision)
    LOG.warning(
        "warning: keys and values of the whole text stay in %s of %d: %s a token and lane in %s, %s at 1M tokens",
        name_layers(caching),
        config.num_layers,
        format_size(token_bytes),
        precision,
        format_size(token_bytes * MILLION_TOKENS),
    )


def warn_of_windows(config: ModelConfig, window_tokens: int) -> None:
    """Warns that layers which keep nothing between windows see one window, where a user may think of the whole text."""
    caching = caching_layers(config)
    if caching:
        LOG.warning(
            "warning: full attention (%s of %d) is over the %s tokens of one forward here, not over the text before;"
            " --window-tokens sets how many",
            name_layers(caching),
            config.num_layers,
            f"{window_tokens:,}",
        )
