"""Extractive question answering: a span of a text, or none (Rajpurkar et al. 2016, arXiv:1606.05250, and 2018,
arXiv:1806.03822)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.some import NEVER, cross_entropy
from niwaki.task.spans import CHINESE, Best, Span, chinese, english, spans_of
from niwaki.task.task import Batch, Rows, Scores, Task, batched, pad
from niwaki.task.texts import rows_of

if TYPE_CHECKING:
    from niwaki.recipe import Recipe

NONE: dict[str, list] = {"text": [], "answer_start": []}


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """softmax over the tokens of a text for where the answer begins, and where it ends; the mean of both losses.

    A text that is longer than `max_length` tokens with its question is read in windows that overlap by `stride` tokens
    of it. One without the answer, or whose end is cut, is to point at its first token, as a question without an answer
    is in all windows. The answer is the span of at most `max_answer_length` tokens with the highest sum of the logits
    of its two ends over all windows; none where the sum at the first token, the least over windows, is above it by
    more than `null_threshold`; null: there always is an answer. `best` spans are considered in a window and shown by
    niwaki predict. `language`: zh compares answers by characters, as CMRC 2018 does (Cui et al. 2019,
    arXiv:1810.07366), en by words, as SQuAD; null: zh where what is right has a Chinese character.
    """

    needs: ClassVar[Needs] = Needs(required=("context", "question", "answers"))
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    metric: ClassVar[str] = "f1"
    as_headed: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    unit: ClassVar[str] = "windows"
    unread: ClassVar[tuple[str, ...]] = (
        "label_smoothing", "max_answer_length", "null_threshold", "best", "language",
    )  # fmt: skip
    paper: ClassVar[str] = "Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822"

    max_length: int = 384
    stride: int = 128
    max_answer_length: int = 30
    null_threshold: float | None = 0.0
    best: int = 20
    language: Literal["en", "zh"] | None = None
    lr: float = 1e-4
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_answer_length", "best"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}={getattr(self, name)}: needs a whole number of at least 1")
        if not 0 <= self.stride < self.max_length:
            raise ConfigError(
                f"task.stride={self.stride}: needs a whole number from 0, below task.max_length={self.max_length}"
            )

    def conflict(self, recipe: Recipe) -> str | None:
        if any(getattr(stage, "own_tokens", False) for stage in recipe.stages):
            return (
                "distill/cross_vocabulary and task=question_answering: where an answer stands is told among the tokens "
                "of a text, and another vocabulary has others; needs a teacher of the same one, with distill/logits"
            )
        return super().conflict(recipe)

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ("start", "end")

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        """Let the model also give both logits as one: (rows, tokens, 2)."""
        model.register_forward_hook(both)

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        found: Rows = {
            name: []
            for name in (
                "input_ids", "token_type_ids", "places", "begin", "labels", "row", "text", "answers", "length",
            )
        }  # fmt: skip
        for start in range(0, len(rows["context"]), 1000):
            part = {name: values[start : start + 1000] for name, values in rows.items()}
            for name, values in self._encode_part(part, tokenizer, start).items():
                found[name] += values
        return {name: values for name, values in found.items() if values}

    def _encode_part(self, rows: Rows, tokenizer: Any, first: int) -> Rows:
        windows = self._windows(rows["question"], rows["context"], tokenizer)
        answers = rows.get("answers") or [NONE] * len(rows["context"])
        found: Rows = {name: [] for name in ("places", "begin", "labels", "row", "text", "answers")}
        for number, row in enumerate(windows["overflow_to_sample_mapping"]):
            offsets, parts = windows["offset_mapping"][number], windows.sequence_ids(number)
            places = [pair if part == 1 else (-1, -1) for pair, part in zip(offsets, parts, strict=True)]
            begin, stop = covered(places)
            found["places"].append(
                [character - begin if character >= 0 else -1 for pair in places for character in pair]
            )
            found["begin"].append(begin)
            found["labels"].append(ends_of(answers[row], places))
            found["row"].append(first + row)
            found["text"].append(rows["context"][row][begin:stop].encode())
            found["answers"].append(json.dumps(list(answers[row]["text"])).encode())
        names = [name for name in ("input_ids", "token_type_ids") if name in windows]
        lengths = [len(ids) for ids in windows["input_ids"]]
        return {**{name: windows[name] for name in names}, **found, "length": lengths}

    def _windows(self, questions: Sequence[str], contexts: Sequence[str], tokenizer: Any) -> Any:
        lengths = [len(ids) for ids in tokenizer(list(questions), verbose=False)["input_ids"]]
        room = self.max_length - self.stride - 8
        if lengths and max(lengths) > room:
            question = questions[lengths.index(max(lengths))]
            raise DataError(
                f"question {question[:40]!r}: its {max(lengths)} tokens leave no room for a text beside them, with "
                f"task.max_length={self.max_length} and task.stride={self.stride}; raise max_length, or "
                "lower the stride"
            )
        return tokenizer(
            [question.strip() for question in questions], list(contexts), truncation="only_second",
            max_length=self.max_length, stride=self.stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        names = [name for name in ("input_ids", "token_type_ids") if name in features[0]]
        batch = pad([{name: row[name] for name in names} for row in features], tokenizer)
        width = batch["input_ids"].shape[1]
        places = [row["places"] + [-1] * (2 * width - len(row["places"])) for row in features]
        batch["places"] = torch.tensor(places).view(len(features), width, 2)
        for name in ("text", "answers"):
            most = max(len(row[name]) for row in features)
            batch[name] = torch.tensor([[*row[name], *[0] * (most - len(row[name]))] for row in features])
        for name in ("labels", "begin", "row"):
            batch["example" if name == "row" else name] = torch.tensor([row[name] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.predictions(outputs, batch), batch["labels"].T.flatten()

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        return cross_entropy(*self.counted(outputs, batch), smoothing)

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """(2 * rows, tokens): where answers begin, then where they end; only tokens of the text and the first."""
        may = batch["places"][..., 0] >= 0
        may[:, 0] = True
        return outputs.logits.masked_fill(~may[..., None], NEVER).permute(2, 0, 1).flatten(0, 1)

    def owners(self, outputs: Any, batch: Batch) -> Tensor:
        return torch.arange(len(batch["example"]), device=batch["example"].device).repeat(2)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return AnswerScores(self)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows, 8):
            encoded = self.encode(
                {name: [row[name] for row in part] for name in ("context", "question")}, tokenizer, ()
            )
            features = rows_of(encoded)
            best = [Best(self.best) for _ in part]
            for some in batched(features):
                batch = {name: value.to(model.device) for name, value in self.collate(list(some), tokenizer).items()}
                for number, spans in self.read(model(**self.inputs(batch)), batch):
                    best[number].add(spans)
            for row, one in zip(part, best, strict=True):
                answer = one.answer(self.null_threshold)
                shown = [{"text": span.text, "score": round(chance, 4)} for span, chance in one.chances()]
                yield {**row, "answer": answer.text, "start": answer.start, "n_best": shown[: self.best]}

    def read(self, outputs: Any, batch: Batch) -> Iterator[tuple[int, list[Span]]]:
        """For each window, the number of its row and its best spans, the empty one among them."""
        logits, places = outputs.logits.float().cpu(), batch["places"].cpu()
        begins, texts = batch["begin"].tolist(), batch["text"].cpu().to(torch.uint8)
        for number, row in enumerate(batch["example"].tolist()):
            text = texts[number].numpy().tobytes().rstrip(b"\0").decode()
            spans = spans_of(logits[number], places[number], begins[number], text, self.best, self.max_answer_length)
            yield row, spans


def both(model: Any, given: Any, outputs: Any) -> Any:
    """A hook: both logits of a model for question answering as `logits` (rows, tokens, 2)."""
    outputs.logits = torch.stack([outputs.start_logits, outputs.end_logits], -1)
    return outputs


def covered(places: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The characters of a text that these tokens hold, from the first to behind the last; none where there is none."""
    inside = [pair for pair in places if pair[0] >= 0]
    return (inside[0][0], inside[-1][1]) if inside else (0, 0)


