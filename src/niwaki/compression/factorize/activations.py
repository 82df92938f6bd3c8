"""What the linears of a model read: second moments of their inputs on calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.model.anatomy import Anatomy
from niwaki.model.text import in_decoder, text_of


def second_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Mapping[str, Tensor]],
    inputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """X X^T, (in, in) in double precision, of the inputs X (in, tokens) of each linear; padding does not count."""
    sums = {n: torch.zeros(linear.in_features, linear.in_features).double() for n, linear in linears.items()}
    state: dict[str, Any] = {}

    def add(name: str) -> Callable[..., None]:
        decoder = in_decoder(Anatomy.of(model), name)

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            read = tokens(arguments[0].detach(), text_of(state["batch"], decoder)).double()
            sums[name] += (read.t() @ read).cpu()

        return hook

    handles = [linear.register_forward_pre_hook(add(name)) for name, linear in linears.items()]
    try:
        with at_rest(model):
            for batch in batches:
                state["batch"] = batch
                model(**inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    return sums


def tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of `values` (..., in) that are no padding; all of them where the mask is of other places."""
    if mask is not None and mask.shape == values.shape[:-1]:
        return values[mask.bool()]
    return values.reshape(-1, values.shape[-1])


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients; afterwards as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
