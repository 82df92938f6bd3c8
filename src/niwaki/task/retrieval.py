"""Retrieval by a bi-encoder: what fits a history stands near it (Karpukhin et al. 2020, arXiv:2004.04906; in-batch
negatives: van den Oord et al. 2018, arXiv:1807.03748)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.data.columns import check_text, check_texts, check_zero_or_one
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.model import pooled
from niwaki.task.task import UNKNOWN, Batch, Rows, Scores, Task, batched, pad

if TYPE_CHECKING:
    from niwaki.recipe import Recipe

NEVER = -1e4  # the logit of a candidate that is no negative
QUERIES_AT_ONCE = 1024
CUTOFFS = (1, 5, 10)


def check_candidate(value: Any) -> Any:
    """A text; or, of a row that is to be answered, a list of texts to rank."""
    return check_texts(value, "candidate") if isinstance(value, list) else check_text(value)


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """loss = mean over rows i with label 1 of -log softmax_j(cos(e(history_i), e(candidate_j)) / temperature)_i.

    e: the mean of the last states of a text's tokens, the same model for both; logits of the model are e, of length 1.
    j: every candidate of the batch, those of rows with label 0 too, but not one with the same text as candidate i, nor
    another one that the batch says to follow the same history. A history is its texts with `separator` between them;
    the oldest go where it is too long.
    """

    needs: ClassVar[Needs] = Needs(
        required=("history", "candidate", "label"), checks={"label": check_zero_or_one, "candidate": check_candidate}
    )
    auto_class: ClassVar[str] = pooled.AUTO_CLASS
    metric: ClassVar[str] = "mrr"
    head_learns: ClassVar[bool] = False
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", "candidate_ids")
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "temperature")
    paper: ClassVar[str] = "Karpukhin et al. 2020, arXiv:2004.04906; van den Oord et al. 2018, arXiv:1807.03748"

    temperature: float = 0.05
    separator: str = "; "
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"task.temperature={self.temperature}: needs a number above 0")

    def check_config(self, config: Any) -> None:
        pooled.refuse_decoder(config, f"task={self.name}")

    def conflict(self, recipe: Recipe) -> str | None:
        keeping = [stage.name for stage in recipe.stages if getattr(stage, "cache", False)]
        if keeping:
            return (
                f"{keeping[0]} with cache=true and task={self.name}: other candidates stand beside a row in each "
                "epoch, of which nothing would be kept; leave it false"
            )
        return None

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ()

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        pooled.put_on(model, nn.Identity())

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        listed = [one for one in rows["candidate"] if isinstance(one, list)]
        if listed:
            raise DataError(f"candidate {listed[0]!r:.60}: must be one text in a row with a label")
        histories = [self.separator.join(history) for history in rows["history"]]
        found: Rows = {
            "input_ids": self._tokens(histories, tokenizer, oldest_go=True),
            "candidate_ids": self._tokens(rows["candidate"], tokenizer),
            "query": list(map(number_of, histories)),
            "item": list(map(number_of, rows["candidate"])),
        }
        found["length"] = [len(a) + len(b) for a, b in zip(found["input_ids"], found["candidate_ids"], strict=True)]
        if "label" in rows:
            found["labels"] = [UNKNOWN if label is None else label for label in rows["label"]]
        return found

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """`input_ids` (2 rows, tokens): all histories, then all candidates."""
        texts = [row[name] for name in self.token_columns for row in features]
        batch = pad([{"input_ids": ids} for ids in texts], tokenizer)
        return batch | {
            name: torch.tensor([row[name] for row in features])
            for name in ("labels", "query", "item")
            if name in features[0]
        }

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """cos(history i, candidate j) / temperature, of all rows: (rows, rows)."""
        histories, candidates = outputs.logits.float().chunk(2)
        return histories @ candidates.T / self.temperature

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the rows with label 1: `predictions`, NEVER where a candidate is no negative, and the row's own number."""
        own = (batch["labels"] == 1).nonzero().flatten()
        query, item, follows = batch["query"], batch["item"], batch["labels"] == 1
        known = (query[own, None] == query) & follows  # (positives, rows): what else follows the same history
        # Of equal candidates, and of those that follow as well, only the row's own stands.
        same = item[:, None] == item
        alike = (known.float() @ same.float() > 0) | same[own]
        alike[torch.arange(len(own), device=own.device), own] = False
        return self.predictions(outputs, batch)[own].masked_fill(alike, NEVER), own

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return RetrievalScores()

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The cosine of each candidate as `score`; of a list of candidates their `ranking`, the nearest first."""
        for part in batched(rows):
            listed = [row["candidate"] if isinstance(row["candidate"], list) else [row["candidate"]] for row in part]
            histories = [self.separator.join(row["history"]) for row in part]
            queries = self._embedded(self._tokens(histories, tokenizer, oldest_go=True), model, tokenizer)
            texts = sorted({text for texts in listed for text in texts})
            items = self._embedded(self._tokens(texts, tokenizer), model, tokenizer)
            places = {text: place for place, text in enumerate(texts)}
            for row, query, candidates in zip(part, queries, listed, strict=True):
                scores = items[[places[text] for text in candidates]] @ query
                ranking = [
                    {"candidate": candidates[i], "score": round(float(scores[i]), 4)}
                    for i in scores.argsort(descending=True, stable=True).tolist()
                ]
                yield {**row, **({"ranking": ranking} if isinstance(row["candidate"], list) else ranking[0])}

    def _embedded(self, texts: list[list[int]], model: Any, tokenizer: Any) -> Tensor:
        """e of texts as tokens: (texts, width), on the CPU."""
        found = []
        for part in batched(texts):
            batch = pad([{"input_ids": ids} for ids in part], tokenizer)
            found.append(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits)
        return torch.cat(found).float().cpu()

    def _tokens(self, texts: Sequence[str], tokenizer: Any, *, oldest_go: bool = False) -> list[list[int]]:
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left" if oldest_go else "right"
        try:
            found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
            return found
        finally:
            tokenizer.truncation_side = side


class RetrievalScores(Scores):
    """Each history that something follows, against all candidates of the split, each text once: recall@k, the share of
    what follows it among the k nearest; mrr, 1 / rank of the first of it; ndcg@10 with gains of 1. Equal cosines
    count as further up than what follows. auc: of the cosines of the labelled pairs, NaN where all have one label."""

    def __init__(self) -> None:
        self._items: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._follows: dict[int, set[int]] = {}
        self._cosines: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, outputs: Any, batch: Batch) -> None:
        histories, candidates = outputs.logits.float().cpu().chunk(2)
        labels = batch["labels"].cpu()
        self._cosines.append((histories * candidates).sum(-1))
        self._labels.append(labels)
        for row, (query, item) in enumerate(zip(batch["query"].tolist(), batch["item"].tolist(), strict=True)):
            self._items.setdefault(item, candidates[row])
            if labels[row] == 1:
                self._queries.setdefault(query, histories[row])
                self._follows.setdefault(query, set()).add(item)

    def compute(self) -> dict[str, float]:
        from torchmetrics.functional.classification import binary_auroc

        cosines, labels = torch.cat(self._cosines), torch.cat(self._labels)
        both = bool((labels == 0).any() and (labels == 1).any())
        auc = float(binary_auroc(cosines[labels >= 0], labels[labels >= 0])) if both else float("nan")
        found = [measures(ranks) for ranks in self._ranks()]
        means = {
            name: sum(one[name] for one in found) / len(found) if found else float("nan") for name in measures([1])
        }
        return {**means, "auc": auc}

    def _ranks(self) -> Iterator[list[int]]:
        """For each history the ranks of what follows it, from 1."""
        items = torch.stack(list(self._items.values()))
        places = {item: place for place, item in enumerate(self._items)}
        for part in batched(list(self._queries), QUERIES_AT_ONCE):
            cosines = torch.stack([self._queries[query] for query in part]) @ items.T
            for query, row in zip(part, cosines, strict=True):
                yield [int((row >= row[places[item]]).sum()) for item in self._follows[query]]


def measures(ranks: Sequence[int]) -> dict[str, float]:
    """recall@k, mrr and ndcg@10 of one query, from the ranks of all that is relevant to it."""
    gains = sum(discount(rank) for rank in ranks if rank <= CUTOFFS[-1])
    best = sum(discount(rank) for rank in range(1, min(len(ranks), CUTOFFS[-1]) + 1))
    recalls = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in CUTOFFS}
    return {**recalls, "mrr": 1 / min(ranks), f"ndcg@{CUTOFFS[-1]}": gains / best}


def discount(rank: int) -> float:
    """1 / log2(1 + rank)."""
    return 1 / math.log2(1 + rank)


def number_of(text: str) -> int:
    """A number that stands for a text, of 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
