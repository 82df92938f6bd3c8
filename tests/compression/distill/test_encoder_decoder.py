"""Every term between models of an encoder and a decoder: the papers' formulas from states, queries and keys that hooks
of this file read, where sources and targets are padded differently."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.distill.attention import Attention
from niwaki.compression.distill.cosine import Cosine
from niwaki.compression.distill.distillation import Compared
from niwaki.compression.distill.hidden import Hidden
from niwaki.compression.distill.logits import Logits
from niwaki.compression.distill.pkd import PatientDistillation
from niwaki.compression.distill.relational import Relational
from niwaki.model.teacher import Teacher

ROWS = {"source": ["one", "twenty two, or so", "three hundred"], "target": ["1, or one less", "22", "300"]}
PAIRS = [(0, 1), (1, 3), (2, 5)]  # TinyBERT's map of three blocks to six
DEEPER = {
    "bart": {"num_hidden_layers": 6, "decoder_layers": 6},
    "t5": {"num_hidden_layers": 6, "num_decoder_layers": 6},
}


@dataclass
class Stack:
    """What went through an encoder or a decoder: what entered the first block and what left each; scores by block."""

    states: list[Tensor]
    scores: list[Tensor]
    lengths: list[int] = field(default_factory=list)


@dataclass
class Side:
    encoder: Stack
    decoder: Stack
    logits: Tensor
    last: Tensor

    @property
    def stacks(self) -> list[Stack]:
        return [self.encoder, self.decoder]


def parts_of(model: Any, stack: str) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The blocks, and the linears of queries and keys of their attention to the text itself."""
    if hasattr(model, "model"):
        blocks = list(getattr(model.model, stack).layers)
        return blocks, [(block.self_attn.q_proj, block.self_attn.k_proj) for block in blocks]
    blocks = list(getattr(model, stack).block)
    attentions = [block.layer[0].SelfAttention for block in blocks]
    return blocks, [(attention.q, attention.k) for attention in attentions]


def scores(model: Any, stack: str, query: Tensor, key: Tensor) -> Tensor:
    """q k^T / sqrt(d); T5 has no such divisor, and adds its first block's biases."""
    query, key = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (query, key))
    plain = query @ key.transpose(2, 3)
    if hasattr(model, "model"):
        return plain / math.sqrt(query.shape[-1])
    first = getattr(model, stack).block[0].layer[0].SelfAttention
    return plain + first.compute_bias(query.shape[2], key.shape[2])


