"""A task's data: what tells cached encodings apart, the columns that were there, samples."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki.data.corpus import Corpus, encoding_hash, tokenizer_hash
from niwaki.data.files import Files
from niwaki.model.tiny import Tiny
from niwaki.task import task as task_module
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


def read(folder: Path, *, task: Any = None, pairs: bool = False) -> Corpus:
    rows = [{"text": f"row {'x' * i}", "label": "ab"[i % 2]} | ({"text_pair": "y"} if pairs else {}) for i in range(40)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus.read(task or Classification(), Files(train=str(file)), Tiny().tokenizer(), seed=3)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_columns_that_were_there(tmp_path: Path, cache: Path, pairs: bool) -> None:
    assert read(tmp_path, pairs=pairs).columns == ("text", "label", *(["text_pair"] if pairs else []))


def test_what_encoding_does_not_read_makes_no_new_entry(tmp_path: Path, cache: Path) -> None:
    read(tmp_path)
    count = len(list(cache.glob("*.arrow")))
    assert count == 3
    read(tmp_path, task=Classification(label_smoothing=0.1))
    assert len(list(cache.glob("*.arrow"))) == count
    read(tmp_path, task=Classification(max_length=64))
    assert len(list(cache.glob("*.arrow"))) == 2 * count


def test_the_settings_of_a_task_that_count() -> None:
    assert encoding_hash(CausalLM()) == encoding_hash(CausalLM(max_new_tokens=5, label_smoothing=0.1))
    hashes = {encoding_hash(task) for task in (CausalLM(), CausalLM(max_length=64), Classification())}
    assert len(hashes) == 3


@pytest.mark.parametrize("changed", [task_module, inspect.getmodule(Classification)])
def test_another_source_text_is_another_encoding(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = encoding_hash(Classification())
    getsource = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda one: getsource(one) + ("# changed" if one is changed else ""))
    assert encoding_hash(Classification()) != before


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Classification):
    """A task in a file of its own that leaves everything as it is."""


def test_a_task_of_another_file_is_another_encoding() -> None:
    assert encoding_hash(Elsewhere()) != encoding_hash(Classification())


def test_special_tokens_tell_tokenizers_apart() -> None:
    one, other = Tiny().tokenizer(), Tiny().tokenizer()
    assert tokenizer_hash(one) == tokenizer_hash(other)
    one("text", truncation=True, max_length=4)
    assert tokenizer_hash(one) == tokenizer_hash(other)
    other.bos_token = "[MASK]"
    assert tokenizer_hash(one) != tokenizer_hash(other)
    one.split_special_tokens = True
    assert tokenizer_hash(one) not in (tokenizer_hash(other), tokenizer_hash(Tiny().tokenizer()))


def contents(folder: Path) -> Mapping[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_calibration_rows_are_drawn_from_training_with_the_seed(tmp_path: Path, cache: Path) -> None:
    corpus = read(tmp_path)
    corpus = replace(corpus, source=replace(corpus.source, batch_size=8))
    before = contents(cache)
    found = [batch["input_ids"] for batch in corpus.calibration(9)]
    assert [len(batch) for batch in found] == [8, 1]
    assert contents(cache) == before
    training = {tuple(row) for row in corpus.features["train"]["input_ids"]}
    rows = [tuple(i for i in row if i) for batch in found for row in batch.tolist()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= training
    again = [batch["input_ids"] for batch in corpus.calibration(9)]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    other = [batch["input_ids"] for batch in replace(corpus, seed=corpus.seed + 1).calibration(2)]
    assert rows[:2] != [tuple(i for i in row if i) for row in other[0].tolist()]
    assert sum(len(batch["labels"]) for batch in corpus.calibration(10**6)) == len(corpus.features["train"])


def test_samples_follow_the_seed_and_leave_no_files(tmp_path: Path, cache: Path) -> None:
    corpus = read(tmp_path)
    before = contents(cache)
    found = [batch["input_ids"].tolist() for batch in corpus.samples("train", 8, 2)]
    assert [len(batch) for batch in found] == [8, 8]
    assert contents(cache) == before
    assert found == [batch["input_ids"].tolist() for batch in corpus.samples("train", 8, 2)]
    rows = [row for batch in found for row in batch]
    assert len({sum(1 for i in row if i) for row in rows}) == 16  # every row has a length of its own
    lengths = [sum(1 for i in row if i) for row in rows]
    assert lengths != sorted(lengths)


def test_a_split_of_few_rows_is_one_sample(tmp_path: Path, cache: Path) -> None:
    corpus = read(tmp_path)
    assert [len(batch["input_ids"]) for batch in corpus.samples("test", 32, 4)] == [len(corpus.features["test"])]
