"""Rows encoded once: the result of a tokenising function, cached as Arrow on disk."""

import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Function = Callable[[dict[str, list]], dict[str, list]]

ROWS_AT_ONCE = 1000
LARGEST_CACHE = 2 * 1024**3  # bytes


def cache_folder() -> Path:
    """$NIWAKI_CACHE, else $XDG_CACHE_HOME/niwaki, else ~/.cache/niwaki. Not created here."""
    if own := os.environ.get("NIWAKI_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "niwaki"


def encode(rows: "Dataset", function: Function, key: str, *, whole: bool = False) -> "Dataset":
    """`function` of the rows, batch by batch (`whole`: all rows at once); its columns replace all others.

    The result is cached under the content of the rows and `key`, so `key` must tell apart all that `function`
    depends on: tokenizer, lengths, code. A damaged cache file is made again. Raises DataError where the
    function returns no rows, or the cache folder cannot be written.
    """
    from filelock import FileLock

    folder = cache_folder() / "encoded"
    name = content_hash(rows, f"{key}\n{'whole' if whole else ROWS_AT_ONCE}")
    path = folder / f"{name}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            if not _is_sound(path):
                _write(_encoded(rows, function, whole), path)
                _remove_oldest(folder, keep=name)
            os.utime(path)
    except OSError as error:
        raise DataError(f"cache folder {folder}: cannot be used: {error}; set NIWAKI_CACHE to another") from error
    return _open(path)


def content_hash(rows: "Dataset", key: str) -> str:
    """sha256 of the content of rows, and of `key`."""
    import pyarrow as pa

    class Digest:
        closed = False

        def __init__(self) -> None:
            self.sha256 = hashlib.sha256(json.dumps(key).encode())

        def write(self, block: Any) -> int:
            self.sha256.update(block)
            return len(block)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    # The metadata holds the history of the rows, not their content; a slice may carry more than its rows.
    table = rows.with_format("arrow")[:].replace_schema_metadata(None)
    table = table.take(pa.array(range(table.num_rows))).combine_chunks()
    digest = Digest()
    with pa.ipc.new_stream(pa.PythonFile(digest, mode="w"), table.schema) as stream:
        stream.write_table(table, max_chunksize=65536)
    return digest.sha256.hexdigest()


def source_of(modules: Iterable[str]) -> dict[str, str]:
    """The source text of imported modules, by name: part of the key of whatever their code computes."""
    return {name: inspect.getsource(sys.modules[name]) for name in modules}


def _encoded(rows: "Dataset", function: Function, whole: bool) -> "pa.Table":
    import pyarrow as pa

    step = rows.num_rows if whole else ROWS_AT_ONCE
    plain = rows.with_format(None)
    tables = [pa.table(function(plain[start : start + step])) for start in range(0, rows.num_rows, max(step, 1))]
    # Permissive: a column whose first thousand rows are empty lists has no type of its own yet.
    table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    if table.num_rows == 0:
        raise DataError(f"{rows.num_rows} rows became none when encoded; give more or longer rows")
    return table


def _write(table: "pa.Table", path: Path) -> None:
    import pyarrow as pa

    with _replaced(path) as name, pa.ipc.new_stream(name, table.schema) as stream:
        stream.write_table(table, max_chunksize=ROWS_AT_ONCE)
    digest = path.with_suffix(".sha256")
    with _replaced(digest) as name:
        Path(name).write_text(_file_hash(path))


@contextmanager
def _replaced(path: Path) -> Iterator[str]:
    """A temporary file that becomes `path` when all went well. The caller holds the lock of `path`."""
    for stale in path.parent.glob(f".{path.name}.*"):
        stale.unlink()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield name
    except BaseException:
        os.unlink(name)
        raise
    os.replace(name, path)


def _is_sound(path: Path) -> bool:
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_text() == _file_hash(path)


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open(path: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _remove_oldest(folder: Path, keep: str) -> None:
    """Until the folder is below its bound. A file that a process has mapped stays readable to it."""
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= LARGEST_CACHE:
            return
        if path.stem != keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".sha256").unlink(missing_ok=True)
            total -= size


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for path in folder.glob("*.arrow"):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        yield state.st_mtime, state.st_size, path
