"""A model from nothing: a family of any size with random weights, and a tokenizer learned from the training rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from niwaki.data.source import Needs, Source
from niwaki.errors import ConfigError, DataError
from niwaki.model.anatomy import family_of, known_families
from niwaki.model.load import fitted
from niwaki.model.tiny import Tiny

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]  # of T5
UNREAD = ("label", "labels", "tags", "id", "entry_point")  # columns whose text is read by nobody


@dataclass(frozen=True, kw_only=True)
class Scratch(Tiny):
    """A model of the family `name`: `blocks` blocks of `width` with `heads` heads of attention and feed-forwards of
    `neurons` neurons (null: four times the width), which reads at most `positions` tokens. An encoder-decoder has so
    many blocks on either side.

    The tokenizer is learned from the texts of the training rows: byte-level BPE (Radford et al. 2019) with at most
    `vocabulary` tokens, in lower case for encoders.
    """

    name: str = "bert"
    blocks: int = 2
    width: int = 128
    heads: int = 2
    neurons: int | None = None
    positions: int = 512
    vocabulary: int = 8000
    learned: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name not in known_families():
            raise ConfigError(f"model.name={self.name!r}: needs one of {', '.join(known_families())}")
        for name, least in (("blocks", 1), ("width", 8), ("heads", 1), ("positions", 8), ("vocabulary", 300)):
            if getattr(self, name) < least:
                raise ConfigError(f"model.{name}={getattr(self, name)}: needs a whole number of at least {least}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(
                f"model.heads={self.heads}: needs a number that divides model.width={self.width} into even parts"
            )
        super().__post_init__()

    def learn(self, source: Source, needs: Needs, seed: int) -> None:
        rows = source.splits(needs, seed)["train"]
        columns = [name for name in rows.column_names if name not in UNREAD]
        writes = family_of(self.shape()).causal or self.shape().is_encoder_decoder
        self.learned[:] = [byte_pairs(texts_in(rows[name] for name in columns), self.vocabulary, lower=not writes)]

    def tokenizer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        assert self.learned, "the tokenizer is learned first"
        plain = PreTrainedTokenizerFast(
            tokenizer_object=self.learned[0], pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
            sep_token="[SEP]", mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]",
            model_max_length=self.positions, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            **({"extra_special_tokens": SENTINELS} if self.name == "t5" else {}),
        )  # fmt: skip
        return fitted(plain, self.config())

    def shape(self) -> Any:
        """The config without the tokens, which are not known yet."""
        from transformers import AutoConfig

        neurons = self.neurons or 4 * self.width
        wanted: dict[str, Any] = {
            "hidden_size": self.width, "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads, "intermediate_size": neurons, "max_position_embeddings": self.positions,
            "embedding_size": self.width, "head_dim": self.width // self.heads, "n_inner": neurons,
            "hidden_dim": neurons, "encoder_ffn_dim": neurons, "decoder_ffn_dim": neurons, "d_ff": neurons,
            "d_kv": self.width // self.heads, "decoder_layers": self.blocks, "num_decoder_layers": self.blocks,
            "decoder_attention_heads": self.heads, "tie_word_embeddings": True, "forced_eos_token_id": None,
            **IDS,
        }  # fmt: skip
        plain = AutoConfig.for_model(self.name)
        own = {name: value for name, value in wanted.items() if hasattr(plain, name)}
        if plain.is_encoder_decoder:
            own["decoder_start_token_id"] = IDS["pad_token_id" if self.name == "t5" else "eos_token_id"]
        if self.name == "deberta-v2":
            own |= {"relative_attention": True, "position_buckets": 32, "position_biased_input": False}
            own |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
        return AutoConfig.for_model(self.name, **own)

    def config(self) -> Any:
        config = self.shape()
        if self.learned:
            config.vocab_size = self.learned[0].get_vocab_size() + (len(SENTINELS) if self.name == "t5" else 0)
        return self.changed(config)


def texts_in(values: Any) -> Iterator[str]:
    """Every text in lists and mappings of any depth."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from texts_in(value)
    elif values is not None and not isinstance(values, int | float):
        for value in values:
            yield from texts_in(value)


def byte_pairs(texts: Iterator[str], size: int, *, lower: bool) -> Any:
    """A byte-level BPE tokenizer, learned from `texts`, in lower case or not; any text can be written in it. It is the
    same in every process, as one of WordPiece would not be.

    Raises:
        DataError: there is nothing to learn from.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    if lower:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL) + len(alphabet):
        raise DataError("data.train: there is no text that a tokenizer could be learned from")
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer
