"""Speeds: medians of the times taken, in turns, on the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from niwaki.errors import ConfigError
from niwaki.measure import speed
from niwaki.measure.speed import Measure, rate, seconds, speeds


class Slow:
    """A model that takes as long as it says, by a clock of its own."""

    def __init__(self, clock: list[float], takes: list[float], calls: list[tuple[Any, int]]) -> None:
        self.clock, self.takes, self.calls = clock, takes, calls

    def __call__(self, input_ids: torch.Tensor) -> None:
        self.calls.append((self, len(input_ids)))
        self.clock[0] += self.takes.pop(0) if self.takes else 1.0


def rows(count: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(count, 3)}


def test_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    warm = [9.0, 9.0]  # one single, one batch
    first = Slow(clock, [*warm, 0.001, 2.0, 0.005, 4.0, 0.002, 8.0], calls)
    second = Slow(clock, warm + [1.0, 1.0] * 3, calls)
    found = speeds({"first": first, "second": second}, [rows(1)], [rows(8)], repeats=3)
    assert found["first"] == pytest.approx({"latency_ms": 2.0, "throughput": 2.0})
    assert found["second"] == pytest.approx({"latency_ms": 1000.0, "throughput": 8.0})
    timed = calls[4:]
    assert timed == [(first, 1), (first, 8), (second, 1), (second, 8)] * 3


def test_seconds_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    assert seconds(Slow(clock, [0.5], []), rows(4)) == 0.5
    assert rate(Slow(clock, [0.5], []), rows(4)) == 8.0


def test_nothing_keeps_a_gradient() -> None:
    seen: list[bool] = []

    def model(input_ids: torch.Tensor) -> None:
        seen.append(torch.is_inference_mode_enabled())

    speeds({"it": model}, [rows(1)], [rows(2)], repeats=1)
    assert all(seen)


def test_refusal() -> None:
    with pytest.raises(ConfigError, match=r"^measure\.repeats=-1"):
        Measure(repeats=-1)
