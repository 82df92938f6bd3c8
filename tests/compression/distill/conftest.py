"""A student, a wider and deeper teacher, and a term of distillation between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from niwaki.compression.distill.distillation import Distillation, Term
from niwaki.model.teacher import Teacher
from niwaki.stage import Effects


@dataclass
class Pair:
    """Both sides of a term."""

    one: Any  # student
    other: Any  # teacher
    stage: Distillation
    effects: Effects

    @property
    def term(self) -> Term:
        (term,) = self.effects.terms.values()
        assert isinstance(term, Term)
        return term

    def loss(self, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        batch = batch or self.one.batch()
        return self.term(self.one.model(**self.one.task.inputs(batch)), batch)

    def states(self, batch: dict[str, torch.Tensor] | None = None) -> tuple[Any, Any]:
        """The hidden states of both, from what enters the first block up, as transformers shows them."""
        inputs = self.one.task.inputs(batch or self.one.batch())
        with torch.no_grad():
            shown = [side.model(**inputs, output_hidden_states=True) for side in (self.one, self.other)]
        return shown[0].hidden_states, shown[1].hidden_states

    def lengths(self, batch: dict[str, torch.Tensor] | None = None) -> list[int]:
        """Of each row, without padding."""
        lengths: list[int] = (batch or self.one.batch())["attention_mask"].sum(1).tolist()
        assert len(set(lengths)) > 1  # there is padding
        return lengths


def louder(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)


@pytest.fixture
def pair(setting: Callable[..., Any]) -> Callable[..., Pair]:
    """`pair(stage, family, task, teacher's family, **overrides of its config)`: six blocks of width 48 by default."""

    def make(
        stage: Distillation, family: str = "bert", task: str = "classification",
        teacher: str | None = None, **sizes: Any,
    ) -> Pair:  # fmt: skip
        larger = {"hidden_size": 48, "num_hidden_layers": 6} if family in ("bert", "llama") and not teacher else {}
        one, other = setting(family, task), setting(teacher or family, task, seed=1, overrides={**larger, **sizes})
        louder(one.model)
        louder(other.model)
        context = one.context(load_teacher=lambda *_: Teacher(other.model))
        return Pair(one, other, stage, stage.prepare(one.model, context))

    return make