@torch.no_grad()
def look(one: Any, model: Any, batch: dict[str, Tensor]) -> Side:
    kept: dict[int, Tensor] = {}
    modules = [module for stack in ("encoder", "decoder") for part in parts_of(model, stack) for module in part]
    flat = [
        module for one_or_two in modules for module in (one_or_two if isinstance(one_or_two, tuple) else [one_or_two])
    ]
    handles = [
        module.register_forward_hook(
            lambda m, _, output: kept.__setitem__(id(m), output[0] if isinstance(output, tuple) else output)
        )
        for module in flat
    ]  # fmt: skip
    shown = model(**one.task.inputs(batch), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    stacks = []
    lengths = batch["attention_mask"].sum(1), (batch["labels"] != -100).sum(1)
    for stack, counts in zip(("encoder", "decoder"), lengths, strict=True):
        blocks, pairs = parts_of(model, stack)
        states = [getattr(shown, f"{stack}_hidden_states")[0], *(kept[id(block)] for block in blocks)]
        found = [scores(model, stack, kept[id(query)], kept[id(key)]) for query, key in pairs]
        stacks.append(Stack(states, found, counts.tolist()))
    return Side(*stacks, shown.logits, shown.decoder_hidden_states[-1])


def places(lengths: list[int]) -> Iterator[tuple[int, int]]:
    return ((row, place) for row, length in enumerate(lengths) for place in range(length))


def mean(values: list[Any]) -> float:
    return float(sum(map(float, values)) / len(values))


def of_logits(student: Side, teacher: Side) -> float:
    found = []
    for at in places(student.decoder.lengths):
        q, p = ((side.logits[at] / 2).softmax(-1) for side in (student, teacher))
        found.append(4 * (p * (p / q).log()).sum())
    return mean(found)


def of_hidden(student: Side, teacher: Side) -> float:
    found = []
    for one, other in zip(student.stacks, teacher.stacks, strict=True):
        for i, j in [(0, 0), *((i + 1, j + 1) for i, j in PAIRS)]:
            found.append(mean([((one.states[i][at] - other.states[j][at]) ** 2).mean() for at in places(one.lengths)]))
    return mean(found)


def of_attention(student: Side, teacher: Side) -> float:
    found = []
    for one, other in zip(student.stacks, teacher.stacks, strict=True):
        for i, j in PAIRS:
            squares = (one.scores[i] - other.scores[j]) ** 2
            ends = [
                squares[row, :, place, : place + 1 if one is student.decoder else one.lengths[row]].flatten()
                for row, place in places(one.lengths)
            ]
            found.append(torch.cat(ends).mean())
    return mean(found)


def of_cosine(student: Side, teacher: Side) -> float:
    pairs = ((student.last[at], teacher.last[at]) for at in places(student.decoder.lengths))
    return mean([1 - a @ b / (a @ a * (b @ b)).sqrt() for a, b in pairs])


def of_pkd(student: Side, teacher: Side) -> float:
    found = []
    for one, other in zip(student.stacks, teacher.stacks, strict=True):
        for (i, j), row in itertools.product(PAIRS[:-1], range(len(one.lengths))):
            a, b = one.states[i + 1][row, 0], other.states[j + 1][row, 0]  # no head reads the end token
            found.append(((a / a.norm() - b / b.norm()) ** 2).sum())
    return mean(found)


def of_relational(student: Side, teacher: Side) -> float:
    lengths = student.decoder.lengths
    rows = [[side.last[row, :n].mean(0) for row, n in enumerate(lengths)] for side in (student, teacher)]
    pairs, triples = (list(itertools.permutations(range(len(lengths)), count)) for count in (2, 3))
    plain = [[(one[i] - one[j]).norm() for i, j in pairs] for one in rows]
    distances = [[d / mean(side) for d in side] for side in plain]
    angles = [[torch.cosine_similarity(one[i] - one[j], one[k] - one[j], dim=0) for i, j, k in triples] for one in rows]

    def huber(pair: tuple[Tensor, Tensor]) -> float:
        x = abs(float(pair[0] - pair[1]))
        return x * x / 2 if x <= 1 else x - 0.5

    return mean(list(map(huber, zip(*distances, strict=True)))) + 2 * mean(list(map(huber, zip(*angles, strict=True))))


TERMS: list[tuple[Compared, Callable[[Side, Side], float]]] = [
    (Logits(teacher="x"), of_logits), (Hidden(teacher="x"), of_hidden), (Attention(teacher="x"), of_attention),
    (Cosine(teacher="x"), of_cosine), (PatientDistillation(teacher="x"), of_pkd),
    (Relational(teacher="x"), of_relational),
]  # fmt: skip


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize(("stage", "formula"), TERMS, ids=[stage.name for stage, _ in TERMS])
def test_the_formula(
    setting: Callable[..., Any], family: str, stage: Compared, formula: Callable[[Side, Side], float]
) -> None:
    one, other = setting(family, "translation"), setting(family, "translation", seed=1, overrides=DEEPER[family])
    for model in (one.model.eval(), other.model.eval()):
        for parameter in model.parameters():
            parameter.data *= 3 if parameter.dim() > 1 else 1
    batch = one.batch(ROWS)
    student, teacher = (look(one, model, batch) for model in (one.model, other.model))
    longest = [stack.lengths.index(max(stack.lengths)) for stack in student.stacks]
    assert longest == [1, 0]  # they are padded differently
    effects = stage.prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
    assert not effects.modules
    (term,) = effects.terms.values()
    expected = formula(student, teacher)
    assert expected > 1e-4
    assert term(one.model(**one.task.inputs(batch)), batch).item() == pytest.approx(expected, rel=1e-3)
