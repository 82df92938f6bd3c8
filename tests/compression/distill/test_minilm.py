"""MiniLM's relations in plain loops, with any number of relation heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill.minilm import MiniLM
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import outline
from niwaki.model.teacher import Teacher


def vectors(model: Any, block: int, states: Any, relation: str) -> Any:
    """The queries, keys or values of a block of a BERT, from what enters it: (rows, positions, width)."""
    linear = getattr(model.bert.encoder.layer[block].attention.self, relation)
    return (states[block] @ linear.weight.T + linear.bias).detach()


def relation_row(rows: list[list[float]], at: int) -> list[float]:
    """softmax over the positions of a_at . a_j / sqrt(d)."""
    scores = [sum(x * y for x, y in zip(rows[at], other, strict=True)) / math.sqrt(len(rows[at])) for other in rows]
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def by_hand(student: Any, teacher: Any, heads: int, lengths: list[int]) -> float:
    total, count = 0.0, 0
    for row, length in enumerate(lengths):
        for head in range(heads):
            sides = []
            for whole in (student, teacher):
                width = whole.shape[-1] // heads
                sides.append(whole[row, :length, head * width : (head + 1) * width].tolist())
            for at in range(length):
                q, p = (relation_row(side, at) for side in sides)
                total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True) if b > 0)
                count += 1
    return total / count


@pytest.mark.parametrize(("heads", "block"), [(None, None), (2, None), (8, 1), (16, 0)])
def test_the_formula(pair: Callable[..., Any], heads: int | None, block: int | None) -> None:
    both = pair(MiniLM(teacher="x", relation_heads=heads, teacher_block=block, weight=0.5))
    ours, theirs = both.states()
    parts = []
    for relation in ("query", "key", "value"):
        student = vectors(both.one.model, 2, ours, relation)
        teacher = vectors(both.other.model, 5 if block is None else block, theirs, relation)
        parts.append(by_hand(student, teacher, heads or 4, both.lengths()))
    assert both.loss().item() == pytest.approx(0.5 * sum(parts) / 3, rel=1e-3)
    assert min(parts) > 1e-3


def test_one_relation(pair: Callable[..., Any]) -> None:
    both = pair(MiniLM(teacher="x", relations=["value"]), num_attention_heads=8)
    ours, theirs = both.states()
    student, teacher = vectors(both.one.model, 2, ours, "value"), vectors(both.other.model, 5, theirs, "value")
    assert both.loss().item() == pytest.approx(by_hand(student, teacher, 8, both.lengths()), rel=1e-3)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_the_loss_of_the_first_paper_by_hand(pair: Callable[..., Any], family: str, task: str) -> None:
    """KL of the attention of each head over the text that it may look at, and the relation of the values."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12} if family == "llama" else {}
    parts = []
    for relation in ("query_key", "value"):
        both = pair(MiniLM(teacher="x", relations=[relation]), family, task, **sizes)
        parts.append(both.loss().item())
    both = pair(MiniLM(teacher="x", relations=["query_key", "value"]), family, task, **sizes)
    assert both.loss().item() == pytest.approx(sum(parts) / 2, rel=1e-5)
    distributions = []
    for side in (both.one, both.other):
        side.model.set_attn_implementation("eager")
        with torch.no_grad():
            shown = side.model(**side.task.inputs(both.one.batch()), output_attentions=True)
        distributions.append(shown.attentions[-1].tolist())
    total, count = 0.0, 0
    for row, length in enumerate(both.lengths()):
        for head in range(4):
            for at in range(length):
                seen = at + 1 if family == "llama" else length
                q, p = (side[row][head][at][:seen] for side in distributions)
                total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True) if b > 0)
                count += 1
    assert parts[0] == pytest.approx(total / count, rel=1e-3)
    assert parts[0] > 1e-3


def test_attentions_need_as_many_heads(setting: Callable[..., Any]) -> None:
    small, large = (outline(Anatomy.of(setting(overrides=given).model)) for given in ({}, {"num_attention_heads": 8}))
    with pytest.raises(ConfigError, match=r"query_key compares head with head, and the student has 4, the teacher 8"):
        MiniLM(teacher="x", relations=["query_key", "value"]).compare_outlines(small, large)
    MiniLM(teacher="x", relations=["value"], relation_heads=4).compare_outlines(small, large)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "albert", "modernbert", "distilbert", "gpt2"])
def test_it_is_zero_for_a_student_that_is_its_teacher(setting: Callable[..., Any], family: str) -> None:
    one, other = setting(family), setting(family)
    effects = MiniLM(teacher="x", relation_heads=2, relations=["query", "key", "value", "query_key"]).prepare(
        one.model, one.context(load_teacher=lambda *_: Teacher(other.model))
    )
    (term,) = effects.terms.values()
    batch = one.batch()
    value = term(one.model.eval()(**one.task.inputs(batch)), batch)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    for linear in list(Anatomy.of(one.model).linears().values()):
        linear.weight.data *= 6
    loss = term(one.model(**one.task.inputs(batch)), batch)
    loss.backward()
    assert loss.item() > 1e-4
    assert all(bool(p.grad.isfinite().all()) for p in one.model.parameters() if p.grad is not None)


def test_what_stands_at_padding_does_not_matter(pair: Callable[..., Any]) -> None:
    both = pair(MiniLM(teacher="x"), "llama", "causal_lm", head_dim=12)
    batch = both.one.batch()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 7)}
    assert both.loss(other).item() == pytest.approx(both.loss(batch).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"relation_heads": 0}, "relation_heads=0: needs null or at least 1"),
        ({"relations": ["query", "output"]}, r"relations=\['query', 'output'\]: needs some of query, key, value"),
        ({"relations": []}, r"relations=\[\]: needs some of"),
        ({"teacher_block": -1}, "teacher_block=-1: needs null or a block from 0 up"),
        ({"teacher_block": 6}, r"teacher_block=6: the teacher has the blocks 0\.\.5"),
        ({"relation_heads": 5}, "relation_heads=5: does not divide the 32 that the query of the student is wide"),
        ({"relation_heads": 32}, "relation_heads=32: does not divide the 48 that the query of the teacher is wide"),
        ({}, r"relation_heads=12 \(the teacher's attention heads\): does not divide the 32 that the query of the stud"),
    ],
)
def test_refusals(setting: Callable[..., Any], fields: dict[str, Any], said: str) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12}
    small, large = (outline(Anatomy.of(setting(overrides=given).model)) for given in ({}, sizes))
    with pytest.raises(ConfigError, match=rf"^compression\.minilm\.{said}"):
        MiniLM(teacher="x", **fields).compare_outlines(small, large)
