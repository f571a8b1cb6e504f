"""The error for a user's mistake in a configuration."""


class ConfigError(ValueError):
    """A user's mistake in a configuration; the message is one line that names the field and what to do."""


def require(condition: bool, path: str, message: str) -> None:
    """Raises a ConfigError for the field at this dotted path unless the condition holds."""
    if not condition:
        raise ConfigError(f"{path}: {message}")
