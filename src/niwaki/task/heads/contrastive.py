"""SetFit: the encoder is tuned on pairs of a few texts, then a logistic regression reads it (Tunstall et al. 2022,
arXiv:2209.11055)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import ConfigError
from niwaki.model import pooled
from niwaki.task.heads.head import Head
from niwaki.task.task import Batch

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.data.corpus import Corpus
    from niwaki.recipe import Recipe

SEVERAL = 1000  # steps of the regression


class Regression(nn.Module):
    """logits = `weight` (labels, width) e + `bias`. Both are buffers: no gradient moves them."""

    weight: Tensor
    bias: Tensor

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(labels, width))
        self.register_buffer("bias", torch.zeros(labels))

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding[:, None] * self.weight).sum(-1) + self.bias


@dataclass(frozen=True, kw_only=True)
class Contrastive(Head):
    """Loss of the fit: mean of (cos(e_i, e_j) - [i and j are of one class])^2 over pairs of training texts; where
    a text may have several labels, two that share one, or have none, are of one class.

    In each epoch a text is paired with `pairs` others of its class and with `pairs` of other classes, drawn anew; a
    batch has so many pairs as data.batch_size says. e: the mean of the last states of the text's tokens, of length 1.
    The head is scikit-learn's logistic regression on e of the training texts, fitted before each validation and after
    the fit; of several labels one for each, yes against no.
    """

    is_new: ClassVar[bool] = False
    guesses: ClassVar[bool] = False
    refits: ClassVar[bool] = True
    paper: ClassVar[str] = "Tunstall et al. 2022, arXiv:2209.11055"

    pairs: int = 20

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ConfigError(f"task.pairs={self.pairs}: needs a whole number of at least 1")

    def auto_class_of(self, config: Any) -> str:
        return pooled.AUTO_CLASS

    def check_config(self, config: Any) -> None:
        pooled.refuse_decoder(config, self.setting)

    def conflict(self, recipe: Recipe) -> str | None:
        from niwaki.stage import Phase

        if recipe.data.shots == 0:
            return f"data.shots=0: {self.setting} draws its head of training rows; choose task.head=label_embedding"
        if recipe.data.unlabelled:
            return f"data.unlabelled: {self.setting} makes pairs of rows with a label; leave it null"
        taught = [stage.name for stage in recipe.stages if stage.phase is Phase.OBJECTIVE]
        if taught:
            return (
                f"{taught[0]} and {self.setting}: a batch holds pairs, and the head is no part of the fit, so it has "
                "nothing to learn from a teacher; choose task.head=label_embedding or linear"
            )
        if getattr(recipe.tuning, "merge", True) is False:
            return (
                f"tuning.merge=false and {self.setting}: the head would not be the same without the adapter; needs true"
            )
        return None

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        pooled.put_on(model, Regression(len(labels), pooled.width_of(model)))

    def epoch(self, features: Dataset) -> Dataset:
        rows, turns = len(features), 2 * self.pairs
        repeated = features.select(np.repeat(np.arange(rows), turns), keep_in_memory=True)
        return repeated.add_column("turn", np.tile(np.arange(turns), rows))

    def company(
        self, features: Sequence[dict[str, Any]], split: Dataset, drawing: tuple[int, int]
    ) -> list[dict[str, Any]]:
        classes = split.select_columns(["labels"]).with_format("numpy")["labels"][:]
        partners = [partner(row, classes, drawing, row["turn"] < self.pairs) for row in features]
        found = split.__getitems__([place if place is not None else 0 for place in partners])
        return [
            {**(other if place is not None else row), "of": number}
            for number, (row, other, place) in enumerate(zip(features, found, partners, strict=True))
        ]

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = super().collate(features, tokenizer)
        if "of" in features[-1]:
            batch["of"] = torch.tensor([row.get("of", -1) for row in features])
        return batch

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Over the pairs of a batch, or over all that its rows make where it was not drawn in pairs."""
        of, labels, embedding = batch.get("of"), batch["labels"], outputs.embedding
        if of is None:
            first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
        else:
            second = (of >= 0).nonzero().flatten()
            first = of[second]
        cosine = (embedding[first] * embedding[second]).sum(-1)
        return functional.mse_loss(cosine, of_one_class(labels[first], labels[second]).float())

    def begin(self, model: Any, corpus: Corpus) -> None:
        self.refit(model, corpus)

    def refit(self, model: Any, corpus: Corpus) -> None:
        from sklearn.linear_model import LogisticRegression

        embeddings, labels = embedded(model, corpus)
        if self.several:
            fits = [yes_or_no(embeddings, column) for column in labels.T]
            model.head.weight.copy_(torch.stack([weight for weight, _ in fits]))
            model.head.bias.copy_(torch.stack([bias for _, bias in fits]))
            return
        fitted = LogisticRegression(max_iter=SEVERAL).fit(embeddings.numpy(), labels.numpy())
        weight, bias = (torch.from_numpy(np.atleast_1d(one)).float() for one in (fitted.coef_, fitted.intercept_))
        if len(fitted.classes_) == 2:  # one row says how much likelier the second is
            weight, bias = (torch.cat([torch.zeros_like(one), one]) for one in (weight, bias))
        model.head.weight.zero_()
        model.head.bias.fill_(-torch.inf if len(fitted.classes_) < len(corpus.labels) else 0.0)
        model.head.weight[fitted.classes_] = weight.to(model.head.weight.device)
        model.head.bias[fitted.classes_] = bias.to(model.head.bias.device)


def of_one_class(first: Any, second: Any) -> Any:
    """Whether the labels of two rows are the same, or share one: (...,) of (...,), or (...,) of (..., labels). Two rows
    without any label have the same."""
    return first == second if first.ndim < 2 else (first * second).any(-1) | (first == second).all(-1)


def yes_or_no(embeddings: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (width,) and bias of one label, which `given` (rows,) says of each row; where all rows or none have
    it, the bias alone: the log-odds of their share, with half a row more on both sides."""
    from sklearn.linear_model import LogisticRegression

    having, rows = int(given.sum()), len(given)
    if having in (0, rows):
        return torch.zeros(embeddings.shape[1]), torch.tensor((having + 0.5) / (rows - having + 0.5)).log()
    fitted = LogisticRegression(max_iter=SEVERAL).fit(embeddings.numpy(), given.numpy())
    return torch.from_numpy(fitted.coef_[0]).float(), torch.tensor(fitted.intercept_[0]).float()


def partner(row: dict[str, Any], classes: np.ndarray, drawing: tuple[int, int], same: bool) -> int | None:
    """The number of a training row of the same class as `row`, or of another, drawn by the row, its turn and `drawing`;
    None for the row itself, where no other has its class."""
    text = np.asarray(row["input_ids"], np.int64).tobytes()
    own = int.from_bytes(hashlib.sha256(text).digest()[:8])
    generator = np.random.default_rng([*drawing, int(row["turn"]), own])
    fitting = np.flatnonzero(of_one_class(classes, np.asarray(row["labels"])) == same)
    return int(generator.choice(fitting)) if len(fitting) else None


def embedded(model: Any, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """(rows, width), (rows,): the embeddings and labels of all training rows, in fp32 and without dropout."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found, labels = [], []
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for batch in corpus.numbered():
                inputs = {name: tensor.to(device) for name, tensor in corpus.task.inputs(batch).items()}
                found.append(model(**inputs).embedding.float().cpu())
                labels.append(batch["labels"])
    finally:
        model.train(training)
    return torch.cat(found), torch.cat(labels)


HEAD = Contrastive
