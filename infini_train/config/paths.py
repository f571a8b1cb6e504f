"""What can be a path, and what ~ in it stands for."""

import os

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of Linux


def expand_home(path: str) -> str:
    """The path with the home folder in place of ~.

    Raises:
        ValueError: no file can have such a path; the message has no name in front.
    """
    if not path:
        raise ValueError("must not be empty")
    if "\0" in path:
        raise ValueError("holds the character '\\x00', which no path may have")
    is_url = "://" in path or path.startswith("pipe:")
    if not is_url:
        path = os.path.expanduser(path)
        encoded = os.fsencode(path)
        if len(encoded) > MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
            raise ValueError(f"is too long: a name has at most {MAX_NAME_BYTES} bytes, a path {MAX_PATH_BYTES}")
    return path
