"""What a tuning or compression method is, and what it may know about the run it is part of."""

from __future__ import annotations

import abc
import enum
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from niwaki.errors import ConfigError
from niwaki.naming import option_name

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor, nn

    from niwaki.data.batches import Batches
    from niwaki.data.corpus import Corpus
    from niwaki.edits import Edit
    from niwaki.model.anatomy import Anatomy
    from niwaki.model.teacher import Teacher

Term = Callable[[Any, Mapping[str, "Tensor"]], "Tensor"]
"""A loss term: (student outputs, batch) -> scalar."""


Retell = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]
"""A batch -> the batch that is learned from in its place."""


class Phase(enum.IntEnum):
    """When a method acts. The order of a user's list never matters; this one does."""

    VOCABULARY = -1  # changes which tokens there are, before anything is read
    SHAPE = 0  # changes the architecture
    TUNE = 1  # decides which parameters learn
    PRUNE = 2  # weight links, in the order in which they are stacked: prune, share, quantize
    SHARE = 3
    QUANTIZE = 4
    OBJECTIVE = 5  # adds to the loss

    @property
    def acts_on_weights(self) -> bool:
        return Phase.PRUNE <= self <= Phase.QUANTIZE


ONE_OF_A_KIND = {
    Phase.PRUNE: "each draws its own mask of the weights",
    Phase.SHARE: "each gathers the weights into its own shared values",
    Phase.QUANTIZE: "each puts the weights on its own grid",
}


@dataclass
class Context:
    """What a stage may use of the run; it never sees the task, the data or the other methods."""

    anatomy: Anatomy
    targets: dict[str, nn.Linear]  # the linears that weight methods act on, by their name in the bare model
    steps: int  # optimizer steps of the whole fit
    seed: int
    head_learns: bool  # the head is new, so every tuning trains it
    predictions: Callable[[Any, Mapping[str, Tensor]], Tensor]  # (outputs, batch) -> (positions, classes) logits
    owners: Callable[[Any, Mapping[str, Tensor]], Tensor]  # the same -> (positions,) the row that each is of
    load_teacher: Callable[[str | None, str], Teacher]  # (place, or null for the one that is named; field of it)
    token_ids: Callable[[str], list[int]]  # of a text, without special tokens
    calibration: Callable[[int], Sequence[Mapping[str, Tensor]]]  # so many rows of the training split, as batches
    training: Callable[[], Batches]  # all rows of the split as batches, numbered as `row`
    training_key: Callable[[], str]  # a digest of these rows as they are encoded
    read_by: Callable[
        [str], Callable[[Tensor], dict[str, Tensor]]
    ]  # training rows by number, as a model's tokenizer reads
    inputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # what of a batch the model's forward takes
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # the task's own, of a model on a batch: a scalar
    write: Callable[..., Tensor]  # (model, batch, num_beams=) -> the tokens that it writes in answer, as Task.write
    retold: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]  # a batch with such tokens as its own answers
    tables: dict[str, nn.Module] = field(default_factory=dict)  # of embeddings, with links; outputs tied to them
    records: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what each link left behind at fold
    epoch: int = 0  # optimizer steps of one epoch
    facts: dict[str, Any] = field(default_factory=dict)  # what stages add to metrics.json when they finalize
    kept: dict[str, Tensor] = field(default_factory=dict)  # parameters as they were before the fit, where one asked
    writing: Mapping[str, Any] = field(default_factory=dict)  # the settings that `write` goes by
    tokens: Sequence[int] = ()  # those that stay, where some go: by their numbers in the model as it was loaded

    @property
    def new_head(self) -> list[nn.Parameter]:
        """The parameters of the head where it is new, so that every tuning trains it; else none. A pooler is part of
        the head: what a model was pretrained for there (next sentences, similarity) is not the task."""
        tied = {id(parameter) for parameter in self.anatomy.embeddings.parameters()}
        found = self.anatomy.head_parameters().values() if self.head_learns else ()
        return [parameter for parameter in found if id(parameter) not in tied]


@dataclass
class Effects:
    """What a prepared stage adds to the fit."""

    callbacks: list[pl.Callback] = field(default_factory=list)
    terms: dict[str, Term] = field(default_factory=dict)
    settled: int = 0  # first optimizer step at which the model has its final form
    lr_factors: dict[str, float] = field(default_factory=dict)  # of the learning rate, by the name of a parameter
    edits: list[Edit] = field(default_factory=list)  # what was done to the structure, below what comes after it
    modules: dict[str, nn.Module] = field(default_factory=dict)  # that learn beside the model, and end with the fit
    retells: list[Retell] = field(default_factory=list)  # what is done to each training batch before it is read


