"""Tables as integers: codes and scales worked out by hand, rows that are read out of a stream of bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from niwaki.compression.quantize.integers import to_codes
from niwaki.compression.quantize.tables import IntegerEmbedding, IntegerOutput, IntegerTable, UseIntegerTables
from niwaki.weights import packed, to_dense

TABLE = torch.tensor([[0.45, -1.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])


def filled(tokens: int, width: int, bits: int, group: int | None = None) -> tuple[IntegerTable, torch.Tensor]:
    """A table of random values, and what its codes stand for."""
    values = torch.randn(tokens, width)
    codes, scale = to_codes(values.reshape(-1, group) if group else values, bits)
    table = IntegerTable(tokens, width, bits=bits, group=group)
    table.store(codes.to(torch.int8).reshape(tokens, width), scale.reshape(tokens, -1))
    return table, (codes * scale).reshape(tokens, width)


def test_bytes_worked_out_by_hand() -> None:
    """Codes 57 (57.15), -127, 32 (31.75), 0 of 8 bits; 3 (3.15), -7, 2 (1.75), 0 of 4, each plus 7: nibbles A 0 9 7,
    and 7 for the zeros; 0, -1, 0, 0 of 2, each plus 1: 01 00 01 01 01 01 01 01."""
    for bits, last, stored in (
        (8, 127, [[57, -127, 32, 0], [0, 0, 0, 0]]),
        (4, 7, [0xA0, 0x97, 0x77, 0x77]),
        (2, 1, [0b01000101, 0b01010101]),
    ):
        codes, scale = to_codes(TABLE, bits)
        table = IntegerTable(2, 4, bits=bits, group=None)
        table.store(codes.to(torch.int8), scale)
        assert table.codes.tolist() == stored
        assert table.scale[:, 0].tolist() == [pytest.approx(1 / last), 1.0]
        assert torch.equal(table.rows(torch.tensor([1])), torch.zeros(1, 4))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("width", "group"), [(12, None), (12, 4), (7, None), (1, None)])
def test_rows_are_those_of_the_whole_table(bits: int, width: int, group: int | None) -> None:
    """Also where a row begins within a byte."""
    table, values = filled(11, width, bits, group)
    assert torch.equal(table.dequantized(), values)
    numbers = torch.tensor([[10, 0, 3], [3, 9, 10]])
    assert torch.equal(table.rows(numbers), values[numbers])
    assert torch.equal(table.codes_of(numbers), table.integers()[numbers])
    bytes_of_codes = 11 * width if bits == 8 else -(-11 * width * bits // 8)
    assert table.codes.numel() * table.codes.element_size() == bytes_of_codes


def test_looking_up_makes_no_other_row_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    table, values = filled(11, 8, 4)
    monkeypatch.setattr(table, "dequantized", lambda: pytest.fail("the whole table"))
    monkeypatch.setattr(table, "integers", lambda: pytest.fail("the whole table"))
    assert torch.equal(table.rows(torch.tensor([2])), values[2:3])


class Model(nn.Module):
    """Two modules that look up, one of them with a factor, and an output layer, around one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(11, 8, padding_idx=0)
        self.second = nn.Embedding(11, 8)
        self.second.embed_scale = 3.0  # type: ignore[assignment]
        self.output = nn.Linear(8, 11)
        self.second.weight = self.output.weight = self.first.weight


def integer(bits: int = 4) -> tuple[Model, Model]:
    """A model with dense weights that lie on a grid, and one with integers for them."""
    table, values = filled(11, 8, bits)
    model = Model()
    with torch.no_grad():
        model.first.weight.copy_(values)
    plain = copy.deepcopy(model)
    UseIntegerTables(tables=["first"], bits=bits, group=None).apply(model)
    model.first.table.store(table.integers(), table.scale)  # type: ignore[union-attr, operator]
    return model, plain


def test_all_that_share_a_parameter_share_the_integers() -> None:
    model, plain = integer()
    assert isinstance(model.first, IntegerEmbedding)
    assert isinstance(model.output, IntegerOutput)
    assert model.first.table is model.second.table is model.output.table
    assert [name for name, _ in packed(model)] == ["first.table"]
    assert (model.first.padding_idx, model.first.num_embeddings, model.first.embedding_dim) == (0, 11, 8)
    numbers, hidden = torch.tensor([[1, 5]]), torch.randn(2, 8)
    assert torch.equal(model.first(numbers), plain.first(numbers))
    assert torch.equal(model.second(numbers), 3 * plain.second(numbers))
    assert torch.equal(model.output(hidden), plain.output(hidden))
    assert {name for name, _ in model.named_parameters()} == {"output.bias"}


def test_dense_again_they_are_the_same_modules_around_one_parameter() -> None:
    model, plain = integer()
    to_dense(model)
    assert type(model.first) is type(model.second) is nn.Embedding
    assert model.first.weight is model.second.weight is model.output.weight
    assert isinstance(model.first.weight, nn.Parameter)
    assert torch.equal(model.first.weight, plain.first.weight)
    assert model.output.bias is not None
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_what_a_product_takes_is_made_once_and_follows_what_is_loaded() -> None:
    model, _ = integer()
    other, _ = integer()
    hidden = torch.randn(2, 8)
    model.output(hidden)
    assert model.output.weight is model.output.weight
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.output(hidden), other.output(hidden))
    half = model.to(torch.bfloat16)
    assert half.first(torch.tensor([1])).dtype is half.output.weight.dtype is torch.bfloat16
