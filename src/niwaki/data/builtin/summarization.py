"""Docstrings of the standard library, to be summed up as their writers did: in the first sentence."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from niwaki.data.builtin.docstrings import docstrings_of, folded, without_examples
from niwaki.data.builtin.python_docs import cached, deal, modules
from niwaki.data.source import Needs, Source
from niwaki.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUMMARY = (4, 30)  # words, the fewest and the most
SHORTEST, LONGEST = 12, 160  # words of what is summed up; more are cut off


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`target`: the first sentence of a docstring, `source`: the rest. `group` as in `Docstring`; `label`: the area."""

    group: str
    label: str
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class DocSummaries(Source):
    """`source`: a docstring without its first sentence and its examples; `target`: that sentence.

    Of docstrings that begin with one whole sentence in a paragraph of its own. Their number differs a little by
    version of Python. Whole classes and functions are dealt to the splits as in `PythonDocs`.
    """

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        from datasets import Dataset

        rows = cached("summarization", Summary, parse_summaries)
        parts = deal(rows, self.validation_fraction, self.test_fraction)
        return {
            split: Dataset.from_dict({name: [getattr(row, name) for row in part] for name in ("source", "target")})
            for split, part in parts.items()
        }


def parse_summaries(library: Path) -> list[Summary]:
    """The rows of a standard library at `library`; no source and no target twice. DataError where there are none."""
    rows: dict[str, Summary] = {}
    targets = set()
    for area, module, path in modules(library):
        for docstring in docstrings_of(path, module):
            parts = summed_up(docstring.text)
            if parts and folded(parts[1]) not in targets:
                targets.add(folded(parts[1]))
                row = Summary(group=docstring.group, label=area, source=parts[0], target=parts[1])
                rows.setdefault(folded(row.source), row)
    if not rows:
        raise DataError(f"{library}: no docstrings; is Python here without its sources?")
    return list(rows.values())


def summed_up(text: str) -> tuple[str, str] | None:
    """What is summed up, and the sentence that does; None where the docstring does not begin with one alone."""
    first, _, rest = text.strip().partition("\n\n")
    summary, body = " ".join(first.split()), without_examples(rest).split()
    fewest, most = SUMMARY
    whole = re.fullmatch(r"[A-Z][a-z]*\b[^:]*[^.:]\.", summary) and not re.search(r"[.!?] +[A-Z]", summary)
    if not whole or not fewest <= len(summary.split()) <= most or len(body) < SHORTEST:
        return None
    return " ".join(body[:LONGEST]), summary
