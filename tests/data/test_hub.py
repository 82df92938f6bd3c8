"""The hub source, on local folders that the same loader reads."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from niwaki.data.hub import Hub
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError

CLASSIFY = Needs(required=("text", "label"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def folder(path: Path, **splits: list[dict]) -> str:
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict]:
    return [{"text": f"text {i}", "label": i % 2} for i in range(count)]


def test_a_folder_is_read_and_missing_splits_are_carved(tmp_path: Path) -> None:
    splits = Hub(path=folder(tmp_path / "set", train=rows(40), test=rows(5))).splits(CLASSIFY, 0)
    assert {name: split.num_rows for name, split in splits.items()} == {
        "train": 36,
        "validation": 4,
        "test": 5,
    }
    assert splits["test"][1] == {"text": "text 1", "label": "1"}


def test_parquet_class_labels_become_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_list(rows(20), features=features)
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))
    splits = Hub(path=str(tmp_path / "set")).splits(CLASSIFY, 0)
    assert set(splits["train"]["label"]) == {"bad", "good"}


def test_a_test_split_without_labels_can_be_carved_instead(tmp_path: Path) -> None:
    hidden = [{"text": "kept back", "label": None}]
    path = folder(tmp_path / "set", train=rows(40), validation=rows(4), test=hidden)
    with pytest.raises(DataError, match="split test row 1: column 'label' is empty"):
        Hub(path=path).splits(CLASSIFY, 0)
    assert Hub(path=path, test="carve").splits(CLASSIFY, 0)["test"].num_rows == 4


@pytest.mark.parametrize(
    ("named", "split"),
    [
        ({"train": "test"}, "test"),
        ({"train": "test", "validation": "carve", "test": "test"}, "test"),
        ({"train": "validation"}, "validation"),
        ({"validation": "train"}, "validation"),
    ],
)
def test_nobody_learns_from_the_rows_of_another_split(named: dict[str, str], split: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "set", train=rows(4), validation=rows(5), test=rows(6))
    with pytest.raises(
        ConfigError, match=rf"data.train=.* and data.{split}=.*: a model would be measured with rows that"
    ):
        Hub(path=path, **named)
    everything = {"train": "test", "validation": "test", "test": "test"}
    found = Hub(path=path, **everything, shots=0).splits(CLASSIFY, 0)
    assert [one.num_rows for one in found.values()] == [6, 6, 6]


def test_a_split_under_another_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", train=rows(8), validation=rows(4))
    splits = Hub(path=path, test="validation").splits(CLASSIFY, 0)
    assert splits["test"][:] == splits["validation"][:]
    with pytest.raises(DataError, match=r"data\.test=dev: .* has no such split; it has train, validation"):
        Hub(path=path, test="dev").splits(CLASSIFY, 0)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*absent: cannot be loaded") as caught:
        Hub(path=str(tmp_path / "absent")).splits(CLASSIFY, 0)
    assert "\n" not in str(caught.value)
    path = folder(tmp_path / "set", train=rows(8))
    with pytest.raises(DataError, match=r"data\.name=other: cannot be loaded: .*other"):
        Hub(path=path, name="other").splits(CLASSIFY, 0)


def test_the_users_progress_bars_are_as_before(tmp_path: Path) -> None:
    datasets.enable_progress_bars()
    Hub(path=folder(tmp_path / "set", train=rows(40))).splits(CLASSIFY, 0)
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("options", [{"path": ""}, {"path": "a", "train": None}, {"path": "a", "name": ""}])
def test_wrong_settings_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"data\.(path|train|name)="):
        Hub(**options)
