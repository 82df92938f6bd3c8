"""Every form of a run's model in one table: who takes part, how the turns are timed, what a failure leaves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lifecycle import write_rows

from niwaki import artifact, compose, pipeline
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.errors import ConfigError
from niwaki.measure import speed, speed_table
from niwaki.measure.speed import Measure
from niwaki.measure.speed_table import Contender, race, resident_mb, speed_command, speed_text, whole_graph


class Rows:
    """A corpus whose rows all have three tokens."""

    task = SimpleNamespace(inputs=lambda batch: batch)

    def samples(self, split: str, size: int, count: int) -> list[dict[str, Any]]:
        assert split == "test"
        return [{"input_ids": torch.ones(size, 3)} for _ in range(count)]


class Timed(Contender):
    """Takes, by a clock of its own, one second more with each single row, and as long as is said for a batch."""

    def load(self) -> Any:
        if self.folder.name == "broken":
            raise RuntimeError("no such kernel\nand more")
        clock, calls, batch = self.settings["clock"], self.settings["calls"], self.settings["batch"]
        count = [0]

        def model(input_ids: torch.Tensor) -> None:
            assert torch.is_inference_mode_enabled()
            calls.append((self.name, len(input_ids)))
            if len(input_ids) == 1:
                count[0] += 1
                clock[0] += count[0]
            else:
                clock[0] += batch

        return model


def test_all_take_turns_and_what_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[float] = [0.0]
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    settings = {"clock": clock, "calls": calls}
    corpus: Any = Rows()
    first = Timed("first", Path("a"), corpus, settings={**settings, "batch": 16.0})
    broken = Timed("broken", Path("broken"), corpus)
    second = Timed("second", Path("b"), corpus, settings={**settings, "batch": 4.0})
    found = race([first, broken, second], repeats=2)
    assert broken.problem == "RuntimeError: no such kernel"
    assert set(found) == {"first", "second"}
    assert calls[28:] == [*([("first", 1)] * 5), ("first", 32), *([("second", 1)] * 5), ("second", 32)] * 2
    # Each met ten rows before, so the ten timed ones take 11 to 20 seconds.
    expected = {"latency_ms_p50": 15500.0, "latency_ms_p95": 19550.0}
    assert found["first"] == pytest.approx({**expected, "throughput": 2.0})
    assert found["second"] == pytest.approx({**expected, "throughput": 8.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that times all forms, but for the compiler, which has no place in a quick test."""
    folder = tmp_path_factory.mktemp("timed")
    path = write_rows(folder, count=36)["classification"]
    config = compose.compose([
        *(f"data.{split}={path}" for split in ("train", "validation", "test")), "data=files", "model=tiny-bert",
        "trainer.precision=fp32", "trainer.max_steps=2", "logger=none", "callbacks=[]", "measure.repeats=1",
        "measure.table=true", "compression=quantize/qat", "compression.qat.activation_bits=null", "export=hf",
    ]).config  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", uncompiled)
        patch.setattr(speed_table, "added_memory", lambda one: 12.5)
        pipeline.run(compose.build(config), folder, config)
    return folder


def uncompiled(model: Any, **settings: Any) -> Any:
    assert settings == {"dynamic": True}
    raise NotImplementedError("no compiler here")


def test_a_run_has_the_table(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text())["speed"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["dense, eager", "dense, ONNX Runtime", "artifact, eager", "artifact, compiled", "export=hf"]
    assert rows["artifact, compiled"]["problem"] == "NotImplementedError: no compiler here"
    assert rows["artifact, compiled"]["memory_mb"] is None
    assert "throughput" not in rows["artifact, compiled"]
    for name in ("dense, eager", "artifact, eager", "export=hf"):
        assert rows[name]["problem"] is None
        assert 0 < rows[name]["latency_ms_p50"] <= rows[name]["latency_ms_p95"]
        assert rows[name]["throughput"] > 0
        assert rows[name]["memory_mb"] == 12.5
    assert rows["artifact, eager"]["bytes"] == artifact.weight_bytes(run / "model")
    assert rows["artifact, eager"]["bytes"] < rows["dense, eager"]["bytes"]
    assert rows["export=hf"]["bytes"] == json.loads((run / "exports/hf/export.json").read_text())["bytes"]
    assert found["rounds"] == 1
    assert found["batch"] == 32
    assert 0 < found["lengths"]["mean"] <= found["lengths"]["longest"] <= 128
    report = (run / "report.md").read_text()
    assert "## Speed" in report
    assert "| artifact, compiled | - | - | - | - | - |" in report
    assert "artifact, compiled: NotImplementedError: no compiler here" in report


def test_what_is_compared_to_the_first_row() -> None:
    row = {"latency_ms_p50": 4.0, "latency_ms_p95": 5.0, "memory_mb": 80.0, "bytes": 10**6, "problem": None}
    table = {
        "rows": [{**row, "name": "a", "throughput": 50.0}, {**row, "name": "b", "throughput": 300.0}],
        "machine": "abacus", "threads": 2, "rounds": 3, "batch": 32,
        "lengths": {"mean": 24.0, "longest": 50, "of_batches": 44.0},
    }  # fmt: skip
    text = speed_text(table)
    assert "| a | 4.00 ms | 5.00 ms | 50.0 rows/s | 1.00x | 80 MB | 1.00 MB |" in text
    assert "| b | 4.00 ms | 5.00 ms | 300 rows/s | 6.00x | 80 MB | 1.00 MB |" in text
    assert "abacus, 2 threads; 3 rounds in turns; test rows of 24 tokens on average, batches of 44" in text


def test_memory_is_what_a_fresh_process_gained(run: Path) -> None:
    corpus = pipeline.read(compose.build(json_config(run)))
    one = Contender("artifact", run / "model", corpus)
    gained = speed_table.added_memory(one)
    assert gained is not None
    assert 0 < gained < 300
    assert speed_table.added_memory(Contender("nothing", run / "none", corpus)) is None


def json_config(run: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return found


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_mb()
    held = torch.ones(25_000_000)
    assert 80 < resident_mb() - before < 130
    assert held.numel()


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^measure\.table=true: needs measure\.repeats of at least 1"):
        Measure(repeats=0, table=True)
    with pytest.raises(ConfigError, match=r"^speed .*: needs the folder of a run, with config\.yaml and model/ in it$"):
        speed_command(run / "model", 1)
    with pytest.raises(ConfigError, match=r"^speed .*: needs the folder of a run"):
        speed_command(tmp_path, 1)


class Three(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            IntegerLinear(16, 16, bits=8, group=None, activation_bits=8, bias=None) for _ in range(3)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.third(self.second(self.first(values)))
        return found


def test_a_compiled_artifact_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made of the codes once breaks it."""
    graphs: list[Any] = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=kept))
    model, values = Three(), torch.randn(5, 16)
    run = whole_graph(model)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(run(values=values), model(values))
    assert len(graphs) == 1
