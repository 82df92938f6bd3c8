"""Vocabulary trimming: tokens that the data does not use leave tokenizer, embeddings and output layer (Abdaoui et al.
2020, arXiv:2010.05609)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from niwaki.data import tokens as pieces
from niwaki.data.corpus import Corpus
from niwaki.data.source import SPLITS
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import KeepTokens, table_of, token_fields
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.vocabulary"


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Stage):
    """Keep the tokens that stand at least `min_count` times in `splits`, with special and added ones; number them anew.

    A text of kept tokens is read as before, so a model says the same of it. Any other is read in smaller pieces, since
    with `alphabet` every single character or byte stays, and each piece that these cannot spell: no more is unknown
    than before. Without it, what the data did not show becomes the token for the unknown. `extra`: a text file (UTF-8)
    whose tokens stay too. With `splits=[train,validation,test]` the test is read as before, which is to look at it.
    """

    phase: ClassVar[Phase] = Phase.VOCABULARY
    paper: ClassVar[str] = "Abdaoui et al. 2020, arXiv:2010.05609"

    splits: Sequence[str] = ("train",)
    min_count: int = 1
    extra: str | None = None
    alphabet: bool = True

    def __post_init__(self) -> None:
        wrong = [split for split in self.splits if split not in SPLITS]
        if wrong or not self.splits or len(set(self.splits)) != len(self.splits):
            raise ConfigError(f"{FIELD}.splits={list(self.splits)}: needs different ones of {', '.join(SPLITS)}")
        if self.min_count < 1:
            raise ConfigError(f"{FIELD}.min_count={self.min_count}: needs a whole number of at least 1")

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        output = anatomy.model.get_output_embeddings()  # type: ignore[operator]
        if output is not None and len(output.weight) != table_of(anatomy.model).num_embeddings:
            raise ConfigError(
                f"{FIELD}: the output layer has {len(output.weight)} rows, the embeddings "
                f"{table_of(anatomy.model).num_embeddings}; needs one of each for every token"
            )

    def kept_tokens(self, corpus: Corpus, config: Any) -> list[int]:
        tokenizer, counts = corpus.tokenizer, corpus.token_counts(self.splits)
        if not self.alphabet and not pieces.has_unknown(tokenizer):
            raise ConfigError(
                f"{FIELD}.alphabet=false: the tokenizer has no token for what it cannot spell; needs alphabet=true"
            )
        kept = {*(counts >= self.min_count).nonzero()[0].tolist(), *self._extra(tokenizer)}
        kept |= pieces.always(tokenizer) | named_by(config) | (pieces.alphabet(tokenizer) if self.alphabet else set())
        kept = pieces.with_parts(tokenizer, kept)
        if kept >= set(tokenizer.get_vocab().values()):
            raise ConfigError(f"{FIELD}: the data uses all {len(tokenizer)} tokens of the model; leave it out")
        return sorted(kept)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        context.facts["tokens"] = {"before": table_of(model).num_embeddings, "after": len(context.tokens)}
        return Effects(edits=[self.trim(model, context.tokens)])

    def trim(self, model: Any, tokens: Sequence[int]) -> KeepTokens:
        refuse_shifted_positions(model, tokens)
        edit = KeepTokens.of(tokens)
        edit.apply(model)
        return edit

    def _extra(self, tokenizer: Any) -> set[int]:
        """The tokens of the text file that `extra` names, line by line."""
        if self.extra is None:
            return set()
        try:
            lines = Path(self.extra).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{FIELD}.extra={self.extra!r}: needs a text file in UTF-8 ({error})") from error
        found = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
        if not any(found):
            raise ConfigError(f"{FIELD}.extra={self.extra!r}: holds no token; needs some text, or null")
        return {token for row in found for token in row}


def named_by(config: Any) -> set[int]:
    """The tokens that a model's config names, as far as it has them."""
    named = [value if isinstance(value, list) else [value] for _, value in token_fields(config)]
    return {token for tokens in named for token in tokens if 0 <= token < config.vocab_size}


def refuse_shifted_positions(model: nn.Module, tokens: Sequence[int]) -> None:
    """Raise ConfigError where positions are counted from the number of the padding token (RoBERTa), and it changes."""
    for name, module in model.named_modules():
        counted = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        padding = module.padding_idx if counted else None
        if padding is not None and (len(tokens) <= padding or tokens[padding] != padding):
            raise ConfigError(
                f"{FIELD}: the positions of this model count from the number of its padding token, {padding}, which "
                "would change; use another model"
            )
