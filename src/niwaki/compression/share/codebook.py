"""Weight sharing by k-means with trained centroids (Deep Compression; Han, Mao & Dally 2016, arXiv:1510.00149)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.share.clusters import STARTS, cluster, nearest
from niwaki.compression.share.huffman import shared_bytes
from niwaki.compression.share.stored import CodebookLinear, UseCodebook, look_up, places
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage, Tuning
from niwaki.weights import Link, entering, links, stack

FIELD = "compression.codebook"


class Shared(torch.autograd.Function):
    """(weight, centroids, indices, mask, sizes) -> the centroid of each weight, 0 where the mask (if any) is not set.

    The gradient of a centroid is the sum of those of its weights (equation 3 of the paper). Where centroids follow the
    means of their clusters, of these `sizes`, each weight of a cluster gets the mean of their gradients, as is true of
    a mean; else, and where the mask is not set, each gets its own, straight through, as if nothing were shared.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, centroids: Tensor, indices: Tensor, mask: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(indices, mask, sizes)
        ctx.shape = centroids.shape
        shared = look_up(centroids, indices)
        return shared if mask is None else shared.masked_fill_(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        indices, mask, sizes = ctx.saved_tensors
        (gradient,) = gradients
        if sizes is None and not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None
        own = gradient if mask is None else gradient.masked_fill(~mask, 0.0)
        sums = cluster_sums(own, indices, ctx.shape)
        if sizes is not None:
            alike = look_up((sums / sizes).to(gradient.dtype), indices)
            gradient = alike if mask is None else torch.where(mask, alike, gradient)
        return gradient, sums.to(own.dtype), None, None, None


def cluster_sums(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """The sum of the values of each cluster, in double precision. (out, in) twice -> `shape`, (tables, 2^bits)."""
    sums = torch.zeros(shape, dtype=torch.float64, device=values.device)
    found = places(sums, indices)
    return sums.flatten().index_add_(0, found, values.flatten().double()).view(shape)


class Codebook(Link):
    """w -> the centroid of its cluster; before the clusters are drawn, w itself. (out, in).

    A centroid is the sum of `base`, its place when the clusters were drawn, and `shift`, what it has learned since.
    Above a delta, the mean of what now enters its cluster is a third part (and `base` what is left), so that the delta
    moves the centroids. Weights that a mask `below` has set to zero stay zero and belong to no cluster. One that the
    mask lets back takes the centroid that was nearest to it, as it stood below the mask, when the clusters were drawn.
    """

    phase = Phase.SHARE
    indices: Tensor
    base: Tensor
    drawn: Tensor

    def __init__(
        self, shape: torch.Size, *, bits: int, rows: int | None, follows: bool, below: Link | None = None
    ) -> None:
        super().__init__()
        self._below = (below,)  # in a tuple: it has its place in the chain
        self.follows = follows
        self.tables = shape[0] // (rows or shape[0])
        self.register_buffer("indices", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("base", torch.zeros(self.tables, 2**bits))
        self.register_buffer("drawn", torch.tensor(False))
        self.shift = nn.Parameter(torch.zeros(self.base.numel()))  # flat: no optimizer lets a vector decay
        self.is_drawn = False  # as the buffer, which on a GPU would have to be waited for

    def forward(self, weight: Tensor) -> Tensor:
        if not self.is_drawn:
            return weight
        mask = self.mask
        sizes = self.sizes() if self.follows else None
        return Shared.apply(weight, self.centroids(weight, sizes), self.indices, mask, sizes)

    @property
    def mask(self) -> Tensor | None:
        """Where a weight is kept; None where none is pruned."""
        return self._below[0].kept() if self._below[0] else None

    def sizes(self) -> Tensor:
        """How many weights each cluster has, 1 for none. (tables, 2^bits), double."""
        members = torch.ones_like(self.indices) if self.mask is None else self.mask
        return cluster_sums(members, self.indices, self.base.shape).clamp(min=1)

    def centroids(self, weight: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The values that the weights share, (tables, 2^bits); `weight` is what enters the link."""
        centroids = self.base + self.shift.view_as(self.base)
        return centroids + self.means(weight, sizes) if self.follows else centroids

    def means(self, weight: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The mean of each cluster, 0 of one that is empty, without a gradient. (tables, 2^bits)."""
        sums = cluster_sums(weight.detach(), self.indices, self.base.shape)
        return (sums / (self.sizes() if sizes is None else sizes)).to(weight.dtype)

    def draw(self, linear: nn.Linear, start: str, seed: int) -> None:
        """Find the clusters of what enters anew; what the centroids have learned stays on top."""
        rows = entering(linear, self).reshape(self.tables, -1)
        valid = torch.ones_like(rows, dtype=torch.bool) if self.mask is None else self.mask.view_as(rows)
        self._assign(linear, cluster(rows, valid, self.base.shape[1], start, seed))
        self.drawn.fill_(True)
        self.is_drawn = True

    def reassign(self, linear: nn.Linear) -> None:
        """Give every weight the centroid that is nearest to it now; no centroid moves."""
        self._assign(linear, self.centroids(entering(linear, self)).detach() - self.shift.detach().view_as(self.base))

    def _assign(self, linear: nn.Linear, centroids: Tensor) -> None:
        whole = centroids + self.shift.detach().view_as(centroids)
        unmasked = entering(linear, self._below[0] or self)
        self.indices.copy_(nearest(unmasked.reshape(self.tables, -1), whole).view(unmasked.shape))
        self.base.copy_(centroids - self.means(entering(linear, self)) if self.follows else centroids)

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        """`indices` (out, in), `centroids` (tables, 2^bits) and, above a mask, `kept` (out, in)."""
        if not self.is_drawn:
            return {}
        found = {"indices": self.indices.clone(), "centroids": self.centroids(weight).detach().clone()}
        return found if self.mask is None else {**found, "kept": self.mask.clone()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.is_drawn = bool(self.drawn)


class CodebookSchedule(pl.Callback):
    """Draws the clusters at optimizer step `begin`, and the indices anew every `reassign` steps after it."""

    def __init__(
        self, books: Mapping[nn.Linear, Codebook], *, start: str, seed: int, begin: int, reassign: int | None
    ) -> None:
        self.books = books
        self.start = start
        self.seed = seed
        self.begin = begin
        self.reassign = reassign
        self._step = -1

    def draw(self) -> None:
        """Find the clusters of what now enters every codebook."""
        for number, (linear, book) in enumerate(self.books.items()):
            book.draw(linear, self.start, self.seed + number)
        self._rest()

    def _rest(self) -> None:
        """Stop the base weights of drawn codebooks from learning what nothing reads."""
        for linear, book in self.books.items():
            if book.is_drawn and not self.reassign:
                chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
                chain.original.requires_grad_(False)

    def on_train_start(self, *_: Any) -> None:
        self._rest()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step <= self._step or step < self.begin:
            return
        self._step = step
        if step == self.begin:
            self.draw()
        elif self.reassign and (step - self.begin) % self.reassign == 0:
            for linear, book in self.books.items():
                book.reassign(linear)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]


@dataclass(frozen=True, kw_only=True)
class CodebookSharing(Stage):
    """W[i, j] = c[k], k the cluster of W[i, j] in a k-means of the layer; dL/dc[k] = sum of dL/dW[i, j] over cluster k.

    `bits`: 2^bits centroids, and the bits of a stored index. `rows`: output rows that share a table; null for one table
    per layer. `start`: where k-means begins. `begin`: when the clusters are drawn, as a fraction of the fit; 0 before
    it, 1 after it, and then nothing is trained. Below a schedule of masks it is best where that ends.

    The centroids learn wherever the weight or a delta below would. A delta (LoRA) moves each by the mean of what it
    does to the weights of the cluster, and its gradient is that of the mean. With `reassign`, W itself learns on,
    straight through, and every so many optimizer steps each weight takes the centroid that is nearest to it; without
    it W rests, as in the paper.
    """

    phase: ClassVar[Phase] = Phase.SHARE
    paper: ClassVar[str] = "Han, Mao & Dally 2016, arXiv:1510.00149"

    bits: int = 4
    rows: int | None = None
    start: Literal["linear", "density", "forgy"] = "linear"
    begin: float = 0.0
    reassign: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"{FIELD}.bits={self.bits}: needs a whole number from 1 to 8")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"{FIELD}.rows={self.rows}: needs null or a whole number of at least 1")
        if self.start not in STARTS:
            raise ConfigError(f"{FIELD}.start={self.start!r}: needs one of {', '.join(STARTS)}")
        if not 0 <= self.begin <= 1:
            raise ConfigError(f"{FIELD}.begin={self.begin}: needs a number from 0 (before the fit) to 1 (after it)")
        if self.reassign is not None and self.reassign < 1:
            raise ConfigError(f"{FIELD}.reassign={self.reassign}: needs null or a whole number of at least 1")
        if self.reassign is not None and self.begin == 1:
            raise ConfigError(f"{FIELD}.reassign={self.reassign}: has no effect with {FIELD}.begin=1; leave it null")

    @property
    def during_fit(self) -> bool:  # type: ignore[override]
        """Whether the fit runs through the codebook."""
        return self.begin < 1

    def conflict(self, others: Sequence[Stage]) -> str | None:
        for other in others:
            if self.during_fit and other.name == "gradual":
                return (
                    f"tuning=gradual and {self.name}: centroids learn in place of the weights, and would not thaw with "
                    f"them; use tuning=full, or {FIELD}.begin=1"
                )
            if self.reassign and isinstance(other, Tuning) and not other.moves_linears:
                return (
                    f"tuning={other.name} and {self.name} with {FIELD}.reassign={self.reassign}: no weight moves, so "
                    f"none would take another centroid; leave {FIELD}.reassign null"
                )
            if other.phase is Phase.QUANTIZE and other.acts_on_linears and other.during_fit and not self.during_fit:
                return (
                    f"{self.name} with begin=1 and {other.name}: the fit would run through a grid below which the "
                    f"clusters are drawn later; set {FIELD}.begin below 1"
                )
            if other.phase is Phase.PRUNE and self.during_fit and not other.during_fit:
                return (
                    f"{self.name} and {other.name}: the fit would run through clusters below which the mask is drawn "
                    f"later; set {FIELD}.begin=1"
                )
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        for name, linear in targets.items():
            if self.rows and linear.out_features % self.rows:
                raise ConfigError(
                    f"{FIELD}.rows={self.rows}: {name} has {linear.out_features} outputs, which it does not divide"
                )
            if 2**self.bits > linear.in_features * (self.rows or linear.out_features):
                raise ConfigError(
                    f"{FIELD}.bits={self.bits}: {name} has fewer weights to a table than its {2**self.bits} centroids"
                )

    def needs_fit(self) -> str | None:
        if not self.reassign and not 0 < self.begin < 1:
            return None
        given = "reassign" if self.reassign else "begin"
        return f"{FIELD}.{given}={getattr(self, given)}: needs a fit; trainer.max_epochs=0 has none"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        books = {linear: self._stack(linear) for linear in context.targets.values()}
        begin = max(round(self.begin * context.steps), 1) if 0 < self.begin < 1 else 0
        schedule = CodebookSchedule(
            books, start=self.start, seed=context.seed, begin=begin, reassign=self.reassign
        )  # fmt: skip
        if not begin:
            schedule.draw()
        return Effects(callbacks=[schedule], settled=begin)

    def _stack(self, linear: nn.Linear) -> Codebook:
        """A codebook on top of the chain of a linear; what learned below it, or what of it still does, decides whether
        the centroids learn."""
        chain = links(linear)
        chains: Any = linear.parametrizations if chain else None
        weight: Any = chains["weight"].original if chain else linear.weight
        delta = any(link.phase is Phase.TUNE for link in chain)
        masking = next((link for link in chain if link.kept() is not None), None)
        book = Codebook(
            weight.shape, bits=self.bits, rows=self.rows, follows=delta, below=masking
        ).to(weight.device)  # fmt: skip
        book.shift.requires_grad_((weight.requires_grad or delta) and self.during_fit)
        stack(linear, book)
        return book

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        found = {name: context.records[name] for name in context.targets if "indices" in context.records[name]}
        kept = {name: int(record["kept"].sum()) if "kept" in record else None for name, record in found.items()}
        edit = UseCodebook(modules=kept, bits=self.bits, rows=self.rows)
        edit.apply(model)
        sizes = {"dense_bytes": 0, "packed_bytes": 0, "huffman_bytes": 0}
        for name, record in found.items():
            linear: Any = model.get_submodule(name)
            linear.store(record["indices"], record["centroids"], record.get("kept"))
            for size, value in self._sizes(linear, record).items():
                sizes[size] += value
        context.facts["codebook"] = sizes
        return [edit]

    def _sizes(self, linear: CodebookLinear, record: Mapping[str, Tensor]) -> dict[str, int]:
        """Bytes of a weight in fp32, as it is stored, and in a Huffman code; the last two with the centroids."""
        table = record["centroids"].numel() * 4
        coded = shared_bytes(record["indices"], record.get("kept"), self.bits)
        return {
            "dense_bytes": record["indices"].numel() * 4,
            "packed_bytes": sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers()),
            "huffman_bytes": coded + table,
        }
