"""Pfeiffer's adapter: MAD-X's formula in one block of BERT, and what it becomes where the norms stand first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from niwaki.model.anatomy import Anatomy, family_of, known_families
from niwaki.model.tiny import FAMILIES
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.adapter_pfeiffer import Pfeiffer
from niwaki.tuning.bottleneck import bottlenecks

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]


@pytest.mark.parametrize("index", [0, 2])
def test_it_reads_the_norm_and_adds_to_the_feed_forward(
    setting: Callable[..., Any],
    grown: Callable[..., Any],
    bottleneck_by_hand: Any,
    block_by_hand: Callable[..., Any],
    index: int,
) -> None:
    one = setting("bert")
    grown(one, Pfeiffer(size=6), random=True)
    inside = list(bottlenecks(one.model, "default").values())[index]

    def feed(r: Any, z: Any, norm: Any) -> Any:
        return r + bottleneck_by_hand(inside, norm(r + z), functional.relu)

    assert not torch.allclose(*block_by_hand(one, index), atol=1e-3)
    real, hand = block_by_hand(one, index, feed=feed)
    assert torch.allclose(real, hand, atol=1e-5)


def test_it_follows_a_norm_that_learned(
    setting: Callable[..., Any], grown: Callable[..., Any], bottleneck_by_hand: Any
) -> None:
    """The norm that it reads is the block's own, not a copy."""
    one = setting("bert")
    grown(one, Pfeiffer(size=6, norms=True), random=True)
    layer: Any = Anatomy.of(one.model).blocks[0]
    layer.output.LayerNorm.bias.data += 1.0
    adapted = layer.output.dense
    z, hidden = torch.randn(2, 5, 32), torch.randn(2, 5, 64)
    with torch.no_grad():
        layer.intermediate.dense(z)
        r = adapted.linear(hidden)
        expected = r + bottleneck_by_hand(adapted.adapter["default"], layer.output.LayerNorm(r + z), functional.relu)
        assert torch.allclose(adapted(hidden), expected, atol=1e-6)


@pytest.mark.parametrize("index", [0, 2])
def test_where_no_norm_follows_it_reads_the_feed_forward(
    setting: Callable[..., Any],
    grown: Callable[..., Any],
    bottleneck_by_hand: Any,
    block_by_hand: Callable[..., Any],
    index: int,
) -> None:
    one = setting("llama")
    grown(one, Pfeiffer(size=6), random=True)
    inside = list(bottlenecks(one.model, "default").values())[index]
    real, hand = block_by_hand(one, index, feed=lambda r, *_: r + bottleneck_by_hand(inside, r, functional.relu))
    assert torch.allclose(real, hand, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_one_in_a_block_and_no_norms(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str, task: str
) -> None:
    one = setting(family, task)
    base = one.logits()
    context = grown(one, Pfeiffer(size=8))
    head = {id(p) for p in context.anatomy.head_parameters().values()} if context.head_learns else set()
    learning = {n: p for n, p in one.model.named_parameters() if p.requires_grad and id(p) not in head}
    assert all(".adapter.default." in name for name in learning)
    assert sum(p.numel() for p in learning.values()) == 3 * (2 * 8 * 32 + 32 + 8)
    assert float((one.logits() - base).abs().max()) <= 1e-5


# (norm after the residual sum, so h = norm(r + z)); the published model code of each family
POST_NORM = {"albert", "bart", "bert", "deberta-v2", "distilbert", "electra", "roberta"}


@pytest.mark.parametrize("kind", known_families())
def test_every_family_says_where_its_norms_stand(kind: str) -> None:
    assert family_of(type("Config", (), {"model_type": kind})).post_norm == (kind in POST_NORM)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [Houlsby, Pfeiffer, Parallel])
def test_every_family_starts_as_its_base(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str, kind: Any
) -> None:
    one = setting(family, "classification")
    base = one.logits()
    grown(one, kind(size=8, init_std=0.0))
    assert torch.equal(one.logits(), base)
    ends = [n for n, m in one.model.named_modules() if n.endswith(".adapter.default")]
    anatomy = Anatomy.of(one.model)
    feeds, attentions = len(anatomy.places("feed_out")), len(anatomy.places("output"))
    assert len(ends) == feeds + (attentions if kind is Houlsby else 0)
    assert feeds == len(anatomy.blocks)
