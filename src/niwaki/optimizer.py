"""Optimizers, with no weight decay on biases and norms."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from niwaki.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(abc.ABC):
    """Learning rate and weight decay, and what makes an optimizer of them."""

    lr: float
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optimizer.lr={self.lr}: needs a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: needs a number of at least 0")

    def build(
        self, model: nn.Module, *, fused: bool = True, factors: Mapping[str, float] | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over the parameters of `model` that learn; `fused` is several times faster. `factors`
        multiplies the learning rate of the parameters that it names."""
        return self.over(groups(model, self.lr, self.weight_decay, factors or {}), fused)

    @abc.abstractmethod
    def over(self, parameters: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        """The optimizer over these parameter groups."""


def groups(model: nn.Module, lr: float, weight_decay: float, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """What learns, in groups of one learning rate and weight decay: matrices with decay, vectors (biases, norms, scales
    of one row or column, which decay would pull from 1 to 0) without."""
    parted: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = sum(size > 1 for size in parameter.shape) > 1
            parted.setdefault((factors.get(name, 1.0), matrix), []).append(parameter)
    return [
        {"params": found, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), found in sorted(parted.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def check_moments(betas: Sequence[float], eps: float) -> None:
    """Raise ConfigError unless these can be Adam's."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas={list(betas)}: needs two numbers in 0..1, below 1")
    if not 0 < eps < math.inf:
        raise ConfigError(f"optimizer.eps={eps}: needs a number above 0")


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
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, fused=fused)
