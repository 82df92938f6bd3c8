"""Post-training 8-bit quantization: weights per output channel, activations per token at run time.

Zafrir et al. 2019 (Q8BERT, arXiv:1910.06188) for the symmetric scheme; ZeroQuant (Yao et al. 2022, arXiv:2206.01861)
for activations rounded token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.compression.quantize.integers import put_on_grid, to_integers
from niwaki.compression.quantize.layout import Layout
from niwaki.edits import Edit
from niwaki.stage import Context, Effects, Phase, Stage


@dataclass(frozen=True, kw_only=True)
class Int8(Stage):
    """codes = round(w / s), s = max|w| / 127 per output channel; the same per token for the input."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    during_fit: ClassVar[bool] = False
    paper: ClassVar[str] = "Zafrir et al. 2019, arXiv:1910.06188; Yao et al. 2022, arXiv:2206.01861"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        put_on_grid(context.targets, 8, None, 8)
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, Layout(bits=8), 8)
