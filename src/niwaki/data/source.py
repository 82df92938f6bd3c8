"""Where rows come from: the abstract `Source`, and what every source owes a task."""

import abc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from niwaki.console import notice
from niwaki.data.columns import (
    ANSWERS,
    ASKING,
    CHECKS,
    EXAMPLES,
    KEPT_BACK,
    NAMES,
    OF_PLAIN_TEXT,
    TOGETHER,
    check_text,
    labels_of,
    values_of,
)
from niwaki.data.names import Origin, Spec, origin_of, roots
from niwaki.data.sampling import carve, choose_limit, choose_shots, has_classes
from niwaki.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
CLASSES = ("label", "labels", "tags")  # columns whose texts are classes


@dataclass(frozen=True)
class Needs:
    """The columns that a task reads: `required` must be there, `optional` are taken where they are.

    `checks`: the task's own check of a column, in place of `niwaki.data.columns.CHECKS`. `asks`: what a model is given
    where it answers rows that are no training rows, null for the columns that are no answer; `hints`: what it is given
    beside them where they are there, although it is kept back for the most part.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    checks: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    asks: tuple[str, ...] | None = None
    hints: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @property
    def answers(self) -> tuple[str, ...]:
        """Those that a teacher can say in place of the data."""
        return tuple(column for column in self.all if column in ANSWERS)

    @property
    def asked(self) -> tuple[str, ...]:
        """Those that a model is given, the required ones first."""
        return tuple(column for column in self.all if column not in KEPT_BACK) if self.asks is None else self.asks

    @property
    def asking(self) -> "Needs":
        """What a row must have to be answered."""
        return Needs(
            required=tuple(column for column in self.asked if column not in self.optional),
            optional=(*(column for column in self.asked if column in self.optional), *self.hints),
            checks={**self.checks, **ASKING},
        )

    def trained_on(self, columns: Sequence[str]) -> "Needs":
        """What labelled rows must have for a model that was trained on rows with these columns; none: not known."""
        if not columns:
            return self
        read = tuple(name for name in self.optional if name in columns and name not in (*KEPT_BACK, *NAMES))
        unread = tuple(name for name in self.optional if name in (*KEPT_BACK, *NAMES))
        return replace(self, required=(*self.required, *read), optional=unread)

    def check(self, column: str) -> Callable[[Any], Any]:
        """Raw value -> canonical value; ValueError says what is wrong with it."""
        return self.checks.get(column) or CHECKS.get(column, check_text)

    def checked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row, each value checked; what is not read is left out.

        Raises:
            ValueError: a missing column, or a bad value.
        """
        found = {}
        for column in self.all:
            if row.get(column) is None and column in self.optional:
                continue
            if column not in row:
                raise ValueError(f"has no {column!r}; give {self.example}")
            try:
                found[column] = self.check(column)(row[column])
            except ValueError as wrong:
                raise ValueError(f"column {column!r} {wrong}") from None
        return found

    @property
    def example(self) -> str:
        """A row with the required columns, as JSON."""
        return json.dumps({column: EXAMPLES.get(column, "...") for column in self.required})

    def from_text(self, text: str) -> dict[str, Any]:
        """A row from a JSON object, or from any other text where that is all that is required.

        Raises:
            ValueError: an empty text, one that leaves columns empty, or a bad value.
        """
        check_text(text)
        value, problem = None, ""
        if text.lstrip().startswith("{"):
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                problem = f" ({error.msg} at character {error.pos + 1})"
        if isinstance(value, dict):
            return self.checked(value)
        if len(self.required) > 1:
            raise ValueError(f"is no JSON object{problem}; give {self.example}")
        (column,) = self.required
        return self.checked({column: OF_PLAIN_TEXT.get(column, str)(text)})


def is_text(rows: "Dataset", column: str) -> bool:
    """Whether a column holds texts, or lists of texts."""
    kind = rows.features[column]
    return str(getattr(getattr(kind, "feature", kind), "dtype", "")) == "string"


