"""A learned mask over the channels of the residual stream (z_hidden of CoFi, Xia et al. 2022, arXiv:2204.00408)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.compression.prune.hard_concrete import open_probability, sample, settled
from niwaki.model.stream import Stream
from niwaki.stage import Context
from niwaki.weights import cut_record

STREAM_MASK = "cofi_stream_mask"  # child of the model, during the fit
SPREAD = 0.01
OPEN = 10.0  # log alpha of channels and whole sublayers at the start, as in the authors' code; of a unit near 0


class StreamMask(nn.Module):
    """z for each channel. A norm in the stream is one over the channels whose z is not 0, and what it gives is
    multiplied by z; so is what enters the blocks without a norm.

    While it learns, z is drawn anew for each batch; in eval mode it is the mask of as many zeros as are expected, and
    after `settle` the one that was chosen, for good. One channel always stays.
    """

    open: Tensor
    is_settled: Tensor

    def __init__(self, stream: Stream, device: Any) -> None:
        super().__init__()
        self.stream = stream
        self.channel = nn.Parameter(torch.full((stream.width,), OPEN, device=device))
        self.register_buffer("open", torch.ones(stream.width, device=device))
        self.register_buffer("is_settled", torch.zeros((), dtype=torch.bool, device=device))
        self.hooks: list[Any] = []
        self._uniform: Tensor | None = None

    def factors(self) -> Tensor:
        """z, (channels,)."""
        if self.is_settled:
            return self.open
        if not self.training:
            return self.expected()
        if self._uniform is None:
            self._uniform = torch.rand_like(self.channel)
        return sample(self.channel, self._uniform)

    def forget(self) -> None:
        """Draw anew from here on."""
        self._uniform = None

    def probability(self) -> Tensor:
        """Of each channel, that its z is not zero: (channels,)."""
        return open_probability(self.channel)

    @torch.no_grad()
    def expected(self) -> Tensor:
        """The mask that would be kept now."""
        mask = settled(self.channel).to(self.open)
        if not mask.any():
            mask[self.channel.argmax()] = 1
        return mask

    @torch.no_grad()
    def ranks(self) -> Tensor:
        """The order in which channels close, as that of the units of a sublayer; infinite for the one that stays."""
        ranks = self.expected() + self.probability()
        ranks[ranks.argmax()] = torch.inf
        return ranks

    def settle(self, stays: Tensor) -> None:
        """Keep these channels for good."""
        self.open.copy_(stays)
        self.is_settled.fill_(True)

    def put_to_work(self, model: nn.Module) -> None:
        """Mask the norms, and what enters the blocks without one."""
        if self.hooks:
            return
        for name in self.stream.norms:
            self.hooks.append(model.get_submodule(name).register_forward_hook(self._normed))
        for name in self.stream.entrances:
            self.hooks.append(model.get_submodule(name).register_forward_hook(self._entering))

    def remove(self) -> list[int]:
        """Take the hooks off; the channels that stay."""
        for hook in self.hooks:
            hook.remove()
        return self.open.nonzero().flatten().tolist()

    def _entering(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.factors().to(output.dtype)

    def _normed(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        z = self.factors().to(output.dtype)
        stays = (z != 0).nonzero().flatten()
        if len(stays) < len(z):
            output = output.new_zeros(output.shape).index_copy(-1, stays, norm_of(norm, args[0], stays))
        return output * z


def norm_of(norm: Any, values: Tensor, stays: Tensor) -> Tensor:
    """What a norm would give if it were one over these channels alone: (..., channels that stay)."""
    scales = {name: parameter[stays] for name, parameter in norm.named_parameters(recurse=False)}
    shape = getattr(norm, "normalized_shape", None)
    hooks, norm._forward_hooks = norm._forward_hooks, type(norm._forward_hooks)()
    try:
        if shape is not None:
            norm.normalized_shape = (len(stays),)
        result: Tensor = functional_call(norm, scales, (values.index_select(-1, stays),))
        return result
    finally:
        norm._forward_hooks = hooks
        if shape is not None:
            norm.normalized_shape = shape


def add_stream_mask(model: nn.Module, stream: Stream | None, seed: int) -> StreamMask | None:
    """A mask of the stream, if there is one to mask, drawn near its start."""
    if stream is None:
        return None
    mask = StreamMask(stream, next(model.parameters()).device)
    noise = torch.randn(stream.width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mask.channel.add_(SPREAD * noise.to(mask.channel))
    model.add_module(STREAM_MASK, mask)
    return mask


def cut_stream_records(context: Context, stream: Stream, kept: Sequence[int]) -> None:
    """Cut what the links left behind at the fold as the linears will be."""
    for name in stream.writers:
        context.records[name] = cut_record(context.records.get(name, {}), rows=kept)
    for name in (*stream.tables, *stream.readers):
        context.records[name] = cut_record(context.records.get(name, {}), columns=kept)
