"""How much each part of a model minds losing its smallest weights, and the sparsities that follow from it.

Each unit (a linear, a block, or one place in all blocks) is pruned by magnitude alone, without training, the rest left
as it is (the analysis of Li et al. 2017, arXiv:1608.08710, section 3.2, with single weights in place of filters).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from math import floor, inf, isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from niwaki import artifact
from niwaki.compression.prune.pattern import Pattern
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy

Unit = Literal["linear", "block", "part"]
Curve = Sequence[tuple[float, float]]  # (sparsity, loss), sparsities rising
MEASURED = "measured.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is pruned one at a time (`unit`), to which `sparsities`, and the overall sparsity `target` of a map."""

    unit: Unit = "linear"
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    target: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ConfigError(f"--unit {self.unit}: needs one of {', '.join(get_args(Unit))}")
        if not self.sparsities or (wrong := [s for s in self.sparsities if not 0 < s < 1]):
            shown = wrong[0] if self.sparsities else "''"
            raise ConfigError(f"--sparsities {shown}: needs numbers above 0 and below 1")
        if self.target is not None and not 0 < self.target <= max(self.sparsities):
            raise ConfigError(
                f"--target {self.target}: needs a number above 0, and at most {max(self.sparsities)}, the largest of "
                "--sparsities"
            )
        object.__setattr__(self, "sparsities", tuple(sorted(set(self.sparsities))))


@dataclass
class Record:
    """The measurements that are there: `scores[unit][sparsity]`, None where the metric was no finite number."""

    identity: str  # of weights and rows
    base: float
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, identity: str) -> Record | None:
        """What an earlier call left of the same model and rows."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.identity == identity else None

    def write(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self)) + "\n")


def replace_file(path: Path, text: str) -> None:
    """The file has its new content whole, or its old."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def places(model: Any) -> dict[str, tuple[str, str]]:
    """Of each linear of the blocks: its block, and its place in there."""
    blocks = [name for name, _, _ in Anatomy.of(model).named_blocks()]
    found = {}
    for name in Anatomy.of(model).linears():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        found[name] = (block, name.removeprefix(f"{block}."))
    return found


def units(model: Any, unit: Unit) -> dict[str, list[str]]:
    """The linears of each unit."""
    found: dict[str, list[str]] = {}
    for name, (block, inner) in places(model).items():
        found.setdefault({"linear": name, "block": block, "part": inner}[unit], []).append(name)
    return found


@contextmanager
def pruned(model: nn.Module, sparsities: Mapping[str, float]) -> Iterator[None]:
    """Within: each linear without its round(s n) smallest weights, the first ones among equals."""
    weights: dict[str, torch.Tensor] = {n: model.get_submodule(n).weight.data for n in sparsities}  # type: ignore[misc]
    kept = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, sparsity in sparsities.items():
            weights[name] *= Pattern().draw(weights[name].abs(), sparsity)
        yield
    finally:
        for name, weight in kept.items():
            weights[name].copy_(weight)


def measure(
    model: nn.Module, groups: Mapping[str, Sequence[str]], sparsities: Sequence[float], score: Callable[[], float],
    record: Record, path: Path, tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Fill what `record` lacks; after each measurement it is on disk, so that a call that is stopped goes on there."""
    todo = [(unit, s) for unit in groups for s in sparsities if f"{s}" not in record.scores.get(unit, {})]
    for number, (unit, sparsity) in enumerate(todo, start=1):
        with pruned(model, dict.fromkeys(groups[unit], sparsity)):
            found = score()
        record.scores.setdefault(unit, {})[f"{sparsity}"] = found if isfinite(found) else None
        record.write(path)
        tell(f"{number}/{len(todo)} {unit} at {sparsity}: {found:.4f}")


def losses(record: Record, unit: str, sparsities: Sequence[float], mode: str) -> list[float]:
    """How much worse than the whole model, at each sparsity; infinite where the metric was no number."""
    found = [record.scores[unit][f"{s}"] for s in sparsities]
    sign = 1 if mode == "max" else -1
    return [inf if one is None else sign * (record.base - one) for one in found]


def hull(curve: Curve) -> list[tuple[float, float]]:
    """The largest convex curve below a loss that starts at (0, 0) and never falls: gains are taken for noise."""
    points, worst = [(0.0, 0.0)], 0.0
    for sparsity, loss in curve:
        worst = max(worst, loss)
        if worst == inf:
            break
        while len(points) > 1 and slope(points[-2], points[-1]) >= slope(points[-2], (sparsity, worst)):
            points.pop()
        points.append((sparsity, worst))
    return points


def slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Loss for each unit of sparsity."""
    return (other[1] - one[1]) / (other[0] - one[0])


def allocate(curves: Mapping[str, Curve], parameters: Mapping[str, int], target: float) -> dict[str, float]:
    """The sparsity of each unit that removes `target` of all parameters for the least sum of losses.

    Each curve is taken as its convex hull, with straight lines between what was measured. Then the greedy rule is the
    best one: of all next steps take the one with the least loss for each weight removed, until enough are gone; steps
    that cost the same are taken together, each by the same fraction, and the last ones in part.

    Raises:
        ConfigError: the curves end before so many are removed.
    """
    steps = [
        (slope(a, b) / parameters[unit], unit, (b[0] - a[0]) * parameters[unit])
        for unit, curve in curves.items()
        for a, b in pairwise(hull(curve))
    ]
    removed, left = dict.fromkeys(curves, 0.0), target * sum(parameters.values())
    for _, together in groupby(sorted(steps), key=lambda step: step[0]):
        taken = list(together)
        part = min(1.0, left / sum(weights for *_, weights in taken))
        for _, unit, weights in taken:
            removed[unit] += part * weights
        left -= part * sum(weights for *_, weights in taken)
    if left > 0.5:
        raise ConfigError(f"--target {target}: more than what was measured allows; add a larger one to --sparsities")
    return {unit: removed[unit] / parameters[unit] for unit in curves}


def whole_counts(sparsities: Mapping[str, float], parameters: Mapping[str, int], target: float) -> dict[str, float]:
    """The sparsities as fractions of whole weights, with round(target n) of all n removed (largest remainders)."""
    exact = {name: sparsity * parameters[name] for name, sparsity in sparsities.items()}
    counts = {name: floor(count + 1e-9) for name, count in exact.items()}
    missing = round(target * sum(parameters.values())) - sum(counts.values())
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[:missing]:
        counts[name] += 1
    return {name: count / parameters[name] for name, count in counts.items()}


def sparsity_map(
    groups: Mapping[str, Sequence[str]], curves: Mapping[str, Curve], parameters: Mapping[str, int], target: float
) -> dict[str, float]:
    """The sparsity of each linear that `allocate` gives its unit, over whole weights."""
    sizes = {unit: sum(parameters[name] for name in names) for unit, names in groups.items()}
    by_unit = allocate(curves, sizes, target)
    named = {name: by_unit[unit] for unit, names in groups.items() for name in names}
    return whole_counts(named, parameters, target)


def identity_of(folder: Path, features: Any) -> str:
    """One for the same weights and the same rows."""
    weights = {n: f["sha256"] for n, f in artifact.parse_card(folder)["files"].items() if n.endswith(".safetensors")}
    rows = {name: features[name][:] for name in sorted(features.column_names)}
    return hashlib.sha256(json.dumps([weights, rows]).encode()).hexdigest()
