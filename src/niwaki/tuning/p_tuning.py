"""P-tuning: virtual tokens from a small encoder that only training needs (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only
from niwaki.tuning.virtual import add_prompt, prompt_of


class Encoder(nn.Module):
    """A learned embedding of each virtual token, and the network above it: (tokens, width)."""

    def __init__(self, tokens: int, width: int, recurrent: nn.LSTM | None, feed_forward: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.recurrent = recurrent
        self.feed_forward = feed_forward

    def forward(self) -> Tensor:
        hidden = self.embedding.weight
        if self.recurrent is not None:
            hidden, _ = self.recurrent(hidden)
        return self.feed_forward(hidden)


def lstm_encoder(tokens: int, width: int, hidden: int, layers: int) -> Encoder:
    """MLP(BiLSTM(E)), the LSTM with `hidden` units in each direction, the MLP with one hidden layer of 2 `hidden`."""
    recurrent = nn.LSTM(width, hidden, num_layers=layers, bidirectional=True)
    return Encoder(tokens, width, recurrent, mlp([2 * hidden, 2 * hidden, width]))


def mlp_encoder(tokens: int, width: int, hidden: int, layers: int) -> Encoder:
    """MLP(E) with `layers` hidden layers."""
    return Encoder(tokens, width, None, mlp([width, *[hidden] * layers, width]))


def mlp(widths: list[int]) -> nn.Sequential:
    """Linears with a ReLU between two of them."""
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(into, out)]
    return nn.Sequential(*layers[1:])


ENCODERS = {"lstm": lstm_encoder, "mlp": mlp_encoder}


@dataclass(frozen=True, kw_only=True)
class PTuning(Tuning):
    """model([P; E(text)]) with P = encoder(E_v), E_v of `tokens` rows; encoder and E_v learn, all else is frozen but a
    new head. After the fit P is saved as it is and the encoder is dropped.

    `encoder`: `lstm`, a bidirectional LSTM of `layers` layers with an MLP above it, or `mlp`, with `layers` hidden
    layers. `hidden`: units of a layer, in each direction; null is the width of an embedding.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    tokens: int = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int | None = None
    layers: int = 2

    def __post_init__(self) -> None:
        for field in ("tokens", "layers"):
            if getattr(self, field) < 1:
                raise ConfigError(f"tuning.{field}={getattr(self, field)}: needs a whole number of at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"tuning.hidden={self.hidden}: needs null or a whole number of at least 1")

    def grow(self, model: nn.Module, anatomy: Anatomy) -> list[Edit]:
        return add_prompt(model, anatomy, self.tokens)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        head = context.new_head
        prompt, width = prompt_of(model), context.anatomy.embeddings.embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            prompt.encode_by(ENCODERS[self.encoder](self.tokens, width, self.hidden or width, self.layers))
        train_only(model, [*prompt.parameters(), *head])
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        prompt = prompt_of(model)
        with torch.no_grad():
            prompt.settle(prompt())
        return []
