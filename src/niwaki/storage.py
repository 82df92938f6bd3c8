"""Weights on disk: a tensor of which most is one value is stored as where the others are, and the others.

Three forms, chosen tensor by tensor by the bytes that each takes: dense; a bit mask of the places and the values that
stand there; for N:M patterns the values and, in ceil(log2 M) bits each, their places within the group. Codes of fewer
than 8 bits are taken out of their bytes before, and packed again. All of it is bit for bit: a value is left out where
its bits are those of zero, so -0.0 and NaN are values like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import ArtifactError
from niwaki.packing import pack, packed_bytes, unpack

KEY = "niwaki"  # of the forms, in the metadata of a safetensors file
PARTS = {"bitmask": ("mask", "values"), "N:M": ("places", "values")}  # of a stored tensor, as NAME:PART
GROUPS = range(2, 33)
HEADER = 256  # bytes that the parts of a tensor and their description add to a file's header, at most
SAMPLE = 4096  # groups
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")

Items = np.ndarray[Any, np.dtype[Any]]  # of a tensor, in order: unsigned numbers with its bits


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a tensor of `shape` and `dtype` is stored: as items of `bits` each, without those that are `background`.

    With a `group` M: `keep` of the items of every M, and the places of these. Without: a mask of one bit an item.
    """

    shape: tuple[int, ...]
    dtype: str
    bits: int
    background: int = 0
    keep: int = 0
    group: int = 0

    @property
    def name(self) -> str:
        """`bitmask` or `N:M`."""
        return "N:M" if self.group else "bitmask"

    @property
    def packed(self) -> bool:
        """Whether several items share a byte of the tensor, or lie across two."""
        return self.bits < 8

    @property
    def count(self) -> int:
        """Items of the tensor."""
        elements = math.prod(self.shape)
        return elements * 8 // self.bits if self.packed else elements

    @property
    def place_bits(self) -> int:
        """Bits of a place within a group."""
        return (self.group - 1).bit_length()

    def bytes(self, values: int) -> int:
        """Bytes of the tensor in this form, with so many values that are not background."""
        if self.group:
            kept = self.count // self.group * self.keep
            return packed_bytes(kept, self.bits) + packed_bytes(kept, self.place_bits) + HEADER
        return packed_bytes(values, self.bits) + packed_bytes(self.count, 1) + HEADER


def write(stored: Mapping[str, Tensor], path: Path, forms: Mapping[str, Form]) -> None:
    """Write what `encode` returned to a safetensors file, with the forms that `read` needs."""
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if forms:
        metadata[KEY] = json.dumps({name: asdict(form) for name, form in forms.items()})
    save_file(dict(stored), path, metadata=metadata)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors that `encode` was given, or those of any safetensors file.

    Raises:
        ArtifactError: it is none, or what it says of a tensor does not fit what it holds.
    """
    try:
        state, forms = parts(path)
        return decode(state, forms)
    except ArtifactError as error:
        raise ArtifactError(f"artifact {path.parent}: {path.name}: {error}") from error


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Form]]:
    """What a file holds as it stands there, and the forms of its tensors.

    Raises:
        ArtifactError: it is no safetensors file, or its forms are damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get(KEY, "{}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot be read ({str(error).splitlines()[0]})") from error
    return state, parse(described)


def parse(described: str) -> dict[str, Form]:
    """The forms of a file, from its metadata.

    Raises:
        ArtifactError: they are damaged, or such as this version does not write.
    """
    try:
        found = json.loads(described)
        forms = {name: Form(**{**record, "shape": tuple(record["shape"])}) for name, record in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"the description of what is stored is damaged ({error})") from error
    for name, form in forms.items():
        if not is_sound(form):
            raise ArtifactError(f"{name} is stored in a form that this version does not know ({form})")
    return forms


def is_sound(form: Form) -> bool:
    """Whether the fields of a form go together."""
    numbers = [*form.shape, *(getattr(form, f.name) for f in fields(form) if f.name not in ("shape", "dtype"))]
    if not all(type(number) is int and number >= 0 for number in numbers) or form.dtype not in DTYPES:
        return False
    whole = form.bits == getattr(torch, form.dtype).itemsize * 8
    stream = 0 < form.bits < 8 and form.dtype == "uint8" and len(form.shape) == 1
    grouped = form.group in GROUPS and 0 < form.keep < form.group and form.count % form.group == 0
    return (whole or stream) and form.background < 2**form.bits and (grouped or form.keep == form.group == 0)


def choose(state: Mapping[str, Tensor], streams: Mapping[str, int]) -> dict[str, Form]:
    """The forms that take fewer bytes than the tensor itself, by its name. `streams`: bits of the codes in those uint8
    tensors which hold codes of fewer than 8 bits, one behind the other."""
    found = {name: smallest(tensor, streams.get(name)) for name, tensor in state.items()}
    return {name: form for name, form in found.items() if form}


