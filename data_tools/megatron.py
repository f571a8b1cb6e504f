"""Documents from the token files of Megatron's preprocess_data: a .bin of token ids, and the .idx beside it."""

from collections.abc import Iterator
from typing import Any

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
        dtype, starts, lengths, bounds = _parse_index(data)
    except ValueError as error:
        records.left_out.bad(index_path, f"is not a whole index of Megatron's: {error}", "copy it again")
        return
    with open_raw(part.path) as tokens:
        for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            chunks = []
            for start, length in zip(starts[first:last], lengths[first:last], strict=True):
                tokens.seek(int(start))
                chunks.append(tokens.read(int(length) * dtype.itemsize))
            data = b"".join(chunks)
            records.advance(len(data))
            if len(data) != lengths[first:last].sum() * dtype.itemsize:
                records.left_out.bad(part.path, f"ends in document {number}", "copy it again")
                return
            yield Document(f"{part.id}:{number}", "", part.source, {}, np.frombuffer(data, dtype))


def _parse_index(data: bytes) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """Type of the ids; first byte and number of ids of each sequence; the documents' bounds in sequences.

    Raises:
        ValueError: it is something else, or not whole.
    """
    if data[:9] != _MAGIC or len(data) < _HEADER_BYTES:
        raise ValueError("no such magic number")
    code, sequences = data[17], int.from_bytes(data[18:26], "little")
    n_bounds = int.from_bytes(data[26:34], "little")
    if code not in _TYPES:
        raise ValueError(f"ids of type {code}")
    if len(data) < _HEADER_BYTES + 12 * sequences + 8 * n_bounds:
        raise ValueError("it ends too early")
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER_BYTES)
    starts = np.frombuffer(data, "<i8", sequences, _HEADER_BYTES + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", n_bounds, _HEADER_BYTES + 12 * sequences)
    if n_bounds and (bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any()):
        raise ValueError("its documents don't fit its sequences")
    return np.dtype(_TYPES[code]), starts, lengths.astype(np.int64), bounds
