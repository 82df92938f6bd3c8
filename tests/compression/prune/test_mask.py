"""Masks: patterns drawn from scores by hand, the cubic schedule of Zhu & Gupta, and when masks are drawn."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.compression.prune.mask import Mask, MaskSchedule, cubic, mask_targets
from niwaki.compression.prune.pattern import Pattern, Scope, Selection, keep_largest
from niwaki.errors import ConfigError


def drawn(pattern: str, scores: list[list[float]], sparsity: float) -> list[list[int]]:
    return Pattern.parse(pattern).draw(torch.tensor(scores), sparsity).int().tolist()


def test_unstructured_by_hand() -> None:
    scores = [[5.0, 1.0, 7.0], [2.0, 6.0, 3.0]]
    assert drawn("unstructured", scores, 0.5) == [[1, 0, 1], [0, 1, 0]]
    assert drawn("unstructured", scores, 1 / 6) == [[1, 0, 1], [1, 1, 1]]
    assert drawn("unstructured", scores, 0.0) == [[1, 1, 1], [1, 1, 1]]


def test_two_of_four_and_one_of_four_by_hand() -> None:
    scores = [[4.0, 1.0, 3.0, 2.0, 0.1, 0.4, 0.3, 0.2]]
    assert drawn("2:4", scores, 0.5) == [[1, 0, 1, 0, 0, 1, 1, 0]]
    assert drawn("1:4", scores, 0.75) == [[1, 0, 0, 0, 0, 1, 0, 0]]


def test_a_pattern_grows_group_by_group() -> None:
    scores = [[4.0, 1.0, 3.0, 2.0]]
    assert [sum(drawn("1:4", scores, s)[0]) for s in (0.0, 0.24, 0.25, 0.49, 0.5, 0.74, 0.75)] == [
        4,
        4,
        3,
        3,
        2,
        2,
        1,
    ]


def test_groups_lie_along_the_input() -> None:
    scores = torch.arange(16.0).view(4, 4)
    assert Pattern.parse("2:4").draw(scores, 0.5).int().tolist() == [[0, 0, 1, 1]] * 4


@pytest.mark.parametrize("keep", range(1, 8))
@pytest.mark.parametrize("group", range(2, 9))
def test_every_group_of_every_pattern_keeps_exactly_n(keep: int, group: int) -> None:
    if keep >= group:
        return
    pattern = Pattern.parse(f"{keep}:{group}")
    mask = pattern.draw(torch.randn(6, group * 5), pattern.sparsity)
    assert set(mask.view(-1, group).sum(1).tolist()) == {keep}


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("values", ["ties", "zeros", "random"])
def test_the_count_is_exact_whatever_ties(sparsity: float, values: str) -> None:
    scores = {"ties": torch.ones(7, 11), "zeros": torch.zeros(7, 11), "random": torch.rand(7, 11)}[values]
    mask = Pattern().draw(scores, sparsity)
    assert int((~mask).sum()) == round(sparsity * 77)
    assert set(Pattern(2, 4).draw(torch.zeros(3, 8), 0.5).view(-1, 4).sum(1).tolist()) == {2}


def test_what_is_dropped_is_never_larger_than_what_is_kept() -> None:
    scores = torch.rand(4, 50)
    mask = keep_largest(scores, 20)
    for row, kept in zip(scores, mask, strict=True):
        assert row[~kept].max() <= row[kept].min()


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "2:", ":4", "a:b", "", "2:4:8", "-1:4"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ConfigError, match="needs unstructured, or N:M"):
        Pattern.parse(text)


def test_the_link_and_its_gradient() -> None:
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[3.0, 4.0]])
    masks = mask_targets({"it": linear}, Mask)
    masks[linear].mask.copy_(torch.tensor([[True, False]]))
    assert linear.weight.tolist() == [[3.0, 0.0]]
    linear(torch.tensor([[5.0, 7.0]])).backward()
    assert linear.parametrizations.weight.original.grad.tolist() == [[5.0, 0.0]]  # type: ignore[union-attr]


def test_cubic_at_points_worked_by_hand() -> None:
    # Zhu & Gupta, equation 1, s_i = 0, s_f = 0.8, from step 20 (0.2 * 100) to step 60:
    # s(30) = .8 (1 - .75^3), s(40) = .8 (1 - .5^3), s(50) = .8 (1 - .25^3)
    at = cubic(0.8, 0.2, 0.6, 100)
    assert [at(step) for step in (0, 20, 30, 40, 50, 60, 100)] == pytest.approx(
        [0.0, 0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    )


@pytest.mark.parametrize("steps", range(1, 30))
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.5), (0.4, 0.45), (0.5, 0.6), (0.0, 0.01), (0.0, 1.0), (0.99, 1.0)])
def test_cubic_reaches_the_end_however_short_the_fit(steps: int, begin: float, end: float) -> None:
    at = cubic(0.9, begin, end, steps)
    values = [at(step) for step in range(steps + 1)]
    assert values == sorted(values)
    assert at(max(round(end * steps), 1)) == 0.9


def schedule_of(linears: list[nn.Linear], scope: Scope = "layer", **settings: Any) -> MaskSchedule:
    masks = mask_targets({str(i): linear for i, linear in enumerate(linears)}, Mask)
    plain: dict[str, Any] = {
        "score": lambda weight, mask: weight.abs(), "progress": lambda step: 1.0, "last_step": 0, "interval": 1,
        "selection": Selection(Pattern(), scope, dict.fromkeys(masks.values(), 0.5)),
    }  # fmt: skip
    return MaskSchedule(masks, **(plain | settings))


def two_linears() -> list[nn.Linear]:
    small, large = nn.Linear(2, 1, bias=False), nn.Linear(2, 2, bias=False)
    small.weight.data = torch.tensor([[0.1, -0.2]])
    large.weight.data = torch.tensor([[-3.0, 4.0], [0.3, -5.0]])
    return [small, large]


def test_by_layer_each_gives_its_share() -> None:
    schedule = schedule_of(linears := two_linears())
    schedule.draw(0)
    assert linears[0].weight.tolist() == [[0.0, pytest.approx(-0.2)]]
    assert linears[1].weight.tolist() == [[0.0, 4.0], [0.0, -5.0]]


def test_together_the_smallest_of_all_go() -> None:
    schedule = schedule_of(linears := two_linears(), scope="global")
    schedule.draw(0)
    assert linears[0].weight.tolist() == [[0.0, 0.0]]
    assert linears[1].weight.tolist() == [[-3.0, 4.0], [0.0, -5.0]]


def test_masks_are_drawn_from_what_enters_them_so_a_weight_can_come_back() -> None:
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    schedule = schedule_of([linear], last_step=5)
    schedule.draw(0)
    assert linear.weight.tolist() == [[0.0, 2.0]]
    linear.parametrizations.weight.original.data[0, 0] = 9.0  # type: ignore[union-attr, operator]
    schedule.draw(1)
    assert linear.weight.tolist() == [[9.0, 0.0]]


def test_when_masks_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedule_of(two_linears(), last_step=7, interval=3)
    schedule.draw(0)
    steps: list[int] = []
    draw = schedule.draw
    monkeypatch.setattr(schedule, "draw", lambda step: (steps.append(step), draw(step)))
    for step in (0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 12):  # twice where batches are accumulated
        schedule.on_train_batch_end(SimpleNamespace(global_step=step))  # type: ignore[arg-type]
    assert steps == [3, 6, 7]


def test_a_resumed_schedule_does_not_draw_the_same_step_again() -> None:
    schedule, again = schedule_of(two_linears(), last_step=8), schedule_of(two_linears(), last_step=8)
    schedule.draw(4)
    again.load_state_dict(schedule.state_dict())
    before = [mask.mask.clone() for mask in again.masks.values()]
    again.on_train_batch_end(SimpleNamespace(global_step=4))  # type: ignore[arg-type]
    assert all(torch.equal(a, m.mask) for a, m in zip(before, again.masks.values(), strict=True))
    again.on_train_batch_end(SimpleNamespace(global_step=5))  # type: ignore[arg-type]
    assert not all(mask.mask.all() for mask in again.masks.values())


def test_masks_are_in_the_state_of_the_model(setting: Callable[..., Any]) -> None:
    one = setting()
    mask_targets(one.context().targets, Mask)
    assert sum(name.endswith(".mask") for name in one.model.state_dict()) == 18
