"""Llama (Touvron et al. 2023, arXiv:2302.13971)."""

from niwaki.model.anatomy import Family, Stack

FAMILY = Family(
    stacks=(
        Stack(
            blocks="layers",
            attention="self_attn",
            attention_norm="input_layernorm",
            feed_norm="post_attention_layernorm",
            linears={
                "self_attn.q_proj": "query",
                "self_attn.k_proj": "key",
                "self_attn.v_proj": "value",
                "self_attn.o_proj": "output",
                "mlp.gate_proj": "feed_gate",
                "mlp.up_proj": "feed_in",
                "mlp.down_proj": "feed_out",
            },
        ),
    ),
    causal=True,
    post_norm=False,
)
