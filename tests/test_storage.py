"""Stored forms: each by hand, bit for bit back, never more bytes than dense; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from niwaki import storage
from niwaki.errors import ArtifactError
from niwaki.packing import pack
from niwaki.storage import Form

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8]


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits_of(one), bits_of(other))


def sparse(shape: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of which `share` are zero, at random places."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=draw).to(dtype)
    return torch.where(torch.rand(shape, generator=draw) < share, torch.zeros((), dtype=dtype), values)


def n_of_m(keep: int, group: int, groups: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which `keep` of each `group` are not zero, at random places."""
    draw = torch.Generator().manual_seed(1)
    order = torch.rand(groups, group, generator=draw).argsort(1)
    values = torch.randint(1, 100, (groups, group), generator=draw)
    return torch.where(order < keep, values, 0).to(dtype).view(-1, 8 * group)


def through(tmp_path: Path, state: dict[str, Tensor], forms: dict[str, Form] | None = None, **streams: int) -> Any:
    """The state as it comes back from a file, and the file."""
    path = tmp_path / "model" / "compact.safetensors"
    path.parent.mkdir(exist_ok=True)
    forms = storage.choose(state, streams) if forms is None else forms
    storage.write(storage.encode(state, forms), path, forms)
    return storage.read(path), path


def test_a_bit_mask_by_hand() -> None:
    tensor = torch.tensor([[0.0, 5.0, 0.0, 0.0, -7.0], [0.0, 0.0, 0.0, 1.0, 0.0]])
    form = Form(shape=(2, 5), dtype="float32", bits=32)
    stored = storage.encode({"w": tensor}, {"w": form})
    assert list(stored) == ["w:mask", "w:values"]
    assert stored["w:mask"].tolist() == [0b01001000, 0b10000000]
    assert stored["w:values"].tolist() == [5.0, -7.0, 1.0]
    assert same(storage.decode(stored, {"w": form})["w"], tensor)


def test_places_within_groups_by_hand() -> None:
    """2:4: the second group has one value, beside which the first free place stands for a zero."""
    tensor = torch.tensor([[0, 5, 0, 7], [0, 0, 0, 3]], dtype=torch.int8)
    form = Form(shape=(2, 4), dtype="int8", bits=8, keep=2, group=4)
    stored = storage.encode({"w": tensor}, {"w": form})
    assert stored["w:values"].tolist() == [5, 7, 3, 0]
    assert stored["w:places"].tolist() == [0b01_11_11_00]
    assert same(storage.decode(stored, {"w": form})["w"], tensor)


def test_codes_of_few_bits_by_hand() -> None:
    """3-bit codes 3 3 5 3 3 3 1 3 | 3 3 ...: the commonest, 3, is left out, and the others are packed again."""
    codes = np.array([3, 3, 5, 3, 3, 3, 1, 3], dtype=np.uint8)
    stream = pack(torch.from_numpy(codes), 3)
    assert stream.tolist() == [0b01101110, 0b10110110, 0b11001011]
    form = Form(shape=(3,), dtype="uint8", bits=3, background=3)
    stored = storage.encode({"w": stream}, {"w": form})
    assert stored["w:mask"].tolist() == [0b00100010]
    assert stored["w:values"].tolist() == [0b10100100]
    assert same(storage.decode(stored, {"w": form})["w"], stream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(64, 96), (4097,), (3, 5, 211)], ids=str)
