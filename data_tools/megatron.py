"""Documents from the token files of Megatron's preprocess_data: a .bin of token ids, and the .idx beside it."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from data_tools.documents import Document, FileRange, Records
from data_tools.formats import index_of
from data_tools.storage import open_raw

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER_BYTES = 34


def megatron_documents(records: Records, part: FileRange) -> Iterator[Document]:
    """The documents of a .bin and its .idx as token ids; their text is empty."""
    index_path = index_of(part.path)
    with open_raw(index_path) as file:
        data = file.read()
    try:
        dtype, starts, sizes, bounds = _parse_index(data)
    except ValueError as error:
        records.left_out.bad(index_path, f"is not a whole index of Megatron's: {error}", "copy it again")
        return
    with open_raw(part.path) as tokens:
        size, limit = tokens.seek(0, 2), records.options.max_record_bytes
        for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            begins, n_bytes = starts[first:last], sizes[first:last]
            if (begins > size - n_bytes).any():
                records.left_out.bad(part.path, f"ends in document {number}", "copy it again")
            elif int(n_bytes.sum()) > limit:
                records.too_long(f"{part.path}: document {number}")
            else:
                data = b"".join(_read(tokens, begins, n_bytes))
                records.advance(len(data))
                yield Document(f"{part.id}:{number}", "", part.source, {}, np.frombuffer(data, dtype))


def _read(tokens: BinaryIO, begins: np.ndarray, sizes: np.ndarray) -> Iterator[bytes]:
    """The bytes of sequences."""
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        tokens.seek(begin)
        data = tokens.read(size)
        if len(data) != size:
            raise EOFError("the file became shorter while it was read")
        yield data


def _parse_index(data: bytes) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """Type of the ids; first byte and bytes of each sequence; the documents' bounds in sequences.

    Raises:
        ValueError: it is something else, or not whole.
    """
    if data[:9] != _MAGIC or len(data) < _HEADER_BYTES:
        raise ValueError("no such magic number")
    version, code, sequences = (int.from_bytes(data[a:b], "little") for a, b in ((9, 17), (17, 18), (18, 26)))
    n_bounds = int.from_bytes(data[26:34], "little")
    if version != 1:
        raise ValueError(f"version {version} of the format, not 1")
    if code not in _TYPES:
        raise ValueError(f"ids of type {code}")
    if len(data) < _HEADER_BYTES + 12 * sequences + 8 * n_bounds:
        raise ValueError("it ends too early")
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER_BYTES)
    starts = np.frombuffer(data, "<i8", sequences, _HEADER_BYTES + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", n_bounds, _HEADER_BYTES + 12 * sequences)
    if not n_bounds or bounds[0] != 0 or bounds[-1] != sequences or (bounds[1:] < bounds[:-1]).any():
        raise ValueError("its documents don't fit its sequences")
    if (lengths < 0).any() or (starts < 0).any():
        raise ValueError("negative lengths or places")
    dtype = np.dtype(_TYPES[code])
    return dtype, starts, lengths.astype(np.int64) * dtype.itemsize, bounds
