"""NormalFloat against the paper's levels, a case by hand, torchao's codes, and plain autograd."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.measure.size import count, held_bytes, target_table
from niwaki.tuning.normal_float import LEVELS, NormalFloatLinear, UseNormalFloat, nearest_level, quantize
from niwaki.weights import Packed, to_dense


def packed(inputs: int = 96, outputs: int = 40, block: int = 64, double: bool = False) -> tuple[Any, nn.Linear]:
    """The layer, and the linear that it was made from."""
    dense = nn.Linear(inputs, outputs)
    layer = NormalFloatLinear(inputs, outputs, block=block, double_quantization=double, bias=dense.bias)
    layer.store(dense.weight)
    return layer, dense


def test_the_levels_are_the_quantiles_of_the_paper() -> None:
    # section 3 and appendix E: 8 quantiles on the positive side, 7 on the negative one, a zero; the tails are cut at
    # the mean of 1 - 1/32 and 1 - 1/30
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantiles = lambda n: torch.special.ndtri(torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1])  # noqa: E731
    expected = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])
    expected = (expected / expected.abs().max()).sort().values
    assert torch.allclose(torch.tensor(LEVELS, dtype=torch.float64), expected, atol=1e-6)
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)


def test_codes_scales_and_bytes_by_hand() -> None:
    # two blocks of 4: scales 2 and 0.5; values / scale: 1, -1, 0, 0.46 (nearest 0.4407), then 1, 0, -0.5 (nearest
    # -0.5251), 0.1 (nearest 0.0796)
    weight = torch.tensor([[2.0, -2.0, 0.0, 0.92], [0.5, 0.0, -0.25, 0.05]])
    layer = NormalFloatLinear(4, 2, block=4, double_quantization=False, bias=None)
    layer.store(weight)
    assert layer.scale.tolist() == [2.0, 0.5]
    assert layer.weight.view(torch.uint8).tolist() == [15 << 4 | 0, 7 << 4 | 12, 15 << 4 | 7, 2 << 4 | 8]
    expected = [[2.0, -2.0, 0.0, 2 * LEVELS[12]], [0.5, 0.0, 0.5 * LEVELS[2], 0.5 * LEVELS[8]]]
    assert torch.allclose(layer.dequantized(), torch.tensor(expected))


def test_double_quantization_by_hand() -> None:
    # three scales 1, 2, 6: mean 3, differences -2, -1, 3; 3 / 127 is the step; codes -85, -42, 127
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0, 6.0, 0.0]])
    layer = NormalFloatLinear(6, 1, block=2, double_quantization=True, bias=None)
    layer.store(weight)
    assert layer.scale.tolist() == [-85, -42, 127]
    assert layer.scale.dtype is torch.int8
    step = 3 / 127
    assert layer.dequantized().tolist()[0] == pytest.approx([3 - 85 * step, 0, 3 - 42 * step, 0, 6.0, 0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (384, 384), (40, 96)])
@pytest.mark.parametrize("double", [False, True])
def test_every_weight_gets_its_nearest_level(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape)
    layer = NormalFloatLinear(shape[1], shape[0], block=64, double_quantization=double, bias=None)
    layer.store(weight)
    flat = functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    best = levels[((flat / scale)[..., None] - levels).abs().argmin(-1)]
    assert torch.equal(levels[nearest_level(flat / scale).long()], best)
    stored = layer.scales()[:, None]
    assert torch.allclose(layer.dequantized().flatten(), (best * stored).flatten()[: weight.numel()], atol=1e-6)
    if double:  # half a step of 8 bits
        bound = (scale.squeeze(1) - scale.mean()).abs().max() / 254 * 1.001 + 1e-6
        assert bool(((layer.scales() - scale.squeeze(1)).abs() <= bound).all())
    else:
        assert torch.equal(layer.scales(), scale.squeeze(1))


@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
def test_the_values_are_those_of_torchao() -> None:
    reference = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer, dense = packed(384, 128, double=True)
    theirs = reference.to_nf4(dense.weight.detach(), 64, 256).get_original_weight()
    ours = layer.dequantized()
    # It rounds with scales that are in 8 bits already, so a weight between two levels may get the other one; where
    # the codes are the same, the values differ by the error of two scales at most.
    scale = dense.weight.detach().reshape(-1, 64).abs().amax(1)
    levels = torch.tensor(LEVELS)
    rows = [values.reshape(-1, 64) / values.reshape(-1, 64).abs().amax(1, keepdim=True) for values in (ours, theirs)]
    first, second = ((row[..., None] - levels).abs().argmin(-1).view_as(ours) for row in rows)
    assert float((first == second).float().mean()) > 0.999
    assert int((first - second).abs().max()) <= 1
    bound = 2 * float((scale - scale.mean()).abs().max()) / 127
    assert float((ours - theirs)[first == second].abs().max()) <= bound


def test_zeros_stay_zero_and_do_not_spoil_the_scales() -> None:
    weight = torch.randn(4, 128) * 0.02
    weight[1] = 0.0
    layer = NormalFloatLinear(128, 4, block=64, double_quantization=True, bias=None)
    layer.store(weight)
    assert not layer.dequantized()[1].any()
    assert float((layer.dequantized() - weight).abs().max()) < 0.02


@pytest.mark.parametrize("double", [False, True])
def test_output_and_gradients_are_those_of_the_dequantized_weight(double: bool) -> None:
    layer, _ = packed(double=double)
    dense = nn.Linear(96, 40)
    dense.weight = nn.Parameter(layer.dequantized())
    dense.bias = nn.Parameter(layer.bias.detach().clone())
    mine, theirs = (torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in "ab")
    pull = torch.randn(2, 5, 40)
    out, expected = layer(mine), dense(theirs)
    assert torch.equal(out, expected)
    out.backward(pull)
    expected.backward(pull)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(layer.bias.grad, dense.bias.grad, atol=1e-5)  # type: ignore[arg-type]
    assert {name for name, _ in layer.named_parameters()} == {"bias"}


def test_autocast_computes_in_bfloat16() -> None:
    layer, _ = packed()
    values = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(values)
    assert out.dtype is torch.bfloat16
    assert torch.allclose(out.float(), layer(values), atol=0.05)
    out.float().sum().backward()
    assert values.grad is not None
    assert values.grad.dtype is torch.float32
    assert torch.allclose(values.grad, layer.dequantized().sum(0).expand(3, -1), atol=0.1)


def test_the_weight_is_not_kept_for_the_backward_pass() -> None:
    layer, _ = packed()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 96, requires_grad=True))
    assert not [tensor for tensor in kept if tensor.numel() >= 40 * 96]


@pytest.mark.parametrize(("double", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bytes_in_memory(double: bool, bits: float) -> None:
    layer, _ = packed(384, 1536, double=double)
    layer.bias = None
    rest = 4 if double else 0  # the mean
    assert held_bytes(layer) == 384 * 1536 * bits / 8 + rest


def test_it_is_packed_and_counts_as_its_weights() -> None:
    layer, dense = packed(96, 40)
    model = nn.ModuleDict({"it": layer})
    assert isinstance(layer, Packed)
    assert not isinstance(dense, Packed)
    assert count(model) == {
        "parameters": 96 * 40 + 40,
        "nonzero": int(layer.dequantized().count_nonzero()) + int(layer.bias.count_nonzero()),
    }
    zeros = 1 - int(layer.dequantized().count_nonzero()) / (96 * 40)
    assert target_table(model, ["it"]) == {"it": {"parameters": 96 * 40, "sparsity": zeros, "bits": 4}}
    assert zeros > 0.01


@pytest.mark.parametrize("double", [False, True])
def test_state_copies_and_devices(double: bool) -> None:
    layer, _ = packed(double=double)
    values = torch.randn(2, 96)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other, _ = packed(double=double)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other(values), layer(values))
    assert torch.equal(copy.deepcopy(layer)(values), layer(values))
    with torch.inference_mode():
        inside = layer(values)
    assert torch.equal(layer(values.requires_grad_()), inside)
    with torch.device("meta"):
        empty = NormalFloatLinear(96, 40, block=64, double_quantization=double, bias=None)
    assert {(n, tuple(t.shape)) for n, t in empty.state_dict().items()} == {
        (n, tuple(t.shape)) for n, t in layer.state_dict().items() if n != "bias"
    }


def test_the_edit_and_the_way_back() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64, bias=False), nn.Linear(64, 2))
    edit = UseNormalFloat(modules=["0", "1"], block=32, double_quantization=False)
    quantize(model, edit)
    assert [type(module).__name__ for module in model] == ["NormalFloatLinear", "NormalFloatLinear", "Linear"]
    values = torch.randn(3, 64)
    before = model(values)
    to_dense(model)
    assert [type(module) for module in model] == [nn.Linear] * 3
    assert torch.equal(model(values), before)
    assert model[1].bias is None
