"""Tasks that read one text and write another: by an encoder and a decoder (Sutskever et al. 2014, arXiv:1409.3215), or
by a decoder alone, which goes on with the text that it read (Radford et al. 2019)."""

from __future__ import annotations

import abc
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional

from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task import search
from niwaki.task.layout import filled, layout_for, layout_of
from niwaki.task.search import Search
from niwaki.task.task import IGNORED, Batch, LikelihoodScores, Rows, Scores, Task, alike
from niwaki.task.texts import rows_of

if TYPE_CHECKING:
    from niwaki.model.anatomy import Anatomy

BETWEEN = 0xFF  # between the references of a row; no text in UTF-8 has it


@dataclass(frozen=True, kw_only=True)
class TextToText(Task):
    """-log p(target | source), the mean over the tokens of the targets; the answers are what a search finds, or a draw.

    `max_length` and `max_target_length`: tokens of a source, with what stands around it, and of a target, the longest
    answer included. `prefix` stands before every source, as T5 was trained with; {{ in it is a brace. A model without
    an encoder reads its bos token (else its end token), the source, `separator` and the target, which its end token
    ends; null is a line break, or the end token where the tokenizer knows none.

    `num_beams`: of the search, 1 takes the likeliest token each time. `do_sample` draws each token instead, at
    `temperature`, of the `top_k` likeliest or the likeliest that hold `top_p` of all (Holtzman et al. 2020), by `seed`.
    What is null is as the model's own generation_config says. Teachers write, and exports are compared, by search.
    """

    needs: ClassVar[Needs] = Needs(required=("source", "target"), optional=("references",))
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    head_learns: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    answer: ClassVar[str] = "target"  # the column with what is to be written
    keeps_end: ClassVar[bool] = False  # a source that is too long loses its beginning, else its end
    of_search: ClassVar[tuple[str, ...]] = (
        "num_beams", "do_sample", "temperature", "top_k", "top_p", "seed", "min_target_length", "length_penalty",
        "no_repeat_ngram_size", "repetition_penalty",
    )  # fmt: skip
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", *of_search)

    max_target_length: int = 128
    prefix: str = ""
    separator: str | None = None
    num_beams: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    min_target_length: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        search.check(self)
        known = [one for one in self.needs.asking.optional if one not in ("id", *self.needs.hints)]
        for name in fields_of(self.prefix):
            if name not in known:
                raise ConfigError(
                    f"task.prefix={self.prefix!r}: {name!r} is no column that may be named there; needs a text"
                    + (f" with {{{known[0]}}} at most" if known else " without braces")
                )

    def auto_class_of(self, config: Any) -> str:
        return self.auto_class if config.is_encoder_decoder else "AutoModelForCausalLM"

    def check_config(self, config: Any) -> None:
        from niwaki.model.anatomy import family_of

        if not config.is_encoder_decoder and not family_of(config).causal and not getattr(config, "is_decoder", False):
            raise ConfigError(
                f"task={self.name}: needs a model that writes, and {config.model_type} sees the whole text; try "
                "model=tiny-bart, which has an encoder and a decoder, or model=tiny-llama, which has a decoder alone"
            )

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        config: Any = anatomy.model.config
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"task={self.name}: the config of this {config.model_type} names no decoder_start_token_id, from which "
                "a text is written; set model.overrides.decoder_start_token_id, or the field in its config.json"
            )
        if anatomy.positions is None:
            return
        both = self.max_length + self.max_target_length
        if config.is_encoder_decoder and self.max_target_length > anatomy.positions:
            raise ConfigError(
                f"task.max_target_length={self.max_target_length}: the model writes at most {anatomy.positions} tokens"
            )
        if not config.is_encoder_decoder and both > anatomy.positions:
            raise ConfigError(
                f"task.max_length={self.max_length} and max_target_length={self.max_target_length}: a decoder reads "
                f"both in a row, and this one at most {anatomy.positions} tokens"
            )

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        read = self._given(rows, tokenizer)
        targets = layout_for(tokenizer).targets(rows[self.answer], tokenizer, self.max_target_length)
        return {
            **read,
            "labels": targets,
            "reference": [list(bytes([BETWEEN]).join(map(str.encode, texts))) for texts in self._right(rows)],
            "length": [len(source) + len(target) for source, target in zip(read["input_ids"], targets, strict=True)],
        }

    def _given(self, rows: Rows, tokenizer: Any) -> Rows:
        """The features of rows that are to be answered."""
        return {"input_ids": self._read(rows, tokenizer)}

    def _read(self, rows: Rows, tokenizer: Any) -> list[list[int]]:
        """The tokens that stand before a target."""
        before, behind = layout_for(tokenizer).around(tokenizer, self.separator)
        room = self.max_length - len(before) - len(behind)
        if room < 1:
            raise ConfigError(f"task.max_length={self.max_length}: what stands around a source takes all of it")
        texts = self._sources(rows)
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [[*before, *(ids[-room:] if self.keeps_end else ids[:room]), *behind] for ids in found]

    def _sources(self, rows: Rows) -> list[str]:
        """Each source with its prefix."""
        names = fields_of(self.prefix)
        for name in names:
            if name not in rows:
                raise DataError(f"task.prefix={self.prefix!r}: the rows have no column {name!r}")
            if None in rows[name]:
                text = rows["source"][rows[name].index(None)]
                raise DataError(f"task.prefix={self.prefix!r}: the row with source {text[:40]!r} has no {name!r}")
        return [
            self.prefix.format(**{name: rows[name][number] for name in names}) + text
            for number, text in enumerate(rows["source"])
        ]

    def _right(self, rows: Rows) -> list[list[str]]:
        """For each row the texts of which any would be right."""
        return rows["references"] if "references" in rows else [[text] for text in rows[self.answer]]

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = layout_for(tokenizer).collate(features, tokenizer)
        if "reference" in features[0]:
            batch["reference"] = filled([row["reference"] for row in features], 0)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return layout_of(batch).inputs(batch)

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        logits, targets = (one.flatten(0, 1) for one in layout_of(batch).aligned(outputs, batch))
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing)

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = layout_of(batch).aligned(outputs, batch)
        keep = targets != IGNORED
        return logits[keep], targets[keep]

    @property
    def writing(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("max_target_length", *search.OF_ANY)}

    def write(self, model: Any, batch: Batch, *, num_beams: int) -> Tensor:
        return layout_of(batch).write(model, batch, self._search(model, batch, num_beams))

    def _search(self, model: Any, batch: Batch, num_beams: int, *changes: search.Change) -> Search:
        """The settings and the changes of scores with which a batch is answered."""
        return Search(search.settings_of(self, num_beams), changes)

    def answered(self, model: Any, batch: Batch, number: int = 0) -> Tensor:
        """What a model writes in answer to a batch, searched or drawn as the task says; each `number` draws anew."""
        if not self.do_sample:
            return self.write(model, batch, num_beams=self.num_beams)
        layout = layout_of(batch)
        drawn = search.draw(self, layout.sources(batch), number, model.generation_config)
        return layout.write(model, batch, self._search(model, batch, 1, drawn))

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        return layout_of(batch).retold(batch, written)

    def score(self, scores: Scores, model: Any, batch: Batch) -> None:
        super().score(scores, model, batch)
        assert isinstance(scores, TextScores)
        scores.compare(self.answered(model, batch), batch["reference"])

    def watch(self, scores: Scores, model: Any, batch: Batch) -> None:
        if self.metric == "perplexity":  # for which nothing needs to be written
            super().score(scores, model, batch)
        else:
            self.score(scores, model, batch)

    @abc.abstractmethod
    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores: ...

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for batch, part in self._asked(model, tokenizer, rows):
            for row, text in zip(part, texts_of(self.answered(model, batch), tokenizer), strict=True):
                yield {**row, "generated": text}

    def _asked(
        self, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[dict[str, Tensor], Sequence[Mapping[str, Any]]]]:
        """Batches of rows that are to be answered, with the rows."""
        for part in alike(rows):
            columns = {name: [row[name] for row in part] for name in part[0]}
            given = self._given(columns, tokenizer)
            features = rows_of(given)
            yield {name: value.to(model.device) for name, value in self.collate(features, tokenizer).items()}, part


