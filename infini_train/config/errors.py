"""What is wrong with a configuration, told to its user."""


class ConfigError(ValueError):
    """A mistake of the user in a configuration; the message is one line that names the field and what to do."""


def require(condition: bool, path: str, message: str) -> None:
    """Raises the error of the field at this dotted path unless the condition holds."""
    if not condition:
        raise ConfigError(f"{path}: {message}")
