"""Where and how long the fit runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from niwaki.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Lightning's Trainer, in the terms of a run.

    `max_steps` counts optimizer steps and ends the fit before `max_epochs` does; `max_epochs=0` leaves the fit out
    (one-shot compression of a model that is trained already). `precision`: fp32, bf16 or fp16
    (both mixed), or auto: bf16 where the processor computes it natively, else fp32. `accumulate`: batches per optimizer
    step. `gradient_clip`: largest norm of the gradient, null for none. `validate_every`: optimizer steps between
    validations, null for once per epoch. `threads`: of the CPU, null leaves it to torch.
    """

    accelerator: Literal["cpu", "gpu"] = "cpu"
    devices: int = 1
    max_epochs: int = 3
    max_steps: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: int = 1
    gradient_clip: float | None = 1.0
    validate_every: int | None = None
    limit_validation_batches: int | None = None
    log_every: int = 10
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_epochs", 0), ("accumulate", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: needs a whole number of at least {least}")
        for name in ("max_steps", "validate_every", "limit_validation_batches", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: needs null or a whole number of at least 1")
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ConfigError(f"trainer.gradient_clip={self.gradient_clip}: needs null or a number above 0")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision!r}: needs one of {', '.join(PRECISIONS)}")
        if self.accelerator not in ("cpu", "gpu"):
            raise ConfigError(f"trainer.accelerator={self.accelerator!r}: needs cpu or gpu")
        if self.devices != 1:
            raise ConfigError(f"trainer.devices={self.devices}: needs 1; this version runs on one device")
        if self.precision == "fp16" and self.accelerator == "cpu":
            raise ConfigError("trainer.precision='fp16': needs auto, fp32 or bf16 on a CPU; fp16 needs trainer=gpu")

    def prepare(self) -> None:
        """Set the threads; raise ConfigError where this machine cannot run the fit."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.accelerator == "gpu" and not torch.cuda.device_count():
            raise ConfigError("trainer.accelerator='gpu': this machine has none that can be used; use trainer=cpu")

    @property
    def device(self) -> torch.device:
        """Where a single process evaluates."""
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")

    @property
    def lightning_precision(self) -> Any:
        """The precision in Lightning's words."""
        if self.precision == "auto":
            return "bf16-mixed" if native_bf16(self.accelerator) else "32-true"
        return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[self.precision]

    def steps(self, batches: int) -> int:
        """Optimizer steps of the whole fit, from the batches of an epoch. Lightning's own estimate would make it drop
        the state of the data loader."""
        steps = self.epoch(batches) * self.max_epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def epoch(self, batches: int) -> int:
        """Optimizer steps of one epoch, from its batches."""
        return math.ceil(batches / self.accumulate)

    def build(self, folder: Path, logger: Any, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
        """The Lightning trainer. All checkpoints are the callbacks' business."""
        every = self.validate_every
        return pl.Trainer(
            default_root_dir=folder, logger=logger or False, callbacks=list(callbacks), accelerator=self.accelerator,
            devices=self.devices, max_epochs=self.max_epochs, max_steps=self.max_steps or -1,
            precision=self.lightning_precision, accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.gradient_clip, log_every_n_steps=self.log_every,
            val_check_interval=every * self.accumulate if every else None,
            check_val_every_n_epoch=None if every else 1, limit_val_batches=self.limit_validation_batches,
            num_sanity_val_steps=0, use_distributed_sampler=False, enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        )  # fmt: skip


def native_bf16(accelerator: str) -> bool:
    """Whether bf16 is computed by the processor, rather than emulated."""
    if accelerator == "gpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
