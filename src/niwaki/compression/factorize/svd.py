"""Linears in two by truncated singular value decomposition (Denton et al. 2014, arXiv:1404.0736), plain or aware of the
activations (SVD-LLM; Wang et al. 2024, arXiv:2403.07378)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.factorize.activations import second_moments
from niwaki.compression.factorize.low_rank import Factorize, LowRankLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS, Anatomy
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.svd"
RIDGE = 1e-9  # of the mean of the diagonal: calibration rows may leave directions empty


@dataclass(frozen=True)
class Decomposition:
    """W or, whitened, W S: left singular vectors (out, n) and singular values (n), n = min(in, out), in double."""

    left: Tensor
    values: Tensor

    def truncated(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), B A = U U^T W with the first `rank` columns of U; each row of A is as long as
        its column of B.

        For the plain decomposition that is U diag(s) V^T; for the whitened one U diag(s) V^T S^-1, without an inverse
        that could be badly conditioned.
        """
        left = self.left[:, :rank]
        down = left.t() @ weight.double()
        length = down.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        return (down / length[:, None]).to(weight.dtype), (left * length).to(weight.dtype)

    def dropped(self, rank: int) -> float:
        """sqrt of the share of the squared singular values that a truncation drops: its relative error (Frobenius)."""
        squared = self.values.square()
        return float((squared[rank:].sum() / squared.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())

    def rank_of(self, energy: float) -> int:
        """The least rank that keeps this share of the squared singular values."""
        shares = self.values.square().cumsum(0)
        return int((shares < energy * shares[-1]).sum()) + 1


def decompose(weight: Tensor, moments: Tensor | None) -> Decomposition:
    """The decomposition of a weight (out, in), or of W S with S S^T = X X^T (in, in) of what it reads (SVD-LLM,
    section 3.2): the dropped singular values of W S are then the error of the output, ||W X - B A X||."""
    double = weight.detach().double()
    if moments is not None:
        ridge = RIDGE * moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        whitening = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments), dtype=torch.float64))
        double = double @ whitening
    left, values, _ = torch.linalg.svd(double, full_matrices=False)
    return Decomposition(left, values)


def most_saving(linear: nn.Linear) -> int:
    """The largest rank with which two linears have fewer parameters than one; 0 where none has."""
    both = linear.in_features + linear.out_features
    return (linear.in_features * linear.out_features - 1) // both


