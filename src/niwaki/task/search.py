"""How an answer is searched or drawn: what is handed to transformers' generate (Wolf et al. 2020, arXiv:1910.03771)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from niwaki.errors import ConfigError

if TYPE_CHECKING:
    from niwaki.task.text_to_text import TextToText

Processor = Callable[[Tensor, Tensor], Tensor]  # tokens (texts, tokens), scores (texts, classes) -> scores
Change = Callable[[Sequence[int], int], Processor]  # numbers of rows, tokens before the first that is written
OF_DRAWS = ("temperature", "top_k", "top_p")
OF_ANY = ("min_target_length", "length_penalty", "no_repeat_ngram_size", "repetition_penalty")
REPEATS = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}  # by transformers' names, with what leaves them off


@dataclass(frozen=True)
class Search:
    """The settings of one search, and what changes the scores of each row on its way: a constraint, a draw.

    `processors` are called for as many texts a row as there are beams.
    """

    settings: Mapping[str, Any]
    processors: Sequence[Change] = ()

    def of(self, rows: Sequence[int], begin: int) -> dict[str, Any]:
        """What generate takes to write these rows of a batch."""
        found = dict(self.settings)
        if self.processors:
            found["logits_processor"] = [make(rows, begin) for make in self.processors]
        return found

    def sees_source(self, model: Any) -> bool:
        """Whether the search looks at the tokens before those that are written, padding included."""
        own = {name: getattr(model.generation_config, name, None) for name in REPEATS}
        wanted = {**own, **{name: self.settings[name] for name in REPEATS if name in self.settings}}
        return any(wanted[name] not in (None, off) for name, off in REPEATS.items())


def check(task: TextToText) -> None:
    """Raise ConfigError for settings of a search that cannot be, or would have no effect."""
    for name, least in (("max_target_length", 4), ("num_beams", 1)):
        _check(task, name, getattr(task, name) >= least, f"a whole number of at least {least}")
    for name in ("top_k", "no_repeat_ngram_size"):
        _check(task, name, _above(task, name, 1), "null or a whole number of at least 1")
    for name in ("temperature", "repetition_penalty"):
        _check(task, name, getattr(task, name) is None or getattr(task, name) > 0, "null or a number above 0")
    _check(task, "top_p", task.top_p is None or 0 < task.top_p <= 1, "null or a number above 0, up to 1")
    _check(
        task, "min_target_length",
        task.min_target_length is None or 1 <= task.min_target_length < task.max_target_length,
        f"null or a whole number from 1, below task.max_target_length={task.max_target_length}",
    )  # fmt: skip
    unread = [name for name in OF_DRAWS if getattr(task, name) is not None]
    if unread and not task.do_sample:
        name = unread[0]
        raise ConfigError(
            f"task.{name}={getattr(task, name)}: is read where texts are drawn; needs task.do_sample=true"
        )
    if task.do_sample and task.num_beams > 1:
        raise ConfigError(f"task.num_beams={task.num_beams}: texts are searched or drawn; needs 1 with do_sample=true")
    if task.length_penalty is not None and task.num_beams == 1:
        raise ConfigError(f"task.length_penalty={task.length_penalty}: compares beams; needs task.num_beams above 1")


def _above(task: TextToText, name: str, least: int) -> bool:
    return getattr(task, name) is None or getattr(task, name) >= least


def _check(task: TextToText, name: str, right: bool, needs: str) -> None:
    if not right:
        raise ConfigError(f"task.{name}={getattr(task, name)}: needs {needs}")


def settings_of(task: TextToText, num_beams: int) -> dict[str, Any]:
    """What a task asks of generate, and no more: the model's own generation_config holds for the rest."""
    asked = {
        "min_new_tokens": task.min_target_length,
        "length_penalty": task.length_penalty if num_beams > 1 else None,
        "no_repeat_ngram_size": task.no_repeat_ngram_size,
        "repetition_penalty": task.repetition_penalty,
    }
    plain = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": task.max_target_length}
    return plain | {name: value for name, value in asked.items() if value is not None}


def draw(task: TextToText, sources: Sequence[Tensor], number: int = 0, own: Any = None) -> Change:
    """A change of scores after which one token is left, drawn by its chance: of those that the settings leave, in the
    order of the vocabulary, the first up to which the chances add to more than a number in 0..1. `own`: the model's
    generation_config. The numbers of a row come from the task's seed, its source and `number` alone, so neither the
    batch nor the order of rows makes a difference."""
    warpers = warpers_of(task, own)
    seeds = [seed_of(task.seed, source.tolist(), number) for source in sources]

    def make(rows: Sequence[int], begin: int) -> Processor:
        dice = [torch.Generator().manual_seed(seeds[row]) for row in rows]

        def change(ids: Tensor, scores: Tensor) -> Tensor:
            for warper in warpers:
                scores = warper(ids, scores)
            sums = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
            uniform = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in dice])
            drawn = torch.searchsorted(sums, uniform.to(sums.device) * sums[:, -1:], right=True)
            return torch.full_like(scores, -torch.inf).scatter(1, drawn.clamp(max=scores.shape[1] - 1), 0.0)

        return change

    return make


def warpers_of(task: TextToText, own: Any) -> list[Processor]:
    """What takes tokens out of a draw: by the settings of the task, and of the model where that has none.

    Raises:
        ConfigError: the model has one with which nothing can be drawn.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    kinds = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    found = []
    for name in OF_DRAWS:
        value = getattr(task, name) if getattr(task, name) is not None else getattr(own, name, None)
        if value is None or value == off[name]:
            continue
        if value <= 0:
            raise ConfigError(f"the model's generation_config has {name}={value}: nothing is drawn so; set task.{name}")
        found.append(kinds[name](value if name == "top_k" else float(value)))  # transformers takes floats alone
    return found


def seed_of(*parts: Any) -> int:
    """A seed that is the same wherever these parts are."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