@dataclass(frozen=True, kw_only=True)
class Stage(abc.ABC):
    """One tuning or compression method.

    Weight methods with `during_fit` stack their links before the fit and train through them; the others
    (post-training methods) stack the same links after it.
    """

    phase: ClassVar[Phase]
    during_fit: ClassVar[bool] = True
    leaves_out_blocks: ClassVar[bool] = False  # as model.layers does
    acts_on: ClassVar[Literal["linears", "embeddings"]] = "linears"  # whose weights, where it acts on weights
    turn: ClassVar[int] = 0  # in its phase: -1 embeddings, 0 blocks and what flows between them, 1 units, 2 linears
    adds_term: ClassVar[bool] = True  # to the loss, in the objective phase; else the task's own loss learns from it
    leaves_out_units: ClassVar[bool] = False  # heads, neurons: rows and columns of linears
    paper: ClassVar[str]

    @property
    def name(self) -> str:
        """`prune/magnitude`, `lora`: the option that selects this method, which is where its file stands."""
        return option_name(self)

    @property
    def field(self) -> str:
        """Where the settings of this method stand in a config: `compression.gptq`; a method whose file has another
        package says so."""
        return f"compression.{self.name.rpartition('/')[2]}"

    @property
    def acts_on_linears(self) -> bool:
        """Whether its links stand on the linears of the blocks."""
        return self.phase.acts_on_weights and self.acts_on == "linears"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        """The reason why this method cannot be combined with one of `others`, or None."""
        return None

    def needs_fit(self) -> str | None:
        """What is said of a run without a fit (trainer.max_epochs=0), in one line, where this method needs one."""
        return None

    def foreign(self) -> str | None:
        """What will be in the model that no config of transformers tells of, where `outline` does not show it; None
        where nothing will."""
        return None

    def averaging(self) -> str | None:
        """Why the average of the weights along a fit is none of this method's models, or None."""
        return None

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError where a fit of so many optimizer steps has no room for this method; called before any
        weight is loaded."""
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        """Raise ConfigError where this method cannot act on such a model; called on an empty model of the
        right shapes (meta device), before any weight is loaded."""
        return None

    def outline(self, model: nn.Module) -> None:
        """Give an empty model the structure that `prepare` will, as far as it is known: what later methods are checked
        on."""
        return None

    @abc.abstractmethod
    def prepare(self, model: nn.Module, context: Context) -> Effects:
        """Change the model in place before the fit (or after it, without `during_fit`)."""

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        """After the fold: bring the model into the form that is saved; return the edits that rebuild it."""
        return []


@runtime_checkable
class Trims(Protocol):
    """A stage that leaves tokens out. The data is read with the smaller tokenizer from then on, and the empty model has
    the smaller tables when later methods are checked on it."""

    def kept_tokens(self, corpus: Corpus, config: Any) -> Sequence[int]:
        """The tokens that stay, by their numbers in the tokenizer of `corpus`, ascending. `config`: the model's."""
        ...

    def trim(self, model: Any, tokens: Sequence[int]) -> Edit:
        """Keep these tokens in a model, which may be empty; the edit that does it. Raises ConfigError where it cannot
        lose the others."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tuning(Stage):
    """A stage that decides which parameters learn."""

    phase: ClassVar[Phase] = Phase.TUNE
    may_be_averaged: ClassVar[bool] = True  # whether an average of what learns along the fit is a model of this kind
    additive: ClassVar[bool] = (
        True  # whether its link adds to the base weight, so that a change below it is one above it
    )

    trains_base: ClassVar[bool] = True  # whether weights of the linears that the model brought learn themselves
    moves_linears: ClassVar[bool] = (
        True  # whether some of any linear of the blocks do, or a delta that is added to them
    )

    def grow(self, model: nn.Module, anatomy: Anatomy) -> list[Edit]:
        """Add the layers that stay in the saved model, and return the edits that rebuild them. Called before the
        targets of the weight methods are read, so that they see these layers too; and on an empty model (meta
        device) before that."""
        return []

    def link(self, model: nn.Module, context: Context) -> None:
        """Make this tuning's weight delta, if it has one, the first link of the weight chain."""
        return None


def ordered(stages: Iterable[Stage]) -> list[Stage]:
    """The stages in the order in which they act."""
    return sorted(stages, key=lambda stage: (stage.phase, stage.turn, stage.name))


def refuse_conflicts(stages: Sequence[Stage]) -> None:
    """Raise ConfigError, naming both methods and the reason, for the first pair that cannot be combined: two of one
    method, two that act on the same weights in one phase, or a method with one that its `conflict` names."""
    for first, second in itertools.combinations(ordered(stages), 2):
        if first.name == second.name:
            raise ConfigError(
                f"compression: {first.name} and {second.name}: one method works once in a run; leave one out"
            )
        if first.phase is second.phase and first.acts_on == second.acts_on and first.phase in ONE_OF_A_KIND:
            why = ONE_OF_A_KIND[first.phase]
            raise ConfigError(f"compression: {first.name} and {second.name}: {why}; choose one")
    for stage in stages:
        others = [other for other in stages if other is not stage]
        if reason := stage.conflict(others):
            raise ConfigError(reason)
