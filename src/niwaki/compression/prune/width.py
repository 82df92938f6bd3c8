"""Pruning of the residual width (Minitron, Muralidharan et al. 2024, arXiv:2407.14679), cut out for real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.compression.prune.importance import Importance, measure_channels
from niwaki.compression.prune.structured import ROWS, lowest_dropped
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.stream import KeepWidth, Stream, keep_channels, stream_of
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.width"


@dataclass(frozen=True, kw_only=True)
class Width(Stage):
    """Drop the channels of least importance from the residual stream: their columns of the embeddings, their entries of
    the norms, their row of every linear that writes to the stream and their input of every linear that reads it.

    Attention and feed-forward keep their inner sizes. A norm is one over the channels that stay from then on, so this
    is the model in which the others are zero, and no norm counts them. `ratio`: round(ratio * width) channels go;
    `keep`: so many stay instead. `importance`: activation is the mean |output| of the norms in the stream (the paper's
    for embedding channels), taylor |sum over norms and tokens of a dL/da|, a mean over texts; magnitude the l2 norm of
    all weights at the channel.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    paper: ClassVar[str] = "Muralidharan et al. 2024, arXiv:2407.14679"

    ratio: float | None = None
    keep: int | None = None
    importance: Importance = "magnitude"
    calibration: int | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"{FIELD}.ratio={self.ratio}: needs a number above 0 and below 1")
        if self.ratio is not None and self.keep is not None:
            raise ConfigError(f"{FIELD}.ratio={self.ratio}: has no effect beside {FIELD}.keep; leave one out")
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"{FIELD}.keep={self.keep}: needs a whole number of at least 1")
        if self.importance not in ("magnitude", "taylor", "activation"):
            raise ConfigError(f"{FIELD}.importance={self.importance!r}: needs magnitude, taylor or activation")
        if self.calibration is not None and self.calibration < 1:
            raise ConfigError(f"{FIELD}.calibration={self.calibration}: needs null or a whole number of at least 1")
        if self.calibration is not None and self.importance == "magnitude":
            raise ConfigError(
                f"{FIELD}.calibration={self.calibration}: has no effect with importance=magnitude; leave null"
            )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self._left(checked_stream(anatomy, self.name))

    def outline(self, model: nn.Module) -> None:
        stream = checked_stream(Anatomy.of(model), self.name)
        keep_channels(model, stream, range(self._left(stream)))

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        stream = checked_stream(context.anatomy, self.name)
        left = self._left(stream)
        scores = measure_channels(model, stream, self.importance, self.calibration or ROWS, context)
        kept = lowest_dropped(scores, stream.width - left).nonzero().flatten().tolist()
        keep_channels(model, stream, kept)
        context.facts["kept_channels"] = kept
        return Effects(edits=[KeepWidth(kept=left)])

    def _left(self, stream: Stream) -> int:
        """How many channels stay."""
        left = self.keep or stream.width - round((0.5 if self.ratio is None else self.ratio) * stream.width)
        asked = f"ratio={self.ratio}" if self.keep is None else f"keep={self.keep}"
        if not 0 < left < stream.width:
            why = "leaves none of" if not left else "has no effect on"
            raise ConfigError(
                f"{FIELD}.{asked}: {why} the {stream.width} channels; needs one that keeps 1 to {stream.width - 1}"
            )
        return left


def checked_stream(anatomy: Anatomy, method: str) -> Stream:
    """The stream of a model, for a method that makes it narrower.

    Raises:
        ConfigError: it cannot be cut; names the method.
    """
    try:
        return stream_of(anatomy)
    except ValueError as error:
        raise ConfigError(f"compression: {method}: {error}, so it cannot be made narrower") from error
