"""User mistakes in a configuration or on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A user's mistake; the message is one line that names the field, flag or file and says what to do."""


def require(condition: bool, path: str, message: str) -> None:
    """Raises a ConfigError for the field at this dotted path unless the condition holds."""
    if not condition:
        raise ConfigError(f"{path}: {message}")


@contextmanager
def naming(source: str, advice: str = "") -> Iterator[None]:
    """Prefixes every `ConfigError` raised inside with the field or flag that the value came from.

    Shared code raises errors about values (a file that can't be read); the caller knows where the user wrote them:
    ``with naming("data.synthetic.haystack"):`` in training, ``with naming("--haystack"):`` on the command line.
    `advice` is appended.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}{advice and f'; {advice}'}") from error
