"""Table to text: fields and values as sentences (Novikova et al. 2017, arXiv:1706.09254), steered by a prefix (Keskar et
al. 2019, arXiv:1909.05858) or held to words and answers (Hokamp & Liu 2017, arXiv:1704.07138)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from niwaki.data.source import Needs
from niwaki.task.layout import layout_of
from niwaki.task.rouge import Words, rouge
from niwaki.task.task import Batch, Scores
from niwaki.task.text_to_text import TextScores, TextToText, references_of, texts_of


@dataclass(frozen=True, kw_only=True)
class TableToText(TextToText):
    """BLEU, which is the score to watch, and ROUGE-L. Rows of one source (and one attribute) are one table: it is written
    once, and compared to the targets of them all. `prefix` may name a column: "{attribute}: " has one table written in
    several ways."""

    needs: ClassVar[Needs] = Needs(required=("source", "target"), optional=("references", "attribute"))
    metric: ClassVar[str] = "bleu"
    paper: ClassVar[str] = "Novikova et al. 2017, arXiv:1706.09254"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "rouge_words")

    rouge_words: Words = "english"

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
        return TableScores(tokenizer, self.rouge_words)


class TableScores(TextScores):
    """bleu in 0..100 with sacrebleu's settings (the challenge's own script splits words a little otherwise) and rougeL,
    the best of all references; tables: how many there are."""

    def __init__(self, tokenizer: Any, rouge_words: Words) -> None:
        from sacrebleu.metrics import BLEU

        super().__init__(tokenizer)
        self._bleu = BLEU()
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

    def compute(self) -> dict[str, float]:
        return {
            "bleu": self._bleu.corpus_score(self.written, self.streams).score,
            **rouge(self.written, self.references, self._words, ("rougeL",)),
            "tables": float(len(self.written)),
            **super().compute(),
        }

    def report(self) -> dict[str, Any]:
        """sacrebleu's own words for what `compute` did."""
        return {"signatures": {"bleu": str(self._bleu.get_signature())}}
