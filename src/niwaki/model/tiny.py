"""Tiny random models with a tokenizer of their own, for tests and for trying a setup out in seconds."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import adapt
from niwaki.model.load import Pretrained, auto_class, fitted, with_labels

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
SENTINELS = {"t5": [f"<extra_id_{number}>" for number in range(32)]}  # what stands for a span that was left out
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
POSITIONS = {"max_position_embeddings": 512}
FAR = {"max_position_embeddings": 2048}  # where positions have no weights
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": POSITIONS,
    "llama": {
        **FAR, **TOKENS, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "roberta": {**POSITIONS, **TOKENS},
    "distilbert": {**POSITIONS, "hidden_dim": 64},
    "electra": {**POSITIONS, "embedding_size": 16},
    # Versions 2 and 3 share the attention's linears between text and relative positions.
    "deberta-v2": {
        **POSITIONS, "relative_attention": True, "position_buckets": 16, "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {**POSITIONS, **TOKENS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    "qwen2": {**FAR, **TOKENS, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**FAR, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "albert": {**POSITIONS, **TOKENS, "embedding_size": 16},
    "gpt2": {"n_positions": 512, "n_inner": 64, **TOKENS},
    "bart": {
        **POSITIONS, **TOKENS, "encoder_ffn_dim": 64, "decoder_layers": 3, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64, "decoder_start_token_id": 3, "forced_eos_token_id": None,
    },
    "t5": {
        "d_kv": 8, "d_ff": 64, "num_decoder_layers": 3, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tiny(Pretrained):
    """A random model of a family, 3 blocks of width 32, on characters. Nothing is read from anywhere."""

    name: str = "bert"
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in FAMILIES:
            raise ConfigError(f"model.name={self.name!r}: needs one of {', '.join(FAMILIES)}")

    @property
    def place(self) -> str:
        return self.name

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {piece: i for i, piece in enumerate(pieces(self.name))}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=64))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        plain = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]", model_max_length=512,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            extra_special_tokens=SENTINELS.get(self.name, []),
        )  # fmt: skip
        return fitted(plain, self.config())

    def config(self) -> Any:
        from transformers import AutoConfig

        plain = AutoConfig.for_model(self.name)
        sizes = {name: value for name, value in SIZES.items() if hasattr(plain, name)}
        return self.changed(
            AutoConfig.for_model(self.name, vocab_size=len(pieces(self.name)), **sizes, **FAMILIES[self.name])
        )

    def carried(self) -> list[Edit]:
        return []

    def load(self, task: Any, labels: Sequence[str], seed: int) -> Any:
        torch.manual_seed(seed)
        config = with_labels(self.config(), task.outputs(labels))
        model = auto_class(task, config).from_config(config, dtype=torch.float32)
        task.attach(model, labels)
        adapt(model)
        return self.padded(model).eval()


def pieces(name: str = "bert") -> list[str]:
    """The vocabulary of a family: special tokens, characters, characters inside a word, and sentinels."""
    return [*SPECIAL, *CHARACTERS, *(f"##{character}" for character in CHARACTERS), *SENTINELS.get(name, [])]
