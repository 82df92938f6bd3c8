"""Span corruption: an encoder reads a text with spans left out, a decoder writes these (Raffel et al. 2020,
arXiv:1910.10683)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.causal_lm import DOCUMENTS_AT_ONCE, documents
from niwaki.task.kept import kept
from niwaki.task.layout import CROSSED, end_of
from niwaki.task.masked_lm import dice_of
from niwaki.task.search import Search
from niwaki.task.task import IGNORED, Batch, LikelihoodScores, Rows, Scores, Task, batched

SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Task):
    """Mean negative log-likelihood per token of the targets, its exponential (the perplexity), and the share guessed.

    Documents, as causal_lm has them, each with an end token behind it, are cut into blocks. Of a block's n tokens
    round(noise_share * n) are left out, in round(that / mean_span) spans of random lengths with text before each; a
    sentinel <extra_id_i> stands where the i-th was. The target is each sentinel with its span, a last sentinel, and the
    end token. A block has as many tokens as leave `max_length` for the encoder. Spans are drawn as masked_lm draws.
    """

    needs: ClassVar[Needs] = Needs(required=("text",))
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    head_learns: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "max_new_tokens")
    paper: ClassVar[str] = "Raffel et al. 2020, arXiv:1910.10683"

    noise_share: float = 0.15
    mean_span: float = 3.0
    max_new_tokens: int = 64
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.noise_share < 1:
            raise ConfigError(f"task.noise_share={self.noise_share}: needs a number above 0 and below 1")
        if self.mean_span < 1:
            raise ConfigError(f"task.mean_span={self.mean_span}: needs a number of at least 1")
        if self.max_new_tokens < 1:
            raise ConfigError(f"task.max_new_tokens={self.max_new_tokens}: needs a whole number of at least 1")

    def check_config(self, config: Any) -> None:
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"task={self.name}: an encoder reads what is left and a decoder writes what is not, and "
                f"{config.model_type} is one of the two; use task=causal_lm or masked_lm, or try model=tiny-t5"
            )

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        end, length = end_of(tokenizer), self.block
        sentinels_of(tokenizer, self._spans(length)[1] + 1)
        stream: list[int] = []
        for part in batched(documents(rows["text"]), DOCUMENTS_AT_ONCE):
            encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            stream += [token for ids in encoded["input_ids"] if ids for token in (*ids, end)]
        blocks = [stream[i : i + length] for i in range(0, len(stream), length)]
        blocks = [block for block in blocks if len(block) > 1]  # one token is left, and one is left out
        if not blocks:
            raise DataError(f"a split has {len(stream)} tokens: needs at least 2, so that one is told from another")
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    @property
    def block(self) -> int:
        """The most tokens of which `max_length` are read: those that stay, sentinels and the end token."""
        length = self.max_length
        while self._read(length + 1) <= self.max_length:
            length += 1
        while self._read(length) > self.max_length:
            length -= 1
        return length

    def _read(self, length: int) -> int:
        noise, spans = self._spans(length)
        return length - noise + spans + 1

    def _spans(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are left out, and in how many spans."""
        noise = min(max(round(length * self.noise_share), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        return self._corrupted(features, tokenizer, ())

    def draw(self, features: list[dict[str, Any]], tokenizer: Any, drawing: tuple[int, int]) -> dict[str, Tensor]:
        return self._corrupted(features, tokenizer, drawing)

    def _corrupted(self, features: list[dict[str, Any]], tokenizer: Any, drawing: tuple[int, ...]) -> dict[str, Tensor]:
        end, rows = end_of(tokenizer), []
        for row in features:
            ids = list(row["input_ids"])
            noise, spans = self._spans(len(ids))
            dice = dice_of(np.array(ids), drawing)
            left, out = segments(len(ids) - noise, spans, dice), segments(noise, spans, dice)
            source, target = corrupted(ids, left, out, sentinels_of(tokenizer, spans + 1))
            rows.append({"input_ids": [*source, end], "labels": [*target, end]})
        return CROSSED.collate(rows, tokenizer)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return CROSSED.inputs(batch)

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        logits, targets = (one.flatten(0, 1) for one in CROSSED.aligned(outputs, batch))
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = CROSSED.aligned(outputs, batch)
        keep = targets != IGNORED
        return logits[keep], targets[keep]

    @property
    def writing(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens}

    def write(self, model: Any, batch: Batch, *, num_beams: int) -> Tensor:
        asked = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": self.max_new_tokens}
        return CROSSED.write(model, batch, Search(asked))

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        return CROSSED.retold(batch, written)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return SpanScores()

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        end, known = end_of(tokenizer), sentinels_of(tokenizer, 1)
        for part in batched(rows):
            texts = tokenizer(
                [row["text"] for row in part], add_special_tokens=False, split_special_tokens=False, verbose=False
            )["input_ids"]
            for row, ids in zip(part, texts, strict=True):
                if not set(known) & set(ids):
                    raise DataError(
                        f"text {row['text'][:40]!r}: leaves nothing out; write {SENTINEL.format(0)} where a span is to "
                        f"be filled in, {SENTINEL.format(1)} for the next"
                    )
            batch = CROSSED.collate([{"input_ids": [*ids, end]} for ids in texts], tokenizer)
            written = self.write(model, {k: v.to(model.device) for k, v in batch.items()}, num_beams=1)
            for row, ids, tokens in zip(part, texts, written.tolist(), strict=True):
                found = spans_in([token for token in tokens if token != IGNORED], set(known))
                asked = [token for token in ids if token in set(known)]
                filled = [tokenizer.decode(found.get(token, []), skip_special_tokens=True).strip() for token in asked]
                yield {**row, "spans": filled}


def sentinels_of(tokenizer: Any, least: int) -> list[int]:
    """The numbers of <extra_id_0>, <extra_id_1>, ...

    Raises:
        ConfigError: there are fewer than `least`.
    """
    found = sentinels(tokenizer)
    if len(found) < least:
        raise ConfigError(
            f"task=span_corruption: the tokenizer of {tokenizer.name_or_path or 'the model'!r} has {len(found)} "
            f"sentinels <extra_id_..>, and a block needs {least}; needs a model such as T5, which has 100, or a lower "
            "task.max_length"
        )
    return list(found)


@kept
def sentinels(tokenizer: Any) -> tuple[int, ...]:
    """All that the tokenizer knows."""
    numbers = (tokenizer.convert_tokens_to_ids(SENTINEL.format(number)) for number in count())
    return tuple(takewhile(lambda one: one is not None and one != tokenizer.unk_token_id, numbers))


def segments(items: int, count: int, dice: np.random.Generator) -> list[int]:
    """The lengths of `count` segments of so many items, each of at least one; every way to cut is as likely."""
    cuts = np.sort(dice.choice(np.arange(1, items), count - 1, replace=False)) if count > 1 else np.array([], dtype=int)
    return [int(length) for length in np.diff([0, *cuts, items])]


def corrupted(
    ids: Sequence[int], left: Sequence[int], out: Sequence[int], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What is read and what is written, where `left` tokens stay and `out` tokens go, in turns."""
    source: list[int] = []
    target: list[int] = []
    place = 0
    for stays, goes, sentinel in zip(left, out, sentinels, strict=False):
        source += [*ids[place : place + stays], sentinel]
        place += stays
        target += [sentinel, *ids[place : place + goes]]
        place += goes
    return source, [*target, sentinels[len(left)]]


def spans_in(tokens: Sequence[int], sentinels: set[int]) -> dict[int, list[int]]:
    """What was written behind each sentinel, the first time where one comes twice."""
    found: dict[int, list[int]] = {}
    current: list[int] = []
    for token in tokens:
        if token in sentinels:
            current = found.setdefault(token, []) if token not in found else []
        else:
            current.append(token)
    return found


class SpanScores(LikelihoodScores):
    """Of every token of the targets; and accuracy, the share of them that the model finds likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self._right = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, targets = (one.flatten(0, 1) for one in CROSSED.aligned(outputs, batch))
        self.add(logits, targets)
        self._right += int(((logits.argmax(-1) == targets) & (targets != IGNORED)).sum())

    def compute(self) -> dict[str, float]:
        return {**super().compute(), "accuracy": self._right / self._tokens}
