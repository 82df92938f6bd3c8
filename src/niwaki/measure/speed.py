"""How fast models run, side by side: latency of single rows, throughput of batches, at the data's own lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import ConfigError

Inputs = dict[str, Tensor]
THROUGHPUT_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`before`: whether the model is also measured as it was loaded. `repeats`: timed rounds (0 leaves speed out).
    `table`: whether every form of the model is timed at last, dense and compressed, compiled and exported."""

    before: bool = True
    repeats: int = 20
    table: bool = False

    def __post_init__(self) -> None:
        if self.repeats < 0:
            raise ConfigError(f"measure.repeats={self.repeats}: needs a whole number of at least 0")
        if self.table and not self.repeats:
            raise ConfigError("measure.table=true: needs measure.repeats of at least 1, or nothing is timed")


def speeds(
    models: Mapping[str, Any], singles: Sequence[Inputs], batches: Sequence[Inputs], repeats: int
) -> dict[str, dict[str, float]]:
    """Per model: `latency_ms`, median milliseconds of one row, and `throughput`, rows per second in batches.

    The models take turns on the same inputs in every round, so that a drift of the machine meets all alike.
    """
    single_times: dict[str, list[float]] = {name: [] for name in models}
    batch_times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            for inputs in (*singles[:3], *batches[:1]):
                model(**inputs)
        for turn in range(repeats):
            for name, model in models.items():
                single_times[name].append(seconds(model, singles[turn % len(singles)]) * 1000)
                batch_times[name].append(rate(model, batches[turn % len(batches)]))
    return {
        name: {"latency_ms": statistics.median(single_times[name]), "throughput": statistics.median(batch_times[name])}
        for name in models
    }


def rate(model: Any, inputs: Inputs) -> float:
    """Rows per second of one forward pass."""
    return len(inputs["input_ids"]) / seconds(model, inputs)


def seconds(model: Any, inputs: Inputs) -> float:
    """Wall time of one forward pass."""
    device = inputs["input_ids"].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
