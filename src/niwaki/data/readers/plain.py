"""Plain text, and plain text beside its translation."""

import io
from collections.abc import Collection
from pathlib import Path

from niwaki.data.readers.rows import Rows, rows_from, text_of
from niwaki.errors import DataError


def read_txt(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """One row a line, line break and blank lines kept: the rows joined give the file's text back."""
    lines = list(io.StringIO(text_of(path, origin), newline=""))
    return rows_from({"text": lines}, list(range(1, len(lines) + 1)), origin, wanted)


def read_parallel(paths: tuple[Path, Path], origin: str, wanted: Collection[str]) -> Rows:
    """Columns source and target, from two files that hold the same texts line by line; lines that are blank in both
    are skipped."""
    prefix = origin.partition("=")[0]
    source, target = (text_of(path, f"{prefix}={path}").split("\n") for path in paths)
    for lines in (source, target):
        if lines[-1] == "":
            lines.pop()
    if len(source) != len(target):
        raise DataError(
            f"{origin}: {paths[0].name} has {len(source)} lines but {paths[1].name} has {len(target)}; line by line "
            "they must be translations of each other"
        )
    pairs = [
        (line, one.rstrip("\r"), other.rstrip("\r"))
        for line, (one, other) in enumerate(zip(source, target, strict=True), start=1)
        if one.strip() or other.strip()
    ]
    columns = {"source": [one for _, one, _ in pairs], "target": [other for _, _, other in pairs]}
    return rows_from(columns, [line for line, _, _ in pairs], origin, wanted)