def _flat(pair: Sequence[Any]) -> list[Any]:
    """A column and its spec, or the names in it where it is a list of some."""
    column, spec = pair
    return [column, *spec] if isinstance(spec, Sequence) and spec and not isinstance(spec, str) else [column, spec]


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """Rows for the three splits, and how they are served.

    `limit` keeps that many rows of each split, a seeded sample in the order of the source; `shots` keeps
    that many rows of each class of the training split, or in all of a task without classes (`limit` then holds for
    validation and test only); 0 leaves
    none but what their labels are, so nothing is learned.
    `columns` maps a column of the task to its name in the source, or to what it is made of there (`data/names.py`).
    `validation_fraction` and `test_fraction` are the shares of the training rows that become a split which the source
    does not have. `skip_empty` leaves out rows in which a text is empty, which are an error otherwise. `unlabelled`
    names files whose rows stand behind the training rows without an answer; neither `limit` nor `shots` counts them.
    """

    batch_size: int = 32
    eval_batch_size: int = 64
    limit: int | None = None
    shots: int | None = None
    skip_empty: bool = False
    columns: Mapping[str, Spec] = field(default_factory=dict)
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    workers: int = 0
    unlabelled: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("workers", 0)):
            self._check_whole_number(name, least)
        for name, least in (("limit", 1), ("shots", 0)):
            if getattr(self, name) is not None:
                self._check_whole_number(name, least)
        self._check_fractions()
        self._check_unlabelled()
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(text, str) and text for pair in self.columns.items() for text in _flat(pair)
        ):
            raise ConfigError(f"data.columns={self.columns!r}: give a mapping such as {{text: sentence}}")
        object.__setattr__(self, "columns", dict(self.columns))

    def _check_whole_number(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"data.{name}={value!r}: must be a whole number, {least} or more")

    def _check_fractions(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ConfigError(f"data.{name}={value!r}: must be a number above 0 and below 1")
        total = self.validation_fraction + self.test_fraction
        if total >= 1:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction} and data.test_fraction="
                f"{self.test_fraction}: together they must be below 1, or no row is left to train on"
            )

    def _check_unlabelled(self) -> None:
        value = self.unlabelled
        if value is None:
            return
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence) or not paths or not all(isinstance(path, str) and path for path in paths):
            raise ConfigError(f"data.unlabelled={value!r}: must be null, a path or a list of paths")
        object.__setattr__(self, "unlabelled", tuple(paths))

    @abc.abstractmethod
    def read(self, needs: Needs) -> "dict[str, Dataset]":
        """The rows as they are, by split ("train" at least), columns under the names of the source."""

    def wanted(self, needs: Needs) -> set[str]:
        """Every column of the source that the columns of the task might be made of."""
        return {name for column in needs.all for name in roots(self.columns.get(column, column))}

    def place(self, split: str, number: int, row: dict[str, Any]) -> str:
        """Where a row stands, for errors; `number` counts the rows of the split from 1."""
        return f"split {split!r} row {number}"

    def origin(self, split: str) -> str:
        """Where a split comes from, for errors."""
        return f"split {split!r}"

    def is_running_text(self, split: str) -> bool:
        """Whether rows are the successive lines of one text: blank ones belong, and order is kept."""
        return False

    def splits(self, needs: Needs, seed: int) -> "dict[str, Dataset]":
        """Exactly train, validation and test, with the task's columns only, every row checked.

        Splits that the source lacks are carved from train with the seed, so that rows of equal text (one context,
        one conversation) share a split; running text is cut in order instead. Raises DataError or ConfigError, in one
        line.
        """
        self._check_mapping(needs)
        found = self.read(needs)
        for split, rows in found.items():
            if rows.num_rows == 0:
                raise DataError(f"{self.origin(split)}: has no rows")
        kept = self._columns_to_keep(found, needs)
        if self.skip_empty:
            found = {split: self._filled(split, rows, kept, needs) for split, rows in found.items()}
        checked = {split: self._checked(split, rows, kept, needs) for split, rows in found.items()}
        self._check_labels(found, checked)
        whole = self._carved(checked, seed)
        return {split: self._sampled(split, whole[split], seed) for split in SPLITS}

    def _check_mapping(self, needs: Needs) -> None:
        for column in self.columns:
            if column not in needs.all:
                raise ConfigError(
                    f"data.columns.{column}={self.columns[column]}: this task has no column {column!r}; "
                    f"it reads {', '.join(needs.all)}"
                )

    def _columns_to_keep(self, found: "dict[str, Dataset]", needs: Needs) -> list[str]:
        kept = list(needs.required)
        for column in needs.optional:
            if column in self.columns or any(column in rows.column_names for rows in found.values()):
                kept.append(column)
        for split, rows in found.items():
            for column in kept:
                for name in self._origin(column, rows).reads:
                    if name not in rows.column_names:
                        raise DataError(self._missing_column(split, column, name, rows.column_names))
        return kept

    def _origin(self, column: str, rows: "Dataset") -> Origin:
        return origin_of(self.columns.get(column, column), rows.column_names)

    def _named(self, column: str) -> str:
        """What a column is called in errors."""
        spec = self.columns.get(column, column)
        return spec if isinstance(spec, str) else f"[{', '.join(spec)}]"

    def _missing_column(self, split: str, column: str, name: str, present: list[str]) -> str:
        names = [other for other in present if not other.startswith("__")]
        near = nearest(name, names)
        hint = f"; name it with data.columns.{column}={near}" if near else ""
        return f"{self.origin(split)}: no column {name!r}; found {', '.join(names) or 'none'}{hint}"

    def _filled(self, split: str, rows: "Dataset", kept: list[str], needs: Needs) -> "Dataset":
        """The rows without an empty text, where rows are no lines of one text."""
        if self.is_running_text(split):
            return rows
        empty: set[int] = set()
        for column in kept:
            if needs.check(column) is check_text:
                origin = self._origin(column, rows)
                read = [values_of(rows, name) for name in origin.reads]
                texts = (origin.make(*parts) for parts in zip(*read, strict=True))
                empty.update(number for number, text in enumerate(texts) if not str(text or "").strip())
        if len(empty) == rows.num_rows:
            raise DataError(f"{self.origin(split)}: has no row without an empty text")
        if empty:
            notice(f"{self.origin(split)}: left out {len(empty):,} of {rows.num_rows:,} rows, in which a text is empty")
        return rows.select([number for number in range(rows.num_rows) if number not in empty]) if empty else rows

    def _checked(self, split: str, rows: "Dataset", kept: list[str], needs: Needs) -> "Dataset":
        """The rows under the task's names, each value checked and made canonical."""
        from datasets import Dataset

        values: dict[str, list] = {}
        for column in kept:
            check, origin = needs.check(column), self._origin(column, rows)
            # Which of the choices it is, not what this is called.
            codes = column == "label" and "choices" in kept
            read = [values_of(rows, name, codes=codes) for name in origin.reads]
            if check is check_text and self.is_running_text(split):
                values[column] = [origin.make(*parts) for parts in zip(*read, strict=True)]
                continue
            values[column] = []
            for number, parts in enumerate(zip(*read, strict=True), start=1):
                try:
                    values[column].append(check(origin.make(*parts)))
                except ValueError as wrong:
                    place = self.place(split, number, rows[number - 1])
                    raise DataError(f"{place}: column {self._named(column)!r} {wrong}") from None
        self._check_together(split, rows, values)
        return Dataset.from_dict(values)

    def _check_together(self, split: str, rows: "Dataset", values: dict[str, list]) -> None:
        for (one, other), check in TOGETHER.items():
            if one in values and other in values:
                for number, pair in enumerate(zip(values[one], values[other], strict=True), start=1):
                    try:
                        check(*pair)
                    except ValueError as wrong:
                        raise DataError(f"{self.place(split, number, rows[number - 1])}: {wrong}") from None

    def _check_labels(self, found: "dict[str, Dataset]", checked: "dict[str, Dataset]") -> None:
        """Refuse a class that no training row has, while it can be said where it stands."""
        for column in CLASSES:
            if all(column in rows.column_names for rows in checked.values()) and is_text(checked["train"], column):
                labels_of(checked, column, lambda split, number: self.place(split, number, found[split][number - 1]))

    def _carved(self, found: "dict[str, Dataset]", seed: int) -> "dict[str, Dataset]":
        if "train" not in found:
            raise DataError(f"{self.origin('train')}: is missing; found {', '.join(found) or 'no split'}")
        fractions = {"validation": self.validation_fraction, "test": self.test_fraction}
        wanted = {split: share for split, share in fractions.items() if split not in found}
        if not wanted:
            return found
        parts = carve(found["train"], wanted, seed, in_order=self.is_running_text("train"))
        for split, rows in parts.items():
            if not rows:
                raise DataError(
                    f"{self.origin('train')}: {found['train'].num_rows} rows are too few to carve {split!r} "
                    f"from; give more rows, or data.validation and data.test of your own"
                )
        return found | {split: found["train"].select(rows) for split, rows in parts.items()}

    def _sampled(self, split: str, rows: "Dataset", seed: int) -> "Dataset":
        if split == "train" and self.shots == 0:
            return rows  # which tell the labels, before they go
        if split == "train" and self.shots is not None:
            column = next((name for name in ("label", "labels") if name in rows.column_names), None)
            if column is None or not has_classes(rows, column) or "choices" in rows.column_names:
                return rows.select(choose_limit(rows, min(self.shots, rows.num_rows), seed))
            return rows.select(choose_shots(rows[column][:], self.shots, seed))
        if self.limit is None or self.limit >= rows.num_rows:
            return rows
        if self.is_running_text(split):
            return rows.select(range(self.limit))
        return rows.select(choose_limit(rows, self.limit, seed))
