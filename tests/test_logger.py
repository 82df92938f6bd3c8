"""Loggers: where they write, what survives a resume, and that Weights & Biases never asks nor stops a run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki.logger import Csv, LoggerSettings, NoLogger, TensorBoard, Wandb, numbers

METRICS = {"task": "classification", "steps": 7, "before": None, "after": {"test": {"accuracy": 0.5}, "bytes": 9}}


def steps_of(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_csv_is_where_it_says_and_a_resume_loses_no_step(tmp_path: Path) -> None:
    for steps in ((1, 2), (2, 3), (4,)):
        logger: Any = Csv().build(tmp_path, {})
        for step in steps:
            logger.log_metrics({"train/loss": 0.5}, step=step)  # and then the process is killed
    assert steps_of(tmp_path / "csv" / "metrics.csv") == ["1", "2"]
    assert steps_of(tmp_path / "csv-2" / "metrics.csv") == ["2", "3"]
    assert steps_of(tmp_path / "csv-3" / "metrics.csv") == ["4"]


@pytest.mark.parametrize("settings", [Csv(), TensorBoard(), NoLogger()])
def test_finish_adds_the_final_numbers(tmp_path: Path, settings: LoggerSettings) -> None:
    if isinstance(settings, TensorBoard):
        pytest.importorskip("tensorboard")
    logger = settings.build(tmp_path, {})
    if logger is not None:
        logger.log_metrics({"train/loss": 0.5}, step=3)
        logger.finalize("success")  # as Lightning does after the fit
    settings.finish(logger, tmp_path, METRICS)
    if isinstance(settings, Csv):
        assert steps_of(tmp_path / "csv" / "metrics.csv") == ["3", "7"]
        assert "0.5" in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[-1]


class FakeWandb:
    """Stands for `wandb.init`: fails online, notes what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error = error
        self.torn_down = 0

    def init(self, **asked: Any) -> Any:
        self.asked.append(asked)
        if self.error and asked["mode"] == "online":
            raise self.error
        return object()

    def teardown(self) -> None:
        self.torn_down += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeWandb]:
    def make(error: str | None = None, **environment: str) -> FakeWandb:
        import wandb

        fake = FakeWandb(getattr(wandb.errors, error)("bad\nkey") if error else None)
        monkeypatch.setattr(wandb, "init", fake.init)
        monkeypatch.setattr(wandb, "teardown", fake.teardown)
        monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", lambda experiment: experiment)
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return fake

    return make


def test_a_resumed_run_is_the_same_run(tmp_path: Path, wandb: Callable[..., FakeWandb]) -> None:
    fake = wandb(WANDB_API_KEY="k")
    Wandb().build(tmp_path, {})
    Wandb().build(tmp_path, {})
    (other := tmp_path / "other").mkdir()
    Wandb().build(other, {})
    ids = [asked["id"] for asked in fake.asked]
    assert ids[0] == ids[1] != ids[2]
    assert {asked["resume"] for asked in fake.asked} == {"allow"}


def test_the_id_that_a_sweep_gives_is_kept(tmp_path: Path, wandb: Callable[..., FakeWandb]) -> None:
    fake = wandb(WANDB_RUN_ID="sweep1")
    Wandb().build(tmp_path, {})
    assert fake.asked[0]["id"] == "sweep1"


@pytest.mark.parametrize("error", ["CommError", "AuthenticationError", "UsageError"])
def test_a_stale_key_or_no_network_goes_offline_in_one_line(
    tmp_path: Path, wandb: Callable[..., FakeWandb], capsys: pytest.CaptureFixture[str], error: str
) -> None:
    fake = wandb(error, WANDB_API_KEY="k")
    Wandb().build(tmp_path, {})
    assert [asked["mode"] for asked in fake.asked] == ["online", "offline"]
    assert fake.asked[0]["id"] == fake.asked[1]["id"]
    assert fake.torn_down == 1
    assert capsys.readouterr().err == "wandb: logging offline: bad key\n"


@pytest.mark.parametrize(
    ("environment", "mode", "said"),
    [
        ({}, "offline", ""),
        ({"WANDB_MODE": "online"}, "offline", "wandb: logging offline: WANDB_MODE=online, but there is no key"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled", ""),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline", ""),
        ({"WANDB_API_KEY": "k"}, "online", ""),
    ],
)
def test_there_is_never_a_prompt(
    tmp_path: Path, wandb: Callable[..., FakeWandb], capsys: pytest.CaptureFixture[str],
    environment: dict[str, str], mode: str, said: str,
) -> None:  # fmt: skip
    fake = wandb(**environment)
    Wandb().build(tmp_path, {})
    assert [asked["mode"] for asked in fake.asked] == [mode]
    error = capsys.readouterr().err
    assert error.startswith(said) if said else error == ""
    assert error.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("server", "host", "mode"),
    [
        (None, "api.wandb.ai", "online"),
        ("https://wandb.example.org", "wandb.example.org", "online"),
        ("https://wandb.example.org", "api.wandb.ai", "offline"),
    ],
)
def test_a_key_in_netrc_is_one_for_its_server(
    tmp_path: Path, wandb: Callable[..., FakeWandb], server: str | None, host: str, mode: str
) -> None:
    fake = wandb(**({"WANDB_BASE_URL": server} if server else {}))
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    Wandb().build(tmp_path, {})
    assert fake.asked[0]["mode"] == mode


def test_offline_runs_of_one_folder_have_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    settings = Wandb()
    for _ in range(2):
        logger: Any = settings.build(tmp_path, {"a": 1})
        logger.log_metrics({"train/loss": 0.5}, step=1)
        settings.finish(logger, tmp_path, METRICS)
    kept = (tmp_path / "wandb-run-id").read_text().strip()
    found = [place.name for place in (tmp_path / "wandb").glob("offline-run-*")]
    assert found
    assert all(name.endswith(f"-{kept}") for name in found)


def test_numbers() -> None:
    assert numbers(METRICS) == {"steps": 7, "after/test/accuracy": 0.5, "after/bytes": 9}
