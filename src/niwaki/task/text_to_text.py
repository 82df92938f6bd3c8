"""Tasks that read one text and write another, by an encoder and a decoder (Sutskever et al. 2014,
arXiv:1409.3215)."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.model.load import DECODER_START
from niwaki.task.task import IGNORED, Batch, LikelihoodScores, Rows, Scores, Task, batched, pad, searched, until_end

if TYPE_CHECKING:
    from niwaki.model.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class TextToText(Task):
    """-log p(target | source), the mean over the tokens of the targets; the answers are what beam search finds.

    `max_length` and `max_target_length`: tokens of a source and of a target, the longest answer included. `prefix`
    stands before every source, as T5 was trained with. `num_beams`: of the search, 1 takes the likeliest token each
    time; what else the model's own generation_config asks for (a penalty of length, no repeats) holds too.
    """

    needs: ClassVar[Needs] = Needs(required=("source", "target"))
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    head_learns: ClassVar[bool] = False
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "num_beams")

    max_target_length: int = 128
    num_beams: int = 1
    prefix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_target_length", 4), ("num_beams", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"task.{name}={getattr(self, name)}: needs a whole number of at least {least}")

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        config: Any = anatomy.model.config
        if getattr(config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"task={self.name}: the config of this {config.model_type} names no decoder_start_token_id, from which "
                "a text is written; set model.overrides.decoder_start_token_id, or the field in its config.json"
            )
        if anatomy.positions is not None and self.max_target_length > anatomy.positions:
            raise ConfigError(
                f"task.max_target_length={self.max_target_length}: the model writes at most {anatomy.positions} tokens"
            )

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        sources = self._tokenize(rows["source"], tokenizer)
        targets = tokenizer(text_target=rows["target"], truncation=True, max_length=self.max_target_length)["input_ids"]
        targets = [ended(ids, tokenizer.eos_token_id, self.max_target_length) for ids in targets]
        return {
            "input_ids": sources,
            "labels": targets,
            "reference": [list(text.encode()) for text in rows["target"]],
            "length": [len(source) + len(target) for source, target in zip(sources, targets, strict=True)],
        }

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = pad([{"input_ids": row["input_ids"]} for row in features], tokenizer)
        if "labels" in features[0]:
            start = tokenizer.convert_tokens_to_ids(tokenizer.init_kwargs[DECODER_START])
            batch |= told(filled([row["labels"] for row in features], IGNORED), torch.full((len(features), 1), start))
            batch["reference"] = filled([row["reference"] for row in features], 0)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        logits, targets = outputs.logits.flatten(0, 1), batch["labels"].flatten()
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORED
        return outputs.logits[keep], batch["labels"][keep]

    @property
    def writing(self) -> dict[str, Any]:
        return {"max_target_length": self.max_target_length}

    def write(self, model: Any, batch: Batch, *, num_beams: int) -> Tensor:
        given = batch["input_ids"], batch["attention_mask"]
        written = searched(model, *given, num_beams=num_beams, new=self.max_target_length)
        return until_end(written[:, 1:], model)  # behind the token that the decoder starts from

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        return {**batch, **told(written, batch["decoder_input_ids"][:, :1])}

    def score(self, scores: Scores, model: Any, batch: Batch) -> None:
        super().score(scores, model, batch)
        assert isinstance(scores, TextScores)
        scores.compare(self.write(model, batch, num_beams=self.num_beams), batch["reference"])

    @abc.abstractmethod
    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores: ...

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows):
            features = [{"input_ids": ids} for ids in self._tokenize([row["source"] for row in part], tokenizer)]
            batch = {name: value.to(model.device) for name, value in pad(features, tokenizer).items()}
            written = self.write(model, batch, num_beams=self.num_beams)
            for row, text in zip(part, texts_of(written, tokenizer), strict=True):
                yield {**row, "generated": text}

    def _tokenize(self, texts: list[str], tokenizer: Any) -> list[list[int]]:
        texts = [self.prefix + text for text in texts]
        found: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return found


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


def texts_of(tokens: Tensor, tokenizer: Any) -> list[str]:
    """Rows of tokens, IGNORED behind each, as texts without special tokens."""
    rows = [[token for token in row if token != IGNORED] for row in tokens.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


class TextScores(LikelihoodScores):
    """Of every token of the targets; and pairs of what was written and what should have been."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.written: list[str] = []
        self.references: list[str] = []

    def update(self, outputs: Any, batch: Batch) -> None:
        self.add(outputs.logits.flatten(0, 1), batch["labels"].flatten())

    def compare(self, written: Tensor, references: Tensor) -> None:
        """Take what was written, tokens (rows, tokens), and the references as bytes of UTF-8 (rows, bytes)."""
        self.written += texts_of(written, self._tokenizer)
        self.references += [bytes(byte for byte in row if byte).decode() for row in references.tolist()]
