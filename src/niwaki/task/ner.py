"""Named-entity recognition as token classification: tags on words, predicted at each word's first piece
(Devlin et al. 2019, arXiv:1810.04805, section 5.3)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.columns import check_words, labels_of
from niwaki.data.readers.conll import iob2, wrong_tag
from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.task.casing import check_segments, make_room, segment_of, segments_of
from niwaki.task.tables import class_scores
from niwaki.task.task import IGNORED, UNKNOWN, Batch, Rows, Scores, Task, batched, pad
from niwaki.task.texts import rows_of

if TYPE_CHECKING:
    from niwaki.recipe import Recipe

HAN = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # each a word by itself, as in CLUENER: nothing stands between them
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}](?:(?:[^\W{HAN}]|[.'’&/-])*[^\W{HAN}])?|[^\w\s]")


def check_tags(value: Any) -> list[str]:
    """Tags in the scheme IOB2, which those of IOB1, BIOES, BILOU and BMES become; others, such as parts of speech,
    stay. ValueError for what looks like the tag of an entity and is none."""
    tags = check_words(value)
    for position, tag in enumerate(tags, start=1):
        if wrong := wrong_tag(tag):
            raise ValueError(f"has {tag!r} as tag {position}, which {wrong}")
    return iob2(tags)


@dataclass(frozen=True, kw_only=True)
class NER(Task):
    """Entity-level precision, recall, f1 (seqeval), and a table per tag over all words, those cut off included.

    A sentence that is longer than `max_length` tokens is read in windows, each of which repeats `overlap` of the one
    before, and each word is tagged where the shorter of its two sides is longest; with null it is cut, and what was cut
    off counts as tagged O. `scheme`: the tags that are learned, predicted and counted, iob2 or bioes; null: those of
    the data, which become IOB2 when they are read. Entities are read off tags of any scheme as seqeval does.
    `casing`: a model whose tokens are all in small letters is told which words had capitals, by a segment of their own.
    """

    needs: ClassVar[Needs] = Needs(required=("tokens", "tags"), asks=("text",), checks={"tags": check_tags})
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"

    unit: ClassVar[str] = "windows"

    max_length: int = 256
    overlap: float | None = 0.25
    scheme: Literal["iob2", "bioes"] | None = None
    casing: bool = False
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap is not None and not 0 <= self.overlap <= 0.5:
            raise ConfigError(f"task.overlap={self.overlap}: needs null or a number in 0..0.5")

    @property
    def whole(self) -> bool:  # type: ignore[override]
        """With windows the parts of a sentence find one another by its number, which counts in a split."""
        return self.overlap is not None

    def conflict(self, recipe: Recipe) -> str | None:
        from niwaki import artifact

        if self.overlap is not None and any(getattr(stage, "own_tokens", False) for stage in recipe.stages):
            return (
                f"task.overlap={self.overlap} and distill/cross_vocabulary: another vocabulary has other windows; "
                "needs task.overlap=null"
            )
        if self.casing and recipe.tuning.name != "full" and not artifact.is_artifact(recipe.model.place):
            return (
                f"task.casing=true and tuning={recipe.tuning.name}: what tells capitals is new and would not learn; "
                "use tuning=full, go on from a model that was tuned with it, or leave task.casing=false"
            )
        return super().conflict(recipe)

    def refuse_start(self, other: Task) -> None:
        if isinstance(other, NER) and other.casing and not self.casing:
            raise ConfigError(
                "task.casing=false: the model that this starts from is told capitals; needs task.casing=true"
            )

    def reads_as(self, other: Task) -> bool:
        return super().reads_as(other) and isinstance(other, NER) and other.casing == self.casing

    def check_config(self, config: Any) -> None:
        if self.casing:
            check_segments(config)

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        if self.casing:
            make_room(model)

    def read_as(self, column: str, value: Any) -> Any:
        return retagged(value, self.scheme) if column == "tags" else value

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        found = tuple(labels_of(dict(splits), "tags"))
        if self.scheme is None:
            return found
        kinds = sorted({kind for kind, _, _ in entities_of(found)})
        return tuple(sorted(["O", *(f"{begin}-{kind}" for kind in kinds for begin in BEGINNINGS[self.scheme])]))

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = self._tokenize(rows["tokens"], tokenizer)
        index = {label: i for i, label in enumerate(labels)}
        given = rows.get("tags") or [None] * len(rows["tokens"])
        tags = [
            [UNKNOWN] * len(words) if row is None else [index[tag] for tag in retagged(row, self.scheme)]
            for words, row in zip(rows["tokens"], given, strict=True)
        ]
        places = encoded.get("overflow_to_sample_mapping") or list(range(len(tags)))
        firsts = told_once([first_pieces(encoded.word_ids(i)) for i in range(len(places))], places)
        seen: dict[int, set[int | None]] = {}
        for row, words in zip(places, firsts, strict=True):
            seen.setdefault(row, set()).update(words)
        begun = [row == 0 or places[row - 1] != place for row, place in enumerate(places)]
        found = {
            "input_ids": encoded["input_ids"],
            "labels": [
                [tags[place][word] if word is not None else IGNORED for word in words]
                for place, words in zip(places, firsts, strict=True)
            ],
            "words": [[IGNORED if word is None else word for word in words] for words in firsts],
            "cut": [
                [i for i in range(len(tags[place])) if i not in seen[place]] if first else []
                for place, first in zip(places, begun, strict=True)
            ],
            "cut_labels": [
                [tag for i, tag in enumerate(tags[place]) if i not in seen[place]] if first else []
                for place, first in zip(places, begun, strict=True)
            ],
            "sentence": places,
            "length": [len(ids) for ids in encoded["input_ids"]],
        }
        if self.casing:
            kinds = [[segment_of(word) for word in words] for words in rows["tokens"]]
            found["token_type_ids"] = [segments_of(kinds[at], encoded.word_ids(i)) for i, at in enumerate(places)]
        return found

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = pad(features, tokenizer, labels=True)
        for name in ("words", "cut", "cut_labels"):
            width = max(len(row[name]) for row in features)
            padded = [[*row[name], *[IGNORED] * (width - len(row[name]))] for row in features]
            batch[name] = torch.tensor(padded, dtype=torch.long)
        batch["sentence"] = torch.tensor([row["sentence"] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORED
        return outputs.logits[keep], batch["labels"][keep]

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return TagScores(labels)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows):
            spans = [[match.span() for match in WORD.finditer(row["text"])] or [(0, 0)] for row in part]
            words = [[row["text"][a:b] for a, b in places] for row, places in zip(part, spans, strict=True)]
            encoded = self.encode({"tokens": words}, tokenizer, labels)
            features = rows_of(encoded)
            found: list[dict[int, tuple[str, float]]] = [{} for _ in part]
            for some in batched(features):
                batch = {k: v.to(model.device) for k, v in self.collate(list(some), tokenizer).items()}
                sure, best = model(**self.inputs(batch)).logits.float().softmax(-1).max(-1)
                places, chances, tags = batch["sentence"].tolist(), sure.tolist(), best.tolist()
                for row, token, word in told_words(batch["words"].tolist()):
                    found[places[row]][word] = labels[tags[row][token]], chances[row][token]
            for given, said, at in zip(part, found, spans, strict=True):
                told = [(*said[word], at[word]) for word in sorted(said)]
                yield {**given, "entities": entities(given["text"], told)}

    def _tokenize(self, words: list[list[str]], tokenizer: Any) -> Any:
        if lacks_space(tokenizer):
            words = [[f" {word}" for word in row] for row in words]
        windows: dict[str, Any] = {}
        if self.overlap is not None:
            room = self.max_length - tokenizer.num_special_tokens_to_add()
            windows = {"stride": int(self.overlap * room), "return_overflowing_tokens": True}
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length, **windows)


def lacks_space(tokenizer: Any) -> bool:
    """Whether a word given alone is encoded as if it stood behind another without a space, as byte-level tokenizers do
    (GPT-2, RoBERTa, Llama 3) unless they were made with add_prefix_space, and some SentencePiece ones."""
    state = tokenizer.backend_tokenizer.pre_tokenizer
    step = json.loads(state.__getstate__()) if state else {}
    steps = step.get("pretokenizers", [step])
    return any(
        step.get("add_prefix_space") is False if step.get("type") == "ByteLevel" else
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "always"
        for step in steps
    )  # fmt: skip


def first_pieces(word_ids: Sequence[int | None]) -> list[int | None]:
    """The word index at each word's first piece, None elsewhere."""
    seen: set[int | None] = {None}
    return [None if word in seen or seen.add(word) else word for word in word_ids]  # type: ignore[func-returns-value]


