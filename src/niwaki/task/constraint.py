"""Searches that may only find certain texts: one of a list, along a trie of tokens (De Cao et al. 2021,
arXiv:2010.00904); or any that holds certain words (Hokamp & Liu 2017, arXiv:1704.07138)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import takewhile

import torch
from torch import Tensor

from niwaki.task.search import Change, Processor
from niwaki.task.task import IGNORED

Tokens = tuple[int, ...]
Trie = dict[int, "Trie"]
NEVER, LEAST = -torch.inf, -1e9  # of a token that may not come; of one that has to, whatever else speaks against it


def held(scores: Tensor, allowed: Iterable[int]) -> Tensor:
    """The scores (classes,) of what may come; another rule of the search yields to this one."""
    places = torch.tensor(sorted(allowed), device=scores.device)
    found = torch.full_like(scores, NEVER)
    found[places] = scores[places].clamp(min=LEAST)
    return found


def by_text(
    change: Callable[[int, Tokens, Tensor], Tensor], rows: Sequence[int], begin: int, ends: frozenset[int]
) -> Processor:
    """A change of scores, made of one for each text: (number of the row, tokens that were written, scores). A text that
    has ended is left alone."""

    def all_texts(ids: Tensor, scores: Tensor) -> Tensor:
        beams = len(ids) // len(rows)
        texts = [tuple(text) for text in ids[:, begin:].tolist()]
        return torch.stack([
            own if ends & set(text) else change(rows[number // beams], text, own)
            for number, (text, own) in enumerate(zip(texts, scores, strict=True))
        ])  # fmt: skip

    return all_texts


def one_of(choices: Tensor, ends: frozenset[int]) -> Change:
    """Only the texts in `choices` (texts, tokens), IGNORED behind each; each has its end token."""
    root = trie(tuple(plain(text) for text in choices.tolist()))

    def change(row: int, text: Tokens, scores: Tensor) -> Tensor:
        following = root
        for token in text:
            following = following.get(token, {})
        return held(scores, following) if following else scores

    return lambda rows, begin: by_text(change, rows, begin, ends)


@lru_cache(maxsize=8)
def trie(texts: tuple[Tokens, ...]) -> Trie:
    """The texts as one tree: to each token those that may follow it."""
    root: Trie = {}
    for text in texts:
        node = root
        for token in text:
            node = node.setdefault(token, {})
    return root


def with_all(values: Tensor, ends: frozenset[int], most: int) -> Change:
    """Only texts of at most `most` tokens that hold each of `values` (rows, values, spellings, tokens) in one of its
    spellings.

    A model writes what it likes and may not end before all are there. Where it would rather end, or only as many tokens
    are left as the rest takes, it writes one after another of those that lack; which comes next, it chooses.
    """
    known = [[[plain(one) for one in value if plain(one)] for value in row] for row in values.tolist()]
    pressed: set[tuple[int, Tokens]] = set()  # the texts that are to be made whole without a detour

    def change(row: int, text: Tokens, scores: Tensor) -> Tensor:
        lacking = [value for value in known[row] if value and not any(holds(text, one) for one in value)]
        if not lacking:
            return scores
        takes = sum(max(map(len, value)) for value in lacking) + 1
        if (row, text[:-1]) in pressed or int(scores.argmax()) in ends or most - len(text) <= takes:
            pressed.add((row, text))
            return held(scores, next_tokens(text, [one for value in lacking for one in value]))
        scores = scores.clone()
        scores[sorted(ends)] = NEVER
        return scores

    return lambda rows, begin: by_text(change, rows, begin, ends)


def plain(tokens: Sequence[int]) -> Tokens:
    """Tokens without what stands behind them."""
    return tuple(takewhile(lambda token: token != IGNORED, tokens))


def holds(text: Tokens, part: Tokens) -> bool:
    """Whether tokens occur in others, one after another."""
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def next_tokens(text: Tokens, wanted: Sequence[Tokens]) -> set[int]:
    """What brings a text nearer to one of the `wanted` parts: the token behind the longest beginning of one with which
    the text ends, so that one which was begun is finished."""
    for length in range(max(map(len, wanted)) - 1, -1, -1):
        tail = text[len(text) - length :] if length <= len(text) else None
        found = {one[length] for one in wanted if len(one) > length and one[:length] == tail}
        if found:
            return found
    raise AssertionError("every part has a first token")
