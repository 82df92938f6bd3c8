"""A model of natural language inference as a classifier: each label is a hypothesis about the text (Yin et al. 2019,
arXiv:1909.00161)."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from niwaki.model.pooled import Embedded

NAME = "hypotheses"


class Hypotheses(nn.Module):
    """Which outputs of the model say that a text entails what follows it, or contradicts it (None: not asked)."""

    def __init__(self, entailment: int, contradiction: int | None) -> None:
        super().__init__()
        self.entailment = entailment
        self.contradiction = contradiction

    def forward(self, logits: Tensor) -> Tensor:
        """(..., outputs) -> (...)."""
        entails = logits[..., self.entailment]
        return entails if self.contradiction is None else entails - logits[..., self.contradiction]


def put_on(model: Any, entailment: int, contradiction: int | None) -> None:
    """Let a classifier of pairs, which may be empty (meta device), give logits (rows, labels)."""
    model.add_module(NAME, Hypotheses(entailment, contradiction))
    model.forward = MethodType(judge, model)


def judge(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
    **settings: Any,
) -> Any:  # fmt: skip
    """The forward pass of such a model: (rows, labels, tokens) -> logits (rows, labels). Texts alone (rows, tokens) get
    the outputs that the model has by itself."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    if input_ids.dim() == 2:
        return type(model).forward(model, **present, **settings)
    flat = {name: tensor.flatten(0, 1) for name, tensor in present.items()}
    logits = type(model).forward(model, **flat, **settings).logits
    return Embedded(logits=getattr(model, NAME)(logits.unflatten(0, input_ids.shape[:2])))
