"""The edit that takes heads or neurons out of a model, and what its config can tell of that."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from niwaki.edits import Edit
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.model.units import Kind, Units, cut, units_of


@dataclass(frozen=True, kw_only=True)
class CutUnits(Edit):
    """Heads or neurons leave the model. `kept`: by the place of the sublayer, the heads that stay, or how many neurons;
    `in_config`: the config that is saved has these sizes too, so transformers builds the model from it."""

    kind: Kind
    kept: dict[str, Any]
    in_config: bool = False

    @property
    def carried(self) -> bool:  # type: ignore[override]
        """Whether another training has to make the cut again: its config does not tell."""
        return not self.in_config

    def apply(self, model: Any) -> None:
        anatomy = Anatomy.of(model)
        places = {units.place: units for units in units_of(anatomy, self.kind)}
        for place, kept in self.kept.items():
            if place not in places:
                raise ValueError(f"there is no {place} that {self.kind} can be cut out of")
            check_kept(places[place], kept)
        cut_all(anatomy, {units: indices(self.kept.get(place, units.count)) for place, units in places.items()})


def indices(kept: int | Sequence[int]) -> list[int]:
    """The units that stay; of neurons, whose order means nothing, a number says enough once the weights are cut."""
    return list(range(kept)) if isinstance(kept, int) else list(kept)


def check_kept(units: Units, kept: Any) -> None:
    """Raise ValueError unless this can be what stays of these units."""
    numbers = isinstance(kept, int) or (isinstance(kept, list) and all(isinstance(i, int) for i in kept))
    if not numbers or not set(indices(kept)) <= set(range(units.count)) or (isinstance(kept, int) and kept < 0):
        raise ValueError(f"{units.place} has {units.count} {units.kind}, of which {kept} cannot stay")


def cut_all(anatomy: Anatomy, kept: Mapping[Units, Sequence[int]]) -> None:
    """Keep these units of every sublayer; the family mends what else there is for each head."""
    for units, its in kept.items():
        cut(anatomy.model, units, its)
        if units.kind == "heads":
            anatomy.family.heads_cut(anatomy.model.get_submodule(units.place), units.query_heads(its))


def tell_config(anatomy: Anatomy, kind: Kind) -> bool:
    """Write the sizes into the config of the model, where what transformers builds from it then has the very same;
    else leave it as it is. Returns whether it was written."""
    from huggingface_hub.errors import StrictDataclassError

    model: Any = anatomy.model
    fields = fields_of(anatomy, kind)
    candidate = copy.deepcopy(model.config)
    try:
        write(candidate, fields)
        candidate.validate()
        with torch.device("meta"):
            fresh = type(model)(candidate)
        adapt(fresh)
        same = shapes(Anatomy.of(fresh)) == shapes(anatomy) and same_parameters(fresh, model)
    except (ValueError, RuntimeError, StrictDataclassError):  # sizes that the family is not made for
        return False
    if same:
        write(model.config, fields)
    return same


def fields_of(anatomy: Anatomy, kind: Kind) -> dict[str, int]:
    """The fields of the config that would tell of these units, with the sizes in the last sublayer of each stack."""
    fields: dict[str, int] = {}
    for units in units_of(anatomy, kind):
        if kind == "neurons":
            fields[units.stack.neurons] = units.count
            continue
        fields[units.stack.heads] = len(units.query_heads(range(units.count)))
        fields |= {"num_key_value_heads": units.count, "head_dim": units.size}
    return fields


def write(config: Any, fields: Mapping[str, int]) -> None:
    """Set these fields, those aside that only grouped-query attention has where the family does not."""
    for name, value in fields.items():
        if name != "num_key_value_heads" or hasattr(config, name):
            setattr(config, name, value)


def shapes(anatomy: Anatomy) -> list[tuple[Any, ...]]:
    """The sizes of every sublayer."""
    kinds: tuple[Kind, ...] = ("heads", "neurons")
    return [(u.place, u.count, u.columns, tuple(u.rows.values())) for kind in kinds for u in units_of(anatomy, kind)]


def same_parameters(fresh: Any, model: Any) -> bool:
    """Whether what both models have under one name is of one shape."""
    theirs = dict(fresh.named_parameters())
    return all(theirs[name].shape == p.shape for name, p in model.named_parameters() if name in theirs)
