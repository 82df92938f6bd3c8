"""DeBERTa, versions 2 and 3 (He et al. 2021, arXiv:2006.03654 and 2111.09543). Its pooler is part of the head."""

from typing import Any

from niwaki.model.anatomy import Family, Stack, table_of_positions


def positions(config: Any) -> int | None:
    """Relative positions are clipped, so only a table of absolute ones sets a bound."""
    return table_of_positions(config) if config.position_biased_input else None


FAMILY = Family(
    stacks=(
        Stack(
            blocks="encoder.layer",
            attention="attention.self",
            attention_norm="attention.output.LayerNorm",
            feed_norm="output.LayerNorm",
            linears={
                "attention.self.query_proj": "query",
                "attention.self.key_proj": "key",
                "attention.self.value_proj": "value",
                # Of the relative positions (the paper's W_q,r and W_k,r), where they do not share those of the text.
                "attention.self.pos_query_proj": "query",
                "attention.self.pos_key_proj": "key",
                "attention.output.dense": "output",
                "intermediate.dense": "feed_in",
                "output.dense": "feed_out",
            },
            optional=frozenset({"attention.self.pos_query_proj", "attention.self.pos_key_proj"}),
        ),
    ),
    causal=False,
    post_norm=True,
    positions=positions,
    beside_stream=("encoder.rel_embeddings",),
)
