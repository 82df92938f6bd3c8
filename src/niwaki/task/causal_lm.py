"""Causal language modelling: predict each token from those before it (Radford et al. 2019); text packed in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.task import IGNORED, Batch, Rows, Scores, Task, pad


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Mean negative log-likelihood per token, and its exponential, the perplexity.

    Rows that end with a line break are pieces of one running text; any other row is a document of its own, and the
    tokenizer's separator (bos, else eos) stands before it. The stream is cut into blocks of `max_length` tokens that
    overlap by one, so that every token but the first is predicted exactly once.
    """

    needs: ClassVar[Needs] = Needs(required=("text",))
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    head_learns: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    paper: ClassVar[str] = "Radford et al. 2019"

    max_length: int = 256
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"task.max_new_tokens={self.max_new_tokens}: needs a whole number of at least 1")

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        stream: list[int] = []
        for document in documents(rows["text"]):
            stream += [] if separator is None else [separator]
            stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) < 2:
            raise DataError(
                f"a split has {len(stream)} tokens: needs at least 2, so that one is predicted from another"
            )
        stride = self.max_length - 1
        blocks = [stream[i : i + self.max_length] for i in range(0, len(stream) - 1, stride)]
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        for row in features:
            row["labels"] = list(row["input_ids"])
        return pad(features, tokenizer, labels=True)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch["labels"][:, 1:]
        keep = targets != IGNORED
        return outputs.logits[:, :-1][keep], targets[keep]

    def scores(self, labels: Sequence[str]) -> Scores:
        return TokenScores(self)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, str]]
    ) -> Iterator[dict[str, Any]]:
        for row in rows:
            ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            if tokenizer.bos_token_id is not None:
                ids = functional.pad(ids, (1, 0), value=tokenizer.bos_token_id)
            written = model.generate(
                ids.to(model.device), attention_mask=ids.new_ones(ids.shape).to(model.device),
                max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = written[0, ids.shape[1] :]  # by position: a tokenizer may not give the prompt back as it was
            yield {**row, "generated": tokenizer.decode(new, skip_special_tokens=True)}


def documents(texts: Sequence[str]) -> list[str]:
    """Rows joined to documents: a row that ends with a line break runs on into the next one."""
    joined: list[list[str]] = [[]]
    for text in texts:
        joined[-1].append(text)
        if not text.endswith(("\n", "\r")):
            joined.append([])
    return ["".join(pieces) for pieces in joined if pieces]


class TokenScores(Scores):
    """perplexity = exp(loss), loss = mean negative log-likelihood over all predicted tokens, in nats."""

    def __init__(self, task: CausalLM) -> None:
        self._task = task
        self._total = 0.0
        self._tokens = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, labels = self._task.counted(outputs, batch)
        self._total += float(functional.cross_entropy(logits.float(), labels, reduction="sum"))
        self._tokens += len(labels)

    def compute(self) -> dict[str, float]:
        loss = self._total / self._tokens
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}
