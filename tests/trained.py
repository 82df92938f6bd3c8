"""Tokenizers of several kinds, trained on a few lines, and models that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXTS = [
    "the old pine stands in the garden by the wall",
    "cut the pine in autumn, and wire the branches in winter",
    "a gardener waits; the tree does not hurry",
    "pruning is waiting with scissors in hand",
    "the garden is small, the mountain in it is not",
]
OTHERS = ["a stranger stands in the mountains", "winter branches, wired", "unheard: quartz vexing jumbo zephyrs"]


def fast(tokenizer: Any, **settings: Any) -> Any:
    """The tokenizer of transformers around one."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]", model_input_names=["input_ids", "attention_mask"], **settings,
    )  # fmt: skip


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def word_piece(texts: list[str] = TEXTS, size: int = 160) -> Any:
    """As BERT's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return fast(tokenizer)


def byte_pairs(texts: list[str] = TEXTS, size: int = 420) -> Any:
    """As GPT-2's and RoBERTa's: pairs of bytes, merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends)
    tokenizer.add_tokens(["<added>"])
    return fast(tokenizer)


def unigram(texts: list[str] = TEXTS) -> Any:
    """As T5's and ALBERT's: the words, their pairs of characters and the characters, each with a score of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    pairs = sorted({word[i : i + 2] for word in words for i in range(len(word) - 1)})
    scores = {name: 0.0 for name in SPECIAL}
    for start, pieces in ((-12.0, sorted(set("".join(words)))), (-9.0, pairs), (-7.0, words)):
        scores |= {piece: start - 0.01 * i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=SPECIAL.index("[UNK]")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return fast(tokenizer)


KINDS = {"WordPiece": word_piece, "BPE": byte_pairs, "Unigram": unigram}


def folder(place: Path, family: str, task: str, tokenizer: Any, **settings: Any) -> Path:
    """A Hugging Face folder of a tiny random model of a family that reads with this tokenizer."""
    from niwaki.model.load import auto_class
    from niwaki.model.tiny import Tiny
    from niwaki.task.causal_lm import CausalLM
    from niwaki.task.classification import Classification

    kind = {"classification": Classification(), "causal_lm": CausalLM()}[task]
    config = Tiny(name=family, dropout=0.0, overrides=settings).config()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = (
        tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
    )  # fmt: skip
    model = auto_class(kind, config).from_config(config)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
