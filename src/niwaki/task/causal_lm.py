"""Causal language modelling: predict each token from those before it (Radford et al. 2019); text packed in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.task import IGNORED, Batch, LikelihoodScores, Rows, Scores, Task, batched, pad, searched, until_end

if TYPE_CHECKING:
    from niwaki.model.anatomy import Anatomy

DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Mean negative log-likelihood per token, and its exponential, the perplexity.

    Rows that end with a line break are pieces of one running text; any other row is a document of its own, and the
    tokenizer's separator (bos, else eos) stands before it. The stream is cut into blocks of `max_length` tokens that
    overlap by one, so that every token but the first is predicted exactly once.
    """

    needs: ClassVar[Needs] = Needs(required=("text",))
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    head_learns: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    unit: ClassVar[str] = "blocks"
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "max_new_tokens")
    paper: ClassVar[str] = "Radford et al. 2019"

    max_length: int = 256
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"task.max_new_tokens={self.max_new_tokens}: needs a whole number of at least 1")

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if anatomy.positions is not None and self.max_new_tokens >= anatomy.positions:
            raise ConfigError(
                f"task.max_new_tokens={self.max_new_tokens}: leaves no room for a text before them; the model reads at "
                f"most {anatomy.positions} tokens"
            )

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        separator = separator_of(tokenizer)
        stream: list[int] = []
        # A document stays whole, however long: cut at a line break, some tokenizers give other tokens.
        for part in batched(documents(rows["text"]), DOCUMENTS_AT_ONCE):
            encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                stream += ids if separator is None else [separator, *ids]
        if len(stream) < 2:
            raise DataError(
                f"a split has {len(stream)} tokens: needs at least 2, so that one is predicted from another"
            )
        stride = self.max_length - 1
        blocks = [stream[i : i + self.max_length] for i in range(0, len(stream) - 1, stride)]
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    def translate(self, rows: Rows, tokenizer: Any, other: Any, labels: Sequence[str]) -> Rows:
        """The text of each block anew, cut at `max_length` tokens; separators stay between the documents."""
        ends, begins = separator_of(tokenizer), separator_of(other)
        blocks = []
        for ids in rows["input_ids"]:
            texts = tokenizer.batch_decode(parted(ids, ends), skip_special_tokens=True)
            encoded = other(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            between = [] if begins is None else [begins]
            joined = [token for number, part in enumerate(encoded) for token in (between if number else []) + part]
            blocks.append(joined[: self.max_length])
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        for row in features:
            row["labels"] = list(row["input_ids"])
        return pad(features, tokenizer, labels=True)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch["labels"][:, 1:]
        keep = targets != IGNORED
        return outputs.logits[:, :-1][keep], targets[keep]

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        logits, targets = aligned(outputs, batch)
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing)

    @property
    def writing(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "max_new_tokens": self.max_new_tokens}

    def write(self, model: Any, batch: Batch, *, num_beams: int) -> Tensor:
        """The blocks without their last `max_new_tokens` are gone on with, half of a block at least is read; one that
        is too short is left as it is."""
        start, new = self._start, self.max_length - self._start
        long = batch["attention_mask"].sum(1) > start
        written = batch["input_ids"].new_full((len(long), new), IGNORED)
        if long.any():
            starts = batch["input_ids"][long, :start]
            whole = searched(model, starts, torch.ones_like(starts), num_beams=num_beams, new=new)
            found = until_end(whole[:, start:], model)
            written[long] = functional.pad(found, (0, new - found.shape[1]), value=IGNORED)
        return written

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        ids, start, told = batch["input_ids"], self._start, written != IGNORED
        long = told.any(1)[:, None]
        width = max(ids.shape[1], start + written.shape[1])
        own = {name: functional.pad(batch[name], (0, width - ids.shape[1])) for name in ("input_ids", "attention_mask")}
        new = functional.pad(told, (start, width - start - written.shape[1]))
        place = functional.pad(written.where(told, 0), (start, width - start - written.shape[1]))
        before = torch.arange(width, device=ids.device) < start
        return {
            **batch,
            "input_ids": torch.where(long & ~before, place, own["input_ids"]),
            "attention_mask": torch.where(long, (before | new).long(), own["attention_mask"]),
            "labels": torch.where(
                long,
                place.where(new, IGNORED),
                functional.pad(batch["labels"], (0, width - ids.shape[1]), value=IGNORED),
            ),
        }

    @property
    def _start(self) -> int:
        """The tokens of a block that are read before some are written."""
        return max(self.max_length - self.max_new_tokens, self.max_length // 2)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return TokenScores()

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        from niwaki.model.anatomy import Anatomy

        positions = Anatomy.of(model).positions
        for row in rows:
            ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            if tokenizer.bos_token_id is not None:
                ids = functional.pad(ids, (1, 0), value=tokenizer.bos_token_id)
            if positions is not None and ids.shape[1] + self.max_new_tokens > positions:
                raise DataError(
                    f"text {row['text'][:40]!r}: its {ids.shape[1]} tokens and the {self.max_new_tokens} to write are "
                    f"more than the {positions} that the model reads; give a shorter text"
                )
            written = model.generate(
                ids.to(model.device), attention_mask=ids.new_ones(ids.shape).to(model.device),
                max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = written[0, ids.shape[1] :]  # by position: a tokenizer may not give the prompt back as it was
            yield {**row, "generated": tokenizer.decode(new, skip_special_tokens=True)}


def aligned(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (rows * positions, classes) as a view, and to each the token that follows, IGNORED where none does:
    what `counted` picks, without a copy of the logits."""
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return outputs.logits.flatten(0, 1), targets.flatten()


def documents(texts: Sequence[str]) -> list[str]:
    """Rows joined to documents: a row that ends with a line break runs on into the next one."""
    joined: list[list[str]] = [[]]
    for text in texts:
        joined[-1].append(text)
        if not text.endswith(("\n", "\r")):
            joined.append([])
    return ["".join(pieces) for pieces in joined if pieces]


def separator_of(tokenizer: Any) -> int | None:
    """The token before each document: bos, else eos."""
    token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return token


def parted(ids: list[int], separator: int | None) -> list[list[int]]:
    """`ids` in pieces, between separators; the first is empty where one stands first."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == separator:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


class TokenScores(LikelihoodScores):
    """Of every token that is predicted from those before it."""

    def update(self, outputs: Any, batch: Batch) -> None:
        self.add(*aligned(outputs, batch))
