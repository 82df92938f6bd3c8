"""Sequence-level distillation: the student learns the texts that the teacher writes (Kim & Rush 2016,
arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.compression.distill.distillation import Distillation
from niwaki.compression.distill.remembered import Ragged, Remembered
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Taught, Teacher
from niwaki.stage import Context, Effects, Stage
from niwaki.task.task import IGNORED


@dataclass(frozen=True, kw_only=True)
class SequenceLevel(Distillation):
    """The task's own loss, -log q(y | x), of what the teacher finds for x by beam search in place of the row's answer.

    The teacher writes an answer to each training row once; they are kept on disk, and used again by later runs.
    `num_beams`: of its search (the paper's 5). `share`: of the batches, by chance, whose answers are the teacher's; the
    others keep their own. Every other term of distillation reads the same batches, so that distill/logits beside it is
    the paper's word-level and sequence-level distillation together. A causal language model reads a training block
    without its last task.max_new_tokens, half of it at least, and the teacher writes the rest, which alone is learned.
    """

    paper: ClassVar[str] = "Kim & Rush 2016, arXiv:1606.07947"
    adds_term: ClassVar[bool] = False

    num_beams: int = 5
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ConfigError(f"{self.title}.num_beams={self.num_beams}: needs a whole number of at least 1")
        if not 0 < self.share <= 1:
            raise ConfigError(f"{self.title}.share={self.share}: needs a number above 0, up to 1")

    def conflict(self, others: Sequence[Stage]) -> str | None:
        strangers = [other.name for other in others if isinstance(other, Taught) and other.own_tokens]
        if strangers:
            return f"{self.title} and {strangers[0]}: its teacher reads the rows as they are; leave one out"
        return super().conflict(others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        model: Any = anatomy.model
        writes = anatomy.causal or model.config.is_encoder_decoder
        if not writes or model.get_output_embeddings() is None:
            raise ConfigError(
                f"{self.title}: the teacher writes; needs a model that does, with task=translation or task=causal_lm"
            )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        return Effects(retells=[Retold(RememberedTexts(teacher, context, self.num_beams), context, self.share)])


class Retold:
    """A batch with the teacher's answers in place of its own, in this share of all batches."""

    def __init__(self, texts: RememberedTexts, context: Context, share: float) -> None:
        self._texts = texts
        self._context = context
        self._share = share

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._share < 1 and float(torch.rand(())) >= self._share:
            return batch
        return self._context.retold(batch, self._texts(batch))


class Texts:
    """The file of a teacher's texts: their tokens one after another, and where those of each row are."""

    def __init__(self, folder: Path) -> None:
        self._places_of = Ragged(folder)
        self._tokens = np.memmap(folder / "tokens.i32", dtype=np.int32, mode="r")

    def of(self, rows: Tensor) -> Tensor:
        """(rows, tokens of the longest), IGNORED behind the others."""
        texts = [torch.from_numpy(self._tokens[places].astype(np.int64)) for places in self._places_of.of(rows)]
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORED).to(rows.device)


class RememberedTexts(Remembered[Texts]):
    """A teacher whose texts for the training rows are looked up."""

    def __init__(self, teacher: Teacher, context: Context, num_beams: int) -> None:
        super().__init__(teacher, context, "compression.sequence")
        self._num_beams = num_beams

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.found(batch).of(batch["row"])

    def _what(self) -> Any:
        own = self.teacher.model.generation_config.to_diff_dict()
        return {"writing": self._context.writing, "num_beams": self._num_beams, "generation": own}

    def _read(self, folder: Path) -> Texts:
        return Texts(folder)

    def _fill(self, folder: Path, device: torch.device) -> None:
        owners: list[Tensor] = []
        rows = 0
        with (folder / "tokens.i32").open("wb") as tokens:
            for batch in self._context.training():
                moved = {name: tensor.to(device) for name, tensor in batch.items()}
                with self.teacher.asked(device) as model:
                    written = self._context.write(model, moved, num_beams=self._num_beams)
                counted = written != IGNORED
                written[counted].to(torch.int32).cpu().numpy().tofile(tokens)
                owners.append(moved["row"][:, None].expand_as(written)[counted].cpu())
                rows += len(written)
        if not sum(map(len, owners)):
            raise ConfigError(
                f"{self._field}: no block of the training text is long enough for a text to be gone on with; lower "
                "task.max_length"
            )
        Ragged.write(folder, torch.cat(owners).numpy(), rows)
