"""Distillation of the output distribution (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.logits.teacher"


@dataclass(frozen=True, kw_only=True)
class Logits(Stage):
    """weight * T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T)), mean over the positions that count.

    `teacher`: a hub name, a folder, or an artifact of this project, with a head for the same task and labels.
    The task's own loss is weighed by `task_weight` at the root of the config (0 learns from the teacher alone).
    """

    phase: ClassVar[Phase] = Phase.OBJECTIVE
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    teacher: str | None = None
    temperature: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise ConfigError(f"{FIELD}: needs a hub name, a folder, or an artifact of this project")
        if self.temperature <= 0:
            raise ConfigError(f"compression.logits.temperature={self.temperature}: needs a number above 0")
        if self.weight <= 0:
            raise ConfigError(f"compression.logits.weight={self.weight}: needs a number above 0")

    def teachers(self) -> dict[str, str]:
        """The fields that name a teacher, and where it is."""
        return {FIELD: str(self.teacher)}

    def needs_fit(self) -> str:
        return "compression.logits: has no effect with trainer.max_epochs=0; a student learns in a fit"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        assert self.teacher is not None
        term = TeacherTerm(
            context.load_teacher(self.teacher, FIELD), context.predictions, self.temperature, self.weight
        )
        return Effects(terms={"distill/logits": term})


class TeacherTerm:
    """The loss term. It holds the teacher, in eval mode and without gradients, outside of every module."""

    def __init__(
        self, teacher: nn.Module, predictions: Callable[[Any, Mapping[str, Tensor]], Tensor],
        temperature: float, weight: float,
    ) -> None:  # fmt: skip
        self.teacher = teacher.eval().requires_grad_(False)
        self.predictions = predictions
        self.temperature = temperature
        self.weight = weight

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        device = batch["input_ids"].device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.inference_mode():
            said = self.teacher(**{name: batch[name] for name in names if name in batch})
            target = self.predictions(said, batch)
        student = self.predictions(outputs, batch)
        return self.weight * softened_divergence(student, target.clone(), self.temperature)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened distributions, mean over rows; both logits (n, classes)."""
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
