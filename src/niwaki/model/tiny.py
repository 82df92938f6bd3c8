"""Tiny random models with a tokenizer of their own, for tests and for trying a setup out in seconds."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.load import Pretrained, auto_class, with_labels

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 512},
    "llama": {
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
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
            raise ConfigError(f"model.name={self.name!r}: needs {' or '.join(FAMILIES)}")

    @property
    def place(self) -> str:
        return self.name

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {piece: i for i, piece in enumerate(pieces())}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=64))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        segments = ["token_type_ids"] if getattr(self.config(), "type_vocab_size", 1) > 1 else []
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]", model_max_length=512,
            model_input_names=["input_ids", *segments, "attention_mask"],
        )  # fmt: skip

    def config(self) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.name, vocab_size=len(pieces()), **SIZES, **FAMILIES[self.name])
        return self.changed(config)

    def carried(self) -> list[Edit]:
        return []

    def load(self, task: Any, labels: Sequence[str], seed: int) -> Any:
        torch.manual_seed(seed)
        model = auto_class(task).from_config(with_labels(self.config(), labels), dtype=torch.float32)
        return self.padded(model).eval()


def pieces() -> list[str]:
    """The vocabulary: special tokens, characters, and characters inside a word."""
    return SPECIAL + list(CHARACTERS) + [f"##{character}" for character in CHARACTERS]
