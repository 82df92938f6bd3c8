"""BERT (Devlin et al. 2019, arXiv:1810.04805)."""

from niwaki.model.anatomy import Family, Stack

FAMILY = Family(
    stacks=(
        Stack(
            blocks="encoder.layer",
            attention="attention.self",
            attention_norm="attention.output.LayerNorm",
            feed_norm="output.LayerNorm",
            linears={
                "attention.self.query": "query",
                "attention.self.key": "key",
                "attention.self.value": "value",
                "attention.output.dense": "output",
                "intermediate.dense": "feed_in",
                "output.dense": "feed_out",
            },
        ),
    ),
    pooler="pooler",
    causal=False,
    post_norm=True,
)
