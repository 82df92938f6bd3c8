"""Llama (Touvron et al. 2023, arXiv:2302.13971)."""

from niwaki.model.anatomy import Family

FAMILY = Family(
    blocks="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    feed_gate="mlp.gate_proj",
    feed_in="mlp.up_proj",
    feed_out="mlp.down_proj",
    attention_norm="input_layernorm",
    feed_norm="post_attention_layernorm",
    embeddings="embed_tokens",
    causal=True,
    post_norm=False,
)
