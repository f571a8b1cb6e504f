"""Writes the same documents with our shard writer and with webdataset's TarWriter, in turns: same bytes? same speed?

    python benchmarks/tar_writers.py --runs 7

Both write one shard, hash it as the manifest needs it, and sync it to the disk. Ours also writes the index.
"""

import argparse
import hashlib
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from infini_train.data.shard_file import ShardRun, document_checksum, encode_metadata, npy_header

SHAPES = ((20_000, 200), (4_000, 2_000), (100, 200_000))  # documents, tokens of each
DTYPE = np.dtype("<u2")


def draw_documents(number: int, n_tokens: int) -> list[np.ndarray]:
    """Random ids, uint16 (n_tokens,) each."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 32_000, n_tokens).astype(DTYPE) for _ in range(number)]


def write_ours(path: Path, documents: list[np.ndarray]) -> None:
    """One shard by `ShardRun`, with its index records and its hash."""
    with (path.parent / "index").open("wb") as index:
        run = ShardRun(path.parent, path.stem, index, DTYPE, 1 << 40)
        for number, tokens in enumerate(documents):
            run.add(tokens, n_bytes=4 * tokens.size, id=f"document-{number}", source="drawn")
        run.close_shard()
    (path.parent / f"{path.stem}-00000.tar").rename(path)


class HashedFile(io.RawIOBase):
    """A file that also hashes what is written, as the manifest needs it."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = path.open("wb", buffering=1 << 20), hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_theirs(path: Path, documents: list[np.ndarray]) -> None:
    """One shard by `webdataset.TarWriter`, of members with our contents, owner, time and mode."""
    stream = HashedFile(path)
    options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": "GNU_FORMAT"}
    with webdataset.TarWriter(stream, encoder=False, **options) as writer:
        for number, tokens in enumerate(documents):
            own = {"id": f"document-{number}", "source": "drawn", "n_bytes": 4 * tokens.size, "n_tokens": tokens.size}
            note = encode_metadata({**own, "crc32": document_checksum(own, tokens)})
            data = npy_header(DTYPE, tokens.size) + tokens.tobytes()
            writer.write({"__key__": f"{number:010d}", "npy": data, "json": note})
    stream.close()


def read_members(path: Path) -> list[tuple[str, bytes, bytes]]:
    """Name, header block and contents of each member, in order."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        return [(m.name, data[m.offset : m.offset_data], data[m.offset_data : m.offset_data + m.size]) for m in tar]


def compare(ours: Path, theirs: Path) -> str:
    """What the two tars have in common, as cells of a table."""
    left, right = read_members(ours), read_members(theirs)
    order = [name for name, *_ in left] == [name for name, *_ in right]
    headers = sorted((name, header) for name, header, _ in left) == sorted((name, header) for name, header, _ in right)
    contents = sorted((name, data) for name, _, data in left) == sorted((name, data) for name, _, data in right)
    return " | ".join("same" if same else "differ" for same in (contents, headers, order))


def measure(write: Callable[[Path, list[np.ndarray]], None], path: Path, documents: list[np.ndarray]) -> float:
    """Seconds of wall time."""
    started = time.perf_counter()
    write(path, documents)
    return time.perf_counter() - started


def main() -> None:
    """Prints a row for each shape of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each writer, in turns (default: 7)")
    options = parser.parse_args()
    print("| documents | contents | headers | order | ours, s | webdataset, s | webdataset / ours |")
    print("|---|---|---|---|--:|--:|--:|")
    for shape in SHAPES:
        documents = draw_documents(*shape)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder, "ours.tar"), Path(folder, "theirs.tar")
            for _ in range(options.runs):
                times["ours"].append(measure(write_ours, ours, documents))
                times["theirs"].append(measure(write_theirs, theirs, documents))
            found = compare(ours, theirs)
        a, b = (statistics.median(times[arm]) for arm in ("ours", "theirs"))
        row = f"{shape[0]:,} of {shape[1]:,} tokens | {found} | {a:.2f} | {b:.2f} | {b / a:.2f}"
        print(f"| {row} |")


if __name__ == "__main__":
    main()
