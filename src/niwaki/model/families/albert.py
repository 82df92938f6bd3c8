"""ALBERT (Lan et al. 2019, arXiv:1909.11942): groups of blocks that all layers share, most often one of one block."""

from niwaki.model.anatomy import Family, Stack

FAMILY = Family(
    stacks=(
        Stack(
            blocks="encoder.albert_layer_groups.*.albert_layers",
            attention="attention",
            attention_norm="attention.LayerNorm",
            feed_norm="full_layer_layer_norm",
            linears={
                "attention.query": "query",
                "attention.key": "key",
                "attention.value": "value",
                "attention.dense": "output",
                "ffn": "feed_in",
                "ffn_output": "feed_out",
            },
        ),
    ),
    pooler="pooler",
    causal=False,
    post_norm=True,
    fixed=lambda config: "all layers of an albert share their blocks",
)
