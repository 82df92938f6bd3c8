"""Label embeddings: a text is compared with a description of each label (Schopf et al. 2022, arXiv:2211.16285; Reimers
& Gurevych 2019, arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import ConfigError
from niwaki.model import pooled
from niwaki.task import descriptions
from niwaki.task.heads.head import Head
from niwaki.task.task import batched, pad

if TYPE_CHECKING:
    from niwaki.data.corpus import Corpus


class LabelVectors(nn.Module):
    """logits = (cos(text, vector of the label) - offset of the label) / temperature, `weight` (labels, width); `offset`
    (labels,) is there where each logit counts by itself."""

    def __init__(self, labels: int, width: int, temperature: float, several: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(labels, width))
        self.offset = nn.Parameter(torch.zeros(labels)) if several else None
        self.temperature = temperature

    def forward(self, embedding: Tensor) -> Tensor:
        vectors = functional.normalize(self.weight.float(), dim=-1)
        # A sum of products, which no autocast rounds: logits are a cosine times 20 or so.
        cosine = (embedding[:, None] * vectors).sum(-1)
        return (cosine if self.offset is None else cosine - self.offset) / self.temperature

    @torch.no_grad()
    def take(self, vectors: Tensor) -> None:
        """Begin with these vectors (labels, width). The offset begins as the mean cosine of a label with the others: a
        text is of a label when it is nearer to it than they are."""
        self.weight.copy_(vectors)
        if self.offset is not None:
            alike = functional.normalize(self.weight, dim=-1)
            self.offset.copy_(((alike @ alike.T).sum(-1) - 1) / (len(alike) - 1))


@dataclass(frozen=True, kw_only=True)
class LabelEmbedding(Head):
    """softmax_k(cos(e(text), v_k) / temperature), e: the mean of the last states of the text's tokens. Where a text may
    have several labels, sigmoid((cos(e(text), v_k) - b_k) / temperature), b_k: an offset that learns, and begins as the
    mean of cos(v_k, v_j) over the other labels j.

    v_k begins as e(description of label k), so nothing has to be learned (trainer.max_epochs=0, data.shots=0), and is
    then tuned as any head. `descriptions`: what a label means, in place of its name made readable; `template`: what
    stands around it, such as "A question about {}.".
    """

    paper: ClassVar[str] = "Schopf et al. 2022, arXiv:2211.16285; Reimers & Gurevych 2019, arXiv:1908.10084"

    descriptions: Mapping[str, str] = field(default_factory=dict)
    template: str = "This is about {}."
    temperature: float = 0.05

    def __post_init__(self) -> None:
        descriptions.check_template(self.template, "task.template")
        if self.temperature <= 0:
            raise ConfigError(f"task.temperature={self.temperature}: needs a number above 0")

    def auto_class_of(self, config: Any) -> str:
        return pooled.AUTO_CLASS

    def check_config(self, config: Any) -> None:
        pooled.refuse_decoder(config, self.setting)

    def check_labels(self, labels: Sequence[str]) -> None:
        descriptions.check_known(labels, self.descriptions, "task.descriptions")

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        pooled.put_on(model, LabelVectors(len(labels), pooled.width_of(model), self.temperature, self.several))

    def begin(self, model: Any, corpus: Corpus) -> None:
        if not getattr(model, "head_is_new", True):
            return
        texts = [self.template.replace("{}", text) for text in descriptions.described(corpus.labels, self.descriptions)]
        with torch.no_grad():
            model.head.take(torch.cat([self.embedded(part, model, corpus) for part in batched(texts)]))

    def embedded(self, texts: Sequence[str], model: Any, corpus: Corpus) -> Tensor:
        """e of some texts: (texts, width)."""
        encoded = self.encode({"text": list(texts)}, corpus.tokenizer, corpus.labels)
        features = [{"input_ids": ids} for ids in encoded["input_ids"]]
        batch = {name: tensor.to(model.device) for name, tensor in pad(features, corpus.tokenizer).items()}
        found: Tensor = model(**batch).embedding
        return found


HEAD = LabelEmbedding