def smallest(tensor: Tensor, code_bits: int | None = None) -> Form | None:
    """The form in which a tensor takes the fewest bytes, or None where that is the dense one."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.nbytes <= HEADER:
        return None
    plain = Form(shape=tuple(tensor.shape), dtype=dtype, bits=code_bits or tensor.element_size() * 8)
    if plain.packed and leftover(tensor, plain):
        return None
    items = items_of(tensor, plain)
    background = int(np.bincount(items).argmax()) if plain.packed else 0
    differs = items != background
    mask = replace(plain, background=background)
    values = int(np.count_nonzero(differs))
    best = min([*patterns(mask, differs, values), mask], key=lambda form: form.bytes(values))
    return best if best.bytes(values) < tensor.nbytes else None


def patterns(mask: Form, differs: Items, values: int) -> Iterator[Form]:
    """The N:M forms of a tensor that take no more than a mask of its items does. Where both take as much (2:4) the
    pattern is the better one, since it can be read from the file."""
    width = mask.count if mask.packed else mask.shape[-1]
    for group in GROUPS:
        if width % group:
            continue
        groups = differs.reshape(-1, group)
        for part in (groups[:SAMPLE], groups):  # a few groups tell mostly
            keep = int(np.count_nonzero(part, axis=1).max())
            form = replace(mask, keep=keep, group=group)
            if not 0 < keep < group or form.bytes(values) > mask.bytes(values):
                break
        else:
            yield form


def encode(state: Mapping[str, Tensor], forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors, those of `forms` in parts."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in forms:
            stored |= {f"{name}:{part}": piece for part, piece in pieces(tensor, forms[name]).items()}
        else:
            stored[name] = tensor
    return stored


def pieces(tensor: Tensor, form: Form) -> dict[str, Tensor]:
    """The parts of a tensor: its values, and where they stand."""
    items = items_of(tensor, form)
    differs = items != form.background
    if not form.group:
        return {"mask": torch.from_numpy(np.packbits(differs)), "values": stored_values(items[differs], form)}
    groups = differs.reshape(-1, form.group)
    places = np.argsort(~groups, axis=1, kind="stable")[:, : form.keep].astype(np.uint8)
    kept = np.take_along_axis(items.reshape(-1, form.group), places, axis=1)
    packed = pack(torch.from_numpy(places.ravel()), form.place_bits)
    return {"places": packed, "values": stored_values(kept.ravel(), form)}


def decode(state: Mapping[str, Tensor], forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors that `encode` was given.

    Raises:
        ArtifactError: a part is missing, of another size than it has to be, or points out of its group.
    """
    state = dict(state)
    found = {}
    for name, form in forms.items():
        names = [f"{name}:{part}" for part in PARTS[form.name]]
        lacking = [part for part in names if part not in state]
        if lacking or name in state:
            raise ArtifactError(f"{(lacking or [name])[0]} is {'missing' if lacking else 'there twice'}")
        where, values = (state.pop(part) for part in names)
        found[name] = whole(name, form, where, values)
    return state | found


def whole(name: str, form: Form, where: Tensor, values: Tensor) -> Tensor:
    """A tensor of its parts."""
    kept = read_values(name, form, where, values)
    items = np.full(form.count, form.background, dtype=kept.dtype)
    if form.group:
        places = unpack(where, form.place_bits, len(kept)).numpy().reshape(-1, form.keep)
        if len(places) and int(places.max()) >= form.group:
            raise ArtifactError(f"{name}: a place is out of its group of {form.group}")
        np.put_along_axis(items.reshape(-1, form.group), places.astype(np.intp), kept.reshape(-1, form.keep), axis=1)
    else:
        items[np.unpackbits(where.numpy(), count=form.count).view(bool)] = kept
    return tensor_of(items, form)


def read_values(name: str, form: Form, where: Tensor, values: Tensor) -> Items:
    """The items of a tensor that are stored, once both parts have the types and sizes that fit its form."""
    if where.dtype is not torch.uint8 or where.dim() != 1 or values.dim() != 1:
        raise ArtifactError(f"{name}: its parts are of the wrong kind")
    if str(values.dtype) != f"torch.{form.dtype}":
        raise ArtifactError(f"{name}: its values are {values.dtype}, not torch.{form.dtype}")
    if form.group:
        count = form.count // form.group * form.keep
        needed = packed_bytes(count, form.place_bits)
    else:
        count = int(np.bitwise_count(where.numpy()).sum())
        needed = packed_bytes(form.count, 1)
    if len(where) != needed or len(values) != (packed_bytes(count, form.bits) if form.packed else count):
        raise ArtifactError(f"{name}: its parts do not have the sizes of a tensor of {list(form.shape)}")
    return unpack(values, form.bits, count).numpy() if form.packed else numbers_of(values)


def stored_values(items: Items, form: Form) -> Tensor:
    """Items as they are stored: of the tensor's own type, or packed."""
    if form.packed:
        return pack(torch.from_numpy(items), form.bits)
    return torch.from_numpy(items.view(np.uint8)).view(getattr(torch, form.dtype))


def items_of(tensor: Tensor, form: Form) -> Items:
    """The items of a tensor, in order."""
    return unpack(tensor, form.bits, form.count).numpy() if form.packed else numbers_of(tensor)


def numbers_of(tensor: Tensor) -> Items:
    """The bits of each element, as an unsigned number."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(UNSIGNED[tensor.element_size()])


def tensor_of(items: Items, form: Form) -> Tensor:
    """The tensor that has these items."""
    if form.packed:
        return pack(torch.from_numpy(items), form.bits)
    return torch.from_numpy(items.view(np.uint8)).view(getattr(torch, form.dtype)).view(form.shape)


def leftover(tensor: Tensor, form: Form) -> bool:
    """Whether bits behind the last whole code are set, which no item holds."""
    bits = tensor.numel() * 8 - form.count * form.bits
    return bool(bits) and bool(int(tensor[-1]) & (2**bits - 1))


def size(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in state.values())
