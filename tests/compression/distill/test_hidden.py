"""TinyBERT's hidden states: the formula in plain loops, projections that learn and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact
from niwaki.compose import build, compose
from niwaki.compression.distill.hidden import Hidden
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import outline
from niwaki.model.teacher import Teacher
from niwaki.optimizer import AdamW


def squared(student: Any, teacher: Any, lengths: list[int], matrix: Any = None) -> float:
    """MSE over the positions of the text and the teacher's width; matrix (teacher width, student width)."""
    total, count = 0.0, 0
    for row, length in enumerate(lengths):
        for position in range(length):
            ours, theirs = student[row, position].tolist(), teacher[row, position].tolist()
            mapped = [sum(w * x for w, x in zip(line, ours, strict=True)) for line in matrix] if matrix else ours
            total += sum((a - b) ** 2 for a, b in zip(mapped, theirs, strict=True))
            count += len(theirs)
    return total / count


def test_the_formula_with_projections(pair: Callable[..., Any]) -> None:
    both = pair(Hidden(teacher="x", weight=0.3))
    ours, theirs = both.states()
    modules = both.effects.modules
    assert set(modules) == {"distill/hidden/embeddings_0", "distill/hidden/states_0"}
    of_embeddings, of_states = (modules[f"distill/hidden/{n}_0"].weight.tolist() for n in ("embeddings", "states"))
    lengths = both.lengths()
    parts = [squared(ours[0], theirs[0], lengths, of_embeddings)]
    parts += [squared(ours[i], theirs[j], lengths, of_states) for i, j in ((1, 2), (2, 4), (3, 6))]
    assert both.loss().item() == pytest.approx(0.3 * sum(parts) / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("uniform", [(1, 2), (2, 4), (3, 6)]), ("last", [(1, 4), (2, 5), (3, 6)]), ([[0, 5]], [(1, 6)])],
)
@pytest.mark.parametrize("embeddings", [True, False])
def test_the_formula_at_the_same_width(
    pair: Callable[..., Any], layers: Any, pairs: list[tuple[int, int]], embeddings: bool
) -> None:
    both = pair(Hidden(teacher="x", layers=layers, embeddings=embeddings), "bert", "ner", hidden_size=32)
    assert not both.effects.modules
    ours, theirs = both.states()
    every = [*([(0, 0)] if embeddings else []), *pairs]
    parts = [squared(ours[i], theirs[j], both.lengths()) for i, j in every]
    assert both.loss().item() == pytest.approx(sum(parts) / len(parts), rel=1e-4)


def test_what_stands_at_padding_does_not_matter(pair: Callable[..., Any]) -> None:
    both = pair(Hidden(teacher="x"), "llama", "causal_lm")
    batch = both.one.batch()
    value = both.loss(batch)
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert both.loss(other).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "albert", "modernbert", "deberta-v2", "gpt2"])
def test_it_is_zero_for_a_student_that_is_its_teacher(setting: Callable[..., Any], family: str) -> None:
    one, other = setting(family), setting(family)
    effects = Hidden(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
    (term,) = effects.terms.values()
    batch = one.batch()
    assert not effects.modules
    assert term(one.model.eval()(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-10)
    for linear in Anatomy.of(one.model).linears().values():
        linear.weight.data *= 8
    assert term(one.model(**one.task.inputs(batch)), batch).item() > 1e-6


def test_an_encoder_and_its_decoder_have_maps_of_their_own(pair: Callable[..., Any]) -> None:
    both = pair(Hidden(teacher="x"), "bart", d_model=48)
    assert len(both.effects.modules) == 4
    both.loss().backward()
    assert all(bool(p.grad.any()) for m in both.effects.modules.values() for p in m.parameters())  # type: ignore[union-attr]


def test_the_projection_learns_is_resumed_and_is_not_in_the_model(
    pair: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        both = pair(Hidden(teacher="x"))
        learner = both.one.learner(optimizer=AdamW(lr=0.01), effects=[both.effects])
        return both, learner

    (both, learner), (_, first), (_, second) = fresh(), fresh(), fresh()
    batch = both.one.batch()
    names = set(both.one.model.state_dict())
    before = {name: p.detach().clone() for name, p in learner.beside.named_parameters()}
    assert len(before) == 2
    train(learner, [batch] * 2, max_epochs=2)
    train(first, [batch] * 2, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    with torch.no_grad():
        for parameter in second.beside.parameters():
            parameter.zero_()  # the checkpoint brings them
    train(second, [batch] * 2, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    ended = learner.state_dict()
    assert all(not torch.equal(ended[f"beside.{name}"], value) for name, value in before.items())
    assert all(torch.equal(value, ended[name]) for name, value in second.state_dict().items())
    assert set(both.one.model.state_dict()) == names
    artifact.save(
        tmp_path / "model", model=both.one.model, tokenizer=both.one.tokenizer, task=both.one.task,
        labels=both.one.labels, base_config=both.one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    saved = artifact.load(tmp_path / "model").model
    assert set(saved.state_dict()) == names
    assert sum(p.numel() for p in saved.parameters()) == sum(p.numel() for p in both.one.model.parameters())


def test_the_hooks_end_with_the_fit(pair: Callable[..., Any], train: Callable[..., Any]) -> None:
    both = pair(Hidden(teacher="x"))
    assert both.effects.terms["distill/hidden"].recorder is not None  # type: ignore[attr-defined]
    train(both.one.learner(effects=[both.effects]), [both.one.batch()], callbacks=both.effects.callbacks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in both.one.model.modules())


def test_the_teacher_gets_no_gradient_and_the_student_does(pair: Callable[..., Any]) -> None:
    both = pair(Hidden(teacher="x"))
    both.loss().backward()
    assert all(p.grad is None and not p.requires_grad for p in both.other.model.parameters())
    block = Anatomy.of(both.one.model).blocks[2]
    assert all(bool(p.grad.any()) for p in block.parameters() if p.dim() > 1)  # type: ignore[union-attr]


def test_refusals(setting: Callable[..., Any]) -> None:
    small, large, whole = (
        outline(Anatomy.of(setting(name, overrides=sizes).model))
        for name, sizes in (("bert", {}), ("bert", {"num_hidden_layers": 5}), ("bart", {}))
    )
    with pytest.raises(ConfigError, match=r"^compression\.hidden\.layers: \[0, 5\]: the teacher has the blocks 0"):
        Hidden(teacher="x", layers=[[0, 5]]).compare_outlines(small, large)
    with pytest.raises(ConfigError, match=r"^compression\.hidden: the student is one stack of blocks, the teacher an"):
        Hidden(teacher="x").compare_outlines(small, whole)


def test_where_nothing_below_the_head_learns(setting: Callable[..., Any]) -> None:
    one = setting()
    one.model.base_model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^compression\.hidden: has no effect, since nothing below the head learns"):
        Hidden(teacher="x").prepare(one.model, one.context())


def test_a_fit_of_no_steps() -> None:
    recipe = ["compression=distill/hidden", "compression.hidden.teacher=x", "data=files", "trainer.max_epochs=0"]
    with pytest.raises(ConfigError, match=r"^compression\.hidden: has no effect with trainer.max_epochs=0"):
        build(compose([*recipe, "data.train=x.jsonl", "data.test=x.jsonl"]).config)