def test_what_is_stored_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, share: float, shape: tuple[int, ...]
) -> None:
    state = {"w": sparse(shape, share, dtype), "other": torch.arange(7)}
    back, path = through(tmp_path, state)
    assert set(back) == {"w", "other"}
    assert same(back["w"], state["w"])
    assert same(back["other"], state["other"])
    saved = storage.size(state) - storage.size(load_file(path))
    assert saved > storage.HEADER or saved == 0
    assert (saved > 0) == (share >= 0.3)  # 1 bit of 8, at least, is won by 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("keep", "group", "form"), [
    (2, 4, "N:M"),  # 2 x 2 bits of places are the 4 bits of a mask, which tells of no pattern
    (1, 4, "N:M"), (1, 8, "N:M"), (2, 8, "N:M"), (2, 16, "N:M"), (1, 2, "N:M"), (1, 3, "N:M"),
    (4, 8, "bitmask"), (3, 8, "bitmask"),
])  # fmt: skip
def test_a_pattern_is_stored_by_its_places_where_these_take_no_more_than_a_mask(
    tmp_path: Path, dtype: torch.dtype, keep: int, group: int, form: str
) -> None:
    tensor = n_of_m(keep, group, dtype=dtype)
    (chosen,) = storage.choose({"w": tensor}, {}).values()
    assert chosen.name == form
    if form == "N:M":
        assert (chosen.keep, chosen.group) == (keep, group)
    back, path = through(tmp_path, {"w": tensor})
    assert same(back["w"], tensor)
    items, width = tensor.numel(), tensor.element_size()
    places = 1 if form == "bitmask" else keep / group * (group - 1).bit_length()
    assert storage.size(load_file(path)) == pytest.approx(items * (keep / group * width + places / 8), abs=2)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("count", [4096, 4099, 4101])
def test_streams_of_codes(tmp_path: Path, bits: int, count: int) -> None:
    zero = 2 ** (bits - 1) - 1
    draw = np.random.default_rng(0)
    codes = np.where(draw.random(count) < 0.75, zero, draw.integers(0, 2**bits - 1, count)).astype(np.uint8)
    state = {"w.codes": pack(torch.from_numpy(codes), bits)}
    back, path = through(tmp_path, state, **{"w.codes": bits})
    assert same(back["w.codes"], state["w.codes"])
    assert storage.choose(state, {"w.codes": bits})["w.codes"].background == zero
    differing = int((codes != zero).sum())
    assert storage.size(load_file(path)) == pytest.approx((count + differing * bits) / 8, abs=3)


def test_a_stream_with_bits_behind_its_last_code_stays_as_it_is(tmp_path: Path) -> None:
    stream = pack(torch.full((4096,), 3, dtype=torch.uint8), 3)
    odd = torch.cat([stream, torch.zeros(1, dtype=torch.uint8)])
    assert storage.choose({"w": odd}, {"w": 3})
    odd[-1] = 1  # 4098 whole codes, and 2 bits
    assert not storage.choose({"w": odd}, {"w": 3})
    assert same(through(tmp_path, {"w": odd}, w=3)[0]["w"], odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", ["mask", "places"])
def test_negative_zero_nan_and_infinity_come_back_as_they_were(
    tmp_path: Path, dtype: torch.dtype, pattern: str
) -> None:
    tensor = n_of_m(1, 8, dtype=dtype) if pattern == "places" else sparse((64, 64), 0.9, dtype)
    places = tensor.view(-1).nonzero().flatten()[:6]
    odd = torch.tensor([-0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-40], dtype=dtype)
    tensor.view(-1)[places] = odd
    back, path = through(tmp_path, {"w": tensor})
    assert storage.parts(path)[1]["w"].name == ("N:M" if pattern == "places" else "bitmask")
    assert same(back["w"], tensor)
    assert torch.signbit(back["w"].view(-1)[places[0]])


def test_dense_tensors_and_small_ones_are_left_alone() -> None:
    dense = {"dense": torch.rand(64, 64), "small": torch.zeros(32), "flags": torch.zeros(9999, dtype=torch.bool)}
    dense |= {"scalar": torch.tensor(0.0), "none": torch.zeros(0, 5), "numbers": torch.zeros(9999, dtype=torch.int64)}
    assert storage.choose(dense, {}) == {}


def test_an_old_file_reads_as_before(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(6.0)}, path, metadata={"format": "pt"})
    assert storage.read(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]


