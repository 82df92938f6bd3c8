"""Prefix tuning: learned keys and values before those of the text (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only
from niwaki.tuning.prefixed_attention import NAME, AddPrefixes, Prefix, attention_shapes

INITIAL = 0.02  # standard deviation of keys and values that learn directly


class Hidden(nn.Module):
    """tanh(W E + b) of a learned embedding E: (tokens, hidden), the same for all attention modules."""

    is_prompt: ClassVar[bool] = True

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.linear = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        return torch.tanh(self.linear(self.embedding.weight))


class Writer(nn.Module):
    """One attention module's rows of the second layer: (tokens, hidden) -> (tokens, out)."""

    def __init__(self, hidden: Hidden, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden.linear.out_features, out)
        self._hidden = (hidden,)  # in a tuple: it has its place in the backbone

    def forward(self) -> Tensor:
        return self.linear(self._hidden[0]())


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Tuning):
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], with P_k and P_v of `tokens` rows for every attention; W is frozen.

    With `reparametrize` an MLP writes all of them during the fit, [P_k; P_v] = W2 tanh(W1 E + b1) + b2 with E of
    `tokens` rows, as wide as the model, and a hidden layer of `hidden` (null: as wide as the model); only the keys and
    values that it ends with are saved. Without, P_k and P_v learn themselves, from N(0, 0.02).

    Keys carry no position: under rotary embeddings they are not turned. Encoder, decoder and cross attention each get
    a prefix, as in the paper's own code; a block that is used again and again (ALBERT) has one.
    """

    paper: ClassVar[str] = "Li & Liang 2021, arXiv:2101.00190"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    tokens: int = 10
    reparametrize: bool = True
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tuning.tokens={self.tokens}: needs a whole number of at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"tuning.hidden={self.hidden}: needs null or a whole number of at least 1")
        if self.hidden is not None and not self.reparametrize:
            raise ConfigError(f"tuning.hidden={self.hidden}: has no effect with tuning.reparametrize=false; leave null")

    def grow(self, model: nn.Module, anatomy: Anatomy) -> list[Edit]:
        edit = AddPrefixes(tokens=self.tokens, shapes=attention_shapes(anatomy))
        edit.apply(model)
        return [edit]

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        head = context.new_head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            learning = self._written(model, context.anatomy) if self.reparametrize else drawn(model)
        train_only(model, [*learning, *head])
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        with torch.no_grad():
            for prefix in prefixes(model):
                prefix.settle(*prefix())
        if hasattr(context.anatomy.backbone, NAME):
            delattr(context.anatomy.backbone, NAME)
        return []

    def _written(self, model: nn.Module, anatomy: Anatomy) -> list[nn.Parameter]:
        """Let the MLP write every prefix; its parameters."""
        config: Any = anatomy.model.config
        width: int = config.hidden_size
        shared = Hidden(self.tokens, width, self.hidden or width)
        anatomy.backbone.add_module(NAME, shared)
        learning = list(shared.parameters())
        for prefix in prefixes(model):
            (heads, _, of_key), (_, _, of_value) = prefix.sizes
            writer = Writer(shared, heads * (of_key + of_value))
            prefix.write_by(writer)
            learning += writer.parameters()
        return learning


def prefixes(model: nn.Module) -> list[Prefix]:
    """Every prefix of the model."""
    return [module for module in model.modules() if isinstance(module, Prefix)]


def drawn(model: nn.Module) -> list[nn.Parameter]:
    """The keys and values of every prefix, drawn at random."""
    learning = [parameter for prefix in prefixes(model) for parameter in prefix.parameters()]
    for parameter in learning:
        nn.init.normal_(parameter, std=INITIAL)
    return learning
