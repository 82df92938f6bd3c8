"""(IA)^3: vectors that scale keys, values and the middle of the feed-forward (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.edits import Edit
from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning

if TYPE_CHECKING:
    from peft import PeftConfig

SCALED_AT_THE_INPUT = "feed_out"


class ScaledBias(nn.Module):
    """b -> l * b, with the vector l of an adapter layer that scales outputs. (out,)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: a registered child would make a cycle

    def forward(self, bias: Tensor) -> Tensor:
        return bias * self._layer[0].ia3_l[ADAPTER].flatten()


@dataclass(frozen=True, kw_only=True)
class IA3(PeftTuning):
    """l * (W x + b) for keys and values, W (l * x) + b for the linear that ends the feed-forward; l is 1 at the start.

    So a row of W and an entry of b, or a column of W, is multiplied by its own number. Where one linear makes queries,
    keys and values together (GPT-2, ModernBERT), the queries are scaled too, as in PEFT.
    """

    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    additive: ClassVar[bool] = False

    parts: Sequence[str] = ("key", "value", "feed_out")

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import IA3Config

        ends = context.anatomy.part_names([SCALED_AT_THE_INPUT]) if SCALED_AT_THE_INPUT in self.parts else []
        return IA3Config(target_modules=names, feedforward_modules=ends)

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        scale: Tensor = layer.ia3_l[ADAPTER]  # (out, 1), or (1, in) in the feed-forward
        return weight * scale

    def link(self, model: nn.Module, context: Context) -> None:
        super().link(model, context)
        for layer, base in linked(model):
            scales_bias = not layer.is_feedforward and base.bias is not None
            if scales_bias and not parametrize.is_parametrized(base, "bias"):
                parametrize.register_parametrization(base, "bias", ScaledBias(layer))

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        for _, base in linked(model):
            if parametrize.is_parametrized(base, "bias"):
                parametrize.remove_parametrizations(base, "bias", leave_parametrized=True)
        return super().finalize(model, context)


def linked(model: nn.Module) -> list[tuple[Any, Any]]:
    """The adapter layers whose merge is a link, with their base layers."""
    from niwaki.tuning.delta import adapters

    return [(layer, layer.get_base_layer()) for _, layer in adapters(model) if layer.merged]
