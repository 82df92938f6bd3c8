"""The LightningModule: ties model, task, loss terms and optimizer together. It knows no method by name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.average import Average
from niwaki.errors import UserError
from niwaki.optimizer import OptimizerSettings
from niwaki.schedule import Schedule
from niwaki.stage import Retell, Term
from niwaki.task.task import Task


class DivergedError(UserError):
    """The loss is no longer a finite number."""


class Finite:
    """Refuses a loss that is not finite: at once on the CPU; on a GPU at the step after it, since to wait for a loss
    there would empty the queue of kernels at every step. The weights are checked before anything is saved."""

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, Any] | None = None

    def check(self, loss: Tensor, step: int) -> None:
        """Look at the loss of optimizer step `step`, or at the one before it."""
        if not loss.is_cuda:
            return self._refuse(step, loss)
        due, host = self._pending, loss.detach().to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = step, host, copied
        if due is not None:
            due[2].synchronize()
            self._refuse(*due[:2])

    def _refuse(self, step: int, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()} at optimizer step {step}")


class Learner(pl.LightningModule):
    """loss = task_weight * the task's own + the sum of every stage's terms."""

    def __init__(
        self, model: nn.Module, *, task: Task, labels: Sequence[str], optimizer: OptimizerSettings,
        schedule: Schedule, steps: int, terms: Mapping[str, Term], task_weight: float,
        tokenizer: Any = None, lr_factors: Mapping[str, float] | None = None,
        modules: Mapping[str, nn.Module] | None = None, retells: Sequence[Retell] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.beside = nn.ModuleDict(dict(modules or {}))  # learns with the model, is in checkpoints, never in the model
        self.task = task
        self.labels = labels
        self.tokenizer = tokenizer
        self.optimizer_settings = optimizer
        self.schedule = schedule
        self.steps = steps
        self.terms = terms  # plain callables: a teacher is no child, so no checkpoint holds it
        self.task_weight = task_weight
        self.retells = list(retells)
        self.lr_factors = dict(lr_factors or {})
        self.average: Average | None = None  # of the weights along the fit; set by the callback that keeps it
        self._finite = Finite()
        self._stored_randomness: dict[str, Any] | None = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Before the callbacks see the batch, some of which gather what it makes of the model.
        if self.trainer.training:
            self._take_randomness()  # which a retelling may draw from
            for retell in self.retells:
                batch = retell(batch)
        return batch

    def training_step(self, batch: Mapping[str, Tensor], index: int) -> Tensor:
        outputs = self.model(**self.task.inputs(batch))
        own = self.task.loss(outputs, batch, smoothing=self.task.label_smoothing)
        parts = {name: term(outputs, batch) for name, term in self.terms.items()}
        loss = self.task_weight * own + sum(parts.values())
        self._finite.check(loss, self.global_step)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if parts:
            self.log_dict({f"train/{name}": value.detach() for name, value in {"task": own, **parts}.items()})
        return loss

    def on_validation_epoch_start(self) -> None:
        self._scores = self.task.scores(self.labels, self.tokenizer)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.task.watch(self._scores, self.model, batch)

    def on_validation_epoch_end(self) -> None:
        for name, value in self._scores.compute().items():
            self.log(f"validation/{name}", value, prog_bar=name == self.task.metric, sync_dist=True)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        # Lightning refuses to clip for a fused optimizer under any autocast; only fp16, which scales its gradients,
        # would need that, and it does not get a fused one.
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        fused = self.trainer.precision != "16-mixed"
        optimizer = self.optimizer_settings.build(self.model, fused=fused, factors=self.lr_factors, beside=self.beside)
        scheduler = self.schedule.build(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_weights(self) -> None:
        """Raise DivergedError where a weight that learns is not finite."""
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters() if p.requires_grad):
            raise DivergedError(f"the weights are not finite after optimizer step {self.global_step}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_weights()
        if self.average is not None:
            self.average.write(checkpoint, self)
        of_numpy: Any = numpy.random.get_state()
        checkpoint["randomness"] = {
            "python": list(random.getstate()[1]),
            "numpy": of_numpy[1].tolist(),
            "numpy_position": int(of_numpy[2]),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._stored_randomness = checkpoint.get("randomness")

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self._take_randomness()

    def _take_randomness(self) -> None:
        """Go on with the generators as a checkpoint left them, once."""
        if self._stored_randomness is None:
            return
        stored, self._stored_randomness = self._stored_randomness, None
        random.setstate((3, tuple(stored["python"]), None))
        numpy.random.set_state(("MT19937", stored["numpy"], stored["numpy_position"], 0, 0.0))
        torch.set_rng_state(stored["torch"].cpu())
        if stored["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in stored["cuda"]])
