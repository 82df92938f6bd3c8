"""Rows without an answer: they stand behind the training rows, and nothing but a teacher says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import auto_teacher, compose
from niwaki.console import Console
from niwaki.data.columns import check_marked
from niwaki.data.corpus import Corpus
from niwaki.data.files import Files
from niwaki.data.source import Needs, Source
from niwaki.data.unlabelled import rows_of
from niwaki.errors import ConfigError, DataError
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.task.ner import NER
from niwaki.task.task import UNKNOWN


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    return write(tmp_path / "labelled.jsonl", [{"text": f"row {'x' * i}", "label": "ab"[i % 2]} for i in range(40)])


@pytest.fixture
def bare(tmp_path: Path) -> str:
    return write(tmp_path / "bare.jsonl", [{"text": f"bare {i}"} for i in range(7)])


def read(train: str, task: Any = None, **settings: Any) -> Corpus:
    return Corpus.read(task or Classification(), Files(train=train, **settings), Tiny().tokenizer(), seed=3)


def error(*given: Any, **settings: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read(*given, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"limit": 10}, {"shots": 3}])
def test_they_stand_behind_the_training_rows_and_change_nothing_else(
    labelled: str, bare: str, settings: dict[str, int]
) -> None:
    without, found = read(labelled, **settings), read(labelled, unlabelled=bare, **settings)
    count = len(without.rows["train"])
    assert found.labels == without.labels
    assert found.unlabelled == 7
    assert found.rows["train"][:count] == without.rows["train"][:]
    assert found.rows["train"][count:] == {"text": [f"bare {i}" for i in range(7)], "label": [None] * 7}
    assert found.features["train"][:count] == without.features["train"][:]
    assert found.features["train"]["labels"][count:] == [UNKNOWN] * 7
    for split in ("validation", "test"):
        assert found.features[split][:] == without.features[split][:]


def test_every_row_is_served_once_under_its_number(labelled: str, bare: str) -> None:
    found = read(labelled, unlabelled=bare, batch_size=4)
    for batches in (found.training(), found.numbered()):
        labels = {int(row): int(y) for batch in batches for row, y in zip(batch["row"], batch["labels"], strict=True)}
        assert [labels[row] for row in range(len(labels))] == found.features["train"]["labels"][:]


def test_labels_in_their_files_are_not_read(labelled: str, tmp_path: Path) -> None:
    odd = write(tmp_path / "odd.jsonl", [{"text": "a", "label": "never seen"}, {"text": "b", "label": ["x", 3]}])
    bare = write(tmp_path / "also.jsonl", [{"text": "c"}])
    assert read(labelled, unlabelled=[odd, bare]).rows["train"][-3:] == {"text": ["a", "b", "c"], "label": [None] * 3}


def test_each_line_of_a_text_is_a_row(labelled: str, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one line\r\nanother \n")
    found = read(labelled, unlabelled=str(tmp_path / "plain.txt"), format="jsonl")
    assert found.rows["train"]["text"][-2:] == ["one line", "another "]
    (tmp_path / "plain.txt").write_text("one line\n\nanother\n")
    said = error(labelled, unlabelled=str(tmp_path / "plain.txt"))
    assert said == f"data.unlabelled={tmp_path / 'plain.txt'} line 2: column 'text' is empty"


def test_columns_have_the_names_of_the_training_rows(labelled: str, tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [{"s": f"row {i}", "p": "x", "label": i % 2} for i in range(20)])
    other = write(tmp_path / "o.jsonl", [{"s": "a", "p": "b"}])
    columns = {"text": "s", "text_pair": "p", "label": "label"}
    row = read(train, unlabelled=other, columns=columns).rows["train"][-1]
    assert row == {"text": "a", "text_pair": "b", "label": None}


def test_columns_that_differ_are_refused(labelled: str, bare: str, tmp_path: Path) -> None:
    paired = [{"text": f"row {i}", "text_pair": "x", "label": i % 2} for i in range(20)]
    pairs = write(tmp_path / "pairs.jsonl", paired)
    assert error(pairs, unlabelled=bare) == (
        f"data.unlabelled={bare}: has no column 'text_pair', the training rows have one"
    )
    assert error(labelled, unlabelled=pairs) == (
        f"data.unlabelled={pairs}: has a column 'text_pair', the training rows have none"
    )
    tokens = write(tmp_path / "tokens.jsonl", [{"tokens": ["a"]}])
    assert error(labelled, unlabelled=tokens).startswith(f"data.unlabelled={tokens}: no column 'text'; found tokens")


def test_wrong_files_are_refused(labelled: str, tmp_path: Path) -> None:
    assert error(labelled, unlabelled="x.doc").startswith("data.unlabelled=x.doc: unknown ending; needs one of csv")
    assert error(labelled, unlabelled=str(tmp_path / "none.csv")).endswith("none.csv: no such file")
    (tmp_path / "empty.jsonl").touch()
    assert error(labelled, unlabelled=str(tmp_path / "empty.jsonl")).endswith("has no rows")
    for wrong in ([], "", [""], 5):
        with pytest.raises(ConfigError, match=r"data\.unlabelled=.*: must be null, a path or a list of paths"):
            Files(train=labelled, unlabelled=wrong)  # type: ignore[arg-type]


def test_words_without_tags(setting: Any, tmp_path: Path) -> None:
    """Each word's first piece counts, with no tag."""
    tagged = [{"tokens": ["ada", "met", str(i)], "tags": ["B-PER", "O", "O"]} for i in range(20)]
    train = write(tmp_path / "tagged.jsonl", tagged)
    bare = write(tmp_path / "words.jsonl", [{"tokens": ["pine", "x"], "tags": ["B-NEW"]}])
    found = read(train, NER(), unlabelled=bare)
    assert found.labels == ("B-PER", "O")
    assert found.rows["train"][-1] == {"tokens": ["pine", "x"], "tags": None}
    # [CLS] p ##i ##n ##e x [SEP]
    assert found.features["train"][-1]["labels"] == [-100, UNKNOWN, -100, -100, -100, UNKNOWN, -100]


