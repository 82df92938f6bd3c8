"""The hard concrete distribution (Louizos et al. 2018, arXiv:1712.01312): random masks that are often exactly 0 or 1.

s = sigmoid((log u - log(1 - u) + log alpha) / beta), u uniform in 0..1; z = min(1, max(0, s (zeta - gamma) + gamma)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EDGE = 1e-6  # u stays this far from 0 and 1


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z of these draws of u, any shape."""
    u = uniform.clamp(EDGE, 1 - EDGE)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def settled(log_alpha: Tensor) -> Tensor:
    """The mask that is kept: as many zeros as are expected, where log alpha is lowest. Booleans, (n,)."""
    zeros = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    mask = torch.ones_like(log_alpha, dtype=torch.bool)
    mask[log_alpha.argsort(stable=True)[:zeros]] = False
    return mask
