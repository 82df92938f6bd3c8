"""What every built-in set of rows promises, and how its rows are read in the tests."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from niwaki.data.builtin.generated import Generated
from niwaki.data.source import Needs, Source

Rows = list[dict[str, Any]]


def splits_of(source: Source) -> dict[str, Rows]:
    return {split: rows.to_list() for split, rows in source.read(Needs(required=())).items()}


def rows_of(source: Source) -> Rows:
    return [row for rows in splits_of(source).values() for row in rows]


def digest(splits: dict[str, Rows]) -> str:
    """Twelve hex digits that change with any character of any row, or with the split it is in."""
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()[:12]


def check_generated(
    source: Generated, columns: set[str], expected: str, given: Callable[[dict[str, Any]], Any]
) -> None:
    """Columns, sizes, the pinned digest, the same rows again, no text in two splits, more rows with the same first ones.

    `given`: what must not be in two splits.
    """
    splits = splits_of(source)
    assert list(splits) == ["train", "validation", "test"]
    assert all(set(row) == columns for rows in splits.values() for row in rows)
    assert sum(len(rows) for rows in splits.values()) == source.rows
    for split in ("validation", "test"):
        assert abs(len(splits[split]) - source.rows / 10) <= 3
    seen = [{json.dumps(given(row)) for row in rows} for rows in splits.values()]
    assert sum(len(one) for one in seen) == len(set().union(*seen))
    whole = [json.dumps({name: value for name, value in row.items()}) for rows in splits.values() for row in rows]
    assert len(set(whole)) == len(whole)
    assert splits_of(source) == splits
    larger = {json.dumps(row) for row in rows_of(type(source)(rows=source.rows + 50))}
    assert len(set(whole) - larger) == 0
    assert digest(splits) == expected
