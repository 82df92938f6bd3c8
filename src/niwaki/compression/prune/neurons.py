"""Pruning of feed-forward neurons (Molchanov et al. 2017, arXiv:1611.06440), cut out for real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.compression.prune.structured import Structured
from niwaki.model.units import Kind


@dataclass(frozen=True, kw_only=True)
class Neurons(Structured):
    """Drop the neurons of least importance: their row of feed_in (and of the gate), and their input of feed_out.

    `importance`: taylor is the paper's |sum of a dL/da| of the neuron's activation a, a mean over texts; activation is
    the mean |a|; magnitude the l2 norm of the neuron's weights.
    """

    kind: ClassVar[Kind] = "neurons"
    paper: ClassVar[str] = "Molchanov et al. 2017, arXiv:1611.06440; McCarley et al. 2019, arXiv:1910.06360"
