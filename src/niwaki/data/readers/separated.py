"""Comma- and tab-separated values."""

import csv
import io
import sys
from collections.abc import Collection
from pathlib import Path

from niwaki.data.readers.rows import Rows, rows_from, text_of
from niwaki.errors import DataError


def read_csv(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Comma-separated values with a header line; fields may be quoted with double quotes (RFC 4180)."""
    return _separated(path, origin, wanted, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Tab-separated values with a header line; quotes are plain characters (IANA)."""
    return _separated(path, origin, wanted, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(path: Path, origin: str, wanted: Collection[str], *, delimiter: str, quoting: int) -> Rows:
    stream = io.StringIO(text_of(path, origin), newline="")
    before = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        header = next(reader, [])
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{origin} line 1: column {twice!r} is named twice; rename one")
        values, lines, line = [], [], reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(header):
                    raise DataError(f"{origin} line {line}: {len(fields)} columns, but the header has {len(header)}")
                values.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{origin} line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)
    columns = {name: [fields[i] for fields in values] for i, name in enumerate(header)}
    return rows_from(columns, lines, origin, wanted)