MASKED = {"w": sparse((40, 48), 0.8)}
GROUPED = {"w": n_of_m(1, 6)}


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., str]:
    """`damaged(state, change of the parts, **other fields of the form)`: what reading says, a line."""

    def read(state: dict[str, Tensor], change: dict[str, Any] | None = None, **fields: Any) -> str:
        _, path = through(tmp_path, state)
        stored, forms = storage.parts(path)
        changed = {name: (change or {}).get(name, tensor) for name, tensor in {**stored, **(change or {})}.items()}
        described = {"w": asdict(forms["w"]) | fields}
        save_file(
            {name: tensor for name, tensor in changed.items() if tensor is not None}, path,
            metadata={"format": "pt", storage.KEY: json.dumps(described)},
        )  # fmt: skip
        with pytest.raises(ArtifactError) as caught:
            storage.read(path)
        message = str(caught.value)
        assert message.startswith(f"artifact {path.parent}: compact.safetensors: ")
        assert "\n" not in message
        return message

    return read


def test_parts_that_do_not_fit_are_refused(damaged: Callable[..., str]) -> None:
    count = int(MASKED["w"].count_nonzero())
    assert "w:values is missing" in damaged(MASKED, {"w:values": None})
    assert "w:mask is missing" in damaged(MASKED, {"w:mask": None})
    assert "w is there twice" in damaged(MASKED, {"w": torch.zeros(40, 48)})
    for values in (torch.rand(count - 1), torch.rand(count + 1), torch.rand(0)):
        assert "do not have the sizes of a tensor of [40, 48]" in damaged(MASKED, {"w:values": values})
    assert "do not have the sizes" in damaged(MASKED, {"w:mask": torch.zeros(239, dtype=torch.uint8)})
    assert "do not have the sizes" in damaged(MASKED, {"w:mask": torch.full((240,), 255, dtype=torch.uint8)})
    assert "values are torch.float16" in damaged(MASKED, {"w:values": torch.rand(count).half()})
    assert "wrong kind" in damaged(MASKED, {"w:mask": torch.zeros(240)})
    assert "wrong kind" in damaged(MASKED, {"w:values": torch.rand(count, 1)})
    assert "do not have the sizes" in damaged(GROUPED, {"w:values": torch.rand(511)})
    assert "do not have the sizes" in damaged(GROUPED, {"w:places": torch.zeros(191, dtype=torch.uint8)})


def test_a_place_outside_of_its_group_is_refused(damaged: Callable[..., str]) -> None:
    full = torch.full((192,), 255, dtype=torch.uint8)  # 7 in groups of 6
    assert "a place is out of its group of 6" in damaged(GROUPED, {"w:places": full})


@pytest.mark.parametrize("fields", [
    {"shape": [40, -48]}, {"shape": [40, 4.8]}, {"shape": [10**12, 10**12]}, {"dtype": "object"}, {"dtype": "int64"},
    {"bits": 16}, {"bits": 0}, {"bits": 3}, {"background": 2**32}, {"background": -1}, {"keep": 2}, {"group": 4},
    {"keep": 4, "group": 4}, {"keep": 1, "group": 64}, {"keep": 1, "group": 7}, {"keep": True, "group": 4},
    {"extra": 1}, {"shape": 5}, {"shape": None},
])  # fmt: skip
def test_a_description_that_cannot_be_is_refused(damaged: Callable[..., str], fields: dict[str, Any]) -> None:
    said = damaged(MASKED, **fields)
    assert any(why in said for why in ("that this version does not know", "is damaged", "do not have the sizes"))


@pytest.mark.parametrize("described", ["", "[]", "[1]", "{", '{"w": 1}', '{"w": {}}', "null"])
def test_a_description_that_is_none(tmp_path: Path, described: str) -> None:
    path = tmp_path / "compact.safetensors"
    save_file({"w": torch.rand(3)}, path, metadata={storage.KEY: described})
    with pytest.raises(ArtifactError, match="description of what is stored is damaged"):
        storage.read(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "compact.safetensors"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ArtifactError, match=r"compact\.safetensors: cannot be read"):
        storage.read(path)
    save_file({"w": torch.rand(99)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"compact\.safetensors: cannot be read"):
        storage.read(path)


def test_a_form_says_what_it_takes() -> None:
    form = Form(shape=(64, 64), dtype="float32", bits=32)
    assert form.bytes(1000) == 4096 // 8 + 4000 + storage.HEADER
    assert replace(form, keep=1, group=8).bytes(1000) == 512 * 4 + 512 * 3 // 8 + storage.HEADER
