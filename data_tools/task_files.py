"""Which files a finished task has written, with their hashes: checked before anything is made of them.

Tasks may finish days before the last one, on other machines. Shards and packed text are not listed: shards have hashes
of their own, and text is handed on as it is.
"""

import functools
from pathlib import Path

from infini_train.config.errors import ConfigError
from infini_train.data.manifest import hash_file
from infini_train.data.sealed import dump_sealed, read_sealed

LIST_FILE = "files.json"
_UNLISTED = (".tar", ".zst")


def list_files(folder: Path) -> None:
    """Write the list of a folder's files into it.

    Raises:
        OSError: the disk is full, say.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix not in _UNLISTED)
    (folder / LIST_FILE).write_bytes(dump_sealed({"sha256": {path.name: hash_file(path) for path in found}}))


@functools.cache
def check_files(folder: Path) -> None:
    """Check, once in a process, that the files are as they were written. Work of earlier versions has no list.

    Raises:
        ConfigError: one has changed or is missing.
    """
    if not (folder / LIST_FILE).exists():
        return
    advice = f"remove {folder} and rerun the command, which makes it again"
    for name, sha256 in read_sealed(folder / LIST_FILE, advice)["sha256"].items():
        try:
            is_right = hash_file(folder / name) == sha256
        except OSError as error:
            raise ConfigError(f"{folder / name}: can't be read: {error.strerror}; {advice}") from error
        if not is_right:
            raise ConfigError(f"{folder / name}: is not as it was written (its hash differs); {advice}")
