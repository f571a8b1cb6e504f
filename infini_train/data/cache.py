"""Remote datasets (s3://, gs://, https://, ...) and the local folder that caches their files. Imports no torch.

Shuffled documents come from all shards, so whole shards are fetched, each when it is first needed, and kept: the folder
needs room for the dataset. Processes of a machine share it.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import MANIFEST_FILE, FileEntry, TokenizerEntry, hash_file

_REFUSALS = (
    ("aiohttp", "ClientError"),  # http
    ("botocore.exceptions", "BotoCoreError"),  # s3
    ("botocore.exceptions", "ClientError"),
)
RETRY_AFTER_S = (1.0, 4.0, 16.0)  # for a busy store, or a network that is down for a moment


def is_url(location: str) -> bool:
    """Whether a dataset's location is a URL and not a local folder."""
    return "://" in location


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions, other than OSErrors, by which fsspec's packages report a server's refusal; of loaded packages."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _REFUSALS)
    return tuple(error for error in found if error is not None)


def transport_errors() -> tuple[type[Exception], ...]:
    """All that reading from a URL may raise."""
    return (OSError, *refusals())


class RemoteFolder:
    """A dataset's folder at an fsspec URL, and its copy below `cache_dir`, named after the manifest's hash.

    Args:
        url: of the folder that holds manifest.json.
        cache_dir: a local folder; created if needed.

    Raises:
        ConfigError: no such protocol or folder, or no access to it.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.url)
            manifest = self._files.cat_file(f"{self._root}/{MANIFEST_FILE}")
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: can't be opened: {error}") from error
        except transport_errors() as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{self.url}/{MANIFEST_FILE}: can't be fetched: {reason}") from error
        digest = hashlib.sha256(manifest).hexdigest()
        self.folder = cache_dir / f"{self.url.rsplit('/', 1)[-1]}-{digest[:16]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MANIFEST_FILE).exists():
                with self._locked(MANIFEST_FILE):
                    # What was hashed: a second fetch might find another one.
                    write_atomic(self.folder / MANIFEST_FILE, manifest)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {cache_dir} can't be written: {error.strerror}") from error

    def fetch_tokenizer(self, entry: TokenizerEntry) -> None:
        """Copy the tokenizer's file, if it has one; opening it checks its hash.

        Raises:
            OSError: it can't be read.
        """
        if entry.file is not None and not (self.folder / entry.file).exists():
            with self._locked(entry.file):
                self._copy(entry.file).rename(self.folder / entry.file)

    def fetch(self, entry: FileEntry) -> Path:
        """The copy of a file, fetched and checked against its hash if it is not there yet.

        Raises:
            OSError: it can't be read, even after retries; starting again may help.
            ConfigError: it is not the file of the manifest.
        """
        path = self.folder / entry.file
        if self._is_there(entry):
            return path
        with self._locked(entry.file):
            if self._is_there(entry):
                return path
            partial = self._copy(entry.file)
            if partial.stat().st_size != entry.bytes or hash_file(partial) != entry.sha256:
                partial.unlink()
                raise ConfigError(f"{self.url}/{entry.file}: is not the file of the manifest; copy the dataset again")
            return partial.rename(path)

    def missing_bytes(self, entries: Iterable[FileEntry]) -> int:
        """Bytes of these files that are still to be fetched."""
        return sum(entry.bytes for entry in entries if not self._is_there(entry))

    def _is_there(self, entry: FileEntry) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / entry.file).stat().st_size == entry.bytes
        return False

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; the lock ends with its process."""
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _copy(self, name: str) -> Path:
        """Copy a file whole, synced to the disk, beside its final place."""
        target = self.folder / f".{name}.partial"
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                with self._files.open(f"{self._root}/{name}", "rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 22)
                    file.flush()
                    os.fsync(file.fileno())
                return target
            except transport_errors() as error:
                target.unlink(missing_ok=True)
                number = errno.ENOENT if isinstance(error, FileNotFoundError) else getattr(error, "errno", None)
                if wait_s is None or number in (errno.ENOENT, errno.ENOSPC, errno.EACCES):
                    reason = getattr(error, "strerror", None) or str(error)
                    text = f"{self.url}/{name}: can't be fetched to {target.parent}: {reason}"
                    raise OSError(text) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def check_space(cache_dir: Path, missing: Mapping[str, int]) -> None:
    """Check at the start that the disk has room for all that is missing, of one dataset or of a mixture's parts.

    Args:
        cache_dir: the folder that keeps all of them.
        missing: bytes still to be fetched, by the dataset's URL.

    Raises:
        ConfigError: there is not enough room; says how much is needed.
    """
    needed = sum(missing.values())
    if not needed:
        return
    free = shutil.disk_usage(cache_dir).free
    if needed > free:
        names = ", ".join(url for url, n_bytes in missing.items() if n_bytes)
        raise ConfigError(
            f"data.cache_dir: {cache_dir} has {free / 1e9:.1f} GB free, and {names} need {needed / 1e9:.1f} GB more;"
            " choose a larger disk"
        )
