"""Zero-shot classification by entailment: does the text entail that it is of this class? (Yin et al. 2019,
arXiv:1909.00161)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from niwaki.errors import ConfigError
from niwaki.model import hypotheses
from niwaki.task import descriptions
from niwaki.task.heads.head import Head
from niwaki.task.task import Rows, pad

CONTRADICTIONS = ("contradiction", "not_entailment", "not entailment")


@dataclass(frozen=True, kw_only=True)
class Entailment(Head):
    """softmax over labels k of z(text, hypothesis_k), z: the model's logit of entailment, or with
    `against_contradiction` this less its logit of contradiction. hypothesis_k: `template` around the description of
    label k, its name made readable unless `descriptions` has another. All pairs of a row are one batch of the model,
    which is one of natural language inference and says by the names of its labels which output is which. Where a text
    may have several labels, each has it with p = sigmoid(entailment - contradiction), so this difference is z there.
    """

    is_new: ClassVar[bool] = False
    paper: ClassVar[str] = "Yin et al. 2019, arXiv:1909.00161"

    descriptions: Mapping[str, str] = field(default_factory=dict)
    template: str = "This text is about {}."
    against_contradiction: bool = False

    def __post_init__(self) -> None:
        descriptions.check_template(self.template, "task.template")

    @property
    def reading(self) -> tuple[Any, ...]:
        return ("entailment", self.template, tuple(sorted(self.descriptions.items())))

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ()

    def check_config(self, config: Any) -> None:
        self.places(config)

    def check_labels(self, labels: Sequence[str]) -> None:
        descriptions.check_known(labels, self.descriptions, "task.descriptions")

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        hypotheses.put_on(model, *self.places(model.config))

    def places(self, config: Any) -> tuple[int, int | None]:
        """The outputs of a model of this config that say entailment and, if it is asked for, contradiction.

        Raises:
            ConfigError: none does, by its name.
        """
        names = {str(name).casefold(): int(place) for place, name in config.id2label.items()}
        against = next((names[name] for name in CONTRADICTIONS if name in names), None)
        lacking = [] if "entailment" in names else ["entailment"]
        compares = self.against_contradiction or self.several
        lacking += ["contradiction"] if compares and against is None else []
        if lacking:
            raise ConfigError(
                f"{self.setting}: needs a model of natural language inference, with a label {lacking[0]!r}; this "
                f"{config.model_type} has {', '.join(map(str, config.id2label.values()))}"
            )
        return names["entailment"], against if compares else None

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        """`input_ids` and `token_type_ids` of a row: a list for each label."""
        if "text_pair" in rows:
            raise ConfigError(f"{self.setting}: reads one text and a hypothesis, and the rows have a text_pair")
        claims = [self.template.replace("{}", text) for text in descriptions.described(labels, self.descriptions)]
        longest = max(len(ids) for ids in tokenizer(claims)["input_ids"])
        if longest >= self.max_length:
            raise ConfigError(
                f"task.max_length={self.max_length}: leaves no room for a text beside a hypothesis of {longest} tokens"
            )
        count = len(claims)
        firsts = [text for text in rows["text"] for _ in claims]
        encoded = dict(
            tokenizer(firsts, claims * len(rows["text"]), truncation="only_first", max_length=self.max_length)
        )
        encoded.pop("attention_mask", None)
        found: Rows = {
            name: [values[start : start + count] for start in range(0, len(values), count)]
            for name, values in encoded.items()
        }
        return {**found, "length": [count * max(map(len, ids)) for ids in found["input_ids"]]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """(rows, labels, tokens)."""
        names = [name for name in ("input_ids", "token_type_ids") if name in features[0]]
        pairs = [
            dict(zip(names, one, strict=True))
            for row in features
            for one in zip(*(row[name] for name in names), strict=True)
        ]
        found = pad(pairs, tokenizer)
        return {name: tensor.view(len(features), -1, tensor.shape[1]) for name, tensor in found.items()}


HEAD = Entailment
