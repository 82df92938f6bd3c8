"""What the methods that prune single weights have in common: how many go, where they may stand, in which linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.pattern import Pattern, Scope, Selection
from niwaki.compression.targets import Targets, by_name, check_targets, chosen
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Phase, Stage, Tuning


@dataclass(frozen=True, kw_only=True)
class Pruning(Stage):
    """A mask on each chosen linear.

    `sparsity`: fraction of each of them that becomes zero. `pattern`: unstructured; N:M (N of every M neighbours along
    the input are kept, and the sparsity follows from it); RxC (blocks of R outputs x C inputs, scored by their mean).
    `sparsity_map`: a JSON file {"sparsity": {name or regular expression: fraction}} that gives each linear its own,
    and those that it does not name `sparsity`. `targets`: a regular expression on the whole name of a linear, or a
    list of the parts that they play; null for all linears of the blocks.
    """

    phase: ClassVar[Phase] = Phase.PRUNE
    kind: ClassVar[type[Mask]] = Mask

    sparsity: float | None = None
    pattern: str = "unstructured"
    sparsity_map: str | None = None
    targets: Targets = None

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern, f"{self.field}.pattern")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ConfigError(f"{self.field}.sparsity={self.sparsity}: needs a number above 0 and below 1")
        if pattern.group and self.sparsity not in (None, pattern.sparsity):
            raise ConfigError(
                f"{self.field}.sparsity={self.sparsity}: pattern {self.pattern} makes it {pattern.sparsity}; "
                "leave it out"
            )
        if pattern.group and self.sparsity_map is not None:
            raise ConfigError(
                f"{self.field}.sparsity_map: has no effect with the pattern {self.pattern}, which makes the sparsity "
                f"{pattern.sparsity} everywhere; leave it out"
            )
        check_targets(self.targets, self.field)

    @property
    def final_sparsity(self) -> float:
        """The fraction of zeros that is aimed at, where no map says otherwise."""
        return Pattern.parse(self.pattern).sparsity or self.sparsity or 0.5

    @property
    def compared(self) -> Scope:
        """Whose scores are compared to find those that go."""
        return "layer"

    @property
    def moves_base(self) -> bool:
        """Whether base weights change by a sum that a delta above them has to leave alone."""
        return False

    def check_scope(self, scope: str, allowed: Sequence[str]) -> None:
        """Raise ConfigError for a scope that is none, or that goes with neither pattern nor map."""
        pattern = Pattern.parse(self.pattern)
        if scope not in allowed:
            raise ConfigError(f"{self.field}.scope={scope!r}: needs {' or '.join(allowed)}")
        if pattern.group and scope != "layer":
            raise ConfigError(
                f"{self.field}.scope={scope}: has no effect with the pattern {self.pattern}; use scope=layer"
            )
        if pattern.height > 1 and scope == "row":
            raise ConfigError(
                f"{self.field}.scope=row: a block of the pattern {self.pattern} lies in {pattern.height} rows; use "
                "scope=layer"
            )
        if self.sparsity_map is not None and scope == "global":
            raise ConfigError(
                f"{self.field}.scope=global: finds the sparsity of each linear itself; leave sparsity_map out, or use "
                "scope=layer"
            )

    def conflict(self, others: Sequence[Stage]) -> str | None:
        tuning = next((other for other in others if isinstance(other, Tuning)), None)
        if self.moves_base and tuning and not tuning.additive:
            return (
                f"tuning={tuning.name} and {self.name}: the base weight changes under it, and what this tuning makes "
                "of that is no sum; use tuning=lora"
            )
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        pattern = Pattern.parse(self.pattern)
        linears = chosen(self.targets, self.field, anatomy, targets)
        for name, linear in linears.items():
            if misfit := pattern.misfit(linear.out_features, linear.in_features):
                raise ConfigError(f"{self.field}.pattern={self.pattern}: {name} has {misfit}")
        for name, sparsity in self.sparsities(linears).items():
            self._check_count(name, linears[name], sparsity)

    def _check_count(self, name: str, linear: nn.Linear, sparsity: float) -> None:
        """Raise ConfigError where all that is compared would go, or nothing although a sparsity is asked for. What goes
        of a linear is not known before where all of them are compared."""
        if self.compared == "global" or not sparsity:
            return
        pattern, by_row = Pattern.parse(self.pattern), self.compared == "row"
        drop, count = pattern.dropped(sparsity, linear.out_features, linear.in_features, by_row=by_row)
        if 0 < drop < count:
            return
        setting = f"sparsity={sparsity}" if self.sparsity_map is None else f"sparsity_map={self.sparsity_map!r}"
        unit, where = f"{self.pattern} blocks" if pattern.block else "weights", "each row of " if by_row else ""
        raise ConfigError(
            f"{self.field}.{setting}: {sparsity} of the {count} {unit} of {where}{name} is {'all' if drop else 'none'} "
            "of them; needs one that drops some and leaves some"
        )

    def sparsities(self, names: Mapping[str, Any]) -> dict[str, float]:
        """The final sparsity of each of these linears."""
        if self.sparsity_map is None:
            return dict.fromkeys(names, self.final_sparsity)
        return by_name(self.sparsity_map, self.field, names, self.sparsity)

    def masks(self, context: Context) -> dict[str, tuple[nn.Linear, Any]]:
        """Stack a mask of ones on every chosen linear; (linear, mask) by name."""
        linears = chosen(self.targets, self.field, context.anatomy, context.targets)
        masks = mask_targets(linears, self.kind)
        return {name: (linear, masks[linear]) for name, linear in linears.items()}

    def selection(self, masks: Mapping[str, tuple[nn.Linear, Any]], scope: Scope) -> Selection:
        """Which weights of these masks stay, once they have scores."""
        sparsities = self.sparsities(masks)
        by_mask = {mask: sparsities[name] for name, (_, mask) in masks.items()}
        return Selection(Pattern.parse(self.pattern), scope, by_mask)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Begin and end (fractions of a fit) of what happens along it, every `interval` optimizer steps."""

    begin: float
    end: float
    interval: int

    def check(self, field: str) -> None:
        """Raise ConfigError for a span that is none."""
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(f"{field}.begin={self.begin}, end={self.end}: needs 0 <= begin < end <= 1")
        if self.interval < 1:
            raise ConfigError(f"{field}.interval={self.interval}: needs a whole number of at least 1")

    def steps(self, steps: int) -> tuple[int, int]:
        """First and last optimizer step of it in a fit of so many; the last is at least 1."""
        return round(self.begin * steps), max(round(self.end * steps), 1)


def given(value: Any, usual: Any) -> Any:
    """A setting, or what is usual where it is null."""
    return usual if value is None else value
