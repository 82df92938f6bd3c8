"""On-policy distillation: the student writes, the teacher judges (GKD, Agarwal et al. 2023, arXiv:2306.13649; MiniLLM,
Gu et al. 2023, arXiv:2306.08543)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from niwaki.compression.distill import divergence
from niwaki.compression.distill.distillation import Weighed
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import unseen
from niwaki.model.teacher import Teacher
from niwaki.model.text import end_tokens
from niwaki.stage import Context, Effects


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Weighed):
    """weight * D(p(. | y_<t), q(. | y_<t)), the mean over the positions t of texts y that the student q samples itself,
    with p the teacher; no gradient goes through the sampling, as in GKD.

    A text begins with the first `prompt` tokens of a training block, and the student writes up to `new_tokens` more, at
    temperature 1, until it ends the text. `share`: of the steps, by chance, in which it does; the task's own loss and
    distill/logits learn from the data beside it (GKD's lambda is this share). `divergence`, `beta`, `alpha`: as in
    distill/logits; GKD's is jensen_shannon, MiniLLM's reverse_kl, which it descends by policy gradients instead.
    """

    paper: ClassVar[str] = "Agarwal et al. 2023, arXiv:2306.13649; Gu et al. 2023, arXiv:2306.08543"

    share: float = 1.0
    prompt: int = 16
    new_tokens: int = 48
    divergence: divergence.Name = "reverse_kl"
    beta: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"{self.title}.share={self.share}: needs a number above 0, up to 1")
        for name in ("prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.title}.{name}={getattr(self, name)}: needs a whole number of at least 1")
        divergence.check_shares(self.divergence, self.beta, self.alpha, self.title)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        model: Any = anatomy.model
        if not anatomy.causal or model.get_output_embeddings() is None:
            raise ConfigError(
                f"{self.title}: the student goes on from the start of a text; needs a decoder-only language model, "
                "such as task=causal_lm has"
            )
        if anatomy.positions is not None and self.longest_text > anatomy.positions:
            raise ConfigError(
                f"{self.title}.prompt={self.prompt} and new_tokens={self.new_tokens}: the model reads at most "
                f"{anatomy.positions} tokens"
            )

    @property
    def longest_text(self) -> int:
        return self.prompt + self.new_tokens

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        teacher.only_say()
        return Effects(terms={self.name: OwnTexts(self, model, teacher)})


class OwnTexts:
    """The loss term: now and then the student goes on from the starts of a batch, and both judge what it wrote."""

    def __init__(self, stage: OnPolicy, model: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher
        self._stage = stage
        self._model = (model,)  # in a tuple, like the teacher, which no module may hold
        self._measure = divergence.measure_of(stage.divergence, stage.beta, stage.alpha)

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        (model,), prompt = self._model, self._stage.prompt
        starts = batch["input_ids"][batch["attention_mask"].sum(1) >= prompt, :prompt]
        if not len(starts) or float(torch.rand(())) >= self._stage.share:
            return batch["input_ids"].new_zeros((), dtype=torch.float32)
        with unseen(model):
            texts, written = sample(model, starts, self._stage.new_tokens)
            return self._stage.weight * judged(model, self.teacher, texts, written, self._measure)


@torch.no_grad()
def sample(model: Any, starts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Texts that go on from `starts` (rows, tokens), sampled from the model in eval mode, and which of their tokens it
    wrote, the first end token included: both (rows, tokens + count)."""
    training, ends = model.training, end_tokens(model).to(starts.device)
    model.eval()
    try:
        texts, running = starts, torch.ones(len(starts), dtype=torch.bool, device=starts.device)
        written, step = [torch.zeros_like(starts, dtype=torch.bool)], starts
        cache = None
        with parametrize.cached():  # chains of links, once for all tokens
            for _ in range(count):
                outputs = model(input_ids=step, past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                step = torch.multinomial(outputs.logits[:, -1].float().softmax(-1), 1)
                texts, written = torch.cat([texts, step], 1), [*written, running[:, None]]
                running = running & ~torch.isin(step[:, 0], ends)
        return texts, torch.cat(written, 1)
    finally:
        model.train(training)


def judged(
    model: Any, teacher: Teacher, texts: Tensor, written: Tensor, measure: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The divergence where the student wrote: of the distributions from which each written token was drawn."""
    places, batch = written[:, 1:], {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
    said = [side.logits[:, :-1][places].float() for side in (model(**batch), teacher.say(batch).outputs)]
    classes = min(logits.shape[-1] for logits in said)
    return measure(*(functional.log_softmax(logits[:, :classes], dim=-1) for logits in said))
