"""Documents from the rows of Parquet files."""

from collections.abc import Iterator
from typing import Any

from data_tools.documents import Document, FileRange, Records
from data_tools.storage import open_raw
from infini_train.command_errors import first_line
from infini_train.config.errors import ConfigError

_ROWS, _FEWEST_ROWS = 256, 4  # read at once
_BATCH_BYTES = 400_000_000  # of all of them, if each were as long as its column is stored: a long text may stand once


def parquet_documents(records: Records, part: FileRange) -> Iterator[Document]:
    """The documents of the row groups that begin in a range.

    A null text is an empty one. Bytes are read as UTF-8: some programs store text without saying that it is text.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_raw(part.path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns = _columns(records, part, file.schema_arrow.names)
            number, last_byte = 0, raw.seek(0, 2) - 1
            for i in range(file.num_row_groups if columns else 0):
                group = file.metadata.row_group(i)
                begin = min(_begin(group), last_byte)
                if part.start <= begin and (not part.stop or begin < part.stop):
                    for batch in file.iter_batches(_batch_rows(group, columns), [i], columns):
                        yield from _rows(records, batch, part, number)
                        number += batch.num_rows
                        records.advance(group.total_byte_size * batch.num_rows // max(group.num_rows, 1))
                else:
                    number += group.num_rows
    except ConfigError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a name that is not UTF-8 is a ValueError
        problem = f"is not a readable Parquet file: {first_line(error)}"
        records.left_out.bad(part.path, problem, "fix or remove it")


def _columns(records: Records, part: FileRange, names: list[str]) -> list[str]:
    """The columns to read; none if they are not what the options name."""
    if not records.has_fields(names, part.path):
        return []
    options = records.options
    wanted = {options.text_field, options.id_field or "id", *options.keep_fields}
    wanted.add(options.summary_field or options.text_field)
    columns = [name for name in names if name in wanted]
    if len(columns) > len(set(columns)):
        twice = next(name for name in columns if columns.count(name) > 1)
        records.left_out.bad(part.path, f"has two columns {twice!r}", "rename or remove one")
        return []
    return columns


def _rows(records: Records, batch: Any, part: FileRange, number: int) -> Iterator[Document]:
    text_field, names = records.options.text_field, batch.schema.names
    texts = (text_field, records.options.summary_field)
    for i in range(batch.num_rows):
        where, place_id = f"{part.path}: row {number + i + 1}", f"{part.id}:{number + i + 1}"
        row = {}
        try:
            for name, column in zip(names, batch.columns, strict=True):
                value = column[i].as_py()
                row[name] = value.decode("utf-8") if isinstance(value, bytes) and name in texts else value
        except UnicodeDecodeError:  # Parquet files don't always keep what they promise
            records.left_out.bad(where, f"field {name!r} is not valid UTF-8", "write it again")
            continue
        except (ValueError, OverflowError, LookupError) as error:  # a date in the year 100,000, an unknown time zone
            records.left_out.bad(where, f"field {name!r} can't be read: {error}", "write it as text")
            continue
        if row[text_field] is None:
            yield Document(place_id, "", part.source, {})
        elif isinstance(row[text_field], str) and _utf8_bytes_exceed(row[text_field], records.options.max_record_bytes):
            records.too_long(where)
        elif (document := records.row_document(row, where, place_id, part.source)) is not None:
            yield document


def _batch_rows(group: Any, columns: list[str]) -> int:
    """How many rows to read at once: a text that is repeated in each of them is stored once."""
    chunks = (group.column(i) for i in range(group.num_columns))
    stored = max((chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns), default=0)
    return max(_FEWEST_ROWS, min(_ROWS, _BATCH_BYTES // max(stored, 1)))


def _utf8_bytes_exceed(text: str, limit: int) -> bool:
    return len(text) > limit or (4 * len(text) > limit and len(text.encode("utf-8", "surrogatepass")) > limit)


def _begin(group: Any) -> int:
    """Where a row group begins in its Parquet file."""
    column = group.column(0)
    return max(0, min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset))
