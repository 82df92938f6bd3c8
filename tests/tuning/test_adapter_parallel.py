"""He's scaled parallel adapter against its formula in one block, beside the feed-forward and beside attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from niwaki.errors import ConfigError
from niwaki.model.tiny import FAMILIES
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.bottleneck import Adapted, Entry, bottlenecks

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("beside", ["feed_forward", "attention"])
@pytest.mark.parametrize(("family", "scale"), [("bert", 4.0), ("llama", 4.0), ("bert", 0.5)])
def test_the_formula(
    setting: Callable[..., Any], grown: Callable[..., Any], bottleneck_by_hand: Any, block_by_hand: Callable[..., Any],
    family: str, scale: float, beside: Any, index: int,
) -> None:  # fmt: skip
    one = setting(family)
    grown(one, Parallel(size=6, scale=scale, beside=beside), random=True)
    inside = list(bottlenecks(one.model, "default").values())[index]

    def change(output: Any, begun: Any, _: Any) -> Any:
        return output + scale * bottleneck_by_hand(inside, begun, functional.relu)

    assert not torch.allclose(*block_by_hand(one, index), atol=1e-3)
    real, hand = block_by_hand(one, index, **{"feed" if beside == "feed_forward" else "attention": change})
    assert torch.allclose(real, hand, atol=1e-5)


@pytest.mark.parametrize("beside", ["feed_forward", "attention"])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_starts_as_the_base_and_learns(
    setting: Callable[..., Any], grown: Callable[..., Any], train: Callable[..., Any],
    family: str, task: str, beside: Any,
) -> None:  # fmt: skip
    one = setting(family, task)
    base = one.logits()
    context = grown(one, Parallel(size=8, beside=beside))
    assert torch.equal(one.logits(), base)
    head = {id(p) for p in context.anatomy.head_parameters().values()} if context.head_learns else set()
    expected = {n for n, p in one.model.named_parameters() if ".adapter." in n or id(p) in head}
    own = [p for n, p in one.model.named_parameters() if ".adapter." in n]
    assert sum(p.numel() for p in own) == 3 * (2 * 8 * 32 + 32 + 8)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(steps=3), [one.batch()] * 3)
    assert {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())} == expected


def test_no_activation_is_kept_after_a_pass(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    one = setting()
    grown(one, Parallel(size=4))
    one.logits()
    entries = [m for m in one.model.modules() if type(m).__name__ == "Entry"]
    assert len(entries) == 3
    assert all(entry._input is None for entry in entries)


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_attention_it_reads_what_attention_reads_of_the_text(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str
) -> None:
    """DeBERTa's query reads a table of relative positions after the text."""
    one = setting(family, "classification")
    grown(one, Parallel(size=4, beside="attention"), random=True)
    entered: dict[int, list[torch.Tensor]] = {}
    read: list[tuple[int, torch.Tensor]] = []
    for end in [m for m in one.model.modules() if isinstance(m, Adapted)]:
        (entry,) = end._entry
        entry.linear.register_forward_pre_hook(lambda m, args: entered.setdefault(id(m), []).append(args[0]))
        end.adapter["default"].register_forward_pre_hook(
            lambda _, args, inner=entry.linear: read.append((id(inner), args[0]))
        )
    text = one.batch({"text": ["a pine", "x y z"], "label": ["yes", "no"]})
    one.model.eval()(**one.task.inputs(text))
    assert read
    for place, values in read:
        assert values is entered[place][0]
        assert len(values) == 2
        entered[place].pop(0)  # ALBERT's block runs again


def test_what_a_broken_pass_left_is_forgotten(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    one = setting()
    grown(one, Parallel(size=4), random=True)
    expected = one.logits()
    entry = next(m for m in one.model.modules() if isinstance(m, Entry))
    entry(torch.zeros(1, 3, 32))
    assert torch.equal(one.logits(), expected)


def test_chunked_and_recomputed_feed_forwards(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    """Pieces of the text in turn, and blocks that are computed again for their gradients, are the same function."""
    plain, chunked, recomputed = (setting() for _ in range(3))
    for one in (plain, chunked, recomputed):
        grown(one, Parallel(size=4), random=True)
    text = {"text": ["a pine", "x y z"], "label": ["yes", "no"]}
    batch = plain.batch(text)
    for layer in chunked.model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    recomputed.model.activation_checkpointing_enable()
    gradients = []
    for one in (plain, chunked, recomputed):
        one.model.train()
        one.task.loss(one.model(**one.task.inputs(batch)), batch).backward()
        gradients.append({n: p.grad for n, p in one.model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        assert all(torch.allclose(other[n], gradients[0][n], atol=1e-6) for n in gradients[0])


@pytest.mark.parametrize(("fields", "name"), [({"scale": 0.0}, "scale"), ({"beside": "norm"}, "beside")])
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}="):
        Parallel(**fields)
