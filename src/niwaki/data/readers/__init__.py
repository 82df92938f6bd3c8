"""Readers of local files, one function a format; each keeps the line that a row starts at."""

from collections.abc import Callable, Collection
from pathlib import Path

from niwaki.data.readers.chat import read_chat
from niwaki.data.readers.conll import read_conll
from niwaki.data.readers.json_rows import read_json, read_jsonl
from niwaki.data.readers.parquet import read_parquet
from niwaki.data.readers.plain import read_parallel, read_txt
from niwaki.data.readers.rows import Rows
from niwaki.data.readers.separated import read_csv, read_tsv
from niwaki.data.readers.squad import read_squad

__all__ = ["ENDINGS", "PARALLEL", "READERS", "Rows", "read_parallel"]

# By the ending of a file, which is also the name of the format.
ENDINGS: dict[str, Callable[[Path, str, Collection[str]], Rows]] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "conll": read_conll,
    "txt": read_txt,
}
# By name alone: nothing in a file's ending tells them.
READERS = {**ENDINGS, "squad": read_squad, "chat": read_chat}
PARALLEL = "parallel"  # reads two files
