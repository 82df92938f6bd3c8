"""Translation of a text into another language or script (Sutskever et al. 2014, arXiv:1409.3215)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from niwaki.task.bleu import BleuTokens, bleu
from niwaki.task.text_to_text import TextScores, TextToText


@dataclass(frozen=True, kw_only=True)
class Translation(TextToText):
    """chrF, which tells single words apart too and is the score to watch, BLEU, the rate of wrong characters, and the
    share of answers without one. `bleu_tokens`: see `bleu.BleuTokens`."""

    metric: ClassVar[str] = "chrf"
    paper: ClassVar[str] = "Sutskever et al. 2014, arXiv:1409.3215"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "bleu_tokens")

    bleu_tokens: BleuTokens = "13a"

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores:
        return TranslationScores(tokenizer, self.bleu_tokens)


class TranslationScores(TextScores):
    """bleu and chrf in 0..100 with sacrebleu's settings; cer: characters to change, add and leave out, by those of the
    first references (the phoneme error rate, where each phoneme is one character); exact: the share of answers that are
    one of their references."""

    def __init__(self, tokenizer: Any, bleu_tokens: BleuTokens = "13a") -> None:
        from sacrebleu.metrics import CHRF

        super().__init__(tokenizer)
        self._metrics = {"bleu": bleu(bleu_tokens), "chrf": CHRF()}

    def compared(self) -> dict[str, float]:
        from torchmetrics.functional.text import char_error_rate

        hits = sum(one in map(str.strip, others) for one, others in zip(self.written, self.references, strict=True))
        first = [others[0] for others in self.references]
        return {
            **{name: one.corpus_score(self.written, self.streams).score for name, one in self._metrics.items()},
            "cer": float(char_error_rate(self.written, first)),
            "exact": hits / len(self.references),
        }

    def report(self) -> dict[str, Any]:
        """sacrebleu's own words for what `compared` did."""
        return {"signatures": {name: str(one.get_signature()) for name, one in self._metrics.items()}}
