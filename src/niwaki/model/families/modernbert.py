"""ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""

from niwaki.model.anatomy import Family, Stack

FAMILY = Family(
    stacks=(
        Stack(
            blocks="layers",
            attention="attn",
            attention_norm="attn_norm",
            feed_norm="mlp_norm",
            linears={
                "attn.Wqkv": "query key value",
                "attn.Wo": "output",
                "mlp.Wi": "feed_in feed_gate",
                "mlp.Wo": "feed_out",
            },
            first="block 0 of a modernbert alone has no norm before its attention",
        ),
    ),
    causal=False,
    post_norm=False,
)
