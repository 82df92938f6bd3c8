"""Tiny random backbones of many families, straight from the configs of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT: dict[str, Any] = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout_rate": 0.0,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OF_ENCODER = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": SIZES | {"embedding_size": 16},
    "albert": SIZES | {"embedding_size": 16},
    "distilbert": SPECIAL | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "modernbert": SIZES | {"local_attention": 4, "global_attn_every_n_layers": 2},
    "deberta-v2": SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
OF_DECODER = {
    "gpt2": SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": SIZES | {"num_key_value_heads": 2},
    "qwen2": SIZES
    | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 16},
}
OF_BOTH = {
    "t5": SPECIAL | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                     "decoder_start_token_id": 0},
    "bart": SPECIAL | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                       "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
                       "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = OF_ENCODER | OF_DECODER | OF_BOTH


def config_of(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    for name, value in NO_DROPOUT.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def tiny(family: str, kind: str = "AutoModel", attention: str | None = None, seed: int = 0) -> Any:
    """A model of `family` in eval mode; weights large enough that a wrong position or mask shows."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_config(config_of(family), attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Whole:
    """As much of an anatomy as a family without a file of its own needs here."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backbone = model.base_model
        self.embeddings = model.get_input_embeddings()
        self.positions = getattr(model.config, "max_position_embeddings", None)


def rows(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths, padded on the right; the same row whatever stands beside it."""
    texts = [torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def turned(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows padded on the left."""
    pairs = [(row[keep.bool()], keep) for row, keep in zip(ids, mask, strict=True)]
    width = ids.shape[1]
    left = [torch.cat([row.new_zeros(width - len(row)), row]) for row, _ in pairs]
    return torch.stack(left), mask.flip(1)
