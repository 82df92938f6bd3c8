"""Prompt tuning: learned embeddings before those of the text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

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

BOUND = 0.5  # of the uniform distribution that the paper draws random embeddings from


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Tuning):
    """model([P; E(text)]) with P of `tokens` rows, which learn; everything else is frozen but a new head.

    `init`: where P starts. `random` draws from U(-0.5, 0.5), `vocabulary` takes embeddings of tokens drawn without
    repetition, `text` those of the tokens of `text`, again and again until there are enough.
    """

    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    tokens: int = 20
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    text: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tuning.tokens={self.tokens}: needs a whole number of at least 1")
        if self.init == "text" and not (self.text and self.text.strip()):
            raise ConfigError(f"tuning.text={self.text!r}: needs some words to start from with tuning.init=text")
        if self.init != "text" and self.text is not None:
            raise ConfigError(f"tuning.text={self.text!r}: has no effect with tuning.init={self.init}; leave null")

    def grow(self, model: nn.Module, anatomy: Anatomy) -> list[Edit]:
        known = anatomy.embeddings.num_embeddings
        if self.init == "vocabulary" and self.tokens > known:
            raise ConfigError(f"tuning.tokens={self.tokens}: the vocabulary has {known} to start from; use init=random")
        return add_prompt(model, anatomy, self.tokens)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        head = context.new_head
        prompt = prompt_of(model)
        prompt.settle(self._start(context))
        train_only(model, [*prompt.parameters(), *head])
        return Effects()

    def _start(self, context: Context) -> Tensor:
        """The embeddings to start from, (tokens, width)."""
        table = context.anatomy.embeddings.weight.detach()
        generator = torch.Generator().manual_seed(context.seed)
        if self.init == "random":
            drawn = torch.rand(self.tokens, table.shape[1], generator=generator) * 2 * BOUND - BOUND
            return drawn.to(table.device)
        if self.init == "vocabulary":
            return table[torch.randperm(len(table), generator=generator)[: self.tokens]]
        ids = context.token_ids(self.text or "")
        if not ids:
            raise ConfigError(f"tuning.text={self.text!r}: has no tokens for this model")
        return table[[ids[i % len(ids)] for i in range(self.tokens)]]
