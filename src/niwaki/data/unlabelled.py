"""Training rows without an answer: what they are is for a teacher to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from niwaki.data.files import UNLABELLED, Files
from niwaki.data.source import Needs, Source
from niwaki.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def with_unlabelled(train: Dataset, source: Source, needs: Needs) -> Dataset:
    """The training rows, and behind them the rows of `data.unlabelled` with None for an answer.

    Raises:
        DataError: rows that cannot be used, or that do not have the columns of the training rows.
    """
    from datasets import concatenate_datasets

    paths = source.unlabelled or ()
    return concatenate_datasets([train, *(rows_of(path, train, source, needs) for path in paths)])


def rows_of(path: str, train: Dataset, source: Source, needs: Needs) -> Dataset:
    """The rows of one file, with the columns of the training rows and None for an answer."""
    from datasets import Dataset

    asked = tuple(column for column in needs.required if column not in needs.answers)
    file = Files(train=path, unlabelled=path, columns=source.columns)
    values = file.read_unlabelled(Needs(required=asked, optional=needs.optional, checks=needs.checks))
    for column in needs.optional:
        if (column in values) != (column in train.column_names):
            verbs = ("has a", "have none") if column in values else ("has no", "have one")
            raise DataError(f"{file.origin(UNLABELLED)}: {verbs[0]} column {column!r}, the training rows {verbs[1]}")
    answers: dict[str, list] = {column: [None] * len(values[asked[0]]) for column in needs.answers}
    return Dataset.from_dict({**values, **answers}, features=train.features)
