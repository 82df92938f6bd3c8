"""Learning rates by part, worked by hand, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.errors import ConfigError
from niwaki.optimizer import SGD, AdamW
from niwaki.rates import rates
from niwaki.schedule import Linear
from niwaki.tuning.bitfit import BitFit
from niwaki.tuning.head import Head
from niwaki.tuning.layernorm import LayerNorm
from niwaki.tuning.lora import LoRA
from niwaki.tuning.p_tuning import PTuning
from niwaki.tuning.prefix import PrefixTuning
from niwaki.tuning.prompt import PromptTuning


def in_optimizer(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, float]:
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_each_block_has_a_share_of_the_rate_of_the_one_above(setting: Callable[..., Any]) -> None:
    model = setting().model
    found = in_optimizer(AdamW(lr=0.8, layer_decay=0.5).build(model), model)
    assert len(found) == len(list(model.parameters()))
    by_hand = {"classifier": 0.8, "pooler": 0.8, "layer.2.": 0.8, "layer.1.": 0.4, "layer.0.": 0.2, "embeddings.": 0.1}
    for part, rate in by_hand.items():
        assert all(value == pytest.approx(rate) for name, value in found.items() if part in name), part


def test_the_rates_of_parts_are_absolute_and_norms_come_before_places(setting: Callable[..., Any]) -> None:
    model = setting().model
    given = {"head": 3.0, "embeddings": 0.25, "norms": 7.0}
    found = rates(model, 0.8, 0.5, given)
    assert found["classifier.weight"] == found["bert.pooler.dense.bias"] == 3.0
    assert found["bert.embeddings.word_embeddings.weight"] == 0.25
    assert found["bert.embeddings.LayerNorm.bias"] == found["bert.encoder.layer.0.output.LayerNorm.weight"] == 7.0
    assert found["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.2)
    assert rates(model, 0.8, 1.0, {"blocks": 5.0})["bert.encoder.layer.0.output.dense.weight"] == 5.0


def test_a_factor_of_the_tuning_multiplies_the_rate_of_the_block(setting: Callable[..., Any]) -> None:
    one = setting()
    LoRA(rank=2).prepare(one.model, one.context())
    layer = "bert.encoder.layer.{}.attention.self.query.lora_{}.default.weight"
    factors = {layer.format(i, "B"): 16.0 for i in range(3)}
    found = in_optimizer(AdamW(lr=0.8, layer_decay=0.5).build(one.model, factors=factors), one.model)
    assert found[layer.format(0, "A")] == pytest.approx(0.2)
    assert found[layer.format(0, "B")] == pytest.approx(3.2)
    assert found[layer.format(2, "B")] == pytest.approx(12.8)
    found = in_optimizer(AdamW(lr_by_part={"blocks": 0.5}).build(one.model, factors=factors), one.model)
    assert found[layer.format(1, "B")] == 8.0


def test_what_is_put_before_the_text_is_a_part_of_its_own(setting: Callable[..., Any]) -> None:
    virtual, written, prefixed = setting(), setting(), setting()
    for one, tuning in (
        (virtual, PromptTuning(tokens=2)), (written, PTuning(tokens=2)), (prefixed, PrefixTuning(tokens=2)),
    ):  # fmt: skip
        context = one.context()
        tuning.grow(one.model, context.anatomy)
        tuning.prepare(one.model, context)
        given = rates(one.model, 0.8, 1.0, {"prompt": 3.0, "head": 0.1})
        head = set(context.anatomy.head_parameters())
        assert {name for name, rate in given.items() if rate == 0.1} == head
        assert {name for name, rate in given.items() if rate == 3.0} == set(given) - head
    assert rates(virtual.model, 0.8, 0.5)["bert.prompt.weight"] == pytest.approx(0.1)  # below all three blocks
    assert {rate for name, rate in rates(written.model, 0.8, 0.5).items() if "prompt" in name} == {0.1}
    decayed = rates(prefixed.model, 0.8, 0.5)
    assert {rate for name, rate in decayed.items() if name.startswith("bert.prefix.")} == {0.1}
    writers = [rate for name, rate in decayed.items() if "layer.1.attention.self.prefix.writer" in name]
    assert writers == [0.4, 0.4]


def test_a_schedule_keeps_their_ratios(setting: Callable[..., Any]) -> None:
    model = setting().model
    optimizer = SGD(lr=0.8, layer_decay=0.5).build(model)
    start = in_optimizer(optimizer, model)
    scheduler = Linear(warmup=0.0).build(optimizer, 4)
    optimizer.step()
    scheduler.step()
    assert in_optimizer(optimizer, model) == {name: pytest.approx(0.75 * rate) for name, rate in start.items()}


@pytest.mark.parametrize(
    ("tuning", "fields", "message"),
    [
        (Head(), {"layer_decay": 0.9}, r"^optimizer\.layer_decay=0\.9: has no effect"),
        (Head(), {"lr_by_part": {"blocks": 0.1}}, r"^optimizer\.lr_by_part\.blocks=0\.1: nothing of this part learns"),
        (
            LayerNorm(),
            {"layer_decay": 0.9, "lr_by_part": {"norms": 0.1}},
            r"^optimizer\.layer_decay=0\.9: has no effect",
        ),
        (LayerNorm(), {"lr_by_part": {"norms": 0.1, "blocks": 0.1}}, r"^optimizer\.lr_by_part\.blocks=0\.1: nothing"),
        (LoRA(rank=2), {"lr_by_part": {"norms": 0.1}}, r"^optimizer\.lr_by_part\.norms=0\.1: nothing"),
    ],
)
def test_a_rate_without_effect_is_refused(
    setting: Callable[..., Any], tuning: Any, fields: dict[str, Any], message: str
) -> None:
    one = setting()
    tuning.prepare(one.model, one.context())
    with pytest.raises(ConfigError, match=message):
        AdamW(**fields).build(one.model)


def test_a_rate_with_effect_on_little_is_not_refused(setting: Callable[..., Any]) -> None:
    one = setting()
    BitFit().prepare(one.model, one.context())
    found = rates(one.model, 1.0, 0.5, {"norms": 9.0})
    assert found["bert.encoder.layer.0.output.dense.bias"] == 0.25
    assert found["bert.encoder.layer.0.output.LayerNorm.bias"] == 9.0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"layer_decay": 0.0}, "layer_decay"), ({"layer_decay": 1.1}, "layer_decay"),
        ({"layer_decay": float("nan")}, "layer_decay"), ({"lr_by_part": {"heads": 1e-3}}, r"lr_by_part\.heads"),
        ({"lr_by_part": {"head": 0.0}}, r"lr_by_part\.head"),
        ({"lr_by_part": {"head": float("inf")}}, r"lr_by_part\.head"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.{name}"):
        AdamW(**fields)
