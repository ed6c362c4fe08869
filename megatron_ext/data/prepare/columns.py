"""Reads rows of tables: Parquet, and the Arrow files that the datasets library keeps or saves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.foreign import reading

_ROWS = 256
"""Rows that are held at once."""


def row_groups(path: Path) -> int:
    """Row groups of a Parquet file, which can be read each by itself.

    Raises:
        DataError: no Parquet, or pyarrow is missing.
    """
    return int(_parquet(path).num_row_groups)


def rows_of_parquet(path: Path, group: int, column: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one row group: of `column`, which holds text, or of all columns; None where there is no value."""
    file = _parquet(path)
    if column is not None:
        _check_column(path, file.schema_arrow, column)
    with reading(path, DataError, kind="Parquet", advice="fetch it again"):
        columns = None if column is None else [column]
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
            yield from batch.to_pylist()


def rows_of_arrow(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """The same of an Arrow file, of its streaming or its file format."""
    pyarrow = _pyarrow(path)
    with reading(path, DataError, kind="an Arrow file", advice="fetch it again"), pyarrow.memory_map(str(path)) as file:
        try:
            table = pyarrow.ipc.open_stream(file)
            batches: Iterator[Any] = iter(table)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        if column is not None:
            _check_column(path, table.schema, column)
        for batch in batches:
            wanted = batch if column is None else batch.select([column])
            for start in range(0, len(wanted), _ROWS):
                yield from wanted.slice(start, _ROWS).to_pylist()


def _parquet(path: Path) -> Any:
    _pyarrow(path)
    from pyarrow import parquet

    with reading(path, DataError, kind="Parquet", advice="fetch it again"):
        return parquet.ParquetFile(path)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(f"{path}: reading it needs a library: pip install pyarrow") from error
    return pyarrow


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    if schema.get_field_index(text_key) < 0:
        raise DataError(
            f"{path}: no text under {text_key!r}; its columns: {', '.join(schema.names[:10])}; name the column of the "
            "text (--text-key) or leave the file out"
        )
    kind = str(schema.field(text_key).type)
    if kind not in ("string", "large_string", "string_view") and not kind.startswith("dictionary<values=string"):
        raise DataError(f"{path}: no text under {text_key!r}: the column is of type {kind}, not string")