def fields_of(text: str) -> list[str]:
    """The names in braces of a text, {{ and }} for braces themselves."""
    try:
        found = [(name, spec, way) for _, name, spec, way in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ConfigError(f"task.prefix={text!r}: {error}; write {{{{ for a brace") from None
    for name, spec, way in found:
        if spec or way:
            raise ConfigError(f"task.prefix={text!r}: needs a name alone between braces, such as {{{name}}}")
    return [name for name, _, _ in found]


def texts_of(tokens: Tensor, tokenizer: Any) -> list[str]:
    """Rows of tokens, IGNORED behind each, as texts without special tokens."""
    rows = [[token for token in row if token != IGNORED] for row in tokens.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def references_of(reference: Tensor) -> list[list[str]]:
    """The texts in `reference` (rows, bytes of UTF-8), 0 behind each row."""
    rows = (bytes(byte for byte in row if byte) for row in reference.tolist())
    return [[part.decode() for part in row.split(bytes([BETWEEN]))] for row in rows]


class TextScores(LikelihoodScores):
    """Of every token of the targets; and what was written beside the texts of which each would be right."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.written: list[str] = []
        self.references: list[list[str]] = []

    def update(self, outputs: Any, batch: Batch) -> None:
        self.add(*(one.flatten(0, 1) for one in layout_of(batch).aligned(outputs, batch)))

    def compare(self, written: Tensor, references: Tensor) -> None:
        """Take what was written, tokens (rows, tokens), and the references as bytes of UTF-8 (rows, bytes)."""
        self.written += texts_of(written, self._tokenizer)
        self.references += references_of(references)

    def compute(self) -> dict[str, float]:
        return {**(self.compared() if self.written else {}), **super().compute()}

    def compared(self) -> dict[str, float]:
        """The scores of what was written."""
        return {}

    @property
    def streams(self) -> list[Any]:
        """The references as sacrebleu takes them: the first of every row, the second, ...; None where one has fewer."""
        most = max(map(len, self.references))
        return [[one[i] if i < len(one) else None for one in self.references] for i in range(most)]
