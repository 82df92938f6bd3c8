"""Where a source and its target stand in a batch: in an encoder and a decoder, or one behind the other in a decoder
that stands alone (Liu et al. 2018, arXiv:1801.10198)."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize

from niwaki.errors import ConfigError
from niwaki.model.load import DECODER_START
from niwaki.model.text import end_tokens
from niwaki.task.search import Search
from niwaki.task.task import IGNORED, Batch, pad, until_end

Features = list[dict[str, Any]]


class Layout(abc.ABC):
    """Batches of rows with `input_ids`, the tokens of the source, and `labels`, those of the target."""

    crossed: bool  # whether an encoder reads the source

    @abc.abstractmethod
    def around(self, tokenizer: Any, separator: str | None) -> tuple[list[int], list[int]]:
        """The tokens before a source, and behind it. `separator`: see `TextToText`."""

    @abc.abstractmethod
    def targets(self, texts: Sequence[str], tokenizer: Any, most: int) -> list[list[int]]:
        """The tokens of targets, at most so many, each with its end token."""

    @abc.abstractmethod
    def collate(self, features: Features, tokenizer: Any) -> dict[str, Tensor]:
        """One padded batch; rows without `labels` are to be answered."""

    @abc.abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the model's forward takes."""

    @abc.abstractmethod
    def aligned(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (rows, positions, classes) and the labels (rows, positions) that they predict, IGNORED where none
        counts."""

    @abc.abstractmethod
    def sources(self, batch: Batch) -> list[Tensor]:
        """The tokens of each source, without padding."""

    @abc.abstractmethod
    def write(self, model: Any, batch: Batch, search: Search) -> Tensor:
        """What a model writes in answer to the sources: (rows, tokens), IGNORED behind the end of each."""

    @abc.abstractmethod
    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        """The batch with what `write` gave in place of its labels."""


class Crossed(Layout):
    """The encoder reads the source, the decoder the target, one place later."""

    crossed = True

    def around(self, tokenizer: Any, separator: str | None) -> tuple[list[int], list[int]]:
        return edges(tokenizer)

    def targets(self, texts: Sequence[str], tokenizer: Any, most: int) -> list[list[int]]:
        found = tokenizer(text_target=list(texts), truncation=True, max_length=most)["input_ids"]
        return [ended(ids, tokenizer.eos_token_id, most) for ids in found]

    def collate(self, features: Features, tokenizer: Any) -> dict[str, Tensor]:
        batch = pad([{"input_ids": row["input_ids"]} for row in features], tokenizer)
        if "labels" in features[0]:
            start = tokenizer.convert_tokens_to_ids(tokenizer.init_kwargs[DECODER_START])
            batch |= told(filled([row["labels"] for row in features], IGNORED), torch.full((len(features), 1), start))
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}

    def aligned(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs.logits, batch["labels"]

    def sources(self, batch: Batch) -> list[Tensor]:
        return [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def write(self, model: Any, batch: Batch, search: Search) -> Tensor:
        rows = range(len(batch["input_ids"]))
        with parametrize.cached():  # chains of links, once for all tokens
            found: Tensor = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **search.of(rows, 1)
            )
        return until_end(found[:, 1:], model)  # behind the token that the decoder starts from

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        return {**batch, **told(written, batch["decoder_input_ids"][:, :1])}


class InLine(Layout):
    """One decoder reads the source and goes on with the target; `starts` (rows,) tells where the target begins, `ends`
    (rows,) the token with which it ends."""

    crossed = False

    def around(self, tokenizer: Any, separator: str | None) -> tuple[list[int], list[int]]:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end_of(tokenizer)
        between = tokenizer("\n" if separator is None else separator, add_special_tokens=False)["input_ids"]
        if separator is None and not tokenizer.decode(between):
            between = [end_of(tokenizer)]
        return [first], between

    def targets(self, texts: Sequence[str], tokenizer: Any, most: int) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids[: most - 1], end_of(tokenizer)] for ids in found]

    def collate(self, features: Features, tokenizer: Any) -> dict[str, Tensor]:
        rows = []
        for row in features:
            source, target = list(row["input_ids"]), list(row.get("labels", ()))
            counted = row.get("counted") or [False] * len(source)
            before = [token if counts else IGNORED for token, counts in zip(source, counted, strict=True)]
            rows.append({"input_ids": source + target, "labels": before + target})
        batch = pad(rows, tokenizer, labels=True)
        batch["starts"] = torch.tensor([len(row["input_ids"]) for row in features])
        batch["ends"] = torch.tensor([row.get("end", end_of(tokenizer)) for row in features])
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def aligned(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs.logits, functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def sources(self, batch: Batch) -> list[Tensor]:
        return [ids[:start] for ids, start in zip(batch["input_ids"], batch["starts"].tolist(), strict=True)]

    def write(self, model: Any, batch: Batch, search: Search) -> Tensor:
        sources = self.sources(batch)
        ends = torch.cat([end_tokens(model).to(batch["ends"].device), batch["ends"]]).unique()
        found: list[Tensor] = [batch["ends"][:0]] * len(sources)
        with parametrize.cached():
            for rows in groups(sources, apart=search.sees_source(model)):
                ids, mask = led([sources[row] for row in rows])
                new = model.generate(
                    input_ids=ids, attention_mask=mask, eos_token_id=ends.tolist(),
                    pad_token_id=int(ends[0]), **search.of(rows, ids.shape[1]),
                )[:, ids.shape[1] :]  # fmt: skip
                for row, tokens in zip(rows, until_end(new, model, ends), strict=True):
                    found[row] = tokens
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=IGNORED)

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        answers = [row[row != IGNORED] for row in written]
        rows = [torch.cat([source, answer]) for source, answer in zip(self.sources(batch), answers, strict=True)]
        ids, mask = followed(rows)
        places = torch.arange(ids.shape[1], device=ids.device)
        learned = mask.bool() & (places >= batch["starts"][:, None])
        return {**batch, "input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learned, IGNORED)}


CROSSED, IN_LINE = Crossed(), InLine()


def layout_for(tokenizer: Any) -> Layout:
    """The layout for the model of this tokenizer, which says where a decoder behind an encoder starts."""
    return CROSSED if DECODER_START in tokenizer.init_kwargs else IN_LINE


def layout_of(batch: Batch) -> Layout:
    """The layout in which a batch was made."""
    return IN_LINE if "starts" in batch else CROSSED


def groups(sources: Sequence[Tensor], *, apart: bool) -> Iterator[list[int]]:
    """Numbers of rows that are written at once: those of one length where padding must not be read, else all."""
    if not apart:
        yield list(range(len(sources)))
        return
    for length in sorted({len(source) for source in sources}):
        yield [row for row, source in enumerate(sources) if len(source) == length]


def led(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (rows, longest) with padding on the left, so that all go on at the same place, and their mask. Positions
    are counted from the mask by what searches."""
    width = max(map(len, rows))
    ids = torch.stack([functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def followed(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (rows, longest) with padding on the right, and their mask."""
    join = torch.nn.utils.rnn.pad_sequence
    return join(list(rows), batch_first=True), join([torch.ones_like(row) for row in rows], batch_first=True)


def edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text, and behind it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = special.index(0), special[::-1].index(0)
    return ids[:first], ids[len(ids) - last :]


def end_of(tokenizer: Any) -> int:
    """The token that ends a text.

    Raises:
        ConfigError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'!r} has no end token, with which a text that is "
            "written could end; needs eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def ended(ids: list[int], end: int, most: int) -> list[int]:
    """`ids` with the end token behind them, `most` in all: some tokenizers put none."""
    return ids if ids[-1:] == [end] else [*ids[: most - 1], end]


def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest), with `value` behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def told(labels: Tensor, start: Tensor) -> dict[str, Tensor]:
    """`labels` (rows, tokens), which of them count, and what the decoder reads to predict them: the same one place
    later, behind the token `start` (rows, 1), which also stands where no later prediction counts."""
    read = torch.cat([start, labels[:, :-1]], 1)
    return {
        "labels": labels,
        "decoder_attention_mask": (labels != IGNORED).long(),
        "decoder_input_ids": torch.where(read == IGNORED, start, read),
    }
