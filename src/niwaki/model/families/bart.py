"""BART (Lewis et al. 2019, arXiv:1910.13461): an encoder and a decoder; a language model is its decoder alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from niwaki.edits import Edit
from niwaki.model.anatomy import Family, Stack

SELF = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "output",
}
CROSS = {
    "encoder_attn.q_proj": "query",
    "encoder_attn.k_proj": "key",
    "encoder_attn.v_proj": "value",
    "encoder_attn.out_proj": "output",
}
FEED = {"fc1": "feed_in", "fc2": "feed_out"}


@dataclass(frozen=True, kw_only=True)
class DropCrossAttention(Edit):
    """A decoder alone never runs its attention to an encoder; it leaves the model."""

    carried: ClassVar[bool] = False  # every model of the family is changed so

    def apply(self, model: Any) -> None:
        for block in model.base_model.decoder.layers:
            block.encoder_attn = None
            block.encoder_attn_layer_norm = None


def edits(config: Any) -> list[Edit]:
    """What a loaded model is changed to."""
    return [] if config.is_encoder_decoder else [DropCrossAttention()]


ENCODER = Stack(
    blocks="encoder.layers",
    count="encoder_layers",
    heads="encoder_attention_heads",
    neurons="encoder_ffn_dim",
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    feed_norm="final_layer_norm",
    linears=SELF | FEED,
)
DECODER = Stack(
    blocks="decoder.layers",
    count="decoder_layers",
    heads="decoder_attention_heads",
    neurons="decoder_ffn_dim",
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    cross_attention="encoder_attn",
    cross_norm="encoder_attn_layer_norm",
    feed_norm="final_layer_norm",
    linears=SELF | CROSS | FEED,
    optional=frozenset(CROSS),
)
FAMILY = Family(
    stacks=(ENCODER, DECODER),
    causal=False,
    post_norm=True,
    reads_end=True,
    edits=edits,
    renamed={"BartForCausalLM": {r"^(model\.)?shared\.": "model.decoder.embed_tokens."}},
)
