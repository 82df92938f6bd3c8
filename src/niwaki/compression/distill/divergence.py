"""Divergences of two distributions given by their logarithms, each a mean over rows (n, classes)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.errors import ConfigError

Name = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl"]


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second)."""
    return functional.kl_div(second, first, reduction="batchmean", log_target=True)


def mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log of share * first + (1 - share) * second."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of teacher p and student q (GKD, Agarwal et
    al. 2023, arXiv:2306.13649)."""
    middle = mixed(teacher, student, beta)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def skewed_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898)."""
    return kl(teacher, mixed(teacher, student, alpha))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM)."""
    return kl(student, mixed(student, teacher, alpha))


SKEWED = ("skewed_kl", "skewed_reverse_kl")


def measure_of(name: Name, beta: float | None, alpha: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of that name, of the logarithms of (student, teacher); null: beta 0.5, alpha 0.1."""
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "forward_kl": lambda student, teacher: kl(teacher, student),
        "reverse_kl": kl,
        "jensen_shannon": partial(jensen_shannon, beta=beta or 0.5),
        "skewed_kl": partial(skewed_kl, alpha=alpha or 0.1),
        "skewed_reverse_kl": partial(skewed_reverse_kl, alpha=alpha or 0.1),
    }
    return measures[name]


def check_shares(name: Name, beta: float | None, alpha: float | None, title: str) -> None:
    """Raise ConfigError where beta or alpha has no effect with a divergence, or is no share."""
    for field, value, users in (("beta", beta, ("jensen_shannon",)), ("alpha", alpha, SKEWED)):
        if value is not None and name not in users:
            raise ConfigError(
                f"{title}.{field}={value}: has no effect with divergence={name}; leave it null, or use "
                f"{' or '.join(users)}"
            )
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{title}.{field}={value}: needs a number above 0 and below 1")


def of_numbers(first: Tensor, second: Tensor) -> Tensor:
    """KL of two normal distributions of variance 1 around these numbers (n, 1), which is the same both ways."""
    return (first - second).square().sum(-1).mean() / 2


def with_rest(logs: Tensor, places: Tensor) -> Tensor:
    """Log-probabilities of the classes at `places` (n, count), and of all others together: (n, count + 1)."""
    rest = torch.ones_like(logs, dtype=torch.bool).scatter(-1, places, False)
    others = logs.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, places), others], dim=-1)


def top_and_rest(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the `count` classes that the teacher finds likeliest, and of all the others together: both
    (n, count + 1). So what the student gives to the others counts, which it would not if these were left out; and no
    divergence is larger than that of all classes."""
    places = teacher.topk(count, dim=-1).indices
    return with_rest(student, places), with_rest(teacher, places)
