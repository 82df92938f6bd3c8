"""A linear in two: in -> rank -> out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.model.anatomy import Anatomy
from niwaki.weights import replace_module


class LowRankLinear(nn.Module):
    """y = up(down(x)) = B A x + bias, with A (rank, in) and B (out, rank). It looks like one linear from outside, and
    its two linears are what other methods act on."""

    weight = None  # T5 asks for the type of a linear's weight, where it has one

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.up.bias = bias  # type: ignore[assignment]

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def bias(self) -> Any:
        return self.up.bias

    def forward(self, values: Tensor) -> Tensor:
        product: Tensor = self.up(self.down(values))
        return product


@dataclass(frozen=True, kw_only=True)
class Factorize(Edit):
    """Linears of the backbone become LowRankLinears; `ranks` by their names in it."""

    ranks: dict[str, int]

    def apply(self, model: nn.Module) -> None:
        prefix = Anatomy.of(model).prefix
        for name, rank in self.ranks.items():
            linear: Any = model.get_submodule(prefix + name)
            with torch.device(linear.weight.device):
                pair = LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias)
            replace_module(model, prefix + name, pair.to(linear.weight.dtype).train(linear.training))
