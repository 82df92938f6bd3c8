"""TinyBERT's attention scores: the formula in plain loops, only where both models attend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from niwaki.compression.distill.attention import Attention
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import outline, recorder_of
from niwaki.model.teacher import Teacher


def scores(model: Any, block: int, states: Any, heads: int) -> Any:
    """q k^T / sqrt(d) of a block of a BERT, from what enters it: (rows, heads, positions, positions)."""
    attention = model.bert.encoder.layer[block].attention.self
    entering = states[block]
    parts = []
    for linear in (attention.query, attention.key):
        out = entering @ linear.weight.T + linear.bias
        parts.append(out.view(*out.shape[:2], heads, -1).transpose(1, 2))
    return (parts[0] @ parts[1].transpose(2, 3) / math.sqrt(parts[0].shape[-1])).detach()


def by_hand(student: Any, teacher: Any, lengths: list[int], causal: bool = False) -> float:
    total, count = 0.0, 0
    for row, length in enumerate(lengths):
        for head in range(student.shape[1]):
            for i in range(length):
                for j in range(i + 1 if causal else length):
                    total += (student[row, head, i, j].item() - teacher[row, head, i, j].item()) ** 2
                    count += 1
    return total / count


@pytest.mark.parametrize(("layers", "pairs"), [("uniform", [(0, 1), (1, 3), (2, 5)]), ([[2, 0]], [(2, 0)])])
def test_the_formula(pair: Callable[..., Any], layers: Any, pairs: list[tuple[int, int]]) -> None:
    both = pair(Attention(teacher="x", layers=layers, weight=2.0))
    ours, theirs = both.states()
    parts = [
        by_hand(scores(both.one.model, i, ours, 4), scores(both.other.model, j, theirs, 4), both.lengths())
        for i, j in pairs
    ]
    assert both.loss().item() == pytest.approx(2 * sum(parts) / len(parts), rel=1e-4)


def test_a_position_of_a_causal_model_counts_what_it_sees(pair: Callable[..., Any]) -> None:
    both = pair(Attention(teacher="x", layers=[[0, 0]]), "llama", "causal_lm", head_dim=12)
    batch = both.one.batch()
    value = both.loss(batch).item()
    kept = []
    for side in (both.one, both.other):
        recorder = recorder_of(Anatomy.of(side.model))
        side.model(**side.task.inputs(batch))
        kept.append(recorder.seen.flows[0].attentions[0].scores())  # type: ignore[union-attr]
    assert value == pytest.approx(by_hand(kept[0], kept[1], both.lengths(batch), causal=True), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "albert", "modernbert", "distilbert"])
def test_it_is_zero_for_a_student_that_is_its_teacher(setting: Callable[..., Any], family: str) -> None:
    one, other = setting(family), setting(family)
    effects = Attention(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
    (term,) = effects.terms.values()
    batch = one.batch()
    assert term(one.model.eval()(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-10)
    for linear in Anatomy.of(one.model).linears().values():
        linear.weight.data *= 8
    assert term(one.model(**one.task.inputs(batch)), batch).item() > 1e-6


@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm")])
def test_what_stands_at_padding_does_not_matter(pair: Callable[..., Any], family: str, task: str) -> None:
    both = pair(Attention(teacher="x"), family, task)
    batch = both.one.batch()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 7)}
    assert both.loss(other).item() == pytest.approx(both.loss(batch).item(), rel=1e-4)


def test_other_numbers_of_heads(setting: Callable[..., Any]) -> None:
    small, large = (
        outline(Anatomy.of(setting(overrides={"num_attention_heads": heads, "num_hidden_layers": blocks}).model))
        for heads, blocks in ((4, 3), (8, 6))
    )
    said = (
        r"^compression\.attention: block 0 of the student has 4 attention heads, block 1 of the teacher 8, and scores "
        r"are compared head by head; use distill/minilm$"
    )
    with pytest.raises(ConfigError, match=said):
        Attention(teacher="x").compare_outlines(small, large)


def test_a_model_that_does_not_tell(setting: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^compression\.attention: a deberta-v2 model computes its attention in"):
        Attention(teacher="x").check(Anatomy.of(setting("deberta-v2").model), {})
    plain, other = (outline(Anatomy.of(setting(name).model)) for name in ("bert", "deberta-v2"))
    with pytest.raises(ConfigError, match=r"^compression\.attention: the teacher computes its attention in a way of"):
        Attention(teacher="x").compare_outlines(plain, other)
