"""An export is there whole and good, or not at all; whatever becomes of it, the run's own results stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lifecycle import write_rows
from torch import Tensor

from niwaki import artifact, compose, entry, pipeline
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.export.command import rows_of
from niwaki.export.export import FLIPPED, FLOAT_ORDER, Export, ExportError
from niwaki.export.exports import CARD, Rows, centred, check_scores, example, export, export_all
from niwaki.export.runner import Runner


class InTorch(Runner):
    """The artifact itself, something added to its first logit and taken off its second."""

    runtime = "torch"

    def __init__(self, model: Any, added: float, factor: float) -> None:
        super().__init__(["input_ids", "attention_mask"])
        self.model, self.added, self.factor = [model], added, factor

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model[0](**given).logits * self.factor
        logits[..., 0] += self.added
        logits[..., 1] -= self.added
        return logits


@dataclass(frozen=True, kw_only=True)
class Same(Export):
    """A format that needs no package."""

    paper = "none"
    added: float = 0.0
    factor: float = 1.0
    tolerance: float | None = None
    error: BaseException | None = None

    def write(self, saved: artifact.Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(str(saved.folder))
        if self.error:
            raise self.error
        return {"inputs": list(example)}

    def runner(self, folder: Path) -> Runner:
        return InTorch(artifact.load((folder / "file").read_text()).model, self.added, self.factor)

    def bound(self, model: Any) -> float | None:
        return super().bound(model) if self.tolerance is None else None

    def loss_allowed(self, model: Any) -> float | None:
        return self.tolerance


Same.__module__ = "niwaki.export.same"


@dataclass(frozen=True, kw_only=True)
class Other(Same):
    """Another one."""


Other.__module__ = "niwaki.export.other"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_rows(tmp_path_factory.mktemp("rows"), count=24)["classification"]
    settings = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    return compose.compose([
        *settings, "data=files", "model=tiny-bert", "trainer.precision=fp32", "trainer.max_steps=40",
        "trainer.max_epochs=40", "optimizer.lr=0.01", "logger=none",
        "callbacks=[]", "measure=scores", "compression=quantize/int8",
    ]).config  # fmt: skip


@pytest.fixture(scope="module")
def run(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an export."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(compose.build(config), folder, config)
    return folder


@pytest.fixture
def rows(run: Path) -> Rows:
    saved = artifact.load(run / "model")
    return Rows(rows_of(run, None, {}, saved, 8), json.loads((run / "metrics.json").read_text())["after"]["test"], 0)


def test_a_good_one(run: Path, rows: Rows, tmp_path: Path) -> None:
    found = export(Same(), run / "model", tmp_path / "out", rows)
    assert found["test"] == pytest.approx(rows.scores, abs=1e-6)
    assert found["parity"] == 0.0
    assert found["bound"] == FLIPPED
    assert found["latency_ms"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "file", CARD, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card["format"] == "same"
    assert card["bytes"] == found["bytes"] == (tmp_path / "out" / "file").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_it_is_timed_in_turns_with_the_artifact(run: Path, rows: Rows, tmp_path: Path) -> None:
    found = export(Same(), run / "model", tmp_path / "out", replace(rows, repeats=1))
    assert found["latency_ms"] > 0
    assert found["throughput"] > 0
    assert set(found["artifact"]) == {"latency_ms", "throughput"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"added": 9.0}, r"its logits are up to 9 from those of the artifact, the largest of which is \d+\.\d+;"),
        ({"added": 0.15}, r"its logits are in the middle 0\.15 from those of the artifact, the largest of which is"),
        ({"added": float("nan")}, "some logits are no finite numbers"),
        ({"added": float("inf"), "tolerance": 0.01}, "some logits are no finite numbers"),
        ({"error": RuntimeError("no such operator\nsecond line")}, "RuntimeError: no such operator$"),
        ({"error": ExportError("cannot be traced")}, "cannot be traced$"),
        (
            {"tolerance": 0.01, "factor": -1.0},
            r"test accuracy is 0\.\d+, that of the artifact 1\.0000; export.same.tol",
        ),
    ],
)
def test_one_that_is_not_good_leaves_nothing(
    run: Path, rows: Rows, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=f"^export=same: {said}") as caught:
        export(Same(**settings), run / "model", tmp_path / "out", rows)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"added": 0.02}, 0.02), ({"tolerance": 0.01, "added": 1e-3}, 1e-3), ({"factor": 1.0001}, 0.0)],
)  # fmt: skip
def test_what_is_within_the_bound_is_good(
    run: Path, rows: Rows, tmp_path: Path, settings: dict[str, Any], found: float
) -> None:
    assert export(Same(**settings), run / "model", tmp_path / "out", rows)["parity"] == pytest.approx(found, abs=1e-3)


def test_the_bound_is_that_of_float_order_where_no_activation_is_rounded(setting: Any) -> None:
    assert Same().bound(setting().model) == FLOAT_ORDER


def test_a_good_one_stays_beside_one_that_is_not(run: Path, rows: Rows, tmp_path: Path) -> None:
    found, failures = export_all([Same(added=1.0), Other()], run / "model", tmp_path / "exports", rows)
    assert list(found) == ["other"]
    assert len(failures) == 1
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["other"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_stopped_half_way_it_is_not_there(run: Path, rows: Rows, tmp_path: Path, error: BaseException) -> None:
    with pytest.raises((KeyboardInterrupt, ExportError)):
        export(Same(error=error), run / "model", tmp_path / "out", rows)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(compose.build(config), export={"same": Same(added=1.0)})
    monkeypatch.setattr(compose, "build", lambda _: recipe)
    with pytest.raises(SystemExit) as stop:
        entry.carry_out(config, tmp_path)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: export=same: its logits are up to 1 from those of the artifact")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["exports"] == {}
    assert metrics["after"]["test"]
    assert artifact.load(tmp_path / "model")
    assert (tmp_path / "report.md").is_file()
    assert not (tmp_path / "exports").exists()


def test_what_is_stopped_during_an_export_has_its_metrics(config: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(compose.build(config), export={"same": Same(error=KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, tmp_path, config)
    assert "exports" not in json.loads((tmp_path / "metrics.json").read_text())
    assert not list((tmp_path / "exports").iterdir())


def test_two_rows_are_shown_to_the_exporter_even_of_one(rows: Rows) -> None:
    corpus = rows.corpus
    alone = replace(corpus, features={"test": corpus.features["test"].select([0])})
    assert isinstance(alone, Corpus)
    for one in (corpus, alone):
        shown = example(one)
        assert list(shown) == ["input_ids", "attention_mask"]
        assert all(len(tensor) == 2 for tensor in shown.values())


@dataclass(frozen=True, kw_only=True)
class Needy(Same):
    packages = ("torch", "no_such_package_there_is")
    extra = "needy"


Needy.__module__ = "niwaki.export.needy"


def test_a_package_that_is_missing_is_named_before_the_fit(config: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(compose.build(config), export={"needy": Needy()})
    with pytest.raises(
        ConfigError, match=r"^export=needy: needs no_such_package_there_is; pip install 'niwaki\[needy\]'$"
    ):
        pipeline.run(recipe, tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_texts_that_are_written_are_refused_before_the_fit(tmp_path: Path) -> None:
    path = write_rows(tmp_path)["translation"]
    config = compose.compose([
        "task=translation", "model=tiny-bart", "data=files", f"data.train={path}", "logger=none", "callbacks=[]",
    ]).config  # fmt: skip
    recipe = replace(compose.build(config), export={"same": Same()})
    with pytest.raises(ConfigError, match=r"^export=same: task=translation writes texts"):
        pipeline.judge(recipe)


def test_missing_inputs_are_those_of_one_text_that_is_seen_whole(run: Path) -> None:
    seen: dict[str, Tensor] = {}

    class Looks(Runner):
        def logits(self, given: dict[str, Tensor]) -> Tensor:
            seen.update(given)
            return torch.zeros(1)

    ids = torch.tensor([[5, 6]])
    found = Looks(["input_ids", "attention_mask", "token_type_ids"])(input_ids=ids)
    assert isinstance(found, SimpleNamespace)
    assert {name: tensor.tolist() for name, tensor in seen.items()} == {
        "input_ids": [[5, 6]], "attention_mask": [[1, 1]], "token_type_ids": [[0, 0]],
    }  # fmt: skip


def test_a_shift_of_all_logits_is_no_difference() -> None:
    """Softmax does not mind it, and a bound that is a share of the largest logit must not grow with it."""
    logits = torch.tensor([[-100.0, -101.0, -102.0]])
    torch.testing.assert_close(centred(logits), torch.tensor([[1.0, 0.0, -1.0]]))
    assert centred(torch.tensor([[3.0]])).tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("mode", "ours", "theirs", "good"),
    [("max", 82.0, 81.5, True), ("max", 82.0, 81.0, False), ("min", 5.36, 5.40, True), ("min", 5.36, 5.45, False)],
)
def test_a_tolerance_is_a_share_of_the_score(mode: str, ours: float, theirs: float, good: bool) -> None:
    task: Any = SimpleNamespace(metric="score", mode=mode)
    if good:
        return check_scores(Same(), 0.01, task, {"score": theirs}, {"score": ours})
    with pytest.raises(ExportError, match=r"tolerance=0\.01 of it may be lost"):
        check_scores(Same(), 0.01, task, {"score": theirs}, {"score": ours})
