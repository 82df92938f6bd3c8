"""All methods that quantize after the fit, on models: what is saved is what was chosen, below it everything stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.awq import AWQ, Inputs
from niwaki.compression.quantize.gptq import GPTQ
from niwaki.compression.quantize.hqq import HQQ
from niwaki.compression.quantize.int8_static import Int8Static
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.mixed import Mixed
from niwaki.compression.quantize.post_training import equal, reading_the_same
from niwaki.compression.quantize.smoothquant import SmoothQuant
from niwaki.compression.quantize.weight_only import WeightOnly
from niwaki.compression.share.codebook import CodebookSharing
from niwaki.errors import ConfigError
from niwaki.stage import refuse_conflicts
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold

STAGES = {
    "weight_only": WeightOnly(group=16), "asymmetric": WeightOnly(bits=3, group=8, symmetric=False),
    "gptq": GPTQ(group=16), "act_order": GPTQ(bits=3, group=16, act_order=True, symmetric=False),
    "mixed": Mixed(bits=4.5, group=16), "mixed_gptq": Mixed(bits=4.5, group=16, rounding="gptq"),
    "awq": AWQ(group=16), "hqq": HQQ(group=16), "smoothquant": SmoothQuant(), "int8_static": Int8Static(),
    "some": WeightOnly(group=16, targets=["feed_in", "feed_out"]),
}  # fmt: skip
KINDS = [("bert", "classification"), ("llama", "causal_lm"), ("bart", "translation"), ("albert", "ner")]


def quantized(one: Any, stage: Any, *before: Any) -> dict[str, torch.Tensor]:
    """The logits before and after the fold, and those of the fp32 model."""
    context = one.context()
    for other in before:
        other.prepare(one.model, context)
        if isinstance(other, LoRA):
            with torch.no_grad():
                for name, parameter in one.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            other.link(one.model, context)
    found = {"plain": one.logits()}
    stage.prepare(one.model, context)
    found["chained"] = one.logits()
    context.records.update(fold(context.targets))
    for other in before:
        other.finalize(one.model, context)
    stage.finalize(one.model, context)
    return found | {"stored": one.logits()}


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize("name", STAGES)
def test_the_integers_are_the_chain(name: str, family: str, task: str, setting: Callable[..., Any]) -> None:
    one = setting(family, task)
    found = quantized(one, STAGES[name])
    torch.testing.assert_close(found["stored"], found["chained"], rtol=1e-4, atol=1e-5)
    difference, size = float((found["stored"] - found["plain"]).abs().max()), float(found["plain"].abs().max())
    assert 0 < difference < (0.05 if STAGES[name].bits == 8 else 0.5) * size
    kinds = [isinstance(module, IntegerLinear) for module in one.model.modules()]
    assert sum(kinds) > 0


@pytest.mark.parametrize("name", STAGES)
def test_it_is_the_merged_pruned_weight_that_is_on_the_grid(name: str, setting: Callable[..., Any]) -> None:
    one = setting()
    found = quantized(one, STAGES[name], LoRA(), Magnitude(sparsity=0.5))
    torch.testing.assert_close(found["stored"], found["chained"], rtol=1e-4, atol=1e-5)
    integers = [module for module in one.model.modules() if isinstance(module, IntegerLinear)]
    assert integers
    for module in integers:
        assert float((module.dequantized() == 0).float().mean()) >= 0.5


def entering(one: Any, name: str) -> torch.Tensor:
    """What a linear reads, without padding: (tokens, inputs)."""
    seen: list[torch.Tensor] = []
    handle = one.model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    one.logits()
    handle.remove()
    return seen[0][one.batch()["attention_mask"].bool()]


@pytest.mark.parametrize(
    "stage", [GPTQ(bits=2, group=16), AWQ(bits=2, group=16), SmoothQuant(bits=3), Int8Static(bits=3)]
)
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_a_later_block_is_looked_at_behind_the_quantized_ones_before_it(
    family: str, task: str, stage: Any, setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was added up of the inputs of a block is what enters it when all blocks before it, and none from it on, are
    on their grids."""
    one, seen, quantize = setting(family, task), {}, type(stage).quantize

    def look(self: Any, linears: Any, statistic: Any, context: Any) -> None:
        seen.update(dict.fromkeys(linears, statistic))
        quantize(self, linears, statistic, context)

    context = one.context()
    with monkeypatch.context() as patch:
        patch.setattr(type(stage), "quantize", look)
        stage.prepare(one.model, context)
    assert set(seen) == set(context.targets)
    places = [f"{place}." for place, _, _ in context.anatomy.named_blocks()]
    for number, place in enumerate(places):
        name = next(name for name in seen if name.startswith(place))
        twin, plain = setting(family, task), setting(family, task)
        if number:
            before = "|".join(re.escape(earlier) + ".*" for earlier in places[:number])
            replace(stage, targets=before).prepare(twin.model, twin.context())
        assert equal(seen[name], stage.statistic(entering(twin, name)))
        assert equal(seen[name], stage.statistic(entering(plain, name))) == (number == 0)


def test_what_is_no_target_stays_as_it_is(setting: Callable[..., Any]) -> None:
    for stage in (STAGES["some"], GPTQ(group=16, targets=["feed_in", "feed_out"])):
        one = setting()
        quantized(one, stage)
        found = [n for n, m in one.model.named_modules() if isinstance(m, IntegerLinear)]
        assert len(found) == 6
        assert all(name.endswith((".intermediate.dense", ".output.dense")) for name in found)
        assert not [name for name in found if ".attention." in name]


def test_layers_that_read_the_same_are_found() -> None:
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    assert reading_the_same({"q": one, "k": one.clone(), "o": other}) == [["q", "k"], ["o"]]
    parts = [Inputs(gram, torch.ones(3), torch.tensor(2)) for gram in (one, one.clone(), other)]
    assert reading_the_same(dict(zip("abc", parts, strict=True))) == [["a", "b"], ["c"]]


def test_weights_that_share_a_value_are_rounded_alike_or_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize/gptq and share/codebook: it chooses the code of each weight by"):
        refuse_conflicts([CodebookSharing(), GPTQ()])
    refuse_conflicts([CodebookSharing(), WeightOnly()])


def test_a_group_that_divides_no_width_is_refused(setting: Callable[..., Any]) -> None:
    context = setting().context()
    with pytest.raises(ConfigError, match=r"^compression\.gptq\.group=24: .* has 32 inputs, which it does not divide"):
        GPTQ(group=24).check(context.anatomy, context.targets)
