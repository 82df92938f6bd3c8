"""A pattern, in which a language model fills in the word of a label (PET, Schick & Schutze 2021, arXiv:2001.07676)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from niwaki.errors import ConfigError
from niwaki.model import words
from niwaki.model.anatomy import family_of
from niwaki.model.load import CAUSAL
from niwaki.task import descriptions, patterns
from niwaki.task.heads.head import Head
from niwaki.task.task import Rows

if TYPE_CHECKING:
    from niwaki.data.corpus import Corpus
    from niwaki.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Prompt(Head):
    """softmax over labels k of the model's logit for the word v_k, in the place of {mask} in the pattern.

    `pattern`: holds {text}, {mask} and, for pairs, {text_pair}; only texts are cut where it is too long. A causal model
    reads it up to {mask}, and the word is its next token. `verbalizer`: the word for each label, one token; else the
    label's name made readable. With a fit the cross-entropy over these words tunes the model.
    """

    is_new: ClassVar[bool] = False
    says_several: ClassVar[bool] = False
    paper: ClassVar[str] = "Schick & Schutze 2021, arXiv:2001.07676"

    pattern: str = "{text} This is about {mask}."
    verbalizer: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        patterns.check_pattern(self.pattern)

    @property
    def reading(self) -> tuple[Any, ...]:
        return ("pattern", self.pattern)

    def auto_class_of(self, config: Any) -> str:
        return "AutoModelForCausalLM" if reads_on(config) else "AutoModelForMaskedLM"

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ()

    def check_config(self, config: Any) -> None:
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{self.setting}: needs a model that fills in a word or goes on with a text, and a {config.model_type} "
                "has an encoder and a decoder; try model=tiny-bert or model=tiny-llama"
            )
        behind = self.pattern.partition("{mask}")[2]
        if reads_on(config) and any(map(str.isalnum, behind)):
            raise ConfigError(
                f"task.pattern={self.pattern!r}: a {config.model_type} reads from left to right, so nothing of "
                f"{behind!r} could be read; put {{mask}} last"
            )

    def check_labels(self, labels: Sequence[str]) -> None:
        descriptions.check_known(labels, {**dict.fromkeys(labels, ""), **self.verbalizer}, "task.verbalizer")

    def conflict(self, recipe: Recipe) -> str | None:
        from niwaki.stage import Trims

        trimming = [stage.name for stage in recipe.stages if isinstance(stage, Trims)]
        if trimming:
            return (
                f"{trimming[0]} and {self.setting}: the words for the labels may be among the tokens that go; leave it "
                "out"
            )
        return None

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        words.put_on(model, words.Words(len(labels)))

    def begin(self, model: Any, corpus: Corpus) -> None:
        tokens = patterns.word_tokens(corpus.labels, self.verbalizer, corpus.tokenizer)
        model.words.take(tokens, None if reads_on(model.config) else corpus.tokenizer.mask_token_id)

    def filling(self, causal: bool) -> patterns.Pattern:
        """What makes prompts of texts."""
        return patterns.Pattern(self.pattern, causal, self.max_length)

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        patterns.check_columns(self.pattern, list(rows))
        patterns.word_tokens(labels, self.verbalizer, tokenizer)  # before any weight is loaded
        causal = CAUSAL in tokenizer.init_kwargs
        if not causal and tokenizer.mask_token_id is None:
            raise ConfigError(f"{self.setting}: this tokenizer has no mask token; needs a masked or a causal model")
        found = self.filling(causal).encoded(texts_of(rows), tokenizer)
        return {"input_ids": found, "length": [len(ids) for ids in found]}


def texts_of(rows: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """The texts of each row, by their columns."""
    names = [name for name in ("text", "text_pair") if name in rows]
    return [dict(zip(names, texts, strict=True)) for texts in zip(*(rows[name] for name in names), strict=True)]


def reads_on(config: Any) -> bool:
    """Whether a model of this config reads from left to right."""
    return family_of(config).causal or bool(getattr(config, "is_decoder", False))


HEAD = Prompt
