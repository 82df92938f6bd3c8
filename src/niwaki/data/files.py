"""Rows from local files: tables, JSON, Parquet, CoNLL columns, SQuAD, conversations, parallel and plain text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.data.readers import ENDINGS, PARALLEL, READERS, Rows, read_parallel
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
    squad, chat, parallel, or null to go by the ending; the text formats may end in .gz. CoNLL files give columns
    `tokens` and `tags`, SQuAD's (json by the ending too) `context`, `question`, `answers` and `id`, chat `messages`.
    With parallel each split is a list of two files, which give `source` and `target` line by line.

    A txt file gives column `text`, one row a line with its line break, so that the rows joined are the file; its
    missing splits are cut from its end and `limit` keeps its first lines, since order matters in a running text. Files
    without answers (`unlabelled`) go by their endings, and each line of a txt file is a row.
    """

    train: str | Sequence[str]
    validation: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format is not None and self.format not in (*READERS, PARALLEL):
            formats = ", ".join((*READERS, PARALLEL))
            raise ConfigError(f"data.format={self.format!r}: must be null or one of {formats}")
        if self.format == PARALLEL:
            self._check_pairs()
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

    def _check_pairs(self) -> None:
        for split in SPLITS:
            value = getattr(self, split)
            if value is None and split != "train":
                continue
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
                raise ConfigError(
                    f"data.{split}={value!r}: with data.format=parallel it must be a list of two files, such as "
                    "[train.en,train.de]"
                )
            object.__setattr__(self, split, tuple(value))

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        wanted = self.wanted(needs)
        return {split: self._read(split, wanted) for split in SPLITS if self._paths(split)}

    def read_unlabelled(self, needs: Needs) -> "dict[str, list]":
        """The columns that are needed, of the files without answers, each value checked.

        Raises:
            DataError: no file, no rows, a missing column or a bad value; names the file and the line.
        """
        rows = self._read(UNLABELLED, self.wanted(needs))
        kept = self._columns_to_keep({UNLABELLED: rows}, needs)
        values = self._checked(UNLABELLED, rows, kept, needs)[:]
        if self._format(UNLABELLED, self._paths(UNLABELLED)[0]) == "txt":
            return {"text": [line.rstrip("\r\n") for line in values["text"]]}
        return dict(values)

    def place(self, split: str, number: int, row: dict[str, Any]) -> str:
        paths = self._paths(split)
        place = _origin(split, ",".join(paths) if self.format == PARALLEL else paths[row[FILE]])
        return f"{place} {row[UNIT]} {row[NUMBER]}"

    def origin(self, split: str) -> str:
        paths = self._paths(split)
        if self.format == PARALLEL:
            return _origin(split, ",".join(paths))
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
        if ending not in ENDINGS or (packed and ending == "parquet"):
            remedy = "set data.format to" if split in SPLITS else "needs"
            raise ConfigError(f"{_origin(split, path)}: unknown ending; {remedy} one of {', '.join(READERS)}")
        return ending

    def _read(self, split: str, wanted: set[str]) -> "Dataset":
        import pyarrow as pa
        from datasets import Dataset, concatenate_datasets

        parts = []
        for index, (path, rows) in enumerate(self._files(split, wanted)):
            if not rows.numbers:
                raise DataError(f"{_origin(split, path)}: has no rows")
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

    def _files(self, split: str, wanted: set[str]) -> Iterator[tuple[str, Rows]]:
        """What each file of a split holds, with its name; two parallel ones are one."""
        paths = self._paths(split)
        if self.format == PARALLEL:
            name, pair = ",".join(paths), (Path(paths[0]), Path(paths[1]))
            yield name, read_parallel(pair, _origin(split, name), wanted)
            return
        for path in paths:
            yield path, READERS[self._format(split, path)](Path(path), _origin(split, path), wanted)


def _origin(split: str, path: str) -> str:
    return f"data.{split}={path}"


def _names(rows: "Dataset") -> str:
    return ", ".join(name for name in rows.column_names if not name.startswith("__"))
