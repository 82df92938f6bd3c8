"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877): the fit runs through the integer grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from niwaki.compression.quantize.integers import put_on_grid, to_integers
from niwaki.compression.quantize.layout import Layout, check_bits
from niwaki.compression.quantize.trained import Decay, EnterGrid, GridSchedule, InputScale, TrainedGrid, WeightScale
from niwaki.compression.targets import Targets, check_targets, chosen
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage, Term
from niwaki.weights import links, stack


@dataclass(frozen=True, kw_only=True)
class QAT(Stage):
    """Forward: round(w / s) s, with s = max|w| / q drawn anew at each step; backward: straight through.

    `bits`: 2 to 8. `group`: inputs that share a scale; null for one scale per output channel.
    `activation_bits`: inputs of the linears rounded to so many bits; null leaves them alone.
    `scale`: absmax, or lsq: s learns with the weights (Esser et al. 2019, arXiv:1902.08153), and what lies beyond the
    last code is clipped. `activation_scale`: token, drawn from each token; or one for a linear: observed, the moving
    average of the largest |x| of a batch (Jacob et al., section 3.1); lsq, a learned step; pact, a learned end of the
    range (Choi et al. 2018, arXiv:1805.06085). A learned one starts at the first batch that runs through it, an
    observed one is observed from the first step of the fit. `pact_decay`: times the square of each end of pact, joins
    the loss. `begin`: the fraction of the fit after which it runs through the grid. `freeze`: the one from which scales
    stay as they are, but for those of a token; null: never. Codes are -q..q here, where LSQ's signed ones have one more
    below.
    `targets`: a regular expression on the whole name of a linear, or a list of the parts that they play; null for all
    linears of the blocks.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    paper: ClassVar[str] = (
        "Jacob et al. 2018, arXiv:1712.05877; Esser et al. 2019, arXiv:1902.08153; Choi et al. 2018, arXiv:1805.06085"
    )

    bits: int = 8
    group: int | None = None
    activation_bits: int | None = 8
    scale: WeightScale = "absmax"
    activation_scale: InputScale = "token"
    pact_decay: float = 1e-4
    begin: float = 0.0
    freeze: float | None = None
    targets: Targets = None

    def __post_init__(self) -> None:
        check_bits(self.bits, self.group, "compression.qat")
        check_targets(self.targets, "compression.qat")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ConfigError(
                f"compression.qat.activation_bits={self.activation_bits}: needs null or a whole number from 2 to 8"
            )
        for name, kinds in (("scale", get_args(WeightScale)), ("activation_scale", get_args(InputScale))):
            if getattr(self, name) not in kinds:
                raise ConfigError(f"compression.qat.{name}={getattr(self, name)!r}: needs one of {', '.join(kinds)}")
        if self.activation_bits is None and self.activation_scale != "token":
            raise ConfigError(
                f"compression.qat.activation_scale={self.activation_scale}: has no effect with "
                "compression.qat.activation_bits=null; leave it token"
            )
        if self.pact_decay < 0:
            raise ConfigError(f"compression.qat.pact_decay={self.pact_decay}: needs a number of at least 0")
        if not 0 <= self.begin < 1:
            raise ConfigError(f"compression.qat.begin={self.begin}: needs a number in 0..1, below 1")
        if self.freeze is not None and not self.begin < self.freeze < 1:
            raise ConfigError(
                f"compression.qat.freeze={self.freeze}: needs null or a number above compression.qat.begin="
                f"{self.begin}, below 1"
            )

    @property
    def layout(self) -> Layout:
        """Of the weights."""
        return Layout(bits=self.bits, group=self.group)

    @property
    def _plain(self) -> bool:
        """Whether nothing of the grid is known from one step to the next."""
        return (self.scale, self.activation_scale, self.begin, self.freeze) == ("absmax", "token", 0.0, None)

    def averaging(self) -> str | None:
        learned = self.activation_scale in ("lsq", "pact")
        if not learned and (self.scale != "lsq" or not self.begin):
            return None
        which = f"activation_scale={self.activation_scale}" if learned else f"begin={self.begin}"
        return (
            f"{self.name} with {which}: scales that learn are drawn within the fit, and what stood there before would "
            "count in the average"
        )

    def needs_fit(self) -> str | None:
        if self._plain:
            return None
        given = [
            f"{name}={getattr(self, name)}"
            for name, usual in (("scale", "absmax"), ("activation_scale", "token"), ("begin", 0.0), ("freeze", None))
            if getattr(self, name) != usual
        ]
        return f"compression.qat.{given[0]}: needs a fit; trainer.max_epochs=0 has none"

    def check_steps(self, steps: int) -> None:
        for name, value in (("begin", self.begin), ("freeze", self.freeze)):
            if value and round(value * steps) >= steps:
                raise ConfigError(
                    f"compression.qat.{name}={value}: no step of a fit of {steps} optimizer steps comes after it; "
                    "needs a smaller one or a longer fit"
                )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.layout.check(self._linears(anatomy, targets), "compression.qat")

    def _linears(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """Those that go onto the grid."""
        return chosen(self.targets, "compression.qat", anatomy, targets)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        linears = self._linears(context.anatomy, context.targets)
        if self._plain:
            put_on_grid(linears, self.bits, self.group, self.activation_bits)
            return Effects()
        begin = round(self.begin * context.steps)
        hold = None if self.freeze is None else max(round(self.freeze * context.steps), begin + 1)
        grids = {linear: self._stack(linear, begun=begin == 0) for linear in linears.values()}
        settled = begin + 1 if begin else 0  # scales of activations are drawn at the first step on the grid
        ranges = [grid.inputs for grid in grids.values() if grid.inputs is not None and grid.inputs.kind == "pact"]
        terms: dict[str, Term] = {"pact": Decay(ranges, self.pact_decay)} if ranges and self.pact_decay else {}
        return Effects(callbacks=[GridSchedule(grids, begin=begin, hold=hold)], settled=settled, terms=terms)

    def _stack(self, linear: nn.Linear, *, begun: bool) -> TrainedGrid:
        """A grid on top of the chain of a linear. Its scales learn where something of the linear does."""
        learns = any(parameter.requires_grad for parameter in linear.parameters())
        learns = learns or any(link.phase is Phase.TUNE for link in links(linear))
        weight = linear.weight.detach()
        grid = TrainedGrid(
            weight.shape, self.layout, self.scale, self.activation_bits, self.activation_scale, begun=begun
        ).to(weight.device)  # fmt: skip
        for parameter in grid.parameters():
            parameter.requires_grad_(learns)
        if begun:
            grid.begin(weight)
        stack(linear, grid)
        linear.register_forward_pre_hook(EnterGrid(grid))
        return grid

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, self.layout, self.activation_bits)
