"""Learning-rate schedules at steps worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from niwaki.errors import ConfigError
from niwaki.schedule import SWA, Constant, Cosine, Linear, Schedule


def rates(schedule: Schedule, steps: int) -> list[float]:
    """The rate of every optimizer step, with a full rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.build(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_linear() -> None:
    # 10 steps, 2 of warm-up: 1/3, 2/3, then from 1 down in eighths
    assert rates(Linear(warmup=0.2), 10) == pytest.approx([1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))])


def test_cosine() -> None:
    found = rates(Cosine(warmup=0.0), 4)
    half = math.sqrt(0.5)
    assert found == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_constant() -> None:
    assert rates(Constant(warmup=0.5), 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_swa() -> None:
    # full up to half of 0.8, then down to 0.25 at nine tenths of it, 0.72, then constant
    found = rates(SWA(warmup=0.0, begin=0.8, floor=0.25), 10)
    falling = [1 - 0.75 * fallen / 0.32 for fallen in (0.1, 0.2, 0.3)]
    assert found == pytest.approx([1, 1, 1, 1, 1, *falling, 0.25, 0.25])


@pytest.mark.parametrize("fields", [{"begin": 0.0}, {"begin": 1.1}, {"floor": 0.0}, {"floor": 1.0}])
def test_refusals_of_swa(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"^schedule\.{next(iter(fields))}="):
        SWA(**fields)


@pytest.mark.parametrize("schedule", [SWA(), Linear(), Cosine(), Constant(), Linear(warmup=0.99)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_learns(schedule: Schedule, steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(schedule, steps))


def test_the_rate_is_zero_after_the_end_and_stays_there() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = Linear(warmup=0.0).build(optimizer, 3)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 3, float("nan"), float("inf")])
def test_refusal(warmup: float) -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.warmup="):
        Linear(warmup=warmup)
