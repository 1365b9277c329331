"""A table as a Parquet file, for artifacts that people read with their own tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write columns of equal length; types are inferred."""
    pq.write_table(pa.table(dict(columns)), path)
