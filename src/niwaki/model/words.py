"""A language model that answers in one word: its logits of a few tokens at one place of a text are those of labels."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.model.pooled import Embedded

NAME = "words"


class Words(nn.Module):
    """The `tokens` (labels,) that stand for labels, and the token `mask` in whose place they are read; where there is
    none (-1), they follow the last token of a text. Only the states at that place go through the head of the model."""

    tokens: Tensor
    mask: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(labels, dtype=torch.long))
        self.register_buffer("mask", torch.tensor(-1))
        self.place: Tensor | None = None  # while a forward pass goes on

    def take(self, tokens: list[int], mask: int | None) -> None:
        """From now on these are the tokens."""
        self.tokens.copy_(torch.tensor(tokens))
        self.mask.fill_(-1 if mask is None else mask)

    def opened(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is read of texts and of their mask, both (rows, tokens)."""
        return input_ids, mask

    def weighed(self, logits: Tensor) -> Tensor:
        """What becomes of the logits (rows, labels)."""
        return logits

    def place_in(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(rows,): where the word of each text is read, in texts that are padded on the right."""
        last = mask.sum(1) - 1
        here = (input_ids == self.mask).int()
        return torch.where(self.mask < 0, last, here.argmax(1))

    def select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook before what reads the states (rows, tokens, width) above the backbone: one of each row is left."""
        if self.place is None:
            return None
        place, self.place = self.place, None
        return at(args[0], place)[:, None], *args[1:]


class WordsInContext(Words):
    """The same behind a `prefix` (tokens,), which stands before every text; and less `content_free` (labels,), the
    logarithm of what the model says of texts without content:
    softmax(logits) is W p, of sum 1, with W = diag(p_content_free)^-1 (Zhao et al. 2021, arXiv:2102.09690)."""

    prefix: Tensor
    content_free: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__(labels)
        self.register_buffer("prefix", torch.zeros(0, dtype=torch.long))
        self.register_buffer("content_free", torch.zeros(labels))

    def opened(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        before = self.prefix.expand(input_ids.shape[0], -1)
        return torch.cat([before, input_ids], 1), torch.cat([torch.ones_like(before), mask], 1)

    def weighed(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1) - self.content_free

    def open_with(self, tokens: list[int]) -> None:
        """From now on these tokens stand before every text."""
        self.prefix = torch.tensor(tokens, dtype=torch.long, device=self.prefix.device)

    @property
    def tokens_before(self) -> int:
        """Positions that the prefix takes from every text."""
        return len(self.prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}prefix")
        if stored is not None:  # of any length
            self.prefix = self.prefix.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def at(states: Tensor, place: Tensor) -> Tensor:
    """(rows, tokens, width), (rows,) -> (rows, width)."""
    return states[torch.arange(states.shape[0], device=states.device), place]


def put_on(model: Any, words: Words) -> None:
    """Let a language model, which may be empty (meta device), give logits (rows, labels)."""
    for child in model.children():
        if child is not model.base_model:
            child.register_forward_pre_hook(words.select)
    model.add_module(NAME, words)
    model.forward = MethodType(answer, model)


def answer(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Embedded:
    """The forward pass of such a model: texts (rows, tokens)."""
    words: Words = getattr(model, NAME)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    input_ids, mask = words.opened(input_ids, mask)
    place = words.place_in(input_ids, mask)
    words.place = place
    try:
        logits = type(model).forward(model, input_ids=input_ids, attention_mask=mask, **settings).logits
    finally:
        untaken, words.place = words.place is not None, None
    if untaken:  # something else stands in place of the head now
        logits = at(logits, place)[:, None]
    return Embedded(logits=words.weighed(logits[:, 0, words.tokens]))
