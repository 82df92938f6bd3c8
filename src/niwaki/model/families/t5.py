"""T5 (Raffel et al. 2020, arXiv:1910.10683): an encoder and a decoder; its taggers have the encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from niwaki.model.anatomy import Family, Stack

SELF = {
    "layer.0.SelfAttention.q": "query",
    "layer.0.SelfAttention.k": "key",
    "layer.0.SelfAttention.v": "value",
    "layer.0.SelfAttention.o": "output",
}
CROSS = {
    "layer.1.EncDecAttention.q": "query",
    "layer.1.EncDecAttention.k": "key",
    "layer.1.EncDecAttention.v": "value",
    "layer.1.EncDecAttention.o": "output",
}
FEED = {"wi_0": "feed_gate", "wi_1": "feed_in", "wi": "feed_in", "wo": "feed_out"}
EITHER = ("wi_0", "wi_1", "wi")  # the gated feed-forward of version 1.1 has two linears for the one of version 1.0
FIRST = "block 0 of a t5 alone has the table of relative positions"


def feed(layer: int) -> dict[str, str]:
    """The linears of the feed-forward layer at this place of a block."""
    return {f"layer.{layer}.DenseReluDense.{name}": part for name, part in FEED.items()}


def either(layer: int) -> frozenset[str]:
    """Those that a model may not have."""
    return frozenset(f"layer.{layer}.DenseReluDense.{name}" for name in EITHER)


class OwnBias:
    """Hooks of an attention: of the relative positions' bias, those heads that it still has.

    The table of block 0 serves every block, and each may have lost other heads. So table and bias stay whole, the bias
    is handed on whole, and each attention takes its own part. Cross attention has none; zeros are made for each.
    """

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads = list(heads)
        self._whole: Tensor | None = None

    def before(self, attention: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        whole = None if given.get("key_value_states") is not None else given.get("position_bias")
        if whole is None and attention.has_relative_attention_bias:
            hidden, cache = args[0] if args else given["hidden_states"], given.get("past_key_values")
            seen = cache.get_seq_length(attention.layer_idx) if cache is not None else 0
            length = hidden.shape[1]
            whole = attention.compute_bias(length, length + seen, device=hidden.device, past_seen_tokens=seen)
        self._whole = whole
        return args, given | {"position_bias": None if whole is None else whole[:, self.heads]}

    def after(self, attention: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        whole, self._whole = self._whole, None
        return output if whole is None else (output[0], whole, *output[2:])


def heads_cut(attention: nn.Module, heads: Sequence[int]) -> None:
    """Let an attention take its own part of the bias."""
    own = attention.__dict__.get("own_bias")
    if own is not None:
        own.heads = [own.heads[head] for head in heads]
        return
    own = OwnBias(heads)
    attention.__dict__["own_bias"] = own
    attention.register_forward_pre_hook(own.before, with_kwargs=True)
    attention.register_forward_hook(own.after)


ENCODER = Stack(
    blocks="encoder.block",
    count="num_layers",
    heads="num_heads",
    neurons="d_ff",
    attention="layer.0.SelfAttention",
    attention_norm="layer.0.layer_norm",
    feed_norm="layer.1.layer_norm",
    linears=SELF | feed(1),
    optional=either(1),
    first=FIRST,
)
DECODER = Stack(
    blocks="decoder.block",
    count="num_decoder_layers",
    heads="num_heads",
    neurons="d_ff",
    attention="layer.0.SelfAttention",
    attention_norm="layer.0.layer_norm",
    cross_attention="layer.1.EncDecAttention",
    cross_norm="layer.1.layer_norm",
    feed_norm="layer.2.layer_norm",
    linears=SELF | CROSS | feed(2),
    optional=either(2),
    first=FIRST,
)
FAMILY = Family(stacks=(ENCODER, DECODER), causal=False, post_norm=False, reads_end=True, heads_cut=heads_cut)
