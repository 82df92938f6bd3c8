"""Instruction tuning: the assistant's turns of talks (Wei et al. 2022, arXiv:2109.01652; Ouyang et al. 2022,
arXiv:2203.02155)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from torch import Tensor

from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.task import chat
from niwaki.task.bleu import BleuTokens, bleu
from niwaki.task.layout import CROSSED, layout_for
from niwaki.task.rouge import Words, rouge
from niwaki.task.task import Rows
from niwaki.task.text_to_text import BETWEEN, TextScores, TextToText


@dataclass(frozen=True, kw_only=True)
class Instruction(TextToText):
    """-log p of what the assistant says, the end of each of its turns included; what others say is read alone.

    A talk is written by the tokenizer's chat template, or one that is then saved with it (`chat.DEFAULT`), up to the
    last turn of the assistant. `turns`: which of its turns are learned; where an encoder reads, that is the last alone.
    What does not fit in `max_length` is left out from the oldest question on, the system text last; of one question
    that is too long, the beginning. The scores beside perplexity are of the last turn, as the model writes it;
    validation within a fit writes nothing.
    """

    needs: ClassVar[Needs] = Needs(required=("messages",))
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    paper: ClassVar[str] = "Wei et al. 2022, arXiv:2109.01652; Ouyang et al. 2022, arXiv:2203.02155"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "rouge_words", "bleu_tokens")

    max_length: int = 256
    turns: chat.Turns = "all"
    rouge_words: Words = "english"
    bleu_tokens: BleuTokens = "13a"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefix", "separator"):
            if getattr(self, name):
                raise ConfigError(
                    f"task.{name}={getattr(self, name)!r}: the chat template says what stands around a turn; leave it "
                    "out, or give a system turn"
                )

    def equip(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            tokenizer.chat_template = chat.DEFAULT

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        layout, end, special = layout_for(tokenizer), chat.end_of_turn(tokenizer), chat.special_texts(tokenizer)
        found: Rows = {name: [] for name in ("input_ids", "counted", "labels", "end", "reference", "length")}
        for messages in rows["messages"]:
            talk = until_last_answer(messages)
            chat.check_spelling(talk, special)
            source, counted, target = self._fitted(talk, tokenizer)
            content = talk[-1]["content"]
            if layout.crossed:
                (target,) = layout.targets([content], tokenizer, self.max_target_length)
            found["input_ids"].append(source)
            found["counted"].append(counted)
            found["labels"].append(target)
            found["end"].append(end)
            found["reference"].append([byte for byte in content.encode() if byte not in (0, BETWEEN)])
            found["length"].append(len(source) + len(target))
        return found

    def _read(self, rows: Rows, tokenizer: Any) -> list[list[int]]:
        # With an answer that no one reads: the pieces before it are the same as in training.
        answer, special = {"role": "assistant", "content": "a"}, chat.special_texts(tokenizer)
        for talk in rows["messages"]:
            chat.check_spelling(talk, special)
        return [self._fitted([*talk, answer], tokenizer)[0] for talk in rows["messages"]]

    def _fitted(self, talk: list[chat.Message], tokenizer: Any) -> tuple[list[int], list[bool], list[int]]:
        """What stands before the last answer, which of it counts, and the answer."""
        crossed = layout_for(tokenizer).crossed
        before, behind = CROSSED.around(tokenizer, None) if crossed else ([], [])
        room = self.max_length - len(before) - len(behind)

        @cache
        def read(dropped: int) -> tuple[list[int], list[bool], list[int]]:
            turns = "last" if crossed else self.turns
            source, counted, answer = chat.tokens_of(talks[dropped], tokenizer, turns, self.max_target_length)
            lead = len(before) if source[: len(before)] == before else 0  # where the template spells it
            return source[lead:], counted[lead:], answer

        def fits(dropped: int) -> bool:
            return dropped == len(talks) - 1 or len(read(dropped)[0]) <= room

        talks = chat.shorter(talk)
        whole = fits(0)
        source, counted, answer = read(0 if whole else bisect_left(range(len(talks)), True, lo=1, key=fits))
        source, counted = source[-room:], counted[-room:]
        return (
            [*before, *source, *behind],
            [*[False] * len(before), *counted, *[False] * len(behind)],
            answer,
        )

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        if "end" not in features[0]:
            end = chat.end_of_turn(tokenizer)
            features = [{**row, "end": end} for row in features]
        return super().collate(features, tokenizer)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores:
        return AnswerScores(tokenizer, self.rouge_words, self.bleu_tokens)


def until_last_answer(messages: Sequence[chat.Message]) -> list[chat.Message]:
    """The talk up to the last turn of the assistant."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return [dict(message) for message in messages[: last + 1]]


class AnswerScores(TextScores):
    """rougeL and bleu in 0..100; exact: the share of answers that are the reference."""

    def __init__(self, tokenizer: Any, rouge_words: Words, bleu_tokens: BleuTokens = "13a") -> None:
        super().__init__(tokenizer)
        self._bleu = bleu(bleu_tokens)
        self._words = rouge_words

    def compared(self) -> dict[str, float]:
        hits = sum(one == other.strip() for one, (other, *_) in zip(self.written, self.references, strict=True))
        return {
            **rouge(self.written, self.references, self._words, ("rougeL",)),
            "bleu": self._bleu.corpus_score(self.written, self.streams).score,
            "exact": hits / len(self.written),
        }

    def report(self) -> dict[str, Any]:
        """sacrebleu's own words for what `compared` did."""
        return {"signatures": {"bleu": str(self._bleu.get_signature())}}
