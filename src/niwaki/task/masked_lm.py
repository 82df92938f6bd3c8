"""Masked language modelling: predict hidden tokens from both sides (Devlin et al. 2019, arXiv:1810.04805), others in
each epoch (Liu et al. 2019, arXiv:1907.11692); text packed in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.causal_lm import DOCUMENTS_AT_ONCE, documents
from niwaki.task.layout import edges
from niwaki.task.task import IGNORED, Batch, LikelihoodScores, Rows, Scores, Task, batched, pad

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become the mask, or any token; the others stay
WRITTEN = "[MASK]"  # how a mask may be written in a text, whatever the tokenizer calls it


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Mean negative log-likelihood per hidden token, its exponential (the perplexity), and the share of them guessed.

    Documents, as causal_lm has them, are joined by the tokenizer's separator and cut into blocks, each between the
    special tokens that the tokenizer puts around a text. Of a block's other tokens max(1, round(mask_share * n)) are
    chosen, or with `whole_word` as many whole words as these hold: 80% become the mask, 10% any token, 10% stay.

    What is chosen depends on the block and, in training, on the run's seed and the epoch; elsewhere on nothing else, so
    that every evaluation, before a fit and after it, asks the same of a model.
    """

    needs: ClassVar[Needs] = Needs(required=("text",))
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    head_learns: ClassVar[bool] = False
    head_may_be_new: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    unit: ClassVar[str] = "blocks"
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "mask_share", "fillings")
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692"

    mask_share: float = 0.15
    whole_word: bool = False
    fillings: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_share < 1:
            raise ConfigError(f"task.mask_share={self.mask_share}: needs a number above 0 and below 1")
        if self.fillings < 1:
            raise ConfigError(f"task.fillings={self.fillings}: needs a whole number of at least 1")

    def check_config(self, config: Any) -> None:
        from niwaki.model.anatomy import family_of

        kind = config.model_type
        if config.is_encoder_decoder:
            raise ConfigError(
                f"task={self.name}: needs an encoder, and {kind} is an encoder with a decoder, which writes texts; "
                "try model=tiny-bert, or name one by model=pretrained model.name=..."
            )
        if family_of(config).causal or getattr(config, "is_decoder", False):
            raise ConfigError(
                f"task={self.name}: needs a model that sees the whole text, and {kind} reads from left to right; use "
                "task=causal_lm, or try model=tiny-bert"
            )

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        refuse_without_mask(tokenizer)
        before, behind = edges(tokenizer)
        stream, begins = self._stream(rows["text"], tokenizer)
        special, room = set(tokenizer.all_special_ids), self.max_length - len(before) - len(behind)
        parts = [slice(i, i + room) for i in range(0, len(stream), room)]
        parts = [part for part in parts if not special.issuperset(stream[part])]  # one is predicted in each
        if not parts:
            raise DataError("a split has no token that could be predicted: needs some text that the tokenizer knows")
        blocks = [[*before, *stream[part], *behind] for part in parts]
        found: Rows = {"input_ids": blocks, "length": [len(block) for block in blocks]}
        if self.whole_word:
            found["begins"] = [[True] * len(before) + begins[part] + [True] * len(behind) for part in parts]
        return found

    def _stream(self, texts: Sequence[str], tokenizer: Any) -> tuple[list[int], list[bool]]:
        """The tokens of all documents with the separator between them; and, with `whole_word`, whether a word begins at
        each."""
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        stream: list[int] = []
        begins: list[bool] = []
        for part in batched(documents(texts), DOCUMENTS_AT_ONCE):
            encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for number, ids in enumerate(encoded["input_ids"]):
                between = [separator] if stream and ids and separator is not None else []
                stream += between + ids
                if self.whole_word:
                    words = encoded.word_ids(number)
                    begins += [True] * len(between) + [i == 0 or word != words[i - 1] for i, word in enumerate(words)]
        return stream, begins

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        return self._masked(features, tokenizer, ())

    def draw(self, features: list[dict[str, Any]], tokenizer: Any, drawing: tuple[int, int]) -> dict[str, Tensor]:
        return self._masked(features, tokenizer, drawing)

    def _masked(self, features: list[dict[str, Any]], tokenizer: Any, drawing: tuple[int, ...]) -> dict[str, Tensor]:
        special = np.unique(tokenizer.all_special_ids)
        rows = []
        for row in features:
            ids = np.array(row["input_ids"])
            dice = dice_of(ids, drawing)
            chosen = self._chosen(np.flatnonzero(~np.isin(ids, special)), row.get("begins"), dice)
            labels = np.full_like(ids, IGNORED)
            labels[chosen] = ids[chosen]
            ids[chosen] = replaced(ids[chosen], tokenizer.mask_token_id, special, len(tokenizer), dice)
            rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        return pad(rows, tokenizer, labels=True)

    def _chosen(self, places: np.ndarray, begins: Sequence[bool] | None, dice: np.random.Generator) -> np.ndarray:
        """Which of the `places` of tokens that are no special ones are to be predicted."""
        count = max(1, round(self.mask_share * len(places)))
        if begins is None:
            return dice.permutation(places)[:count]
        words = np.split(places, np.flatnonzero(np.array(begins)[places])[1:]) if len(places) else []
        chosen: list[int] = []
        for number in dice.permutation(len(words)):
            if not chosen or len(chosen) + len(words[number]) <= count:
                chosen += words[number].tolist()
        return np.array(chosen, dtype=int)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return hidden(outputs, batch)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return MaskScores()

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        from niwaki.model.anatomy import Anatomy

        positions = Anatomy.of(model).positions
        for part in batched(rows):
            features = [{"input_ids": with_masks(row["text"], tokenizer, positions)} for row in part]
            batch = {k: v.to(model.device) for k, v in pad(features, tokenizer).items()}
            chances = model(**self.inputs(batch)).logits.float().softmax(-1)
            for row, ids, spread in zip(part, batch["input_ids"], chances, strict=True):
                best = spread[ids == tokenizer.mask_token_id, : len(tokenizer)].topk(min(self.fillings, len(tokenizer)))
                pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                yield {**row, "fillings": [filled(*pair, tokenizer) for pair in pairs]}


