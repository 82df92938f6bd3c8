"""Rows from local files: csv, tsv, jsonl, json, Parquet, CoNLL columns, plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.data.readers import READERS, Rows
from niwaki.data.source import SPLITS, Needs, Source
from niwaki.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

# Where each row stands, beside the columns of the file.
FILE, NUMBER, UNIT = "__file__", "__number__", "__unit__"
UNLABELLED = "unlabelled"


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Local files, one or more for training, one each for validation and test or null to carve it.

    Relative paths start at the current folder. `format` is one of csv, tsv, jsonl, json, parquet, conll, txt,
    or null to go by the ending; the text formats may end in .gz. CoNLL files give columns `tokens` and
    `tags`. A txt file gives column `text`, one row a line with its line break, so that the rows joined are
    the file; its missing splits are cut from its end and `limit` keeps its first lines, since order matters
    in a running text. Files without answers (`unlabelled`) go by their endings, and each line of a txt file is a row.
    """

    train: str | Sequence[str]
    validation: str | None = None
    test: str | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format is not None and self.format not in READERS:
            raise ConfigError(f"data.format={self.format!r}: must be null or one of {', '.join(READERS)}")
        if not isinstance(self.train, str):
            if not isinstance(self.train, Sequence) or not self.train:
                raise ConfigError(f"data.train={self.train!r}: must be a path or a list of paths")
            object.__setattr__(self, "train", tuple(self.train))
        for split in (UNLABELLED, *SPLITS):
            for path in self._paths(split):
                if not isinstance(path, str) or not path:
                    raise ConfigError(f"data.{split}={path!r}: must be a path")
                self._format(split, path)
        if len({self._format("train", path) == "txt" for path in self._paths("train")}) > 1:
            raise ConfigError(f"data.train={list(self.train)}: txt files cannot be mixed with other formats")

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        wanted = {self.columns.get(column, column) for column in needs.all}
        return {split: self._read(split, wanted) for split in SPLITS if self._paths(split)}

    def read_unlabelled(self, needs: Needs) -> "dict[str, list]":
        """The columns that are needed, of the files without answers, each value checked.

        Raises:
            DataError: no file, no rows, a missing column or a bad value; names the file and the line.
        """
        rows = self._read(UNLABELLED, {self.columns.get(column, column) for column in needs.all})
        kept = self._columns_to_keep({UNLABELLED: rows}, needs)
        values = self._checked(UNLABELLED, rows, kept, needs)[:]
        if self._format(UNLABELLED, self._paths(UNLABELLED)[0]) == "txt":
            return {"text": [line.rstrip("\r\n") for line in values["text"]]}
        return dict(values)

    def place(self, split: str, number: int, row: dict[str, Any]) -> str:
        return f"{_origin(split, self._paths(split)[row[FILE]])} {row[UNIT]} {row[NUMBER]}"

    def origin(self, split: str) -> str:
        paths = self._paths(split)
        return _origin(split, paths[0]) if len(paths) == 1 else f"data.{split}"

    def is_running_text(self, split: str) -> bool:
        paths = self._paths(split)
        return bool(paths) and split in SPLITS and self._format(split, paths[0]) == "txt"

    def _paths(self, split: str) -> tuple[str, ...]:
        value = getattr(self, split)
        return () if value is None else value if isinstance(value, tuple) else (value,)

    def _format(self, split: str, path: str) -> str:
        if self.format is not None:
            return self.format
        suffixes = [suffix.lstrip(".").lower() for suffix in Path(path).suffixes]
        packed = bool(suffixes) and suffixes[-1] == "gz"
        ending = "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
        if ending not in READERS or (packed and ending == "parquet"):
            remedy = "set data.format to" if split in SPLITS else "needs"
            raise ConfigError(f"{_origin(split, path)}: unknown ending; {remedy} one of {', '.join(READERS)}")
        return ending

    def _read(self, split: str, wanted: set[str]) -> "Dataset":
        import pyarrow as pa
        from datasets import Dataset, concatenate_datasets

        parts = []
        for index, path in enumerate(self._paths(split)):
            origin = _origin(split, path)
            rows: Rows = READERS[self._format(split, path)](Path(path), origin, wanted)
            if not rows.numbers:
                raise DataError(f"{origin}: has no rows")
            count = len(rows.numbers)
            table = rows.table.append_column(FILE, pa.array([index] * count))
            table = table.append_column(NUMBER, pa.array(rows.numbers))
            table = table.append_column(UNIT, pa.array([rows.unit] * count))
            parts.append((path, Dataset(table)))
        first = parts[0][1]
        for path, part in parts[1:]:
            if set(part.column_names) != set(first.column_names):
                raise DataError(
                    f"{_origin(split, path)}: has columns {_names(part)}, but {parts[0][0]} has {_names(first)}"
                )
        return concatenate_datasets([part for _, part in parts]) if len(parts) > 1 else first


def _origin(split: str, path: str) -> str:
    return f"data.{split}={path}"


def _names(rows: "Dataset") -> str:
    return ", ".join(name for name in rows.column_names if not name.startswith("__"))
