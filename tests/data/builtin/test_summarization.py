"""Summaries of docstrings: the first sentence is cut off, whole, and groups stay in one split."""

import re
from collections import Counter
from pathlib import Path

import pytest
from builtin_rows import rows_of, splits_of

from niwaki.data.builtin import summarization
from niwaki.data.builtin.docstrings import folded
from niwaki.data.builtin.python_docs import deal
from niwaki.data.builtin.summarization import DocSummaries, Summary, parse_summaries, summed_up
from niwaki.data.source import Needs
from niwaki.errors import DataError

BODY = "It goes through the whole tree and closes all of the files that are still open, in their order."


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIWAKI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def f1(found: str, right: str) -> float:
    """ROUGE-1: words in common, each as often as it stands in both."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (found, right))
    return 2 * (one & other).total() / max(1, one.total() + other.total())


def test_the_standard_library_gives_enough() -> None:
    splits = splits_of(DocSummaries())
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sum(sizes.values()) > 1000
    assert sizes["validation"] == pytest.approx(0.1 * sum(sizes.values()), rel=0.1)
    assert sizes["test"] == pytest.approx(0.1 * sum(sizes.values()), rel=0.1)
    for rows in splits.values():
        for row in rows:
            assert row["target"][0].isupper()
            assert row["target"].endswith(".")
            assert 4 <= len(row["target"].split()) <= 30
            assert 12 <= len(row["source"].split()) <= 160
            assert ">>>" not in row["source"]


def test_no_text_and_no_group_is_in_two_splits() -> None:
    rows = [row for split in splits_of(DocSummaries()).values() for row in split]
    assert len({folded(row["source"]) for row in rows}) == len({folded(row["target"]) for row in rows}) == len(rows)
    made = [Summary(group=f"g{n // 3}", label="a", source=str(n), target=str(n)) for n in range(90)]
    parts = deal(made, 0.1, 0.1)
    held = [{row.group for row in part} for part in parts.values()]
    assert sum(map(len, held)) == len(set().union(*held)) == 30


def test_the_same_rows_for_every_seed() -> None:
    needs = Needs(required=("source", "target"))
    assert DocSummaries().splits(needs, 0)["test"][:] == DocSummaries().splits(needs, 1)["test"][:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Close all the open\nfiles.\n\n{BODY}", (BODY, "Close all the open files.")),
        (f"Close all the files.\n\n>>> close()\nTrue\n\n{BODY}", (BODY, "Close all the files.")),
        (f"Close all the files.  Then go.\n\n{BODY}", None),
        (f"close all the files.\n\n{BODY}", None),
        (f"Close all the files\n\n{BODY}", None),
        (f"Usage: close all files.\n\n{BODY}", None),
        (f"Close files.\n\n{BODY}", None),
        ("Close all the open files.\n\nIt is fast.", None),
        ("Close all the open files.", None),
    ],
)
def test_what_is_summed_up(text: str, expected: tuple[str, str] | None) -> None:
    assert summed_up(text) == expected


def test_a_long_docstring_is_cut_off() -> None:
    source, _ = summed_up("Close all the files.\n\n" + "word " * 500)
    assert len(source.split()) == summarization.LONGEST


def test_a_target_or_source_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    docs = [
        f"Close all the files.\n\n{BODY}",
        f"Close all the files.\n\n{BODY} Really.",
        f"Open all the files.\n\n{BODY}",
    ]
    (tmp_path / "json.py").write_text("".join(f"def f{n}():\n    {doc!r}\n" for n, doc in enumerate(docs)))
    assert [row.target for row in parse_summaries(tmp_path)] == ["Close all the files."]


def test_an_interpreter_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no docstrings; is Python here without its sources"):
        parse_summaries(tmp_path)


def test_the_first_words_of_the_rest_are_no_summary() -> None:
    """ROUGE-1 F: the first sentence of the source 0.18, its first ten words 0.18; the writer's sentence 1."""
    rows = rows_of(DocSummaries())
    first = [f1(re.split(r"(?<=[.!?]) ", row["source"])[0], row["target"]) for row in rows]
    words = [f1(" ".join(row["source"].split()[:10]), row["target"]) for row in rows]
    assert max(sum(first), sum(words)) / len(rows) < 0.25
