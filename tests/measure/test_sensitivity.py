"""One unit at a time: what is pruned and put back, the map against an exhaustive search, and the command."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki.errors import ConfigError
from niwaki.measure import sensitivity
from niwaki.measure.plots import draw_sensitivity
from niwaki.measure.sensitivity import Plan, Record, allocate, hull, pruned, sparsity_map, units, whole_counts
from niwaki.model.anatomy import Anatomy


def test_units_are_the_linears_the_blocks_or_one_place_in_all_blocks(setting: Callable[..., Any]) -> None:
    model = setting().model
    linears = list(Anatomy.of(model).linears())
    assert units(model, "linear") == {name: [name] for name in linears}
    blocks, parts = units(model, "block"), units(model, "part")
    assert list(blocks) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert blocks["bert.encoder.layer.1"] == [name for name in linears if ".layer.1." in name]
    assert parts["attention.self.key"] == [f"bert.encoder.layer.{i}.attention.self.key" for i in range(3)]
    assert len(parts) == 6
    for groups in (blocks, parts):
        assert sorted(itertools.chain(*groups.values())) == sorted(linears)


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2", "albert", "bart"])
@pytest.mark.parametrize("unit", ["linear", "block", "part"])
def test_each_linear_is_in_one_unit(setting: Callable[..., Any], family: str, unit: Any) -> None:
    model = setting(family).model
    assert sorted(itertools.chain(*units(model, unit).values())) == sorted(Anatomy.of(model).linears())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
def test_the_smallest_weights_go_and_come_back(setting: Callable[..., Any], sparsity: float) -> None:
    model = setting().model
    names = list(Anatomy.of(model).linears())[:2]
    with torch.no_grad():
        model.get_submodule(names[0]).weight.view(-1)[:100] = 0.25  # equals
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pruned(model, dict.fromkeys(names, sparsity)):
        for name, tensor in model.state_dict().items():
            old = before[name]
            if name.removesuffix(".weight") not in names:
                assert torch.equal(tensor, old)
                continue
            assert int((tensor == 0).sum()) == round(sparsity * old.numel())
            assert torch.equal(tensor[tensor != 0], old[tensor != 0])
            if sparsity > 0:
                assert old[tensor == 0].abs().max() <= old[tensor != 0].abs().min()
    with pytest.raises(KeyboardInterrupt), pruned(model, {names[0]: 0.5}):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_convex_curve_below_by_hand() -> None:
    assert hull([(0.5, 0.1), (0.7, 0.2), (0.9, 0.6)]) == [(0, 0), (0.5, 0.1), (0.7, 0.2), (0.9, 0.6)]
    assert hull([(0.5, 0.4), (0.9, 0.5)]) == [(0, 0), (0.9, 0.5)]  # 0.5 is above the line to 0.9
    assert hull([(0.5, -0.3), (0.9, 0.2)]) == [(0, 0), (0.5, 0), (0.9, 0.2)]  # a gain is noise
    assert hull([(0.5, 0.2), (0.7, 0.1), (0.9, 0.6)]) == [(0, 0), (0.7, 0.2), (0.9, 0.6)]  # and so is a fall
    assert hull([(0.5, 0.2), (0.9, math.inf)]) == [(0, 0), (0.5, 0.2)]


def at(curve: list[tuple[float, float]], sparsity: float) -> float:
    """The loss on straight lines between points."""
    for (a, low), (b, high) in itertools.pairwise(curve):
        if sparsity <= b + 1e-12:
            return low + (high - low) * (sparsity - a) / (b - a)
    return math.inf


@pytest.mark.parametrize("target", [0.1, 0.35, 0.5, 0.65, 0.8])
def test_the_map_has_the_least_loss_of_all(target: float) -> None:
    """Against every allocation of whole weights, of convex curves over units of different sizes."""
    curves = {"a": [(0.5, 0.01), (0.7, 0.03), (0.9, 0.3)], "b": [(0.5, 0.1), (0.7, 0.2), (0.9, 0.5)],
              "c": [(0.5, 0.002), (0.7, 0.004), (0.9, 0.01)]}  # fmt: skip
    sizes = {"a": 300, "b": 100, "c": 100}
    whole = {unit: [(0.0, 0.0), *curve] for unit, curve in curves.items()}
    best = math.inf
    for a, b in itertools.product([i / 300 for i in range(271)], [i / 100 for i in range(91)]):
        c = (target * 500 - 300 * a - 100 * b) / 100
        if -1e-9 <= c <= 0.9 + 1e-9:
            best = min(best, at(whole["a"], a) + at(whole["b"], b) + at(whole["c"], max(c, 0.0)))
    found = allocate(curves, sizes, target)
    assert sum(found[unit] * size for unit, size in sizes.items()) == pytest.approx(target * 500)
    assert sum(at(whole[unit], found[unit]) for unit in curves) == pytest.approx(best, abs=1e-9)


def test_steps_that_cost_the_same_are_taken_together() -> None:
    free = [(0.5, 0.0), (0.9, 0.0)]
    dear = [(0.5, 0.1), (0.9, 0.5)]
    found = allocate({"a": free, "b": free, "c": dear}, {"a": 100, "b": 300, "c": 100}, 0.4)
    assert found == {"a": pytest.approx(0.5), "b": pytest.approx(0.5), "c": 0.0}


def test_a_unit_that_broke_is_spared() -> None:
    curves = {"a": [(0.5, 0.1), (0.9, math.inf)], "b": [(0.5, 0.2), (0.9, 0.3)]}
    assert allocate(curves, {"a": 100, "b": 100}, 0.7)["a"] == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"--target 0\.8: more than what was measured allows"):
        allocate(curves, {"a": 100, "b": 100}, 0.8)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, 0.8999])
def test_the_map_removes_exactly_what_was_asked_for(target: float) -> None:
    draw = torch.Generator().manual_seed(3)
    sizes = {f"l{i}": int(torch.randint(50, 900, (1,), generator=draw)) for i in range(12)}
    groups = {f"g{i}": [f"l{3 * i + j}" for j in range(3)] for i in range(4)}
    curves = {
        unit: list(zip((0.5, 0.7, 0.9), sorted(torch.rand(3, generator=draw).tolist()), strict=True)) for unit in groups
    }
    found = sparsity_map(groups, curves, sizes, target)
    assert list(found) == list(sizes)
    counts = {name: found[name] * size for name, size in sizes.items()}
    assert all(abs(count - round(count)) < 1e-6 for count in counts.values())
    assert sum(round(found[name] * size) for name, size in sizes.items()) == round(target * sum(sizes.values()))
    by_unit = allocate(curves, {unit: sum(sizes[n] for n in names) for unit, names in groups.items()}, target)
    assert all(abs(counts[n] - by_unit[u] * sizes[n]) <= 1 for u, names in groups.items() for n in names)


def test_whole_counts_by_hand() -> None:
    # 0.5 of 3, 3 and 5: 1.5, 1.5 and 2.5; of 11 in all 5.5 -> 6 (to even) go
    assert whole_counts(dict.fromkeys("abc", 0.5), {"a": 3, "b": 3, "c": 5}, 0.5) == {
        "a": 2 / 3,
        "b": 2 / 3,
        "c": 2 / 5,
    }


def test_what_was_measured_is_not_measured_again(setting: Callable[..., Any], tmp_path: Path) -> None:
    """A call that is stopped in the middle leaves all that it has; the next one goes on there."""
    model, path = setting().model, tmp_path / "measured.json"
    groups = {name: [name] for name in list(Anatomy.of(model).linears())[:3]}
    zeros: list[dict[str, int]] = []

    def score(stop: int | None = None) -> float:
        if stop is not None and len(zeros) == stop:
            raise KeyboardInterrupt
        zeros.append({n: int((model.get_submodule(n).weight == 0).sum()) for n in groups})
        return len(zeros) / 10

    record = Record("x", 0.9)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(model, groups, (0.5, 0.7), lambda: score(2), record, path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]
    again = Record.read(path, "x")
    assert again == Record("x", 0.9, {next(iter(groups)): {"0.5": 0.1, "0.7": 0.2}})
    sensitivity.measure(model, groups, (0.5, 0.7), score, again, path, lambda _: None)
    assert len(zeros) == 6
    sizes = [model.get_submodule(name).weight.numel() for name in groups]
    for i, found in enumerate(zeros):
        expected = [round((0.5, 0.7)[i % 2] * size) if i // 2 == j else 0 for j, size in enumerate(sizes)]
        assert list(found.values()) == expected
    assert Record.read(path, "another") is None
    path.write_text("{")
    assert Record.read(path, "x") is None


def test_a_metric_that_is_no_number_is_an_endless_loss(setting: Callable[..., Any], tmp_path: Path) -> None:
    model, record = setting().model, Record("x", 2.0)
    name = next(iter(Anatomy.of(model).linears()))
    found = iter([3.5, math.nan, math.inf])
    sensitivity.measure(
        model, {"u": [name]}, (0.5, 0.7, 0.9), lambda: next(found), record, tmp_path / "m", lambda _: None
    )
    assert record.scores["u"] == {"0.5": 3.5, "0.7": None, "0.9": None}
    assert sensitivity.losses(record, "u", (0.5, 0.7), "min") == [1.5, math.inf]
    assert sensitivity.losses(record, "u", (0.5,), "max") == [-1.5]


@pytest.mark.parametrize(("fields", "reason"), [
    ({"sparsities": (0.5, 1.0)}, "--sparsities 1.0: needs numbers above 0 and below 1"),
    ({"sparsities": (0.0,)}, "--sparsities 0.0: needs"),
    ({"sparsities": (-0.5,)}, "--sparsities -0.5: needs"),
    ({"sparsities": (math.nan,)}, "--sparsities nan: needs"),
    ({"sparsities": ()}, "--sparsities '': needs"),
    ({"target": 0.95}, "--target 0.95: needs a number above 0, and at most 0.9"),
    ({"target": 0.0}, "--target 0.0: needs"),
    ({"unit": "head"}, "--unit head: needs one of linear, block, part"),
])  # fmt: skip
def test_a_plan_that_cannot_be(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace(".", r"\.")):
        Plan(**fields)


@pytest.mark.parametrize("unit", ["linear", "block"])
def test_the_picture_holds_many_units(tmp_path: Path, unit: str) -> None:
    from matplotlib.image import imread

    names = [(f"model.layers.{i}", f"self_attn.part{j}") for i in range(24) for j in range(7)]
    values = {f"{a}.{b}": {"0.5": 0.9 - i / 1000, "0.9": None} for i, (a, b) in enumerate(names)}
    facts = {
        "unit": unit, "metric": "accuracy", "mode": "max", "rows": 100, "base": 0.9, "sparsities": [0.5, 0.9],
        "units": {name: {"scores": scores} for name, scores in values.items()},
        "places": {f"{a}.{b}": [a, b] for a, b in names},
    }  # fmt: skip
    draw_sensitivity(facts, tmp_path / "a.png")
    picture = imread(tmp_path / "a.png")
    assert picture.shape[0] > (24 if unit == "linear" else 168) * 30
    assert float(picture[..., :3].min()) < 0.3
    assert json.dumps(facts)