def test_the_encoding_is_another_entry_of_the_cache(labelled: str, bare: str, cache: Path) -> None:
    read(labelled)
    assert len(list(cache.glob("*.arrow"))) == 3
    keys = {read(labelled).training_key(), read(labelled, unlabelled=bare).training_key()}
    assert len(list(cache.glob("*.arrow"))) == 4
    assert len(keys) == 2


def test_calibration_rows_have_labels(labelled: str, bare: str) -> None:
    without, found = read(labelled), read(labelled, unlabelled=[bare] * 20)
    assert found.unlabelled == 140
    for batch, other in zip(without.calibration(20), found.calibration(20), strict=True):
        assert all(torch.equal(other[name], tensor) for name, tensor in batch.items())
    assert sum(len(batch["labels"]) for batch in found.calibration(1000)) == len(without.rows["train"])


def test_a_smaller_vocabulary_keeps_them(labelled: str, tmp_path: Path) -> None:
    bare = write(tmp_path / "q.jsonl", [{"text": "quiz"}])
    found = read(labelled, unlabelled=bare)
    kept = [number for number, count in enumerate(found.token_counts(["train"])) if count]
    assert found.tokenizer.convert_tokens_to_ids("q") in kept
    assert found.trimmed(sorted({*kept, *range(5)})).unlabelled == 1


def test_another_tokenizer_reads_them_too(labelled: str, bare: str) -> None:
    found = read(labelled, unlabelled=bare)
    count = len(found.features["train"])
    batch = found.read_by(found.tokenizer)(torch.arange(count))
    assert batch["labels"].tolist() == found.features["train"]["labels"][:]


def test_the_setting_is_every_source_s() -> None:
    with pytest.raises(ConfigError, match=r"data\.unlabelled"):
        compose.build(compose.compose(["data=hub", "data.path=x", "data.unlabelled=a.jsonl"]).config)
    taught = ["compression=distill/logits", "compression.logits.teacher=x", "data.unlabelled=a.jsonl"]
    for chosen in (["data=hub", "data.path=x"], ["data=files", "data.train=b.csv"], []):
        source: Source = compose.build(compose.compose([*chosen, *taught]).config).data
        assert source.unlabelled == ("a.jsonl",)


def test_without_effect_it_is_refused_before_anything_is_read() -> None:
    unlabelled, teacher = "data.unlabelled=none.jsonl", "compression.logits.teacher=x"

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose.build(compose.compose([unlabelled, *overrides]).config)
        return str(caught.value)

    plain = "data.unlabelled=none.jsonl: has no effect without a teacher; add compression=[distill/logits]"
    assert refused() == plain
    assert refused("compression=[prune/magnitude,prune/cofi]") == plain
    assert refused("task=causal_lm", "model=tiny-llama", "compression=distill/logits", teacher) == (
        "data.unlabelled=none.jsonl: is for tasks whose answer a teacher can say, labels or a number; task=causal_lm "
        "reads whole training rows"
    )
    compose.build(compose.compose([unlabelled, "compression=prune/cofi", "compression.cofi.teacher=x"]).config)


def test_a_teacher_that_is_tuned_first_never_sees_them() -> None:
    chosen = ["compression=distill/logits", "compression.logits.teacher=auto"]
    config = compose.compose([*chosen, "data.unlabelled=a.jsonl"]).config
    teacher = auto_teacher.of_teacher(config)
    assert teacher["data"]["unlabelled"] is None
    assert config["data"]["unlabelled"] == "a.jsonl"
    assert auto_teacher.key_of(teacher) == auto_teacher.key_of(auto_teacher.of_teacher(compose.compose(chosen).config))
    compose.build(teacher)


def test_the_plan_says_how_many(labelled: str, bare: str, capsys: pytest.CaptureFixture[str]) -> None:
    taught = ["compression=distill/logits", "compression.logits.teacher=x", f"data.unlabelled={bare}"]
    recipe = compose.build(compose.compose(["data=files", f"data.train={labelled}", *taught]).config)
    Console().plan(recipe, read(labelled, unlabelled=bare))
    said = " ".join(capsys.readouterr().out.split())
    assert "39 train, 4 validation, 4 test rows, 7 of the train rows without a label, 2 labels" in said


def test_they_are_checked_as_the_task_checks_its_columns(tmp_path: Path) -> None:
    needs = Needs(required=("text", "label"), checks={"text": check_marked})
    marked = {"text": "<e1>rain</e1> made a <e2>pond</e2>"}
    path = write(tmp_path / "marked.jsonl", [{**marked, "label": "x"}, {**marked, "label": "y"}])
    source = Files(train=path, validation=path, test=path)
    train = source.splits(needs, 0)["train"]
    found = rows_of(write(tmp_path / "bare.jsonl", [marked]), train, source, needs)
    assert found[:] == {"text": [marked["text"]], "label": [None]}
    with pytest.raises(DataError, match=r"plain\.jsonl line 1: column 'text' has <e1> nowhere"):
        rows_of(write(tmp_path / "plain.jsonl", [{"text": "rain"}]), train, source, needs)
