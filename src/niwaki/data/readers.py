"""Readers of local files, one function a format; each keeps the line that a row starts at."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A file's columns, and for each row its number (from 1) counted in `unit`: "line" or "row"."""

    table: "pa.Table"
    numbers: list[int]
    unit: str


def read_csv(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Comma-separated values with a header line; fields may be quoted with double quotes (RFC 4180)."""
    return _separated(path, origin, wanted, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Tab-separated values with a header line; quotes are plain characters (IANA)."""
    return _separated(path, origin, wanted, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(path: Path, origin: str, wanted: Collection[str], *, delimiter: str, quoting: int) -> Rows:
    stream = io.StringIO(_text(path, origin), newline="")
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
    return _rows(columns, lines, origin, wanted)


def read_jsonl(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    objects, lines = [], []
    # Not splitlines: a JSON string may hold U+2028 and the like as it is.
    for line, text in enumerate(_text(path, origin).split("\n"), start=1):
        if not text.strip():
            continue
        objects.append(_object(text, f"{origin} line {line}"))
        lines.append(line)
    return _rows(_columns(objects), lines, origin, wanted)


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at character {error.pos + 1}") from None
    return _checked_object(value, place)


def _checked_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{place}: is a {type(value).__name__}, must be an object such as {{"text": "..."}}')
    return value


def read_json(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """A JSON list of objects, or one object a line."""
    text = _text(path, origin)
    if not text.lstrip().startswith("["):
        return read_jsonl(path, origin, wanted)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin} line {error.lineno}: not JSON: {error.msg}") from None
    objects = [_checked_object(value, f"{origin} row {row}") for row, value in enumerate(values, start=1)]
    return _rows(_columns(objects), list(range(1, len(objects) + 1)), origin, wanted, unit="row")


def _columns(objects: list[dict[str, Any]]) -> dict[str, list]:
    names = dict.fromkeys(name for value in objects for name in value)
    return {name: [value.get(name) for value in objects] for name in names}


def read_parquet(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """An Apache Parquet file; dictionary columns are read as their values."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    _check_there(path, origin)
    try:
        # One file by its handle: a path would also be searched for partitions.
        with path.open("rb") as stream:
            table = parquet.read_table(stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{origin}: not a readable Parquet file: {_first_line(error)}") from None
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            decoded = table.column(index).cast(column.type.value_type)
            table = table.set_column(index, column.name, decoded)
    return Rows(table=table, numbers=list(range(1, table.num_rows + 1)), unit="row")


def read_conll(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """CoNLL columns: 2 to 4, token first, tag last, split by blanks; an empty line ends a sentence.

    Lines that start with -DOCSTART- are skipped; IOB1 tags become IOB2 (Ramshaw & Marcus 1995; Ratnaparkhi
    1998).
    """
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    lines: list[int] = []
    width = 0
    for line, text in enumerate(_text(path, origin).split("\n"), start=1):
        fields = re.split(r"[ \t]+", text.strip(" \t\r"))
        if fields == [""] or fields[0] == "-DOCSTART-":
            if tokens[-1]:
                tokens.append([])
                tags.append([])
            continue
        width = width or len(fields)
        if len(fields) != width or not 2 <= width <= 4:
            expected = width if 2 <= width <= 4 else "2 to 4"
            raise DataError(f"{origin} line {line}: {len(fields)} columns, must be {expected}")
        if not tokens[-1]:
            lines.append(line)
        tokens[-1].append(fields[0])
        tags[-1].append(fields[-1])
    columns = {"tokens": tokens[: len(lines)], "tags": [iob2(sentence) for sentence in tags[: len(lines)]]}
    return _rows(columns, lines, origin, wanted)


def iob2(tags: list[str]) -> list[str]:
    """The tags of a sentence with every entity begun by B-, where IOB1 begins most with I-."""
    fixed = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        begins = tag.startswith("I-") and before not in (f"B-{tag[2:]}", tag)
        fixed.append(f"B-{tag[2:]}" if begins else tag)
    return fixed


def read_txt(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """One row a line, line break and blank lines kept: the rows joined give the file's text back."""
    lines = list(io.StringIO(_text(path, origin), newline=""))
    return _rows({"text": lines}, list(range(1, len(lines) + 1)), origin, wanted)


READERS: dict[str, Callable[[Path, str, Collection[str]], Rows]] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "conll": read_conll,
    "txt": read_txt,
}


def _check_there(path: Path, origin: str) -> None:
    if path.is_dir():
        raise DataError(f"{origin}: is a folder; name a file")
    if not path.exists():
        raise DataError(f"{origin}: no such file")


def _text(path: Path, origin: str) -> str:
    _check_there(path, origin)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin}: cannot be read: {_first_line(error)}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{origin}: not UTF-8: byte {content[position]:#04x} at position {position} "
            f"(line {content[:position].count(10) + 1}); save the file as UTF-8"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _rows(
    columns: dict[str, list], numbers: list[int], origin: str, wanted: Collection[str], unit: str = "line"
) -> Rows:
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        # What no task reads keeps its name only, so that its types need not agree.
        if name not in wanted:
            arrays[name] = pa.nulls(len(values))
            continue
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            at, kinds = _first_of_another_type(values)
            raise DataError(f"{origin} {unit} {numbers[at]}: column {name!r} {kinds}") from None
    return Rows(table=pa.table(arrays), numbers=numbers, unit=unit)


def _first_of_another_type(values: list) -> tuple[int, str]:
    present = [(index, value) for index, value in enumerate(values) if value is not None]
    first = type(present[0][1]) if present else type(None)
    for index, value in present:
        if type(value) is not first:
            return index, f"is {type(value).__name__} {value!r:.40}, but {first.__name__} in the rows before"
    return 0, f"holds {first.__name__} values that do not form one column"
