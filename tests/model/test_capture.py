"""What a recorder keeps is what transformers itself shows: states, attention scores; with every kind of tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki import compose
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import NAME, outline, recorder_of, refuse_attention, tells_attention
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.classification import Classification

TELLING = [family for family in FAMILIES if family != "deberta-v2"]


def louder(model: Any) -> None:
    """Weights large enough that a wrong state or score shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for the rounding of another attention function."""
    bound = 2e-4 * max(1.0, float(theirs.detach().abs().max()))
    return float((ours - theirs).detach().abs().max()) < bound


def seen_by(one: Any, *, attention: bool = False, batch: Any = None) -> tuple[Any, Any]:
    """What the recorder kept of a forward pass, and the outputs of another one, as transformers shows them."""
    model, inputs = one.model.eval(), one.task.inputs(batch or one.batch())
    recorder = recorder_of(Anatomy.of(model))
    if attention:
        recorder.watch_attention()
    plain = model(**inputs).logits
    seen = recorder.seen
    recorder.remove()
    if attention:
        model.set_attn_implementation("eager")
    shown = model(**inputs, output_hidden_states=True, output_attentions=attention)
    assert close(plain, shown.logits)
    return seen, shown


def stacks_of(shown: Any, name: str) -> list[Any]:
    """Hidden states or attentions of each stack."""
    if getattr(shown, f"encoder_{name}", None) is not None:
        return [getattr(shown, f"encoder_{name}"), getattr(shown, f"decoder_{name}")]
    return [getattr(shown, name)]


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_states_that_nobody_asks_for_are_not_kept(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    recorder, inputs = recorder_of(Anatomy.of(one.model)), one.task.inputs(one.batch())
    for wanted, kept in ((False, False), (True, True), (False, True)):  # one that asks is enough
        recorder.watch_states(wanted)
        outlined = outline(Anatomy.of(one.model))
        one.model(**inputs)
        assert recorder.seen is not None
        assert len(recorder.seen.last) == len(one.rows["text"])
        for flow, shapes in zip(recorder.seen.flows, outlined.flows, strict=True):
            assert flow.blocks == shapes.blocks == 3
            assert all(state.numel() for state in shapes.states)
            assert {bool(state.numel()) for state in flow.states} == {kept}


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "classification") for family in FAMILIES),
        ("t5", "ner"),
        ("bart", "causal_lm"),
        ("llama", "causal_lm"),
    ],
)
def test_the_states_are_those_of_transformers(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    louder(one.model)
    seen, shown = seen_by(one)
    expected = stacks_of(shown, "hidden_states")
    assert len(seen.flows) == len(expected)
    for flow, states in zip(seen.flows, expected, strict=True):
        assert flow.blocks == 3
        for ours, theirs in zip(flow.states[:-1], states[:-1], strict=True):  # a final norm may follow the last one
            assert torch.equal(ours, theirs)
    assert torch.equal(seen.last, expected[-1][-1])


@pytest.mark.parametrize("family", TELLING)
def test_the_scores_lead_to_the_attentions_of_transformers(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    louder(one.model)
    batch = one.batch()
    text = batch["attention_mask"].bool()
    seen, shown = seen_by(one, attention=True, batch=batch)
    for flow, attentions in zip(seen.flows, stacks_of(shown, "attentions"), strict=True):
        assert len(flow.attentions) == len(attentions) == 3
        for kept, theirs in zip(flow.attentions, attentions, strict=True):
            allowed = kept.seen().expand_as(theirs)
            ours = kept.scores().masked_fill(~allowed, -torch.inf).softmax(-1)
            rows, queries = text.nonzero(as_tuple=True)
            assert close(ours[rows, :, queries], theirs[rows, :, queries])
            assert bool((theirs.masked_select(~allowed & text[:, None, :, None]) < 1e-6).all())


def test_groups_of_queries_share_a_key(setting: Callable[..., Any]) -> None:
    seen, _ = seen_by(setting("llama"), attention=True)
    kept = seen.flows[0].attentions[0]
    assert (kept.query.shape[1], kept.key.shape[1], kept.scores().shape[1]) == (4, 2, 4)
    by_hand = kept.query[0, 3, 2] @ kept.key[0, 1, 1] * kept.scale
    assert kept.scores()[0, 3, 2, 1].item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_the_local_blocks_of_a_modernbert_see_their_window_alone(setting: Callable[..., Any]) -> None:
    one = setting("modernbert")
    seen, _ = seen_by(one, attention=True)
    reach = [int(kept.seen()[2, 0, 0].sum()) if kept.mask is not None else None for kept in seen.flows[0].attentions]
    assert len(set(reach)) > 1, reach


def test_shared_blocks_count_each_time(setting: Callable[..., Any]) -> None:
    one = setting("albert", overrides={"num_hidden_layers": 5})
    seen, shown = seen_by(one, attention=True)
    (flow,) = seen.flows
    assert (flow.blocks, len(flow.attentions)) == (5, 5)
    assert all(close(a, b) for a, b in zip(flow.states, shown.hidden_states, strict=True))


def tuned(setting: Callable[..., Any], tuning: str, *settings: str, family: str = "bert") -> Any:
    """A tiny model with a tuning that makes a difference."""
    one = setting(family, seed=3)
    stage = compose.build(compose.compose([f"tuning={tuning}", *settings]).config).tuning
    context = one.context()
    stage.grow(one.model, context.anatomy)
    stage.prepare(one.model, context)
    with torch.no_grad():
        for parameter in one.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return one


@pytest.mark.parametrize("tuning", ["lora", "dora", "ia3", "adapter", "adapter_parallel", "bitfit", "qlora"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_layers_that_a_tuning_puts_in(setting: Callable[..., Any], tuning: str, family: str) -> None:
    one = tuned(setting, tuning, family=family)
    seen, shown = seen_by(one, attention=True)
    for flow, states in zip(seen.flows, stacks_of(shown, "hidden_states"), strict=True):
        for a, b in zip(flow.states[:-1], states[:-1], strict=True):
            assert close(a, b)
    text = one.batch()["attention_mask"].bool()
    rows, queries = text.nonzero(as_tuple=True)
    for kept, theirs in zip(seen.flows[0].attentions, stacks_of(shown, "attentions")[0], strict=True):
        ours = kept.scores().masked_fill(~kept.seen().expand_as(theirs), -torch.inf).softmax(-1)
        assert close(ours[rows, :, queries], theirs[rows, :, queries])


@pytest.mark.parametrize("family", ["bert", "llama", "bart", "t5"])
def test_a_prefix_stays_out_of_what_is_compared(setting: Callable[..., Any], family: str) -> None:
    one = tuned(setting, "prefix", "tuning.tokens=3", family=family)
    before = one.logits()
    seen, _ = kept_by(one)
    length = one.batch()["input_ids"].shape[1]
    for flow in seen.flows:
        assert {state.shape[1] for state in flow.states} == {length}
        assert {kept.scores().shape[2:] for kept in flow.attentions} == {(length, length)}
        assert {kept.seen().shape[-1] for kept in flow.attentions} == {length}
    assert torch.equal(one.logits(), before)


def kept_by(one: Any) -> tuple[Any, Any]:
    """What the recorder kept of a forward pass, and its logits."""
    recorder = recorder_of(Anatomy.of(one.model))
    recorder.watch_attention()
    logits = one.model.eval()(**one.task.inputs(one.batch())).logits
    seen = recorder.seen
    recorder.remove()
    return seen, logits


@pytest.mark.parametrize("tuning", ["prompt", "p_tuning"])
@pytest.mark.parametrize("family", ["bert", "llama", "bart", "gpt2"])
def test_virtual_tokens_are_cut(setting: Callable[..., Any], family: str, tuning: str) -> None:
    one = tuned(setting, tuning, "tuning.tokens=4", family=family)
    whole: list[torch.Tensor] = []
    block = Anatomy.of(one.model).blocks[1]
    handle = block.register_forward_hook(lambda *given: whole.append(given[2]))
    seen, logits = kept_by(one)
    handle.remove()
    assert torch.equal(logits, one.logits())
    length = one.batch()["input_ids"].shape[1]
    for flow in seen.flows:
        assert {state.shape[1] for state in flow.states} == {length}
        assert {kept.scores().shape[2:] for kept in flow.attentions} == {(length, length)}
    assert torch.equal(seen.flows[0].states[2], whole[0][:, 4:])
    assert seen.last.shape[1] == length


def test_a_recorder_changes_nothing_and_leaves_nothing(setting: Callable[..., Any]) -> None:
    one = setting("bart")
    before, hooks = one.logits(), count_hooks(one.model)
    recorder = recorder_of(Anatomy.of(one.model))
    recorder.watch_attention()
    assert recorder_of(Anatomy.of(one.model)) is recorder
    assert torch.equal(one.logits(), before)
    assert recorder.seen is None  # no gradient, nothing is kept
    assert torch.equal(one.model(**one.task.inputs(one.batch())).logits, before)
    assert recorder.seen is not None
    assert set(one.model.state_dict()) == set(setting("bart").model.state_dict())
    recorder.remove()
    assert count_hooks(one.model) == hooks
    assert not [module for module in one.model.modules() if NAME in module.__dict__]
    assert one.model.config._attn_implementation == "sdpa"


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_error_in_an_attention_leaves_its_function_as_it_was(setting: Callable[..., Any]) -> None:
    one = setting()
    recorder_of(Anatomy.of(one.model)).watch_attention()
    linear = next(iter(Anatomy.of(one.model).linears().values()))

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    linear.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        one.model(**one.task.inputs(one.batch()))
    assert one.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_has_the_same_outline(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    anatomy = Anatomy.of(one.model)
    hooks, mode = count_hooks(one.model), one.model.training
    empty = Tiny(name=family).empty(Classification(), one.labels)
    for seen in (outline(anatomy), outline(Anatomy.of(empty))):
        assert all(flow.blocks == 3 and flow.states[1].shape == (1, 3, 32) for flow in seen.flows)
        heads = {kept.query.shape[1] for flow in seen.flows for kept in flow.attentions}
        assert heads == ({4} if tells_attention(anatomy) else set())
    assert (count_hooks(one.model), one.model.training) == (hooks, mode)
    assert one.model.config._attn_implementation == ("eager" if family == "deberta-v2" else "sdpa")


def test_a_family_that_does_not_tell(setting: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^compression\.x: a deberta-v2 model computes its attention in a way of"):
        refuse_attention(Anatomy.of(setting("deberta-v2").model), "compression.x")
