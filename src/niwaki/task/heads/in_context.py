"""Learning in context: a causal model reads some answered rows before each text (Brown et al. 2020, arXiv:2005.14165),
calibrated by texts without content (Zhao et al. 2021, arXiv:2102.09690)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from niwaki.console import notice
from niwaki.errors import ConfigError
from niwaki.model import words
from niwaki.model.anatomy import Anatomy
from niwaki.task import patterns
from niwaki.task.heads.prompt import Prompt, reads_on, texts_of
from niwaki.task.masked_lm import edges
from niwaki.task.task import pad

if TYPE_CHECKING:
    from niwaki.data.corpus import Corpus
    from niwaki.recipe import Recipe

CONTENT_FREE = ("N/A", "[MASK]", "")
BETWEEN = "\n\n"


@dataclass(frozen=True, kw_only=True)
class InContext(Prompt):
    """p: as task.head=prompt has it, behind `demonstrations` of training rows in the same pattern, each with its word.

    They are drawn by the run's seed, as many of each class as can be, and are part of the saved model. With `calibrate`
    what it says is W p, of sum 1, W = diag(p_cf)^-1, p_cf: its mean answer to "N/A", "[MASK]" and "". Nothing is tuned.
    The oldest demonstrations go where the model cannot read all of them and a text of max_length tokens.
    """

    paper: ClassVar[str] = "Brown et al. 2020, arXiv:2005.14165; Zhao et al. 2021, arXiv:2102.09690"

    pattern: str = "Text: {text}\nTopic: {mask}"
    demonstrations: int = 4
    calibrate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.demonstrations < 0:
            raise ConfigError(f"task.demonstrations={self.demonstrations}: needs a whole number of at least 0")

    @property
    def reading(self) -> tuple[Any, ...]:
        return ("in context", self.pattern)

    def check_config(self, config: Any) -> None:
        super().check_config(config)
        if not reads_on(config):
            raise ConfigError(
                f"{self.setting}: needs a model that reads from left to right, and {config.model_type} sees the whole "
                "text; use task.head=prompt, or try model=tiny-llama"
            )

    def conflict(self, recipe: Recipe) -> str | None:
        if recipe.fits:
            return (
                f"trainer.max_epochs={recipe.trainer.max_epochs} and {self.setting}: nothing is tuned; set it to 0, or "
                "use task.head=prompt"
            )
        if recipe.data.shots == 0 and self.demonstrations:
            return f"data.shots=0: {self.setting} demonstrates training rows; needs task.demonstrations=0"
        return super().conflict(recipe)

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        words.put_on(model, words.WordsInContext(len(labels)))

    def filling(self, causal: bool) -> patterns.Pattern:
        return patterns.Pattern(self.pattern, causal, self.max_length, opens=False)

    def begin(self, model: Any, corpus: Corpus) -> None:
        super().begin(model, corpus)
        model.words.open_with([])
        chosen = self.drawn(corpus)
        parts = [self.demonstrated(row, corpus.tokenizer) for row in chosen]
        opening, room = edges(corpus.tokenizer)[0], Anatomy.of(model).positions
        while room is not None and len(opening) + sum(map(len, parts)) + self.max_length > room:
            if not parts:
                raise ConfigError(f"task.max_length={self.max_length}: the model reads at most {room} tokens")
            parts.pop(0)
        if len(parts) < len(chosen):
            notice(
                f"{self.setting}: {len(parts)} of {len(chosen)} demonstrations fit into the {room} tokens of the model"
            )
        model.words.open_with([*opening, *(token for part in parts for token in part)])
        self.refit(model, corpus)

    def refit(self, model: Any, corpus: Corpus) -> None:
        """What the model says of texts without content: of the model that it has become."""
        model.words.content_free.zero_()
        if self.calibrate:
            model.words.content_free.copy_(self.said_of_nothing(model, corpus))

    def drawn(self, corpus: Corpus) -> list[Mapping[str, str]]:
        """Training rows, as many of each class as can be, in a random order."""
        rows = corpus.rows["train"]
        generator = np.random.default_rng([corpus.seed, 5])
        places: dict[str, list[int]] = defaultdict(list)
        for place in generator.permutation(len(rows)).tolist():
            places[rows[place]["label"]].append(place)
        turns: list[int] = []
        while len(turns) < min(self.demonstrations, len(rows)):
            classes = [label for label in generator.permutation(sorted(places)).tolist() if places[label]]
            turns += [places[label].pop() for label in classes]
        return [rows[place] for place in generator.permutation(turns[: self.demonstrations]).tolist()]

    def demonstrated(self, row: Mapping[str, str], tokenizer: Any) -> list[int]:
        """The tokens of an answered row, with what stands behind it."""
        texts = texts_of({name: [value] for name, value in row.items()})
        (asked,) = self.filling(True).encoded(texts, tokenizer)
        (token,) = patterns.word_tokens([row["label"]], self.verbalizer, tokenizer)
        return [*asked, token, *tokenizer(BETWEEN, add_special_tokens=False)["input_ids"]]

    def said_of_nothing(self, model: Any, corpus: Corpus) -> Tensor:
        """log p_cf: (labels,)."""
        columns = [name for name in ("text", "text_pair") if name in corpus.columns]
        texts: list[Mapping[str, str]] = [{name: text for name in columns} for text in CONTENT_FREE]
        features = [{"input_ids": ids} for ids in self.filling(True).encoded(texts, corpus.tokenizer)]
        batch = {name: tensor.to(model.device) for name, tensor in pad(features, corpus.tokenizer).items()}
        with torch.no_grad():
            said: Tensor = model(**batch).logits.softmax(-1).mean(0).log()
        return said


HEAD = InContext
