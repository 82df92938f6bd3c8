"""T5 (Raffel et al. 2020, arXiv:1910.10683): an encoder and a decoder; its taggers have the encoder alone."""

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


ENCODER = Stack(
    blocks="encoder.block",
    count="num_layers",
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
    attention="layer.0.SelfAttention",
    attention_norm="layer.0.layer_norm",
    cross_attention="layer.1.EncDecAttention",
    cross_norm="layer.1.layer_norm",
    feed_norm="layer.2.layer_norm",
    linears=SELF | CROSS | feed(2),
    optional=either(2),
    first=FIRST,
)
FAMILY = Family(stacks=(ENCODER, DECODER), causal=False, post_norm=False, reads_end=True)
