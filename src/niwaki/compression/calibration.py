"""Calibration rows, and what enters each linear while they go through the model, block after block."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.model.text import in_decoder, text_of
from niwaki.stage import Context

Gather = Callable[[str, Tensor], None]
"""(name of a linear, what enters it: (tokens, inputs))."""

Calls = list[tuple[nn.Module, Any]]
"""Blocks in the order in which they are called, each with what it gives; one that is used several times as often."""


class Enough(Exception):
    """The blocks that are looked at have been passed."""


def check_rows(rows: int, field: str) -> None:
    """Raise ConfigError for no calibration rows."""
    if rows < 1:
        raise ConfigError(f"{field}.rows={rows}: needs a whole number of at least 1; there is nothing else to look at")


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch where the model is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """(..., inputs) -> (tokens, inputs) without padding: positions whose attention mask (rows, length) is 0. Longer
    rows begin with virtual tokens, which all count; what has another shape (tables of positions) counts whole."""
    extra = values.shape[1] - mask.shape[1] if mask is not None and values.ndim == 3 else -1
    if mask is None or extra < 0 or len(values) != len(mask):
        return values.reshape(-1, values.shape[-1])
    virtual = mask.new_ones(len(mask), extra)
    return values[torch.cat([virtual, mask], 1).bool()]


def watch_inputs(
    model: nn.Module, context: Context, batches: Sequence[Mapping[str, Tensor]], linears: Mapping[str, nn.Linear],
    gather: Gather, stop: nn.Module | None,
) -> None:  # fmt: skip
    """Run the batches, and show what enters `linears` to `gather`, until `stop` is entered."""
    masks: dict[bool, Tensor] = {}

    def show(name: str) -> Any:
        decoder = in_decoder(context.anatomy, name)
        return lambda module, inputs: gather(name, tokens(inputs[0].detach(), masks[decoder]))

    def leave(module: nn.Module, inputs: Any) -> None:
        raise Enough

    handles = [linear.register_forward_pre_hook(show(name)) for name, linear in linears.items()]
    handles += [stop.register_forward_pre_hook(leave)] if stop is not None else []
    device = next(model.parameters()).device
    try:
        for batch in batches:
            moved = to_device(batch, device)
            masks |= {decoder: text_of(moved, decoder) for decoder in (False, True)}
            with suppress(Enough):
                model(**context.inputs(moved))
    finally:
        for handle in handles:
            handle.remove()


def entered(
    model: nn.Module, context: Context, batch: Mapping[str, Tensor], blocks: Sequence[nn.Module]
) -> list[nn.Module]:  # fmt: skip
    """These blocks in the order in which a batch enters them; one that is used several times stands there as often."""
    found: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any) -> None:
        found.append(module)

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        model(**context.inputs(to_device(batch, next(model.parameters()).device)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def after_last_use(block: nn.Module, order: Sequence[nn.Module]) -> nn.Module | None:
    """The first block that is new when this one has been used for the last time; None where there is none."""
    last = max((place for place, used in enumerate(order) if used is block), default=len(order))
    return next((later for later in order[last + 1 :] if later not in order[: last + 1]), None)


def block_by_block(
    model: nn.Module, context: Context, rows: int, linears: Mapping[str, nn.Linear],
    statistic: Callable[[Tensor], Any], act: Callable[[dict[str, Any]], None], field: str,
) -> None:  # fmt: skip
    """Sum up a `statistic` of what enters each linear over `rows` rows of the training split, in eval mode, and `act`
    on those of a block before the next is looked at, which so sees what the changed ones before it give. One that is
    used several times is looked at once, in all of its uses. Each block costs a pass through those below it.

    Raises:
        ConfigError: nothing enters one of the linears; names the `field`.
    """
    batches = context.calibration(rows)
    blocks = [(place, block) for place, _, block in context.anatomy.named_blocks()]
    looked_at = [(block, names) for place, block in blocks if (names := inside(place, linears))]
    with evaluating(model), torch.no_grad():
        order = entered(model, context, batches[0], [block for block, _ in looked_at])
        for block, names in looked_at:
            found: dict[str, Any] = {}

            def gather(name: str, values: Tensor, found: dict[str, Any] = found) -> None:
                part = statistic(values.float())
                found[name] = found[name] + part if name in found else part

            stop = after_last_use(block, order)
            watch_inputs(model, context, batches, {name: linears[name] for name in names}, gather, stop)
            silent = [name for name in names if name not in found]
            if silent:
                raise ConfigError(f"{field}: nothing enters {silent[0]} when the model runs; leave it out by targets")
            odd = [name for name, total in found.items() if not finite(total)]
            if odd:
                raise ConfigError(
                    f"{field}: what enters {odd[0]} is not finite on the training rows, or its sums are not"
                )
            act(found)


def finite(statistic: Any) -> bool:
    """Whether the tensors of a statistic, or of its fields, hold numbers alone."""
    if isinstance(statistic, Tensor):
        return bool(statistic.isfinite().all())
    return all(finite(field) for field in vars(statistic).values()) if hasattr(statistic, "__dict__") else True


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[Calls]:
    """Within: a list that fills with the blocks that are called, and what they give."""
    calls: Calls = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((module, output))

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(calls: Calls) -> Iterator[None]:
    """Within: the blocks of these calls give again what they gave, without computing it; called more often, they
    compute."""
    given: dict[nn.Module, list[Any]] = {}
    for block, output in calls:
        given.setdefault(block, []).append(output)
    own = {block: vars(block).get("forward") for block in given}
    for block, outputs in given.items():
        block.forward = replay(block.forward, outputs)
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def replay(forward: Callable[..., Any], outputs: Sequence[Any]) -> Callable[..., Any]:
    """A function that gives these outputs, one a call, and then does what `forward` does."""
    left = deque(outputs)

    def give(*inputs: Any, **named: Any) -> Any:
        return left.popleft() if left else forward(*inputs, **named)

    return give


def inside(place: str, names: Mapping[str, Any]) -> list[str]:
    """Those of `names` that lie in a block."""
    return [name for name in names if name.startswith(f"{place}.")]


def cholesky_of_inverse(hessian: Tensor, damping: float) -> Tensor:
    """The upper U with U^T U = (H + damping * mean(diag(H)) I)^-1, in float64. U_jj^2 is [H^-1]_jj of what is left of H
    without the columns before j, and U_j: / U_jj the row of that inverse over the same."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