def ends_of(answers: Mapping[str, Sequence[Any]], places: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens in which the first answer begins and ends; the first token of all where it is not whole in these."""
    if not answers["text"]:
        return [0, 0]
    start, stop = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    begin, end = covered(places)
    if start < begin or stop > end:
        return [0, 0]
    inside = [i for i, pair in enumerate(places) if pair[0] >= 0]
    return [
        max(i for i in inside if places[i][0] <= start),
        min(i for i in inside if places[i][1] >= stop),
    ]


class AnswerScores(Scores):
    """exact and f1 over all questions, over those that have an answer and over those that have none, where there are
    some. `loss` is the mean over windows."""

    def __init__(self, task: QuestionAnswering) -> None:
        self._task = task
        self._found: dict[int, Best] = {}
        self._answers: dict[int, list[str]] = {}
        self._loss = 0.0
        self._windows = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, labels = self._task.counted(outputs, batch)
        self._loss += float(functional.cross_entropy(logits.float(), labels, reduction="sum")) / 2
        self._windows += len(batch["example"])
        for row, spans in self._task.read(outputs, batch):
            self._found.setdefault(row, Best(self._task.best)).add(spans)
        for row, given in zip(batch["example"].tolist(), batch["answers"].tolist(), strict=True):
            self._answers[row] = json.loads(bytes(given).rstrip(b"\0"))

    def compute(self) -> dict[str, float]:
        rows = sorted(self._found)
        found = [self._found[row].answer(self._task.null_threshold).text for row in rows]
        wanted = [self._answers[row] for row in rows]
        scores = self._alike(found, wanted)
        groups = {"has_answer": [bool(one) for one in wanted], "no_answer": [not one for one in wanted]}
        if all(any(group) for group in groups.values()):
            for name, group in groups.items():
                some = self._alike(
                    [t for t, u in zip(found, group, strict=True) if u],
                    [t for t, u in zip(wanted, group, strict=True) if u],
                )
                scores |= {f"{name}_{key}": value for key, value in some.items()}
        return {**scores, "loss": self._loss / self._windows}

    def _alike(self, found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
        by_language: dict[Any, list[int]] = {english: [], chinese: []}
        for number, answers in enumerate(wanted):
            language = self._task.language or ("zh" if CHINESE.search("".join(answers)) else "en")
            by_language[chinese if language == "zh" else english].append(number)
        sums = {"exact": 0.0, "f1": 0.0}
        for alike, rows in by_language.items():
            some = alike([found[i] for i in rows], [wanted[i] for i in rows]) if rows else {}
            sums = {name: total + len(rows) * some.get(name, 0.0) for name, total in sums.items()}
        return {name: total / len(found) for name, total in sums.items()}
