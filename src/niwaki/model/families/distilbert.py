"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108)."""

from niwaki.model.anatomy import Family, Stack

FAMILY = Family(
    stacks=(
        Stack(
            blocks="transformer.layer",
            count="n_layers",
            neurons="hidden_dim",
            attention="attention",
            attention_norm="sa_layer_norm",
            feed_norm="output_layer_norm",
            linears={
                "attention.q_lin": "query",
                "attention.k_lin": "key",
                "attention.v_lin": "value",
                "attention.out_lin": "output",
                "ffn.lin1": "feed_in",
                "ffn.lin2": "feed_out",
            },
        ),
    ),
    causal=False,
    post_norm=True,
)
