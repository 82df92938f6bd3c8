"""BERT (Devlin et al. 2019, arXiv:1810.04805)."""

from niwaki.model.anatomy import Family

FAMILY = Family(
    blocks="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    feed_in="intermediate.dense",
    feed_out="output.dense",
    attention_norm="attention.output.LayerNorm",
    feed_norm="output.LayerNorm",
    embeddings="embeddings.word_embeddings",
    pooler="pooler",
    causal=False,
    post_norm=True,
)
