"""AdaLoRA: ranks move to where they matter while the model learns (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects
from niwaki.tuning import beside
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.adalora import AdaLoraModel

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's allocator: importance, its mean and its mean deviation


@dataclass(frozen=True, kw_only=True)
class Ranks(Edit):
    """How much rank each linear was left with: a record alone, since the merged weights hold it."""

    carried: ClassVar[bool] = False  # the ranks of adapters that are merged

    ranks: dict[str, int]

    def apply(self, model: nn.Module) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(PeftTuning):
    """W + (alpha / rank) P diag(e) Q, with entries of e set to zero until `target_rank` of a linear's `rank` are left,
    on average: those of the least importance, |parameter x gradient| smoothed over steps, over all linears together.

    The number that is left falls as (1 - t)^3 from `begin` to `end` (fractions of the fit), every `interval` optimizer
    steps; in a fit without room for one, all at once at `end`. `betas`: smoothing of the importance and of its
    deviation. `orthogonality`: weight in the loss of the mean of ||P^T P - I|| and ||Q Q^T - I||, not squared, as in
    PEFT and in the authors' code; the paper writes the sum of the squares.
    """

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2303.10512"
    may_be_averaged: ClassVar[bool] = False  # ranks that were dropped would come back

    rank: int = 12
    target_rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    begin: float = 0.1
    end: float = 0.7
    interval: int = 10
    betas: Sequence[float] = (0.85, 0.85)
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, alpha=self.alpha, interval=self.interval)
        if not 1 <= self.target_rank < self.rank:
            raise ConfigError(
                f"tuning.target_rank={self.target_rank}: needs at least 1, and less than rank={self.rank}"
            )
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(f"tuning.begin={self.begin}, end={self.end}: needs 0 <= begin < end <= 1")
        if len(self.betas) != 2 or not all(0 < beta < 1 for beta in self.betas):
            raise ConfigError(f"tuning.betas={list(self.betas)}: needs two numbers above 0 and below 1")
        if self.orthogonality < 0:
            raise ConfigError(f"tuning.orthogonality={self.orthogonality}: needs a number of at least 0")

    def needs_fit(self) -> str:
        return "tuning=adalora: needs a fit to learn its ranks from; trainer.max_epochs=0 has none"

    def span(self, steps: int) -> tuple[int, int]:
        """The optimizer steps after which ranks begin and end to fall; between them is one at least."""
        first = int(self.begin * steps)
        return first, max(round(self.end * steps), first + 1)

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import AdaLoraConfig

        first, last = self.span(context.steps)
        return AdaLoraConfig(
            init_r=self.rank,
            target_r=self.target_rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            tinit=first,
            tfinal=context.steps - last,
            total_step=context.steps,
            deltaT=self.interval,
            beta1=self.betas[0],
            beta2=self.betas[1],
            orth_reg_weight=self.orthogonality,
            target_modules=names,
        )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        tuner: Any = self.inject(model, context)
        term = {"orthogonality": Orthogonality(model, self.orthogonality)} if self.orthogonality else {}
        return Effects(callbacks=[RankSchedule(tuner)], terms=dict(term), settled=self.span(context.steps)[1])

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        left = ranks(model)
        context.facts["ranks"] = {
            "sum": sum(left.values()),
            "budget": self.target_rank * len(left),
            "before": {str(self.rank): len(left)},
            "after": {str(rank): count for rank, count in sorted(Counter(left.values()).items())},
        }
        if not self.merge:
            beside.config_of(model).rank_pattern = None  # dropped ranks are zeros in the file
        return [*super().finalize(model, context), Ranks(ranks=left)]


class Orthogonality:
    """A loss term: the mean, over all P and Q of the model, of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius)."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
        self._factors = [(p, ".lora_A." in n) for n, p in named]  # Q (rank, in) or P (out, rank)
        self._weight = weight

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(self._factors[0][0].device.type, enabled=False):
            products = [p @ p.T if rows else p.T @ p for p, rows in self._factors]
            distances = [torch.linalg.norm(one - torch.eye(len(one), device=one.device)) for one in products]
        return self._weight * torch.stack(distances).mean()


class RankSchedule(pl.Callback):
    """Has PEFT score and mask the ranks after each optimizer step, while the gradients of that step are still there."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self._tuner = tuner
        self._done = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for scores in self._scores().values():
            scores.update({name: score.to(pl_module.device) for name, score in scores.items()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._done:  # gradients wait for their step
            return
        self._done = step
        for parameter in self._tuner.model.parameters():
            if parameter.grad is not None:  # of a step that fp16 left out: it would stay in the means for good
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        allocator, last = self._tuner.rankallocator, self._config.total_step - self._config.tfinal
        if step == last and not allocator.ipt:  # PEFT scores every step but the last one, which may be the first
            allocator.update_ipt(self._tuner.model)
        self._tuner.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        """What PEFT keeps beside the model; without it a resumed run would mask other ranks."""
        return {"done": self._done, "scores": self._scores(), "pattern": self._config.rank_pattern}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]
        self._config.rank_pattern = state_dict["pattern"]
        for name, scores in state_dict["scores"].items():
            setattr(self._tuner.rankallocator, name, scores)

    def _scores(self) -> dict[str, dict[str, Tensor]]:
        return {name: getattr(self._tuner.rankallocator, name) for name in SCORES}

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self._tuner.trainable_adapter_name]


def ranks(model: nn.Module) -> dict[str, int]:
    """The ranks that are not masked, by the name of the linear."""
    from niwaki.tuning.delta import adapters

    entries: dict[str, Any] = {name: layer for name, layer in adapters(model)}
    return {name: int(layer.lora_E[ADAPTER].count_nonzero()) for name, layer in entries.items()}
