"""What a reader gives, and what all readers share."""

import gzip
import zlib
from bisect import bisect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from niwaki.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A file's columns, and for each row its number (from 1) counted in `unit`: "line" or "row"."""

    table: "pa.Table"
    numbers: list[int]
    unit: str


def check_there(path: Path, origin: str) -> None:
    if path.is_dir():
        raise DataError(f"{origin}: is a folder; name a file")
    if not path.exists():
        raise DataError(f"{origin}: no such file")


def text_of(path: Path, origin: str) -> str:
    check_there(path, origin)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin}: cannot be read: {first_line(error)}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{origin}: not UTF-8: byte {content[position]:#04x} at position {position} "
            f"(line {content[:position].count(10) + 1}); save the file as UTF-8"
        ) from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def rows_from(
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
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            at = first_that_does_not_fit(values)
            raise DataError(f"{origin} {unit} {numbers[at]}: column {name!r} {unlike(values[: at + 1])}") from None
    return Rows(table=pa.table(arrays), numbers=numbers, unit=unit)


def first_that_does_not_fit(values: list) -> int:
    """The number of the first value, from 0, that makes no column with those before it."""
    import pyarrow as pa

    def fits(count: int) -> bool:
        try:
            pa.array(values[:count])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            return False
        return True

    return bisect(range(1, len(values)), False, key=lambda count: not fits(count))


def unlike(values: list) -> str:
    """What is wrong with the last of these values."""
    last = values[-1]
    if any("\ud800" <= character <= "\udfff" for character in str(last)):
        return f"holds {last!a:.60}, half of a character; write whole ones"
    before = next((type(value).__name__ for value in values[:-1] if value is not None), None)
    if before is None or type(last).__name__ == before:
        return f"holds {last!r:.60}, whose types do not form one column" + (" with the rows before" if before else "")
    return f"is {type(last).__name__} {last!r:.40}, but {before} in the rows before"
