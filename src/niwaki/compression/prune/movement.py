"""Movement pruning: scores learn which weights move away from zero (Sanh et al. 2020, arXiv:2005.07683)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from niwaki.compression.prune.mask import Mask, MaskSchedule, cubic
from niwaki.compression.prune.pattern import Scope
from niwaki.compression.prune.pruning import Pruning, Span
from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects
from niwaki.weights import entering


class StraightThrough(torch.autograd.Function):
    """w * m(S): the gradient of w is masked, that of S is gradient * w, as if m were S itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask.view(torch.uint8).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        weight, mask = ctx.saved_tensors
        gradient = gradients[0]
        return gradient * mask if ctx.needs_input_grad[0] else None, (gradient * weight).flatten(), None


class ScoredMask(Mask):
    """A mask with scores that learn: a vector of out * in numbers, since weight decay spares vectors, as the paper's
    code spares the scores."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__(shape, device)
        self.scores = nn.Parameter(torch.zeros(shape.numel(), device=device))

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, self.scores, self.mask)

    def start(self, scores: Tensor) -> None:
        """Begin with these scores (out, in)."""
        with torch.no_grad():
            self.scores.copy_(scores.flatten())

    @property
    def matrix(self) -> Tensor:
        """The scores as they lie over the weight, (out, in), without gradient."""
        return self.scores.detach().view(self.mask.shape)


def check_factor(factor: float, field: str) -> None:
    """Raise ConfigError for a factor of the learning rate that is none."""
    if not factor > 0:
        raise ConfigError(f"{field}.lr_factor={factor}: needs a number above 0")


def score_rates(model: nn.Module, factor: float) -> dict[str, float]:
    """The factor for the scores of every mask, by the name of the parameter."""
    masks = ((name, module) for name, module in model.named_modules() if isinstance(module, ScoredMask))
    return {f"{name}.scores": factor for name, _ in masks}


def learned_in_a_fit(field: str) -> str:
    """What is said where there is none for the scores to learn in."""
    return f"{field}: its scores are learned, which needs a fit; use another score with trainer.max_epochs=0"


FACTORS = {"magnitude": 10.0, "zero": 200.0}  # of the scores' rate, where none is set


@dataclass(frozen=True, kw_only=True)
class Movement(Pruning):
    """Scores S get the gradient dL/dS = dL/dW' * W of the masked weight W' (straight through the mask), so that
    S = S_0 - lr * sum(W * dL/dW'): what moves away from zero stays. The highest of each linear, of each row, or of all
    linears together are kept, drawn anew every `interval` optimizer steps to the end of the fit.

    `start=zero` is the paper's S_0 = 0, of which only the order counts (`lr_factor` matters only where an optimizer
    scales its step by the size of what it moves, as Adafactor does). It takes the paper's tens of thousands of steps:
    what a short fit drops lies all along the gradient of a few batches, and the model falls apart.
    `start=magnitude`, S_0 = |W|, drops small weights first and lets movement put that right, the sooner the larger
    `lr_factor`, the learning rate of the scores over that of the rest. Near 1 that is magnitude pruning: Adam moves S
    about as far as |W|. The scores have no weight decay. experiments/pruning has the numbers.

    The share that is left falls on the cubic schedule: all until `begin`, 1 - sparsity from `end` (both fractions of
    the fit).
    """

    paper: ClassVar[str] = "Sanh et al. 2020, arXiv:2005.07683"
    kind: ClassVar[type[Mask]] = ScoredMask

    scope: Scope = "layer"
    start: Literal["magnitude", "zero"] = "magnitude"
    begin: float = 0.1
    end: float = 0.8
    interval: int = 1
    lr_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_scope(self.scope, ("layer", "row", "global"))
        if self.start not in FACTORS:
            raise ConfigError(f"{self.field}.start={self.start!r}: needs magnitude or zero")
        self.span.check(self.field)
        check_factor(self.factor, self.field)

    @property
    def factor(self) -> float:
        """Learning rate of the scores over that of the rest."""
        return FACTORS[self.start] if self.lr_factor is None else self.lr_factor

    @property
    def span(self) -> Span:
        """Of the schedule."""
        return Span(begin=self.begin, end=self.end, interval=self.interval)

    @property
    def compared(self) -> Scope:
        return self.scope

    def needs_fit(self) -> str:
        return learned_in_a_fit(self.field)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        masks = self.masks(context)
        if self.start == "magnitude":
            for linear, mask in masks.values():
                mask.start(entering(linear, mask).abs())
        schedule = MaskSchedule(
            dict(masks.values()), score=lambda weight, mask: mask.matrix, selection=self.selection(masks, self.scope),
            progress=cubic(1.0, self.begin, self.end, context.steps), last_step=context.steps, interval=self.interval,
        )  # fmt: skip
        schedule.draw(0)
        _, settled = self.span.steps(context.steps)
        return Effects([schedule], settled=settled, lr_factors=score_rates(model, self.factor))
