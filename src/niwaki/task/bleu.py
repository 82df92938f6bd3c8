"""BLEU: n-grams of a text that references have (Papineni et al. 2002, P02-1040), by sacrebleu (Post 2018)."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

# 13a: words between blanks, marks apart (mteval-v13a); zh: each Chinese character a word; char: each character one, as
# for Japanese, where nothing stands between words either.
BleuTokens = Literal["13a", "zh", "char"]


def bleu(tokens: BleuTokens) -> Any:
    """sacrebleu's metric."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokens)


def words(text: str, tokens: BleuTokens) -> list[str]:
    """What counts as the words of a text: what stands between blanks, else as BLEU has it."""
    if tokens == "13a":
        return text.split()
    found: str = splitter(tokens)(text)
    return found.split()


@cache
def splitter(tokens: BleuTokens) -> Any:
    """What puts blanks between the words of a text."""
    return bleu(tokens).tokenizer
