"""Optimizers, with no weight decay on biases and norms, and with learning rates that may differ by part."""

from __future__ import annotations

import abc
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.rates import check_rates, rates

if TYPE_CHECKING:
    from niwaki.average import Average
    from niwaki.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(abc.ABC):
    """Learning rate and weight decay, and what makes an optimizer of them.

    `layer_decay`: the rate of each block is that of the block above it times this, and the embeddings' lower still
    (Howard & Ruder 2018, arXiv:1801.06146; Clark et al. 2020, arXiv:2003.10555); the top block has the head's rate
    here, where both papers let it decay already. `lr_by_part`: rates of the head, the blocks, the embeddings, the
    norms or the prompt (virtual tokens, prefixes), in place of `lr` and its decay. Factors of a tuning multiply either.
    """

    lr: float
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    lr_by_part: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optimizer.lr={self.lr}: needs a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: needs a number of at least 0")
        check_rates(self.layer_decay, self.lr_by_part)

    def conflict(self, recipe: Recipe) -> str | None:
        """The reason why this optimizer cannot go with the rest of a run, or None."""
        return None

    def average(self) -> Average | None:
        """The average of the weights that is part of the method, where one is."""
        return None

    def rates(self, model: nn.Module) -> dict[str, float]:
        """The learning rate of each parameter that learns, by name.

        Raises:
            ConfigError: `layer_decay` or a part of `lr_by_part` has no effect on what learns.
        """
        return rates(model, self.lr, self.layer_decay, self.lr_by_part)

    def build(
        self,
        model: nn.Module,
        *,
        fused: bool = True,
        factors: Mapping[str, float] | None = None,
        beside: nn.Module | None = None,
    ) -> torch.optim.Optimizer:
        """An optimizer over the parameters of `model` that learn; `fused` is several times faster. `factors`
        multiplies the learning rate of the parameters that it names. What is `beside` the model learns at `lr`."""
        found = groups(model, self.rates(model), self.weight_decay, factors or {})
        if beside is not None:
            found += groups(beside, dict.fromkeys(dict(beside.named_parameters()), self.lr), self.weight_decay, {})
        return self.over(found, fused)

    @abc.abstractmethod
    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        """The optimizer over these parameter groups."""


def groups(
    model: nn.Module, rates: Mapping[str, float], weight_decay: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What learns, in groups of one learning rate and weight decay: matrices with decay, vectors (biases, norms, scales
    of one row or column, which decay would pull from 1 to 0) without."""
    parted: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = sum(size > 1 for size in parameter.shape) > 1
            parted.setdefault((rates[name] * factors.get(name, 1.0), matrix), []).append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (rate, decays), found in sorted(parted.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def check_betas(betas: Sequence[float]) -> None:
    """Raise ConfigError unless these can be the shares of two running means that stay."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas={list(betas)}: needs two numbers in 0..1, below 1")


def check_moments(betas: Sequence[float], eps: float) -> None:
    """Raise ConfigError unless these can be Adam's."""
    check_betas(betas)
    if not 0 < eps < math.inf:
        raise ConfigError(f"optimizer.eps={eps}: needs a number above 0")


def check_installed(module: str, option: str) -> None:
    """Raise ConfigError where the package that brings an optimizer is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"optimizer={option}: needs a package; pip install 'niwaki[optimizers]'")


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101); the fused implementation."""

    lr: float = 5e-5
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self.betas, self.eps)

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps, fused=fused)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Adam(OptimizerSettings):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980); weight decay, if any, is part of the gradient (L2)."""

    lr: float = 5e-5
    weight_decay: float = 0.0
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self.betas, self.eps)

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps, fused=fused)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

    lr: float = 0.01
    weight_decay: float = 0.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum}: needs a number in 0..1, below 1")

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        # torch's fused one fails where some parameters have a momentum and others, that thaw later, none yet
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, fused=fused and not self.momentum)


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerSettings):
    """Adam's second moment as the product of a row and a column (Shazeer & Stern 2018, arXiv:1804.04235).

    The step is relative: max(1e-3, RMS of the parameter) * min(lr, 1 / sqrt(t)), and its RMS at most `clip`; the second
    moment fades by 1 - t^second_moment_decay. For a matrix (m, n) the state holds m + n numbers. It is torch's own,
    since transformers' ignores the learning rate and its schedule unless that is turned off.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    second_moment_decay: float = -0.8
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.second_moment_decay < 0:
            raise ConfigError(
                f"optimizer.second_moment_decay={self.second_moment_decay}: needs a number from -1 up, below 0"
            )
        if not 1 <= self.clip < math.inf:
            raise ConfigError(f"optimizer.clip={self.clip}: needs a number of at least 1")

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(parameters, lr=self.lr, beta2_decay=self.second_moment_decay, d=self.clip)


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerSettings):
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675); wants a rate 3 to 10 times below Adam's and a decay
    as many times above.

    w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay w), then m <- b2 m + (1 - b2) g.
    """

    lr: float = 1e-5
    weight_decay: float = 0.1
    betas: Sequence[float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)
        check_installed("lion_pytorch", "lion")

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        from lion_pytorch import Lion as Implementation

        return Implementation(parameters, lr=self.lr, betas=tuple(self.betas))


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(OptimizerSettings):
    """AdamW whose moments are 8-bit codes in blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861); torchao's.

    Tensors below 4096 elements, or that 256 does not divide, keep theirs in fp32.
    """

    lr: float = 5e-5
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self.betas, self.eps)

    def conflict(self, recipe: Recipe) -> str | None:
        if recipe.trainer.accelerator == "cpu":
            return (
                "optimizer=adamw8bit and trainer.accelerator='cpu': torchao compiles a kernel for every shape of a "
                "weight, which takes minutes on a CPU; use trainer=gpu, or optimizer=adafactor to save memory"
            )
        return None

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit as Implementation

        return Implementation(parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(OptimizerSettings):
    """AdamW without a schedule: an average of the iterates takes its place (Defazio et al. 2024, arXiv:2405.15682).

    Gradients are taken at y = (1 - b1) z + b1 x; z makes AdamW's steps and x is its average, which is what is
    validated and saved. The rate may warm up (`schedule=constant`); wants one to ten times Adam's.
    """

    lr: float = 2e-4
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self.betas, self.eps)
        if not self.betas[0]:
            raise ConfigError(
                f"optimizer.betas={list(self.betas)}: needs a first one above 0; at 0 there is no average"
            )
        check_installed("schedulefree", "schedule_free")

    def conflict(self, recipe: Recipe) -> str | None:
        from niwaki.schedule import Constant

        if any(settings.averages for settings in recipe.callback_settings):
            return "optimizer=schedule_free and callbacks=ema or swa: each keeps its own average; choose one"
        if not isinstance(recipe.schedule, Constant):
            kind = type(recipe.schedule).__name__.lower()
            return (
                f"optimizer=schedule_free and schedule={kind}: its average takes the place of a falling rate; "
                "use schedule=constant, which may warm up"
            )
        return None

    def average(self) -> Average:
        from niwaki.average import ScheduleFreeAverage

        return ScheduleFreeAverage()

    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps)
        optimizer.train()  # the model holds y throughout; x is computed beside it
        return optimizer
