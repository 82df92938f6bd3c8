"""k-means on single numbers (Lloyd 1982), exact and fast: sorted values fall into neighbouring clusters, so that a
prefix sum gives every mean."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster(values: Tensor, valid: Tensor, count: int, start: str, seed: int) -> Tensor:
    """The `count` centroids of each row of `values` (rows, n), from the elements where `valid` holds. (rows, count),
    rising; a row without any valid element has zeros.

    `start`: where the centroids begin, as in Han et al. 2016, section 3.2. linear: evenly from the least to the
    largest value; density: at even steps of the cumulative distribution; forgy: random elements.
    """
    ordered = values.double().masked_fill(~valid, torch.inf).sort(dim=1).values
    found = valid.sum(1, keepdim=True)
    ordered = torch.where(found > 0, ordered, ordered.new_zeros(()))
    found = found.clamp(min=1)
    centroids = lloyd(ordered, found, STARTS[start](ordered, found, count, seed))
    for _ in range(count):
        moved = refilled(ordered, found, centroids)
        if moved is None:
            break
        centroids = lloyd(ordered, found, moved)
    return centroids.to(values.dtype)


def refilled(ordered: Tensor, found: Tensor, centroids: Tensor) -> Tensor | None:
    """The centroids with those of empty clusters where elements are farthest from their own (as in scikit-learn): a
    linear start leaves several empty in the gap that pruning makes around zero. None where no move would help."""
    bounds = bounds_of(ordered, found, centroids)
    empty = bounds.diff(dim=1) == 0
    places = torch.searchsorted(between(centroids), ordered.clamp(max=torch.finfo(ordered.dtype).max))
    distances = (ordered - centroids.gather(1, places)).abs().masked_fill(ordered.isinf(), 0.0)
    most = min(centroids.shape[1], ordered.shape[1])
    far = distances.topk(most, dim=1)
    rank = empty.cumsum(1) - 1  # the first empty cluster takes the farthest element, and so on
    chosen = rank.clamp(min=0, max=most - 1)
    helps = empty & (far.values.gather(1, chosen) > 0) & (rank < most)
    if not helps.any():
        return None
    return torch.where(helps, ordered.gather(1, far.indices.gather(1, chosen)), centroids).sort(dim=1).values


def bounds_of(ordered: Tensor, found: Tensor, centroids: Tensor) -> Tensor:
    """Where among the ordered elements each cluster begins, and the last one ends. (rows, count + 1)."""
    inner = torch.searchsorted(ordered, between(centroids), right=True).minimum(found)
    return torch.cat([torch.zeros_like(found), inner, found], dim=1)


def lloyd(ordered: Tensor, found: Tensor, centroids: Tensor, iterations: int = 300) -> Tensor:
    """Rising centroids (rows, count) moved to the means of their clusters until no element changes its cluster.
    `ordered` (rows, n) rises, and only its first `found` (rows, 1) elements count; an empty cluster stays."""
    sums = torch.nn.functional.pad(ordered.masked_fill(ordered.isinf(), 0.0).cumsum(1), (1, 0))
    bounds = None
    for _ in range(iterations):
        moved = bounds_of(ordered, found, centroids)
        if bounds is not None and torch.equal(moved, bounds):
            break
        bounds = moved
        sizes = bounds.diff(dim=1)
        means = sums.gather(1, bounds).diff(dim=1) / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, centroids)
    return centroids


def between(centroids: Tensor) -> Tensor:
    """The middle between each centroid and the next. (rows, count - 1)."""
    return ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest centroid (in any order) of its row, for each of `values` (rows, n). uint8."""
    rising, order = centroids.double().sort(dim=1)
    places = torch.searchsorted(between(rising), values.double())
    return order.gather(1, places).to(torch.uint8)


def linear(ordered: Tensor, found: Tensor, count: int, seed: int) -> Tensor:
    """Evenly from the least to the largest value."""
    low, high = ordered[:, :1], ordered.gather(1, found - 1)
    return low + (high - low) * torch.linspace(0, 1, count, dtype=ordered.dtype, device=ordered.device)


def density(ordered: Tensor, found: Tensor, count: int, seed: int) -> Tensor:
    """At the middle of each of `count` even steps of the cumulative distribution."""
    steps = (torch.arange(count, dtype=ordered.dtype, device=ordered.device) + 0.5) / count
    return ordered.gather(1, (steps * found).long().minimum(found - 1))


def forgy(ordered: Tensor, found: Tensor, count: int, seed: int) -> Tensor:
    """Random elements; a row of fewer than `count` takes some twice."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number in found.flatten().tolist():
        order = torch.randperm(number, generator=generator)
        chosen.append(order.repeat(-(-count // number))[:count].sort().values)
    return ordered.gather(1, torch.stack(chosen).to(ordered.device))


STARTS = {"linear": linear, "density": density, "forgy": forgy}