@dataclass(frozen=True, kw_only=True)
class SVD(Stage):
    """W ~ B A, A (rank, in) and B (out, rank), the closest of that rank: min ||W - B A||, or with `activation_aware`
    min ||W X - B A X|| over X, the inputs of the linear on `rows` training rows.

    How large the rank is: `rank` itself; `ratio`, the share of the parameters of W that A and B may have together; or
    `energy`, the share of the squared singular values that is kept (of the output's with `activation_aware`). The
    latter two give a multiple of `multiple`, the ratio rounded down and the energy up. `parts`: the linears. One of
    which two would have no fewer parameters stays whole.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    turn: ClassVar[int] = 2
    paper: ClassVar[str] = "Denton et al. 2014, arXiv:1404.0736; Wang et al. 2024, arXiv:2403.07378"

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    multiple: int | None = None
    parts: Sequence[str] = PARTS
    activation_aware: bool = False
    rows: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{FIELD}.{given[1]}={getattr(self, given[1])}: has no effect beside {FIELD}.{given[0]}; set one"
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"{FIELD}.rank={self.rank}: needs null or a whole number of at least 1")
        for name in ("ratio", "energy"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"{FIELD}.{name}={share}: needs null or a number above 0 and below 1")
        if self.multiple is not None and self.rank is not None:
            raise ConfigError(f"{FIELD}.multiple={self.multiple}: has no effect beside {FIELD}.rank; leave it null")
        if self.multiple is not None and self.multiple < 1:
            raise ConfigError(f"{FIELD}.multiple={self.multiple}: needs null or a whole number of at least 1")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"{FIELD}.parts={list(self.parts)}: needs some of {', '.join(PARTS)}")
        if self.rows is not None and not self.activation_aware:
            raise ConfigError(f"{FIELD}.rows={self.rows}: has no effect without {FIELD}.activation_aware=true")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"{FIELD}.rows={self.rows}: needs null or a whole number of at least 1")

    def foreign(self) -> str | None:
        return None if self.energy is None else "linears that are a product of two"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        cutting = next((o for o in others if o.leaves_out_units and getattr(o, "schedule", "") != "one_shot"), None)
        if cutting is None:
            return None
        return (
            f"{self.name} and {cutting.name}: its units are cut after the fit, out of linears that are two by then; "
            "cut them before it, as prune/heads and prune/neurons do with schedule=one_shot"
        )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        chosen = self.chosen(anatomy)
        if not chosen:
            raise ConfigError(f"{FIELD}.parts={list(self.parts)}: this family of models has none of them")
        if self.energy is None and not any(map(self.planned, chosen.values())):
            given = f"rank={self.rank}" if self.rank is not None else f"ratio={self.kept}"
            most = max(map(most_saving, chosen.values()))
            raise ConfigError(
                f"{FIELD}.{given}: saves parameters in no linear of this model; needs a rank from 1 to {most}"
                + ("" if self.rank is not None else f", a multiple of {self.step}")
            )

    def outline(self, model: Any) -> None:
        if self.energy is None:  # else the ranks are only known from the weights
            anatomy = Anatomy.of(model)
            edit_of(anatomy, {n: self.planned(linear) for n, linear in self.chosen(anatomy).items()}).apply(model)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        chosen = self.chosen(context.anatomy)
        ranks, factors, errors = {}, {}, {}
        batches = context.calibration(self.rows or 128) if self.activation_aware else ()
        for part in self._batched(context.anatomy, chosen):
            moments = second_moments(model, part, batches, context.inputs) if batches else {}
            for name, linear in part.items():
                found = decompose(linear.weight, moments.get(name))
                ranks[name] = rank = self._rank(linear, found)
                if rank:
                    factors[name], errors[name] = found.truncated(linear.weight.detach(), rank), found.dropped(rank)
        if not factors:
            raise ConfigError(f"{FIELD}.energy={self.energy}: saves parameters in no linear of this model; lower it")
        edit = edit_of(context.anatomy, ranks)
        edit.apply(model)
        for name, (down, up) in factors.items():
            fill(model.get_submodule(name), down, up)
        context.facts["svd"] = {
            "ranks": {name: rank for name, rank in ranks.items() if rank},
            "errors": errors,  # ||W - BA|| / ||W||, or ||WX - BAX|| / ||WX||
            "left_whole": [name for name, rank in ranks.items() if not rank],
        }
        return Effects(edits=[edit])

    def chosen(self, anatomy: Anatomy) -> dict[str, nn.Linear]:
        """The linears that play one of the parts, by name."""
        names = set(anatomy.part_names(self.parts))
        return {name: linear for name, linear in anatomy.linears().items() if name in names}

    @property
    def kept(self) -> float:
        """The share of parameters that may stay: 0.5 where nothing else is given."""
        return 0.5 if self.ratio is None else self.ratio

    @property
    def step(self) -> int:
        """What a rank that is worked out is a multiple of: 8, which products run well with, where not given."""
        return 8 if self.multiple is None else self.multiple

    def planned(self, linear: nn.Linear) -> int:
        """The rank that follows from the shape alone; 0 where the linear stays whole."""
        rank = self.rank
        if rank is None:
            parameters = linear.in_features * linear.out_features
            rank = math.floor(self.kept * parameters / (linear.in_features + linear.out_features) + 1e-9)
            rank -= rank % self.step
        return rank if rank <= most_saving(linear) else 0

    def _rank(self, linear: nn.Linear, found: Decomposition) -> int:
        if self.energy is None:
            return self.planned(linear)
        rank = -(-found.rank_of(self.energy) // self.step) * self.step
        return rank if rank <= most_saving(linear) else 0

    def _batched(self, anatomy: Anatomy, chosen: Mapping[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
        """The linears block by block: the second moments of a whole model may not fit into memory at once."""
        blocks = [
            {name: linear for name, linear in chosen.items() if name.startswith(f"{place}.")}
            for place, _, _ in anatomy.named_blocks()
        ]
        return [block for block in blocks if block]


def edit_of(anatomy: Anatomy, ranks: Mapping[str, int]) -> Factorize:
    """The edit that gives linears these ranks, by their names in the whole model; 0 leaves one as it is."""
    return Factorize(ranks={name.removeprefix(anatomy.prefix): rank for name, rank in ranks.items() if rank})


def fill(pair: Any, down: Tensor, up: Tensor) -> None:
    """Give a pair its weights."""
    assert isinstance(pair, LowRankLinear)
    with torch.no_grad():
        pair.down.weight.copy_(down)
        pair.up.weight.copy_(up)
