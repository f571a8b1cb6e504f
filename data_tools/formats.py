"""What a file holds, by its name: formats and compressions, whatever the case of the letters."""

import json
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from data_tools.pipes import is_pipe


class Format(NamedTuple):
    """What can be done with the files of a format."""

    suffixes: tuple[str, ...]  # without that of a compression
    compressible: bool  # as a whole
    searched: bool  # a folder is searched for them
    seekable: bool  # its reader seeks, so that it can't read a stream
    cuttable: bool  # a reader finds the records of any range of such a file
    named: tuple[str, ...] = ()  # further suffixes; other things have them, too, so that no folder is searched for them


FORMATS = {
    "jsonl": Format(
        (".jsonl", ".ndjson"),
        compressible=True,
        searched=True,
        seekable=False,
        cuttable=True,
        named=(".json", ".jsonlines", ".ldjson"),
    ),
    "parquet": Format((".parquet",), compressible=False, searched=True, seekable=True, cuttable=True),
    "tar": Format((".tar",), compressible=True, searched=True, seekable=False, cuttable=False),
    "text": Format((".txt", ".md", ".py", ".rst"), compressible=True, searched=True, seekable=False, cuttable=False),
    "megatron": Format((".bin",), compressible=False, searched=False, seekable=True, cuttable=False),
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_OTHER_NAMES = {  # of compressions and of compressed tars
    ".zstd": ".zst",
    ".tgz": ".tar.gz",
    ".tzst": ".tar.zst",
    ".txz": ".tar.xz",
    ".tbz2": ".tar.bz2",
    ".tbz": ".tar.bz2",
}
_NOT_TEXT = (
    *(*COMPRESSIONS, ".zip", ".7z", ".rar", ".lz4", ".lzma", ".br", ".idx", ".npy"),
    *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".pdf", ".docx", ".epub"),
)
_TAR_MAGIC, _TAR_MAGIC_AT = "ustar", 257


def suffixes() -> str:
    """The names that a folder is searched for."""
    endings = " ".join(suffix for each in FORMATS.values() if each.searched for suffix in each.suffixes)
    return f"{endings}, each but .parquet also with {' '.join(COMPRESSIONS)}"


def compression_of(path: str) -> str | None:
    """The suffix of its compression; None: not compressed, or a pipe, whose first bytes show it."""
    if is_pipe(path):
        return None
    name = _plain_name(path)
    return next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), None)


def format_of(path: str) -> str | None:
    """The format, by the file's name; None: none of those known."""
    if is_pipe(path):
        return "tar"  # as in webdataset
    return _find(path, searched=False)


def is_searched(path: str) -> bool:
    """Whether a file that lies in a folder is read when the folder is the source."""
    return _find(path, searched=True) is not None and not PurePosixPath(path).name.startswith(".")


def is_other_format(path: str) -> bool:
    """Whether the name says that the file holds something that is no text, and that is not read here."""
    return format_of(path) is None and _plain_name(path).endswith(_NOT_TEXT)


def format_inside(text: str, text_field: str) -> str | None:
    """The format of records that a text seems to consist of, whatever its name; None: it is a text."""
    if text.startswith(_TAR_MAGIC, _TAR_MAGIC_AT):
        return "tar"
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or rest.lstrip()[:1] not in ("{", ""):
        return None
    row = _parse(first)
    if not isinstance(row, dict):
        return None
    # The text may be in another field, as the reader's error about it then says.
    is_table = isinstance(_parse(rest.lstrip().partition("\n")[0]), dict)
    return "jsonl" if is_table or isinstance(row.get(text_field), str) else None


def _parse(line: str) -> Any:
    """The JSON value of a line; None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def has_index(path: str) -> bool:
    """Whether a file has an index of Megatron's beside it."""
    return path.lower().endswith(".bin")


def index_of(path: str) -> str:
    """The index beside one of Megatron's .bin files."""
    return path[: -len(".bin")] + (".IDX" if path.endswith(".BIN") else ".idx")


def _find(path: str, *, searched: bool) -> str | None:
    name, compression = _plain_name(path), compression_of(path) or ""
    plain = name.removesuffix(compression)
    for kind, each in FORMATS.items():
        endings = each.suffixes if searched else each.suffixes + each.named
        if (each.searched or not searched) and plain.endswith(endings) and (not compression or each.compressible):
            return kind
    return None


def _plain_name(path: str) -> str:
    """The file's name in lower case, with the usual names of its suffixes."""
    name = PurePosixPath(path).name.lower()
    for other, usual in _OTHER_NAMES.items():
        if name.endswith(other):
            return name.removesuffix(other) + usual
    return name