def told_once(firsts: Sequence[Sequence[int | None]], places: Sequence[int]) -> list[list[int | None]]:
    """`firsts` of windows, which are of the sentences `places`, with each word of a sentence in one of them: where
    the shorter of the two sides that it has in the window is longest. The ends of a sentence are no bound."""
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for number, (words, place) in enumerate(zip(firsts, places, strict=True)):
        first = number == 0 or places[number - 1] != place
        last = number + 1 == len(places) or places[number + 1] != place
        for at, word in enumerate(words):
            if word is not None:
                room = min(math.inf if first else at, math.inf if last else len(words) - 1 - at)
                if room > best.get((place, word), (-1.0, 0))[0]:
                    best[place, word] = room, number
    return [
        [word if word is not None and best[place, word][1] == number else None for word in words]
        for number, (words, place) in enumerate(zip(firsts, places, strict=True))
    ]


def told_words(words: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """(row of the batch, token, word of its sentence) of every word that is tagged in a batch."""
    for row, one in enumerate(words):
        yield from ((row, token, word) for token, word in enumerate(one) if word != IGNORED)


BEGINNINGS = {"iob2": "BI", "bioes": "BIES"}


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, last word) of each entity, from tags of IOB1, IOB2 or BIOES, as seqeval reads them."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, first, last) for kind, first, last in get_entities(list(tags))]


