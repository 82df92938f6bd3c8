"""The built-in data: real rows of the running interpreter."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from niwaki.data.builtin import python_docs
from niwaki.data.builtin.docstrings import folded
from niwaki.data.builtin.python_docs import AREAS, PythonDocs, Row, cached_rows, deal, parse_rows
from niwaki.data.source import Needs
from niwaki.errors import DataError

CLASSIFY = Needs(required=("text", "label"), optional=("text_pair",))
TAG = Needs(required=("tokens", "tags"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("NIWAKI_CACHE", str(folder))
        yield folder


def library(path: Path) -> Path:
    """A small standard library: one module for each area."""
    for area, names in AREAS.items():
        text = f"Describes the {area} of this small library."
        (path / f"{names.split()[0]}.py").write_text(f'"""{text}"""\ndef f(): "Shared by all the areas here."\n')
    return path


def test_there_are_enough_rows_and_no_area_dominates() -> None:
    splits = PythonDocs().splits(CLASSIFY, 0)
    counts = Counter(label for split in splits.values() for label in split["label"])
    assert 6 <= len(counts) <= 10
    assert sum(counts.values()) > 3000
    assert max(counts.values()) / sum(counts.values()) < 0.35
    for name, share in (("validation", 0.1), ("test", 0.1)):
        assert set(splits[name]["label"]) == set(counts)
        assert splits[name].num_rows == pytest.approx(share * sum(counts.values()), rel=0.05)


def test_no_text_and_no_group_is_in_two_splits() -> None:
    rows = cached_rows()
    parts = deal(rows, 0.1, 0.1)
    assert sum(len(part) for part in parts.values()) == len(rows)
    for kind in (lambda row: folded(row.text), lambda row: row.group):
        held = [{kind(row) for row in part} for part in parts.values()]
        assert sum(len(one) for one in held) == len(set().union(*held))
    assert len({folded(row.text) for row in rows}) == len(rows)


def test_texts_do_not_name_their_module() -> None:
    for row in cached_rows():
        package = row.group.split(".")[0]
        assert not re.search(rf"(?<!\w){re.escape(package)}(?!\w)", row.text, re.IGNORECASE), row
        assert ">>>" not in row.text
        assert 5 <= len(row.text.split()) <= 64
        assert row.text == " ".join(row.text.split())


def test_splits_follow_the_fractions_and_not_the_seed() -> None:
    source = PythonDocs()
    assert source.splits(CLASSIFY, 0)["test"][:] == source.splits(CLASSIFY, 1)["test"][:]
    larger = PythonDocs(test_fraction=0.3).splits(CLASSIFY, 0)
    assert larger["test"].num_rows > 2.5 * source.splits(CLASSIFY, 0)["test"].num_rows


def test_tagged_rows_are_iob2_and_at_most_half_are_empty() -> None:
    for split in PythonDocs().splits(TAG, 0).values():
        kinds = {tag.partition("-")[2] for tags in split["tags"] for tag in tags} - {""}
        assert kinds == {"PARAMETER", "EXCEPTION", "TYPE", "CONSTANT"}
        empty = sum(set(tags) == {"O"} for tags in split["tags"])
        assert 0 < empty <= split.num_rows / 2
        for tags in split["tags"]:
            for before, tag in zip(["O", *tags], tags, strict=False):
                assert not tag.startswith("I-") or before[2:] == tag[2:]


def test_a_text_of_two_areas_is_dropped_and_parsing_repeats(tmp_path: Path) -> None:
    rows = parse_rows(library(tmp_path))
    assert sorted(row.label for row in rows) == sorted(AREAS)
    assert not [row for row in rows if row.text.startswith("Shared")]
    assert parse_rows(tmp_path) == rows


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    cached_rows()
    assert not {"antigravity", "this", "turtle", "tkinter"} & (set(sys.modules) - before)


def test_an_interpreter_without_sources_is_refused(tmp_path: Path) -> None:
    library(tmp_path)
    (tmp_path / f"{AREAS['text'].split()[0]}.py").unlink()
    with pytest.raises(DataError, match="no docstrings on text; is Python here without its sources"):
        parse_rows(tmp_path)


def test_rows_are_parsed_once_and_a_damaged_cache_is_mended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cached_rows()
    [path] = (cache / "python_docs").glob("*")
    calls = []
    monkeypatch.setattr(python_docs, "parse_rows", lambda folder: calls.append(folder) or rows)
    assert cached_rows() == rows
    assert not calls
    path.write_text(path.read_text()[:1000])
    assert cached_rows() == rows
    assert len(calls) == 1
    assert cached_rows() == rows
    assert len(calls) == 1


def test_a_group_too_large_for_a_split_is_for_training() -> None:
    rows = [Row(group="big" if i < 90 else f"g{i}", label="a", text=str(i), tokens=[], tags=[]) for i in range(100)]
    parts = deal(rows, 0.05, 0.05)
    assert {row.group for row in parts["train"]} == {"big"}
    assert len(parts["test"]) == len(parts["validation"]) == 5
