"""Remote datasets (s3://, gs://, https://, ...) and the local folder that caches their files. Imports no torch.

Shuffled documents come from all shards, so whole shards are fetched, each when it is first needed, and kept: the folder
needs room for the dataset. Processes of a machine share it. A copy that no longer fits its hash is fetched again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import MANIFEST_FILE, FileEntry, TokenizerEntry, hash_file, hash_stream, parse_manifest
from infini_train.data.sealed import MAX_BYTES, parse_object
from infini_train.regular_files import open_own, open_regular, read_regular

LOG = logging.getLogger(__name__)
_REFUSALS = (
    ("aiohttp", "ClientError"),  # http
    ("botocore.exceptions", "BotoCoreError"),  # s3
    ("botocore.exceptions", "ClientError"),
)
_NOTE = ".{}.checked"  # beside each copy
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

    Attributes:
        manifest: as it is at the URL now.

    Raises:
        ConfigError: no such protocol or folder, no access to it, or no manifest as it was written.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        self.url = url.rstrip("/")
        self._checked: dict[str, list[int]] = {}  # copies that were hashed, as they were then
        place = f"{self.url}/{MANIFEST_FILE}"
        try:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.url)
            with self._files.open(f"{self._root}/{MANIFEST_FILE}", "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: can't be opened: {error}") from error
        except transport_errors() as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{place}: can't be fetched: {reason}") from error
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{place}: holds more than {MAX_BYTES:,} bytes, which no manifest does")
        self.manifest = parse_manifest(data, place)
        self.folder = cache_dir / f"{self.url.rsplit('/', 1)[-1]}-{hashlib.sha256(data).hexdigest()[:16]}"
        try:
            self._keep_manifest(data)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {self.folder} can't be written: {error.strerror}") from error

    def open(self, entry: FileEntry | TokenizerEntry) -> IO[bytes]:
        """The copy of a file, opened for reading and right by its hash; fetched if it is missing or damaged.

        A copy is hashed when it is first opened, and again only if the file has changed since; a note beside it tells
        other processes, and later starts of this one, what it was like then.

        Raises:
            OSError: it can't be read, even after retries; starting again may help.
            ConfigError: it is not the file of the manifest.
        """
        assert entry.file is not None
        found = self._open_copy(entry)
        if isinstance(found, str):
            with self._locked(entry.file):
                found = self._open_copy(entry)
                if isinstance(found, str):
                    if found:
                        path = self.folder / entry.file
                        LOG.warning("warning: %s: %s; fetching it again from %s", path, found, self.url)
                    found = self._fetch(entry.file, entry)
        return found

    def missing_bytes(self, entries: Iterable[FileEntry]) -> int:
        """Bytes of these files that are still to be fetched."""
        return sum(entry.bytes for entry in entries if not self._is_there(entry))

    def _is_there(self, entry: FileEntry) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / entry.file).lstat().st_size == entry.bytes
        return False

    def _keep_manifest(self, data: bytes) -> None:
        """Writes what was fetched beside the other copies: a second fetch might find another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink():
            raise OSError(errno.ELOOP, "is a link; remove it")
        path, there = self.folder / MANIFEST_FILE, None
        with contextlib.suppress(OSError):
            there = read_regular(path, MAX_BYTES, follow_links=False)
        if there != data:
            with self._locked(MANIFEST_FILE):
                write_atomic(path, data)

    def _open_copy(self, entry: FileEntry | TokenizerEntry) -> IO[bytes] | str:
        """The copy, if it is right; else what is wrong with it, or nothing if there is none."""
        assert entry.file is not None
        try:
            file = open_regular(self.folder / entry.file, follow_links=False)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return str(error.strerror)
        stamp = _stamp(file)
        if self._checked.get(entry.file) == stamp or self._read_note(entry) == stamp:
            self._checked[entry.file] = stamp
            return file
        if isinstance(entry, FileEntry) and os.fstat(file.fileno()).st_size != entry.bytes:
            problem = "has another size than in the manifest"
        elif hash_stream(file) != entry.sha256:
            problem = "is damaged (its hash differs)"
        else:
            self._note(entry, stamp)
            return file
        file.close()
        return problem

    def _note(self, entry: FileEntry | TokenizerEntry, stamp: list[int]) -> None:
        """Keeps that a copy was right, for this process and for others."""
        assert entry.file is not None
        self._checked[entry.file] = stamp
        with contextlib.suppress(OSError):  # the others will hash it themselves
            note = json.dumps({"sha256": entry.sha256, "stamp": stamp})
            write_atomic(self.folder / _NOTE.format(entry.file), note, durable=False)

    def _read_note(self, entry: FileEntry | TokenizerEntry) -> list[int] | None:
        """What the copy was like when some process found it right; None if that isn't known."""
        try:
            note = parse_object(read_regular(self.folder / _NOTE.format(entry.file), 4096, follow_links=False))
        except (OSError, ValueError):
            return None
        return note.get("stamp") if note.get("sha256") == entry.sha256 else None

    def _fetch(self, name: str, entry: FileEntry | TokenizerEntry) -> IO[bytes]:
        """Replaces the copy."""
        partial, path = self._copy(name), self.folder / name
        try:
            if hash_file(partial) != entry.sha256:
                raise ConfigError(f"{self.url}/{name}: is not the file of the manifest; copy the dataset again")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        file = open_regular(path, follow_links=False)
        self._note(entry, _stamp(file))
        return file

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; the lock ends with its process."""
        with open_own(self.folder / f".{name}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _copy(self, name: str) -> Path:
        """Copy a file whole, synced to the disk, beside its final place."""
        target = self.folder / f".{name}.partial"
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                target.unlink(missing_ok=True)  # of a process that was killed
                with self._files.open(f"{self._root}/{name}", "rb") as source, open_own(target) as file:
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
                    raise OSError(number or errno.EIO, text) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _stamp(file: IO[bytes]) -> list[int]:
    """Changes whenever somebody writes to the file or replaces it."""
    status = os.fstat(file.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


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
