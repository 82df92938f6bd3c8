"""Apache Parquet."""

from collections.abc import Collection
from pathlib import Path

from niwaki.data.readers.rows import Rows, check_there, first_line
from niwaki.errors import DataError


def read_parquet(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """An Apache Parquet file; dictionary columns are read as their values."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    check_there(path, origin)
    try:
        # One file by its handle: a path would also be searched for partitions.
        with path.open("rb") as stream:
            table = parquet.read_table(stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{origin}: not a readable Parquet file: {first_line(error)}") from None
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            decoded = table.column(index).cast(column.type.value_type)
            table = table.set_column(index, column.name, decoded)
    return Rows(table=table, numbers=list(range(1, table.num_rows + 1)), unit="row")
