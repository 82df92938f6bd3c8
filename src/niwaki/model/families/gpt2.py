"""GPT-2 (Radford et al. 2019). Its Conv1D, a linear whose weight lies transposed, becomes a linear on loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from niwaki.edits import Edit
from niwaki.model.anatomy import Family, Stack
from niwaki.weights import replace_module


class TransposedLinear(nn.Linear):
    """A linear whose weight, (out, in), lies as (in, out) in a state dict: files stay as transformers reads them."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if f"{prefix}weight" in destination:  # not while links are stacked on it
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t()
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass(frozen=True, kw_only=True)
class UseLinears(Edit):
    """Every Conv1D, y = x W + b with W (in, out), becomes the linear that computes the same."""

    carried: ClassVar[bool] = False  # every model of the family is changed so

    def apply(self, model: nn.Module) -> None:
        from transformers.pytorch_utils import Conv1D

        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                linear = TransposedLinear(module.nx, module.nf, device="meta")
                linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
                linear.bias = module.bias
                replace_module(model, name, linear.train(module.training))


def fixed(config: Any) -> str | None:
    """Why blocks cannot be left out."""
    return "each block of this gpt2 is scaled by its place" if config.scale_attn_by_inverse_layer_idx else None


FAMILY = Family(
    stacks=(
        Stack(
            blocks="h",
            count="n_layer",
            neurons="n_inner",
            attention="attn",
            attention_norm="ln_1",
            feed_norm="ln_2",
            linears={
                "attn.c_attn": "query key value",
                "attn.c_proj": "output",
                "mlp.c_fc": "feed_in",
                "mlp.c_proj": "feed_out",
            },
        ),
    ),
    causal=True,
    post_norm=False,
    edits=lambda config: [UseLinears()],
    fixed=fixed,
)
