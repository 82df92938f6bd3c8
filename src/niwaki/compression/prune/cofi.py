"""CoFi: structured pruning learned with the task (Xia, Zhong & Chen 2022, arXiv:2204.00408)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from niwaki.compression.distill.distillation import Lesson, inside
from niwaki.compression.prune.cofi_masks import (
    MULTIPLIERS,
    CoFiSchedule,
    Masks,
    Multipliers,
    SizePenalty,
    SublayerMask,
    add_masks,
    last_step,
    masks_of,
    take_masks,
)
from niwaki.compression.prune.layer_match import LayerMatch
from niwaki.compression.prune.stream_mask import STREAM_MASK, StreamMask, add_stream_mask, cut_stream_records
from niwaki.compression.prune.structured import Structured, cut_records, told
from niwaki.compression.prune.width import checked_stream
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.cut_units import CutUnits, cut_all, tell_config
from niwaki.model.stream import KeepWidth, keep_channels, stream_of
from niwaki.model.teacher import Precision
from niwaki.model.units import Kind, units_of
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.cofi"
KINDS: tuple[Kind, Kind] = ("heads", "neurons")
MASKS = ("heads", "neurons", "attention", "feed_forward")  # and HIDDEN
HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True)
class CoFi(Stage):
    """MHA(X) = z_MHA sum_h z_h Att_h(X), FFN(X) = z_FFN f(X W_U) diag(z_int) W_D, each z hard concrete and learned.

    The loss gains lambda_1 (s - t) + lambda_2 (s - t)^2, with s the expected sparsity of the weights that the masks
    act on and t the target, `sparsity` from the fraction `warmup` of the fit on; the multipliers climb. At the
    fraction `end` the masks settle at a real sparsity as near to the target as whole units allow. They close in one
    order over all sublayers: first those that are expected to (of each sublayer as many as the sum of its
    probabilities says, of lowest log alpha; all of a sublayer whose z_layer is expected to be 0), then the others, both
    from the lowest P(z_layer != 0) P(z_unit != 0) on. Where what is expected is too much, the last of it stay open. The
    rest of the fit learns with these masks, then what is closed is cut.

    `masks`: what is masked: heads, neurons, whole sublayers (attention, feed_forward), and hidden, the channels of the
    residual stream, which are one mask for all blocks. `lr_factor`: learning rate
    of masks and multipliers over that of the rest (the paper's 0.01 over 2e-5). `teacher`: a hub name, a folder or an
    artifact, for distillation of hidden states, weighed by `layer_weight`; `precision`: that it runs in.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    turn: ClassVar[int] = 1
    leaves_out_units: ClassVar[bool] = True
    own_tokens: ClassVar[bool] = False
    longest_text: ClassVar[int] = 0
    paper: ClassVar[str] = "Xia, Zhong & Chen 2022, arXiv:2204.00408; Louizos et al. 2018, arXiv:1712.01312"

    sparsity: float = 0.5
    masks: Sequence[str] = MASKS
    warmup: float = 0.2
    end: float = 0.6
    lr_factor: float = 500.0
    teacher: str | None = None
    precision: Precision | None = None
    layer_weight: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"{FIELD}.sparsity={self.sparsity}: needs a number above 0 and below 1")
        chosen = set(self.masks)
        if not chosen & set(MASKS) or chosen - {*MASKS, HIDDEN} or len(chosen) < len(self.masks):
            raise ConfigError(
                f"{FIELD}.masks={list(self.masks)}: needs some of {', '.join(MASKS)}, and {HIDDEN} if wanted"
            )
        if not 0 <= self.warmup < self.end <= 1:
            raise ConfigError(f"{FIELD}.warmup={self.warmup}, end={self.end}: needs 0 <= warmup < end <= 1")
        if self.lr_factor <= 0:
            raise ConfigError(f"{FIELD}.lr_factor={self.lr_factor}: needs a number above 0")
        if self.layer_weight is not None and self.layer_weight <= 0:
            raise ConfigError(f"{FIELD}.layer_weight={self.layer_weight}: needs null or a number above 0")
        for name in ("layer_weight", "precision"):
            if getattr(self, name) is not None and self.teacher is None:
                raise ConfigError(f"{FIELD}.{name}={getattr(self, name)}: has no effect without {FIELD}.teacher")

    def teachers(self) -> dict[str, str]:
        """The field that names the teacher, if there is one, and where it is."""
        return {} if self.teacher is None else {f"{FIELD}.teacher": self.teacher}

    def foreign(self) -> str | None:
        return "sublayers of different widths"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        for other in others:
            if isinstance(other, Structured):
                return f"{self.name} and {other.name}: each decides which {other.kind} stay; choose one"
            grouped = getattr(other, "group", None) or getattr(other, "pattern", "unstructured") != "unstructured"
            if grouped and (other.acts_on_linears or (other.phase.acts_on_weights and HIDDEN in self.masks)):
                return (
                    f"{self.name} and {other.name} with groups along the input: how many inputs a linear will have is "
                    "learned in the fit, and groups may not divide them; leave the groups out"
                )
            if other.phase is Phase.SHARE:
                return (
                    f"{self.name} and {other.name}: values are shared by the weights of whole linears, and units would "
                    "leave them after that; leave one out"
                )
            if getattr(other, "merge", None) is False:
                return (
                    f"{self.name} and tuning={other.name} with tuning.merge=false: the adapters beside the base would "
                    "keep the shapes that are cut after the fit; use a tuning that is merged"
                )
            if other.phase is Phase.TUNE and other.name == "gradual":
                return f"{self.name} and tuning=gradual: what is frozen at first would freeze the masks; use another"
            if HIDDEN in self.masks and (other.name in ("prompt", "p_tuning") or other.name.startswith("adapter")):
                return (
                    f"{self.name} with masks of hidden and tuning={other.name}: what it adds is as wide as the stream, "
                    "which is cut after it; leave hidden out"
                )
            if self.teacher is not None and other.name in ("prompt", "p_tuning"):
                return f"{self.name} with a teacher and tuning={other.name}: the teacher has no virtual tokens to match"
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        try:
            found = [units for kind in KINDS for units in units_of(anatomy, kind)]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"compression: {self.name}: {error}, so they cannot be cut") from error
        if HIDDEN in self.masks:
            checked_stream(anatomy, self.name)
        for units in found:
            inside = units.stack.attention_norm.startswith(f"{units.stack.attention}.")
            if "attention" in self.masks and inside and units.end.startswith(f"{units.place}."):
                raise ConfigError(
                    f"{FIELD}.masks={list(self.masks)}: an attention of this family holds its norm too, so none can be "
                    "left out whole; leave out attention"
                )

    def needs_fit(self) -> str:
        return f"{FIELD}: has no effect with trainer.max_epochs=0; masks learn in a fit"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        found = [units for kind in KINDS for units in units_of(context.anatomy, kind)]
        stream = stream_of(context.anatomy) if HIDDEN in self.masks else None
        masks = Masks(add_masks(model, found, self.masks, context.seed), add_stream_mask(model, stream, context.seed))
        multipliers = Multipliers(masks.each[0].open.device)
        model.add_module(MULTIPLIERS, multipliers)
        settles = last_step(self.end, context.steps)
        penalty = SizePenalty(masks, multipliers, self.sparsity, round(self.warmup * context.steps))
        learning = {id(p) for module in (*masks.each, multipliers) for p in module.parameters()}
        effects = Effects(
            terms={self.name: penalty}, settled=settles,
            lr_factors={n: self.lr_factor for n, p in model.named_parameters() if id(p) in learning},
        )  # fmt: skip
        effects.callbacks.append(CoFiSchedule(model, penalty, settles))
        return self._with_teacher(effects, masks.sublayers, context) if self.teacher else effects

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        masks = masks_of(model)
        context.facts["cofi_sparsity"] = masks.real_sparsity()
        stays = take_masks(model, masks.sublayers)
        delattr(model, MULTIPLIERS)
        narrower = [self._narrow(model, masks.stream, context)] if masks.stream else []
        return [*narrower, *(self._cut(context, kind, stays) for kind in KINDS)]

    def _narrow(self, model: nn.Module, mask: StreamMask, context: Context) -> Edit:
        kept = mask.remove()
        delattr(model, STREAM_MASK)
        cut_stream_records(context, mask.stream, kept)
        keep_channels(model, mask.stream, kept)
        context.facts["kept_channels"] = kept
        return KeepWidth(kept=len(kept))

    def _with_teacher(self, effects: Effects, masks: Sequence[SublayerMask], context: Context) -> Effects:
        """The same, with the teacher's term."""
        teacher = context.load_teacher(self.teacher, f"{FIELD}.teacher")
        projection: Any = identity(width_of(context.anatomy), width_of(teacher.anatomy), context.seed)
        stack = context.anatomy.stacks[0]
        last = [mask for mask in masks if mask.units.kind == "neurons" and mask.units.stack is stack]
        match = LayerMatch(projection, lambda: [bool(mask.factors().any()) for mask in last])
        name = f"{self.name} layers"
        lesson = Lesson(match, {name: projection})
        taught = inside(context.anatomy, teacher, name, lesson, self.layer_weight or 1.0)
        return replace(
            effects, terms=effects.terms | taught.terms, modules=taught.modules,
            callbacks=[*effects.callbacks, *taught.callbacks],
        )  # fmt: skip

    def _cut(self, context: Context, kind: Kind, stays: Mapping[str, list[int]]) -> Edit:
        found = units_of(context.anatomy, kind)
        kept = [stays.get(units.place, list(range(units.count))) for units in found]
        cut_records(context, found, kept)
        cut_all(context.anatomy, dict(zip(found, kept, strict=True)))
        for name in [name for name, linear in context.targets.items() if not linear.weight.numel()]:
            del context.targets[name]  # nothing is left that another method could convert
        context.facts[f"kept_{kind}"] = told(found, kept)
        in_config = tell_config(context.anatomy, kind)
        return CutUnits(kind=kind, kept=dict(context.facts[f"kept_{kind}"]), in_config=in_config)


def width_of(anatomy: Anatomy) -> int:
    """What flows between the blocks of the first stack."""
    output: Any = anatomy.model.get_submodule(anatomy.places("feed_out")[0])
    return int(output.out_features)


def identity(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A linear that is the identity between equal widths, else random."""
    linear = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        if inputs == outputs:
            nn.init.eye_(linear.weight)
        else:
            linear.weight.copy_(
                torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5
            )
    return linear
