"""Loading a teacher: a model that already does the student's task, on the same vocabulary and labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from niwaki import artifact
from niwaki.data.encode import source_of
from niwaki.edits import from_json
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, adapt, family_of
from niwaki.model.capture import Flow, Recorder, Seen, outline, recorder_of
from niwaki.model.embeddings import KeepTokens
from niwaki.model.load import Pretrained, attached, auto_class, has_segments, located

if TYPE_CHECKING:
    from niwaki.task.task import Task


Precision = Literal["fp32", "bf16", "int8"]
ELSEWHERE = ("_name_or_path", "name_or_path", "transformers_version")  # what no answer depends on


@runtime_checkable
class Taught(Protocol):
    """A stage that learns from a teacher."""

    teacher: str | None  # where it is; null: the one that another stage names
    precision: Precision | None  # that it runs in; null: fp32, or what another stage with the same teacher says
    own_tokens: ClassVar[bool]  # whether the teacher reads the rows in tokens of its own, which differ

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that it makes for the teacher to read, beside the rows; else 0."""
        ...

    def teachers(self) -> dict[str, str]:
        """The fields of the config that name a teacher, and the hub name, folder or artifact that each names."""
        ...


@runtime_checkable
class LooksInside(Taught, Protocol):
    """A stage that compares what flows through student and teacher."""

    def compare_outlines(self, student: Seen, teacher: Seen) -> None:
        """Raise ConfigError where what flows through the two cannot be compared, by its shapes."""
        ...


@dataclass(frozen=True)
class Said:
    """What a model made of a batch: the outputs of its forward pass, what flowed through it where a term asks, and the
    batch that it read."""

    outputs: Any
    seen: Seen | None
    batch: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def flows(self) -> list[Flow]:
        assert self.seen is not None, "nobody looked inside"
        return self.seen.flows

    @property
    def last(self) -> Tensor:
        assert self.seen is not None, "nobody looked inside"
        return self.seen.last