def retagged(tags: Sequence[str], scheme: str | None) -> Sequence[str]:
    """The tags of a sentence in another scheme; with None as they are."""
    if scheme is None:
        return tags
    found = ["O"] * len(tags)
    for kind, first, last in entities_of(tags):
        inner = ["I"] * (last - first + 1)
        if scheme == "bioes":
            inner[-1] = "E"
        inner[0] = "S" if scheme == "bioes" and first == last else "B"
        found[first : last + 1] = [f"{begin}-{kind}" for begin in inner]
    return found


def entities(text: str, told: Sequence[tuple[str, float, tuple[int, int]]]) -> list[dict[str, Any]]:
    """Join (tag, chance, characters) of words to entities; the score is the mean chance of its words."""
    found = []
    for kind, first, last in entities_of([tag for tag, _, _ in told]):
        start, end = told[first][2][0], told[last][2][1]
        score = round(sum(chance for _, chance, _ in told[first : last + 1]) / (last + 1 - first), 4)
        found.append({"entity": kind, "text": text[start:end], "start": start, "end": end, "score": score})
    return found


class TagScores(Scores):
    """Entity scores by seqeval, and precision, recall, F1 and support of every tag. A word that was cut off by
    `max_length`, or has no piece at all, counts as predicted O; `loss` is the mean over the others."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._sentences: dict[int, dict[int, tuple[str, str]]] = {}  # by word: true, predicted
        self._loss = 0.0
        self._seen = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        keep = batch["labels"] != IGNORED
        logits = outputs.logits[keep].float()
        self._loss += float(functional.cross_entropy(logits, batch["labels"][keep], reduction="sum"))
        self._seen += len(logits)
        of_tokens = torch.stack([batch["labels"], outputs.logits.argmax(-1), batch["words"]]).tolist()
        lost = torch.stack([batch["cut"], batch["cut_labels"]]).tolist()
        sentences = [self._sentences.setdefault(place, {}) for place in batch["sentence"].tolist()]
        for row, token, word in told_words(of_tokens[2]):
            sentences[row][word] = self._labels[of_tokens[0][row][token]], self._labels[of_tokens[1][row][token]]
        for sentence, words, tags in zip(sentences, *lost, strict=True):
            sentence |= {word: (self._labels[tag], "O") for word, tag in zip(words, tags, strict=True) if word >= 0}

    @property
    def _true(self) -> list[list[str]]:
        return [[words[i][0] for i in sorted(words)] for words in self._sentences.values()]

    @property
    def _predicted(self) -> list[list[str]]:
        return [[words[i][1] for i in sorted(words)] for words in self._sentences.values()]

    def compute(self) -> dict[str, float]:
        from seqeval.metrics import f1_score, precision_score, recall_score

        true, predicted = self._true, self._predicted
        pairs = [pair for words in self._sentences.values() for pair in words.values()]
        return {
            "f1": float(f1_score(true, predicted, zero_division=0)),
            "precision": float(precision_score(true, predicted, zero_division=0)),
            "recall": float(recall_score(true, predicted, zero_division=0)),
            "accuracy": sum(one == other for one, other in pairs) / len(pairs),
            "loss": self._loss / self._seen,
        }

    def report(self) -> dict[str, Any]:
        true, found = ([tag for row in rows for tag in row] for rows in (self._true, self._predicted))
        return class_scores(true, found, self._labels)
