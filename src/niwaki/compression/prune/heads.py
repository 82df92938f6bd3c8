"""Pruning of attention heads (Michel et al. 2019, arXiv:1905.10650), cut out for real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.compression.prune.structured import Structured
from niwaki.model.units import Kind


@dataclass(frozen=True, kw_only=True)
class Heads(Structured):
    """Drop the heads of least importance: their rows of query, key and value, and their inputs of the output.

    `importance`: taylor is the paper's I_h = E_x |dL(x)/dxi_h| with xi_h = 1 a factor of the head's output; activation
    is the mean |output|; magnitude the l2 norm of the head's weights. Under grouped-query attention a key-value head
    goes together with its query heads, and counts as one. Size of a head, scaling and positions stay as they are.
    """

    kind: ClassVar[Kind] = "heads"
    paper: ClassVar[str] = "Michel et al. 2019, arXiv:1905.10650; Voita et al. 2019, arXiv:1905.09418"