def hidden(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (positions, tokens) and tokens (positions,) of the positions that were chosen."""
    keep = batch["labels"] != IGNORED
    return outputs.logits[keep], batch["labels"][keep]


def refuse_without_mask(tokenizer: Any) -> None:
    """Raise ConfigError for a tokenizer that cannot hide a token."""
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            f"task=masked_lm: the tokenizer of {tokenizer.name_or_path or 'the model'!r} has no mask token; needs a "
            "model that was trained with one, such as BERT or RoBERTa, or task=causal_lm"
        )


def dice_of(ids: np.ndarray, drawing: tuple[int, ...]) -> np.random.Generator:
    """A generator that is the same wherever and whenever this block is drawn for the same `drawing`."""
    told = hashlib.sha256(repr((ids.tolist(), drawing)).encode()).digest()
    return np.random.default_rng(int.from_bytes(told[:8], "big"))


def replaced(ids: np.ndarray, mask: int, special: np.ndarray, tokens: int, dice: np.random.Generator) -> np.ndarray:
    """What stands where these tokens were; a random one is none of the `special` ones, which are in ascending order."""
    fate = dice.random(len(ids))
    others = dice.integers(tokens - len(special), size=len(ids))
    for one in special:
        others += others >= one
    return np.where(fate < MASKED, mask, np.where(fate < MASKED + RANDOM, others, ids))


def with_masks(text: str, tokenizer: Any, positions: int | None) -> list[int]:
    """The tokens of a text in which the user wrote masks.

    Raises:
        DataError: there is none, or the text is longer than the model reads.
    """
    ids: list[int] = tokenizer(text.replace(WRITTEN, tokenizer.mask_token), verbose=False)["input_ids"]
    if tokenizer.mask_token_id not in ids:
        raise DataError(f"text {text[:40]!r}: has no mask; write {WRITTEN} where tokens are to be filled in")
    if positions is not None and len(ids) > positions:
        raise DataError(
            f"text {text[:40]!r}: its {len(ids)} tokens are more than the {positions} that the model reads; give a "
            "shorter text"
        )
    return ids


def filled(chances: Sequence[float], tokens: Sequence[int], tokenizer: Any) -> list[dict[str, Any]]:
    """The best tokens for one mask."""
    return [
        {"token": tokenizer.decode([token]).strip(), "score": round(chance, 4)}
        for chance, token in zip(chances, tokens, strict=True)
    ]


class MaskScores(LikelihoodScores):
    """Of every hidden token; and accuracy, the share of them that the model finds likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self._right = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, targets = hidden(outputs, batch)
        self.add(logits, targets)
        self._right += int((logits.argmax(-1) == targets).sum())

    def compute(self) -> dict[str, float]:
        return {**super().compute(), "accuracy": self._right / self._tokens}
