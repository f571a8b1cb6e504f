"""Duplicates in a corpus of any size: keys of documents are sorted on disk, so that equal ones lie side by side.

A document's keys are the hash of its text, or the hashes of the bands of its MinHash signature. Documents that share a
key are duplicates, and all but the first in the corpus are left out. Memory holds one bucket of keys at a time.
"""

import hashlib
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.problems import SettingError
from data_tools.task_files import check_files, list_files
from infini_train.data.words import WORD_EDGE, words

KEY_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("task", "<u4"), ("number", "<u4")])
_KEY, _KEY_HALVES = struct.Struct("<QQII"), struct.Struct(">QQ")
_PLACE = np.dtype([("task", "<u4"), ("number", "<u4")])
_BUCKET_RECORDS = 4_000_000
_SHINGLE_WORDS = 5
SHINGLES_VERSION = 2  # 1: a text without spaces was one word
_PERMUTATIONS = 128
_SEED = 1
_SLAB_CHARS = 1_000_000  # of a text, cut into words at once


def exact_key(text: str) -> bytes:
    """16 bytes, the same for equal texts."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class NearKeys:
    """The keys that similar texts share: one for each band of their MinHash signature over shingles of 5 words.

    Where a script has no spaces, a character with its marks is a word.

    Two texts share a key with probability 1 - (1 - s^rows)^bands, where s is the share of shingles that they have in
    common: about half of the pairs do at the threshold.

    Args:
        threshold: that share, from 0.1 up to 1.

    Raises:
        SettingError: the threshold is not such a share, or rensa is not installed.
    """

    def __init__(self, threshold: float) -> None:
        if not 0.1 <= threshold < 1:
            template = "{threshold}: {given} is not a share from 0.1 up to (not including) 1"
            raise SettingError(template, given=threshold)
        try:
            import rensa
        except ImportError as error:
            template = "{threshold}: needs rensa; install it with: pip install 'infini-train[clean]'"
            raise SettingError(template) from error
        self._rensa = rensa
        choices = [(_PERMUTATIONS // rows, rows) for rows in range(1, _PERMUTATIONS + 1)]
        self.bands, self.rows = min(choices, key=lambda c: abs((1 / c[0]) ** (1 / c[1]) - threshold))

    def __call__(self, text: str) -> list[bytes]:
        return [
            hashlib.blake2b(band.tobytes(), digest_size=16, salt=number.to_bytes(2, "little")).digest()
            for number, band in enumerate(self.signature(text))
        ]

    def signature(self, text: str) -> np.ndarray:
        """uint32 (bands, rows): the smallest hashes of the text's shingles."""
        signature = self._rensa.RMinHash(_PERMUTATIONS, _SEED)
        for shingles in _shingles(text):
            signature.update(shingles)
        return np.array(signature.digest(), "<u4")[: self.bands * self.rows].reshape(self.bands, self.rows)


def _shingles(text: str) -> Iterator[list[str]]:
    """All runs of 5 words, some at a time; a text of fewer words is one shingle."""
    found: list[str] = []
    start, has_runs = 0, False
    while start < len(text) or not start:
        edge = WORD_EDGE.search(text, start + _SLAB_CHARS)
        stop = edge.start() if edge else len(text)
        found += words(text[start:stop].lower())
        start = max(stop, start + 1)
        runs = len(found) - _SHINGLE_WORDS + 1
        if runs > 0:
            yield [" ".join(found[i : i + _SHINGLE_WORDS]) for i in range(runs)]
            found = found[runs:]
            has_runs = True
        elif start >= len(text) and not has_runs:
            yield [" ".join(found)]


class KeyFile:
    """The keys of a task's documents, each with the document's number; written sorted."""

    def __init__(self, task: int) -> None:
        self._task = task
        self._data = bytearray()

    def add(self, number: int, key: bytes) -> None:
        self._data += _KEY.pack(*_KEY_HALVES.unpack(key), self._task, number)

    def write(self, path: Path) -> None:
        """Raises OSError: the disk is full, say."""
        _sorted(np.frombuffer(self._data, KEY_RECORD)).tofile(path)


def disk_bytes(bands: int) -> int:
    """Bytes on the disk, at most, for a document's keys and for marking it as a duplicate."""
    return bands * (KEY_RECORD.itemsize + _PLACE.itemsize)


def find_duplicates(paths: list[Path], out: Path) -> None:
    """Write to the folder `out` which documents to leave out.

    Args:
        paths: the key files of all tasks.
        out: a folder that appears whole; if it is there already, nothing is done.
    """
    if out.exists():
        return
    total = sum(path.stat().st_size for path in paths) // KEY_RECORD.itemsize
    bits = (total // _BUCKET_RECORDS).bit_length()
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        for bucket in range(1 << bits):
            rows = _sorted(np.concatenate([_bucket(path, bucket, bits) for path in paths]))
            same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
            later = rows[1:][same]
            places = np.empty(len(later), _PLACE)
            places["task"], places["number"] = later["task"], later["number"]
            np.save(aside / f"{bucket:05d}.npy", places[np.argsort(places["task"], kind="stable")], allow_pickle=False)
        list_files(aside)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def left_out_of(out: Path, task: int) -> set[int]:
    """The numbers of a task's documents to leave out.

    Raises:
        ConfigError: the folder is not as it was written.
    """
    check_files(out)
    numbers: set[int] = set()
    for path in sorted(out.glob("*.npy")):
        places = np.load(path, mmap_mode="r", allow_pickle=False)
        first, last = np.searchsorted(places["task"], [task, task + 1])
        numbers.update(places["number"][first:last].tolist())
    return numbers


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows["number"], rows["task"], rows["low"], rows["high"]))]


def _bucket(path: Path, bucket: int, bits: int) -> np.ndarray:
    """The records of a file whose keys begin with these bits."""
    if not path.stat().st_size:
        return np.zeros(0, KEY_RECORD)
    rows = np.memmap(path, KEY_RECORD, "r")
    if not bits:
        return np.array(rows)
    first = np.searchsorted(rows["high"], np.uint64(bucket << (64 - bits)))
    last = np.searchsorted(rows["high"], np.uint64((bucket + 1 << (64 - bits)) - 1), side="right")
    return np.array(rows[first:last])
