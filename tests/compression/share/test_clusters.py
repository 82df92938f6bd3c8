"""k-means on single numbers, against Lloyd's algorithm in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from niwaki.compression.share.clusters import STARTS, cluster, nearest


def everywhere(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def plain_k_means(values: list[float], centroids: list[float]) -> list[float]:
    """Lloyd 1982: assign to the nearest, move to the mean, until nothing moves."""
    while True:
        members: list[list[float]] = [[] for _ in centroids]
        for value in values:
            distances = [abs(value - centroid) for centroid in centroids]
            members[distances.index(min(distances))].append(value)
        moved = [sum(m) / len(m) if m else c for m, c in zip(members, centroids, strict=True)]
        if moved == centroids:
            return centroids
        centroids = moved


@pytest.mark.parametrize("count", [2, 4, 16])
def test_the_linear_start_and_lloyd(count: int) -> None:
    values = torch.rand(3, 200) - 0.4  # which leaves no cluster empty
    found = cluster(values, everywhere(values), count, "linear", 0)
    for row, centroids in zip(values.tolist(), found, strict=True):
        low, high = min(row), max(row)
        start = [low + (high - low) * k / (count - 1) for k in range(count)]
        assert centroids.tolist() == pytest.approx(plain_k_means(row, start), abs=1e-6)


def test_the_density_start_by_hand() -> None:
    # 8 values, 4 centroids: the middles of the quarters of the distribution are elements 1, 3, 5 and 7
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 100.0]])
    found = STARTS["density"](values, torch.tensor([[8]]), 4, 0)
    assert found.tolist() == [[1.0, 3.0, 20.0, 100.0]]
    assert cluster(values, everywhere(values), 4, "density", 0)[0].tolist() == pytest.approx(
        plain_k_means(values[0].tolist(), [1.0, 3.0, 20.0, 100.0])
    )


def test_the_forgy_start_takes_elements_by_the_seed() -> None:
    values = torch.randn(2, 50).sort(dim=1).values
    all_of_them = torch.tensor([[50], [50]])
    one, again, other = (STARTS["forgy"](values, all_of_them, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    for row, centroids in zip(values, one, strict=True):
        assert len(set(centroids.tolist()) & set(row.tolist())) == 8
        assert torch.equal(centroids, centroids.sort().values)
    found = cluster(values, everywhere(values), 8, "forgy", 1)
    assert found[0].tolist() == pytest.approx(plain_k_means(values[0].tolist(), one[0].tolist()), abs=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_not_valid_does_not_count(start: str) -> None:
    values = torch.randn(4, 300)
    valid = torch.rand(4, 300) < 0.4
    valid[2] = False
    found = cluster(values.masked_fill(~valid, 0.0), valid, 8, start, 3)
    assert found[2].tolist() == [0.0] * 8
    for row in (0, 1, 3):
        kept = values[row][valid[row]][None]
        assert torch.equal(found[row], cluster(kept, everywhere(kept), 8, start, 3)[0]) or start == "forgy"
        sizes = torch.bincount(nearest(kept, found[row : row + 1])[0].long(), minlength=8)
        means = [kept[0][nearest(kept, found[row : row + 1])[0] == k].mean() for k in range(8) if sizes[k]]
        assert torch.allclose(torch.stack(means), found[row][sizes > 0], atol=1e-6)


def test_an_empty_cluster_moves_to_the_element_that_is_farthest_from_its_centroid() -> None:
    # from 0 3 6 9 to the means 0.1 3 6 8.8; 3 and 6 are empty, and the farthest elements are 8.6 and 9. Then 8.6 and 9
    # have a centroid each, one is left idle, and of 0 and 0.2, equally far from 0.1, one gets it
    values = torch.tensor([[0.0, 0.1, 0.2, 8.6, 9.0]])
    found = cluster(values, everywhere(values), 4, "linear", 0)
    assert found[0].tolist() == pytest.approx([0.0, 0.15, 8.6, 9.0])


@pytest.mark.parametrize("count", [4, 16, 64])
def test_a_gap_around_zero_leaves_no_centroid_idle(count: int) -> None:
    values = torch.randn(3, 4000)
    valid = values.abs() > 1.5
    found = cluster(values, valid, count, "linear", 0)
    for row in range(3):
        kept = values[row][valid[row]]
        sizes = torch.bincount(nearest(kept[None], found[row : row + 1])[0].long(), minlength=count)
        assert int(sizes.min()) > 0
        assert bool((found[row].abs() > 1.5).all())


@pytest.mark.parametrize("start", STARTS)
def test_fewer_values_than_centroids(start: str) -> None:
    values = torch.tensor([[1.0, -2.0, 5.0]])
    found = cluster(values, everywhere(values), 8, start, 0)
    assert bool(found.isfinite().all())
    assert sorted(found.gather(1, nearest(values, found).long())[0].tolist()) == [-2.0, 1.0, 5.0]


def test_the_nearest_of_centroids_in_any_order() -> None:
    values, centroids = torch.randn(2, 100), torch.randn(2, 16)
    expected = (values[:, :, None] - centroids[:, None]).abs().argmin(2)
    assert nearest(values, centroids).tolist() == expected.tolist()
