"""Tables as Parquet files, for artifacts and results that people read with their own tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 4096


def write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write columns of equal length; types are inferred."""
    pq.write_table(pa.table(dict(columns)), path)


class TableWriter:
    """A Parquet file written row by row, whole or not at all; it holds some thousand rows, whatever their number."""

    def __init__(self, path: Path, columns: Mapping[str, type[str] | type[int] | type[float]]) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
        self._schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
        self._rows: list[dict[str, object]] = []

    def __enter__(self) -> "TableWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, self._schema)
        return self

    def add(self, row: dict[str, object]) -> None:
        """One more row, by column name."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