class Teacher:
    """A model that is asked and never learns: in eval mode, without gradients, outside of every module.

    It runs once for each batch, however many terms ask: `terms` of them have it, and what it said is let go when all
    have asked but those that `only_say`.
    fp32 follows the autocast around it. bf16 and int8 run as they are: all weights in bf16, or the linears of the
    blocks in 8-bit integers as quantize/int8 has them, which are faster where the device multiplies integers fast.
    """

    def __init__(self, model: Any, precision: Precision = "fp32", field: str = "teacher") -> None:
        self.model = model.eval().requires_grad_(False)
        self.precision = precision
        self.anatomy = Anatomy.of(model)
        self.terms = 0
        self._aside = 0  # of these, those that only say
        self.reader: Callable[[Tensor], dict[str, Tensor]] | None = (
            None  # of the rows with these numbers, in its tokens
        )
        self._recorder: Recorder | None = None
        self._batch: Mapping[str, Tensor] | None = None
        self._said: Said | None = None
        self._asked = 0
        if precision == "bf16":
            model.to(torch.bfloat16)
        if precision == "int8":
            to_int8(self.anatomy, field)

    def only_say(self) -> None:
        """One of its terms asks it of other batches, or at other times, and none waits for it."""
        self._aside += 1

    def watch(self, *, attention: bool, states: bool = True) -> None:
        """Have what flows through the model be part of what is said: with attentions, and with the states between the
        blocks, where they are asked for."""
        if self._recorder is None:
            self._recorder = recorder_of(self.anatomy)
            self._recorder.always = True
        self._recorder.watch_states(states)
        if attention:
            self._recorder.watch_attention()

    def __call__(self, batch: Mapping[str, Tensor]) -> Said:
        if self._said is None or batch is not self._batch:
            self._said = None  # before the next one is made
            self._batch, self._said, self._asked = batch, self.say(batch), 0
        said = self._said
        self._asked += 1
        if self._asked >= self.terms - self._aside:
            self._batch = self._said = None
        return said

    def let_go(self) -> None:
        """One that only says does so no more; the model is dropped with the last term."""
        self.terms -= 1
        self._aside -= 1
        if self.terms <= 0:
            del self.model, self.anatomy

    def fingerprint(self) -> str:
        """sha256 of all that it computes with: tensors, settings, code. Many a setting changes no tensor, such as the
        number of heads or the activation."""
        from niwaki.tuning.beside import fingerprint

        config = {name: value for name, value in self.model.config.to_diff_dict().items() if name not in ELSEWHERE}
        modules = [(name, type(part).__qualname__, settings_of(part)) for name, part in self.model.named_modules()]
        kinds = {kind.__module__ for part in self.model.modules() for kind in type(part).__mro__}
        code = source_of(sorted(kind for kind in {__name__, *kinds} if kind.partition(".")[0] == "niwaki"))
        versions = [version(package) for package in ("torch", "transformers", "peft")]
        told = [fingerprint(self.model.state_dict(), ()), config, modules, code, versions]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()

    @contextmanager
    def asked(self, device: torch.device) -> Iterator[Any]:
        """The model on this device, in its precision, without gradients."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        as_it_is = torch.autocast(device.type, enabled=False) if self.precision != "fp32" else nullcontext()
        # Not inference mode, whose tensors no later gradient may pass by.
        with torch.no_grad(), as_it_is:
            yield self.model

    def say(self, batch: Mapping[str, Tensor]) -> Said:
        """One forward pass over a batch, or over the same rows in tokens of its own."""
        device = batch["input_ids"].device
        if self.reader is not None:
            batch = {name: tensor.to(device) for name, tensor in self.reader(batch["row"].cpu()).items()}
        names = ["input_ids", "attention_mask", "decoder_input_ids"]
        names += ["token_type_ids"] if has_segments(self.model.config) else []
        with self.asked(device) as model:
            outputs = model(**{name: batch[name] for name in names if name in batch})
        seen = None
        if self._recorder is not None:
            seen, self._recorder.seen = self._recorder.seen, None
        return Said(outputs, seen, batch)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What a module computes with beside tensors and modules: its plain attributes."""
    found = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in ELSEWHERE}
    return {name: value for name, value in found.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, or a collection of such."""
    if isinstance(value, Mapping):
        return all(map(is_plain, (*value, *value.values())))
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def to_int8(anatomy: Anatomy, field: str) -> None:
    """Round the linears of the blocks to 8-bit integers, one scale per output channel."""
    from niwaki.compression.quantize.integers import UseIntegers, to_codes

    linears = anatomy.linears()
    if not linears:
        raise ConfigError(f"{field.rpartition('.')[0]}.precision=int8: the teacher has integers already; leave it null")
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    model: Any = anatomy.model
    UseIntegers(modules=list(linears), bits=8, group=None, activation_bits=8).apply(model)
    for name, weight in weights.items():
        codes, scale = to_codes(weight, 8)
        model.get_submodule(name).store(codes.to(torch.int8), scale)


def the_one(stages: Sequence[Any]) -> str:
    """Where the teacher is that stages name, for one that names none."""
    return next(stage.teacher for stage in stages if isinstance(stage, Taught) and stage.teacher)


def plainly(place: str) -> str:
    """The place of a teacher in the one way to write it: `a`, `a/` and `./a` are one teacher."""
    return os.path.normpath(os.path.expanduser(place))


def places_of(stage: Any, stages: Sequence[Any]) -> set[str]:
    """Where the teachers of a stage are, `plainly`, one that others name among them."""
    return set(map(plainly, (*stage.teachers().values(), stage.teacher or the_one(stages))))


def precision_of(place: str, stages: Sequence[Any]) -> Precision:
    """What a teacher runs in: what the stages that share it say, else fp32."""
    sharing = [s for s in stages if isinstance(s, Taught) and plainly(place) in places_of(s, stages)]
    return next((s.precision for s in sharing if s.precision), "fp32")


@dataclass(frozen=True)
class Uncut:
    """The vocabulary that a student had before tokens were left out, and the numbers in it of those that stay."""

    words: dict[str, int]
    tokens: Sequence[int]


def check_teacher(
    place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int], field: str, uncut: Uncut | None = None
) -> bool:
    """Look at what a teacher says of itself, and load none of its weights. `field` names it in errors. Returns whether
    it has the student's vocabulary; else it has `uncut`, of which the student has a part.

    Raises:
        ConfigError: another task, other labels, or another vocabulary.
    """
    words = check_job(place, task, labels, field)
    if words != vocabulary and (uncut is None or words != uncut.words):
        raise ConfigError(
            f"{field}={place!r}: its vocabulary ({len(words)} entries) is not the student's ({len(vocabulary)}); "
            "use distill/cross_vocabulary, whose teacher reads the rows in tokens of its own"
        )
    return bool(words == vocabulary)


def check_stranger(place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int], field: str) -> None:
    """The same for a teacher that is to read other tokens than the student.

    Raises:
        ConfigError: another task, other labels, or the same vocabulary.
    """
    if check_job(place, task, labels, field) == vocabulary:
        raise ConfigError(
            f"{field}={place!r}: has the student's vocabulary; use distill/logits, which compares classes"
        )


def check_job(place: str, task: Task, labels: Sequence[str], field: str) -> dict[str, int]:
    """Refuse a teacher of another task or with other labels; its vocabulary."""
    place = located(place, field)
    spec = Pretrained(name=place)
    if artifact.is_artifact(place):
        card = artifact.parse_card(Path(place))
        theirs = artifact.task_of(card)
        if type(theirs) is not type(task):
            raise ConfigError(f"{field}={place!r}: does the task {theirs.name}, the student {task.name}")
        if not task.reads_as(theirs):
            raise ConfigError(
                f"{field}={place!r}: reads texts in another form than the student's (task.head and its pattern or "
                "template, task.casing); use one that reads them alike"
            )
        refuse_other_labels(place, card["labels"], labels, field)
    else:
        config = spec.config()
        try:
            task.check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{field}={place!r}: cannot read what the student does ({error})") from None
        needed = type(spec._try(lambda: spec.empty(task, ()))).__name__
        if needed not in (config.architectures or [needed]):
            raise ConfigError(
                f"{field}={place!r}: is a {config.architectures[0]}; the task {task.name} needs a {needed}"
            )
        refuse_other_labels(place, [config.id2label[i] for i in sorted(config.id2label)], task.outputs(labels), field)
    words: dict[str, int] = spec.tokenizer().get_vocab()
    return words


def check_reads(place: str, task: Task, student: Anatomy, field: str, stage: Taught) -> None:
    """Refuse a teacher that cannot read what the student does, or what a stage makes for it: fewer tokens, or a decoder
    that starts from another.

    Raises:
        ConfigError: one of these.
    """
    theirs: Any = Pretrained(name=located(place, field)).config()
    ours: Any = student.model.config
    most = family_of(theirs).positions(theirs)
    for name in ("max_length", "max_target_length"):
        length = getattr(task, name, 0)
        if most is not None and length > most:
            raise ConfigError(f"task.{name}={length}: the teacher {place!r} of {field} reads at most {most} tokens")
    if most is not None and stage.longest_text > most:
        raise ConfigError(
            f"{field}={place!r}: reads at most {most} tokens, and is to read texts of {stage.longest_text}"
        )
    starts = [getattr(config, "decoder_start_token_id", None) for config in (ours, theirs)]
    if not stage.own_tokens and ours.is_encoder_decoder and theirs.is_encoder_decoder and starts[0] != starts[1]:
        raise ConfigError(
            f"{field}={place!r}: its decoder starts from token {starts[1]}, the student's from {starts[0]}; needs a "
            "teacher that starts from the same"
        )


def refuse_other_labels(place: str, theirs: Sequence[str], labels: Sequence[str], field: str) -> None:
    """Raise ConfigError where the student has labels and the teacher's are not the same, in the same order."""
    if labels and tuple(theirs) != tuple(labels):
        odd = sorted(set(theirs) ^ set(labels)) or [f"order {list(theirs)}, not {list(labels)}"]
        raise ConfigError(f"{field}={place!r}: its labels are not the student's ({', '.join(odd[:3])})")


class Teachers:
    """The teachers of a run, each loaded once."""

    def __init__(
        self, stages: Sequence[Any], task: Task, labels: Sequence[str], vocabulary: dict[str, int],
        uncut: Uncut | None = None,
    ) -> None:  # fmt: skip
        self._stages = stages
        self._task, self._labels, self._vocabulary, self._uncut = task, labels, vocabulary, uncut
        self._teachers: dict[str, Teacher] = {}

    def __call__(self, place: str | None, field: str) -> Teacher:
        """The teacher at a place (null: the one that the stages name), for one more term."""
        place = place or the_one(self._stages)
        name = plainly(place)
        if name not in self._teachers:
            strangers = [stage for stage in self._stages if isinstance(stage, Taught) and stage.own_tokens]
            if any(name in places_of(stage, self._stages) for stage in strangers):
                check_stranger(place, self._task, self._labels, self._vocabulary, field)
                model = loaded(located(place, field), self._task, field)
            else:
                model = load_teacher(place, self._task, self._labels, self._vocabulary, field, self._uncut)
            self._teachers[name] = Teacher(model, precision_of(place, self._stages), field)
        self._teachers[name].terms += 1
        return self._teachers[name]


def outline_of_teacher(place: str, task: Task, labels: Sequence[str]) -> Seen:
    """The shapes of what flows through a teacher; none of its weights are read."""
    place = located(place, "teacher")
    if not artifact.is_artifact(place):
        return outline(Anatomy.of(Pretrained(name=place).empty(task, labels)))
    card = artifact.parse_card(Path(place))
    with torch.device("meta"):
        model = artifact.rebuild(
            card["base_config"], [from_json(record) for record in card["edits"]], artifact.task_of(card), Path(place),
            card["labels"],
        )  # fmt: skip
    return outline(Anatomy.of(model))


def load_teacher(
    place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int], field: str, uncut: Uncut | None = None
) -> Any:
    """The teacher's model. `field` of the config names it in errors. A teacher of the vocabulary that the student had
    before tokens were left out loses the same ones: it reads the student's tokens, and its logits are of these.

    Raises:
        ConfigError: another task, other labels, another vocabulary, or no trained head.
    """
    same = check_teacher(place, task, labels, vocabulary, field, uncut)
    teacher = loaded(located(place, field), task, field)
    if not same:
        assert uncut is not None
        KeepTokens.of(uncut.tokens).apply(teacher)
    return teacher


def loaded(place: str, task: Task, field: str) -> Any:
    """The model at a place, with its trained head."""
    if artifact.is_artifact(place):
        return artifact.load(place).model
    spec = Pretrained(name=place)
    teacher, report = spec._try(
        lambda: auto_class(task, spec.config()).from_pretrained(
            spec.place, dtype=torch.float32, output_loading_info=True
        )
    )
    if lacking := {*attached(task, teacher, list(spec.config().id2label.values())), *report["missing_keys"]}:
        missing = sorted(lacking)[0]
        raise ConfigError(f"{field}={place!r}: has no trained head for the task {task.name} ({missing} is missing)")
    adapt(teacher)
    return spec.padded(teacher)
