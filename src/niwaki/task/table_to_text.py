"""Table to text: fields and values as sentences (Novikova et al. 2017, arXiv:1706.09254), steered by a prefix (Keskar
et al. 2019, arXiv:1909.05858) or held to words and answers (Hokamp & Liu 2017, arXiv:1704.07138)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.model.text import end_tokens
from niwaki.task.bleu import BleuTokens, bleu
from niwaki.task.constraint import one_of, with_all
from niwaki.task.kept import kept
from niwaki.task.layout import filled, layout_for, layout_of
from niwaki.task.rouge import Words, rouge
from niwaki.task.search import Change, Search
from niwaki.task.task import IGNORED, Batch, Rows, Scores
from niwaki.task.text_to_text import TextScores, TextToText, references_of, texts_of

FIELD = re.compile(r"([^\[\],]+)\[([^\]]*)\]")  # name[value], as E2E writes a field


@dataclass(frozen=True, kw_only=True)
class TableToText(TextToText):
    """BLEU, which is the score to watch, and ROUGE-L. Rows of one source (and one attribute) are one table: it is
    written once, and compared to the targets of them all. `prefix` may name a column: "{attribute}: " has one table
    written in several ways.

    `must_contain`: fields whose values, as the source has them in field[value], have to occur in the text. `choices`:
    the only texts that may be written. Both hold whatever else is asked of the search, and of draws.
    """

    needs: ClassVar[Needs] = Needs(required=("source", "target"), optional=("references", "attribute"))
    metric: ClassVar[str] = "bleu"
    paper: ClassVar[str] = "Novikova et al. 2017, arXiv:1706.09254"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "rouge_words", "bleu_tokens", "choices")

    rouge_words: Words = "english"
    bleu_tokens: BleuTokens = "13a"
    must_contain: Sequence[str] | None = None
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("must_contain", "choices"):
            value = getattr(self, name)
            if value is not None and (not value or not all(text.strip() for text in value)):
                raise ConfigError(f"task.{name}={list(value)}: needs null or a list of one text or more")
        if self.must_contain is not None and self.choices is not None:
            raise ConfigError(f"task.choices={list(self.choices)}: needs null where task.must_contain is set")

    def _given(self, rows: Rows, tokenizer: Any) -> Rows:
        found = super()._given(rows, tokenizer)
        if self.must_contain is not None:
            found["values"] = [self._spelled(source, tokenizer) for source in rows["source"]]
        return found

    def _spelled(self, source: str, tokenizer: Any) -> list[list[list[int]]]:
        """The values that have to occur, each in the tokens that it has inside of a text and at its beginning.

        Raises:
            DataError: a text that is long enough for them would be longer than any may be.
        """
        assert self.must_contain is not None
        fields = {name.strip(): value.strip() for name, value in FIELD.findall(source)}
        wanted = dict.fromkeys(fields[name] for name in self.must_contain if fields.get(name))
        spelled = [
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {value}", value)]
            for value in wanted
        ]
        takes = sum(max(map(len, value)) for value in spelled) + 1
        if takes > self.max_target_length:
            raise DataError(
                f"source {source[:40]!r}: {', '.join(wanted)} are {takes - 1} tokens, and task.max_target_length="
                f"{self.max_target_length} holds no more than {self.max_target_length - 1} before its end"
            )
        return spelled

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = super().collate(features, tokenizer)
        if self.must_contain is not None:
            batch["values"] = boxed([row["values"] for row in features])
        if self.choices is not None:
            known = tokens_of(tokenizer, tuple(self.choices), self.max_target_length)
            batch["choices"] = known.expand(len(features), -1, -1).contiguous()
        return batch

    def _search(self, model: Any, batch: Batch, num_beams: int, *changes: Change) -> Search:
        ends = frozenset([*end_tokens(model).tolist(), *(batch["ends"].tolist() if "ends" in batch else [])])
        if "choices" in batch:
            changes = (one_of(batch["choices"][0], ends), *changes)
        if "values" in batch:
            changes = (with_all(batch["values"], ends, self.max_target_length), *changes)
        return super()._search(model, batch, num_beams, *changes)

    def score(self, scores: Scores, model: Any, batch: Batch) -> None:
        scores.update(model(**self.inputs(batch)), batch)
        assert isinstance(scores, TableScores)
        tables = [tuple(source.tolist()) for source in layout_of(batch).sources(batch)]
        rows = scores.unseen(tables)
        if rows:
            part = {name: tensor[rows] for name, tensor in batch.items()}
            scores.take([tables[row] for row in rows], self.answered(model, part))
        scores.join(tables, batch["reference"])

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores:
        return TableScores(tokenizer, self.rouge_words, self.bleu_tokens)


@kept
def tokens_of(tokenizer: Any, choices: tuple[str, ...], most: int) -> Tensor:
    """(texts, tokens), IGNORED behind each.

    Raises:
        ConfigError: one has more than `most` tokens.
    """
    found = layout_for(tokenizer).targets(choices, tokenizer, most + 1)
    for text, tokens in zip(choices, found, strict=True):
        if len(tokens) > most:
            raise ConfigError(f"task.choices: {text[:40]!r} is longer than task.max_target_length={most}")
    return filled(found, IGNORED)


def boxed(rows: Sequence[Sequence[Sequence[Sequence[int]]]]) -> Tensor:
    """(rows, values, spellings, tokens), IGNORED where there are fewer."""
    values = max(1, max(map(len, rows)))
    longest = max([1, *(len(one) for row in rows for value in row for one in value)])
    found = torch.full((len(rows), values, 2, longest), IGNORED)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            for k, one in enumerate(value):
                found[i, j, k, : len(one)] = torch.tensor(one)
    return found


class TableScores(TextScores):
    """bleu in 0..100 with sacrebleu's settings (the challenge's own script splits words a little otherwise) and rougeL,
    the best of all references; tables: how many there are."""

    def __init__(self, tokenizer: Any, rouge_words: Words, bleu_tokens: BleuTokens = "13a") -> None:
        super().__init__(tokenizer)
        self._bleu = bleu(bleu_tokens)
        self._words = rouge_words
        self._places: dict[tuple[int, ...], int] = {}

    def unseen(self, tables: Sequence[tuple[int, ...]]) -> list[int]:
        """The numbers of the rows whose table was not written yet, each table once."""
        firsts = {table: row for row, table in reversed(list(enumerate(tables)))}
        return sorted(row for table, row in firsts.items() if table not in self._places)

    def take(self, tables: Sequence[tuple[int, ...]], written: Tensor) -> None:
        """What was written of new tables."""
        for table, text in zip(tables, texts_of(written, self._tokenizer), strict=True):
            self._places[table] = len(self.written)
            self.written.append(text)
            self.references.append([])

    def join(self, tables: Sequence[tuple[int, ...]], references: Tensor) -> None:
        """The references of tables that were written."""
        for table, texts in zip(tables, references_of(references), strict=True):
            known = self.references[self._places[table]]
            known += [text for text in texts if text not in known]

    def compared(self) -> dict[str, float]:
        return {
            "bleu": self._bleu.corpus_score(self.written, self.streams).score,
            **rouge(self.written, self.references, self._words, ("rougeL",)),
            "tables": float(len(self.written)),
        }

    def report(self) -> dict[str, Any]:
        """sacrebleu's own words for what `compared` did."""
        return {"signatures": {"bleu": str(self._bleu.get_signature())}}
