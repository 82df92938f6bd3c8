"""What the tests of the bottleneck adapters share: blocks computed by hand, and models with adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from niwaki.model.anatomy import Anatomy
from niwaki.tuning.bottleneck import bottlenecks, edits_of

Change = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(output of a sublayer, its input, the norm of the block that belongs to it) -> what takes the place of the output."""


def unchanged(output: Tensor, *_: Any) -> Tensor:
    return output


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k / sqrt(d)) v, all (batch, heads, tokens, d); (batch, tokens, heads * d)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(values: Tensor, width: int = 8) -> Tensor:
    return values.unflatten(-1, (-1, width)).transpose(1, 2)


def bert_block(w: dict[str, Tensor], x: Tensor, attention: Change, feed: Change) -> Tensor:
    """One block of BERT: the norms follow the residual sums."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str) -> Callable[[Tensor], Tensor]:
        return lambda z: functional.layer_norm(z, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    first, second = norm("attention.output.LayerNorm"), norm("output.LayerNorm")
    q, k, v = (heads(linear(f"attention.self.{name}", x)) for name in ("query", "key", "value"))
    y = linear("attention.output.dense", attend(q, k, v, causal=False))
    a = first(attention(y, x, first) + x)
    f = linear("output.dense", functional.gelu(linear("intermediate.dense", a)))
    return second(feed(f, a, second) + a)


def llama_block(w: dict[str, Tensor], x: Tensor, attention: Change, feed: Change) -> Tensor:
    """One block of Llama: the norms stand before the sublayers."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str) -> Callable[[Tensor], Tensor]:
        return lambda z: w[f"{name}.weight"] * z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(values: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        cos, sin = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))
        left, right = values.chunk(2, -1)
        return values * cos + torch.cat([-right, left], -1) * sin

    first, second = norm("input_layernorm"), norm("post_attention_layernorm")
    n = first(x)
    q, k, v = (heads(linear(f"self_attn.{name}_proj", n)) for name in "qkv")
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    h = x + attention(linear("self_attn.o_proj", attend(rotated(q), rotated(k), v, causal=True)), n, first)
    m = second(h)
    gated = functional.silu(linear("mlp.gate_proj", m)) * linear("mlp.up_proj", m)
    return h + feed(linear("mlp.down_proj", gated), m, second)


BLOCKS = {"bert": bert_block, "llama": llama_block}


@pytest.fixture
def block_by_hand(setting: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`block_by_hand(one, index, attention, feed)`: what block `index` of the model gives, and the same by hand from
    the weights of the base and the changes of the two sublayers' outputs."""

    def compute(one: Any, index: int, attention: Change = unchanged, feed: Change = unchanged) -> tuple[Tensor, Tensor]:
        family = one.model.config.model_type
        seen: dict[str, Tensor] = {}

        def keep(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            seen["in"], seen["out"] = inputs[0], output if isinstance(output, Tensor) else output[0]

        handle = Anatomy.of(one.model).blocks[index].register_forward_hook(keep)
        ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
            handle.remove()
            base = Anatomy.of(setting(family).model).blocks[index].state_dict()
            return seen["out"], BLOCKS[family](base, seen["in"], attention, feed)

    return compute


@pytest.fixture
def grown() -> Callable[..., Any]:
    """`grown(one, tuning, random=...)`: put a tuning's bottlenecks on, ready to learn; returns the context. With
    `random` they compute something."""

    def put_on(one: Any, tuning: Any, *, random: bool = False) -> Any:
        tuning.grow(one.model, Anatomy.of(one.model))
        context = one.context()
        tuning.prepare(one.model, context)
        if random:
            shake(one.model)
        return context

    return put_on


def shake(model: Any, seed: int = 7) -> None:
    """Values that are not small for the newest adapter's bottlenecks."""
    generator = torch.Generator().manual_seed(seed)
    for bottleneck in bottlenecks(model, list(edits_of(model))[-1]).values():
        for parameter in bottleneck.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.fixture
def bottleneck_by_hand() -> Callable[..., Tensor]:
    """`bottleneck_by_hand(bottleneck, values, activation)`: U f(D x + b) + c, from the tensors alone."""
    return apply_bottleneck


def apply_bottleneck(bottleneck: Any, values: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    w = bottleneck.state_dict()
    return activation(values @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
