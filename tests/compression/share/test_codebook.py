"""Weight sharing: the gradient of a centroid, what learns, zeros below and grids above, and what is stored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki import artifact, compose, pipeline
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.mask import Mask
from niwaki.compression.prune.random import Random
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerLinear, largest_code
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.codebook import Codebook, CodebookSharing
from niwaki.compression.share.huffman import shared_bytes
from niwaki.compression.share.stored import CodebookLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.optimizer import SGD, AdamW
from niwaki.stage import Phase, Stage, refuse_conflicts
from niwaki.task.classification import Classification
from niwaki.tuning.bitfit import BitFit
from niwaki.tuning.delta import unload
from niwaki.tuning.full import Full
from niwaki.tuning.gradual import Gradual
from niwaki.tuning.head import Head
from niwaki.tuning.lora import LoRA
from niwaki.tuning.prompt import PromptTuning
from niwaki.weights import entering, fold, links, stack


def book_of(linear: Any) -> Codebook:
    (book,) = (link for link in links(linear) if isinstance(link, Codebook))
    return book


def books(context: Any) -> dict[str, Codebook]:
    return {name: book_of(linear) for name, linear in context.targets.items()}


def backward(one: Any) -> None:
    one.task.loss(one.model(**one.task.inputs(one.batch())), one.batch()).backward()


def test_the_example_of_the_papers_figure() -> None:
    # Figure 3: 4 x 4 weights in 4 clusters, their gradient, and centroids after a step of size 1
    weight = torch.tensor(
        [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0.0, -1.03], [1.87, 0.0, 1.53, 1.49]]
    )
    gradient = torch.tensor(
        [[-0.03, -0.01, 0.03, 0.02], [-0.01, 0.01, -0.02, 0.12], [-0.01, 0.02, 0.04, 0.01], [-0.07, -0.02, 0.01, -0.02]]
    )
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = weight
    book = Codebook(weight.shape, bits=2, rows=None, follows=False)
    stack(linear, book)
    book.draw(linear, "linear", 0)
    assert book.indices.tolist() == [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
    assert book.centroids(weight)[0].tolist() == pytest.approx([-1.0, 0.0, 1.5, 2.0], abs=1e-6)
    linear.weight.backward(gradient)
    assert book.shift.grad is not None
    assert book.shift.grad.tolist() == pytest.approx([-0.03, 0.04, 0.02, 0.04], abs=1e-6)
    torch.optim.SGD([book.shift], lr=1.0).step()
    assert book.centroids(weight)[0].tolist() == pytest.approx([-0.97, -0.04, 1.48, 1.96], abs=1e-6)
    assert linear.weight[0].tolist() == pytest.approx([1.96, -0.97, 1.48, -0.04], abs=1e-6)


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_a_centroid_gets_the_sum_of_the_gradients_of_its_weights(
    setting: Callable[..., Any], sparsity: float | None, rows: int | None
) -> None:
    one, dense = setting(), setting()
    context = one.context()
    if sparsity:
        Magnitude(sparsity=sparsity).prepare(one.model, context)
    CodebookSharing(bits=3, rows=rows).prepare(one.model, context)
    for name, linear in context.targets.items():
        dense.model.get_submodule(name).weight.data = linear.weight.detach().clone()
    backward(one)
    backward(dense)
    for name, book in books(context).items():
        gradient = dense.model.get_submodule(name).weight.grad
        weight = context.targets[name].weight
        height = rows or len(weight)
        expected = []
        for table in range(len(weight) // height):
            part = slice(table * height, (table + 1) * height)
            for k in range(8):
                members = (book.indices[part] == k) & ((weight[part] != 0) if sparsity else True)
                expected.append(float(gradient[part][members].sum()))
        assert book.shift.grad is not None
        assert book.shift.grad.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.01, weight_decay=0.1), AdamW(lr=1e-3, weight_decay=0.1)])
def test_the_centroids_learn_and_the_weights_rest(
    setting: Callable[..., Any], train: Callable[..., Any], optimizer: Any
) -> None:
    one = setting("bert", "ner")
    context = one.context(steps=3)
    Full().prepare(one.model, context)
    base = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    effects = CodebookSharing(bits=2).prepare(one.model, context)
    drawn = {name: (book.indices.clone(), book.base.clone()) for name, book in books(context).items()}
    assert {n for n, p in one.model.named_parameters() if not p.requires_grad} == {
        f"{name}.parametrizations.weight.original" for name in context.targets
    }
    train(one.learner(optimizer, [effects], 3), [one.batch()] * 3, callbacks=effects.callbacks)
    for name, linear in context.targets.items():
        book = book_of(linear)
        assert torch.equal(linear.parametrizations.weight.original, base[name])  # type: ignore[union-attr]
        assert torch.equal(book.indices, drawn[name][0])
        assert torch.equal(book.base, drawn[name][1])
        assert bool(book.shift.all())
        assert torch.equal(linear.weight, (book.base[0] + book.shift)[book.indices.long()])
        assert len(linear.weight.unique()) <= 4


def test_nothing_learns_where_the_tuning_freezes_the_weights(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    Head().prepare(one.model, context)
    learning = {n for n, p in one.model.named_parameters() if p.requires_grad}
    CodebookSharing().prepare(one.model, context)
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == learning


@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_stay_zero_and_take_no_centroid(
    setting: Callable[..., Any], train: Callable[..., Any], bits: int
) -> None:
    one = setting()
    context = one.context(steps=3)
    prune = Magnitude(sparsity=0.8).prepare(one.model, context)
    effects = CodebookSharing(bits=bits).prepare(one.model, context)
    masks = {name: links(linear)[0].mask.clone() for name, linear in context.targets.items()}
    for name, linear in context.targets.items():
        kept = entering(linear, book_of(linear))[masks[name]]
        shared = linear.weight.detach()
        for value in shared[masks[name]].unique():  # a centroid is the mean of its weights, and of these alone
            members = shared[masks[name]] == value
            assert float(kept[members].mean()) == pytest.approx(float(value), abs=1e-6)
        assert len(shared[masks[name]].unique()) == 2**bits
    train(one.learner(SGD(lr=0.1), [prune, effects], 3), [one.batch()] * 3, callbacks=effects.callbacks)
    for name, linear in context.targets.items():
        assert torch.equal(linear.weight == 0, ~masks[name])
        assert len(linear.weight[masks[name]].unique()) == 2**bits


def test_a_mask_that_grows_takes_weights_out_of_their_clusters(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting()
    context = one.context(steps=4)
    prune = Magnitude(sparsity=0.7, schedule="cubic", begin=0.0, end=0.75, interval=1).prepare(one.model, context)
    effects = CodebookSharing(bits=3).prepare(one.model, context)
    both = [*prune.callbacks, *effects.callbacks]
    train(one.learner(SGD(lr=0.1), [prune, effects], 4), [one.batch()] * 4, callbacks=both)
    fold(context.targets)
    for linear in context.targets.values():
        assert int((linear.weight == 0).sum()) == round(0.7 * linear.weight.numel())
        assert len(linear.weight.unique()) <= 9


@pytest.mark.parametrize("below", ["nothing", "delta"])
def test_what_a_mask_lets_back_takes_the_centroid_that_is_nearest_to_it(
    setting: Callable[..., Any], below: str
) -> None:
    one = setting()
    context = tuned(one, CodebookSharing(bits=3), sparsity=0.6)[0] if below == "delta" else one.context()
    if below == "nothing":
        Magnitude(sparsity=0.6).prepare(one.model, context)
        CodebookSharing(bits=3).prepare(one.model, context)
    for linear in context.targets.values():
        book, mask = book_of(linear), links(linear)[-2]
        assert isinstance(mask, Mask)
        own, back = entering(linear, mask), ~mask.mask
        centroids = linear.weight[mask.mask].unique().detach()
        mask.take(torch.ones_like(mask.mask))
        nearest = centroids[(own[back][:, None] - book.centroids(own).detach()).abs().argmin(1)]
        if below == "nothing":  # above a delta the means move with the members
            assert torch.equal(linear.weight[back], nearest)
        assert len(book.indices[back].unique()) > 1


def test_connections_that_grow_from_zero_are_shared_and_not_pruned(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting("bert", "ner")
    context = one.context(steps=4)
    prune = Random(sparsity=0.75, schedule="rigl", interval=1, fraction=0.5, end=1.0).prepare(one.model, context)
    effects = CodebookSharing(bits=3).prepare(one.model, context)
    both = [*prune.callbacks, *effects.callbacks]
    first = {name: links(linear)[0].mask.clone() for name, linear in context.targets.items()}
    train(one.learner(SGD(lr=0.1), [prune, effects], 4), [one.batch()] * 4, callbacks=both)
    records = fold(context.targets)
    for name, linear in context.targets.items():
        assert not torch.equal(records[name]["mask"], first[name])
        assert torch.equal(records[name]["kept"], records[name]["mask"])
        assert int((linear.weight == 0).sum()) == round(0.75 * linear.weight.numel())


@pytest.mark.parametrize("group", [None, 16])
def test_under_a_grid_the_centroids_land_on_it(setting: Callable[..., Any], group: int | None) -> None:
    one = setting()
    context = one.context()
    Magnitude(sparsity=0.5).prepare(one.model, context)
    CodebookSharing(bits=3).prepare(one.model, context)
    QAT(bits=4, group=group, activation_bits=None).prepare(one.model, context)
    assert [link.phase for link in links(next(iter(context.targets.values())))] == [2, 3, 4]
    for linear in context.targets.values():
        masked = entering(linear, book_of(linear))
        book, weight = book_of(linear), linear.weight.detach()
        size = group or weight.shape[1]
        for row in range(len(weight)):
            for first in range(0, weight.shape[1], size):
                part = slice(first, first + size)
                shared = [float(book.base[0][k]) for k in book.indices[row, part].int()]
                shared = [s if m else 0.0 for s, m in zip(shared, masked[row, part].tolist(), strict=True)]
                scale = max(map(abs, shared)) / largest_code(4)
                expected = [round(s / scale) * scale if scale else 0.0 for s in shared]
                assert weight[row, part].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def tuned(one: Any, stage: CodebookSharing, steps: int = 10, sparsity: float | None = None) -> tuple[Any, Any, Any]:
    """LoRA below the codebook."""
    context, tuning = one.context(steps), LoRA(rank=2)
    tuning.prepare(one.model, context)
    tuning.link(one.model, context)
    if sparsity:
        Magnitude(sparsity=sparsity).prepare(one.model, context)
    return context, tuning, stage.prepare(one.model, context)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_above_a_delta_both_learn_and_the_fold_is_exact(
    setting: Callable[..., Any], train: Callable[..., Any], sparsity: float | None
) -> None:
    one = setting("bert", "ner")
    context, tuning, effects = tuned(one, CodebookSharing(bits=3), 4, sparsity)
    drawn = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    start = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(AdamW(lr=0.01), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, start[n])}
    assert {n for n in start if "lora_" in n or n.endswith("shift")} <= moved
    assert not any(n.endswith("original") for n in moved)
    trained = one.logits()
    fold(context.targets)
    assert torch.equal(one.logits(), trained)
    tuning.finalize(one.model, context)
    assert torch.equal(one.logits(), trained)
    for name, linear in context.targets.items():
        assert len(linear.weight.unique()) <= 8 + bool(sparsity)
        assert not torch.equal(linear.weight, drawn[name])


def test_a_delta_moves_each_centroid_by_the_mean_of_its_cluster(setting: Callable[..., Any]) -> None:
    one = setting()
    context, _, _ = tuned(one, CodebookSharing(bits=2), sparsity=0.5)
    before = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    entered = {name: entering(linear, book_of(linear)) for name, linear in context.targets.items()}
    for name, parameter in one.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for name, linear in context.targets.items():
        change = entering(linear, book_of(linear)) - entered[name]
        moved = linear.weight.detach() - before[name]
        for value in before[name].unique():
            members = before[name] == value
            expected = float(change[members].mean()) if value else 0.0
            assert moved[members].tolist() == pytest.approx([expected] * int(members.sum()), abs=1e-6)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_the_gradient_of_a_delta_is_that_of_the_loss(setting: Callable[..., Any], sparsity: float | None) -> None:
    """Against a small step in each direction: nothing is passed straight through here."""
    one = setting()
    tuned(one, CodebookSharing(bits=3), sparsity=sparsity)
    one.model.double()
    for name, parameter in one.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    inputs = one.task.inputs(one.batch())
    weights = torch.randn_like(one.logits())

    def loss() -> Tensor:
        return (one.model(**inputs).logits * weights).sum()

    loss().backward()
    parameters = dict(one.model.named_parameters())
    chosen = [name for name in parameters if "lora_" in name and ".1." in name]
    assert len(chosen) == 12
    for name in chosen:
        parameter, gradient = parameters[name], parameters[name].grad
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
                losses.append(float(loss()))
                parameter -= sign * 1e-5 * direction
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-7)


def test_a_delta_alone_learns_to_fit(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """With the centroids' own shift held still, the loss falls by what the adapters do to the means."""
    one = setting("bert", "ner")
    context, _, effects = tuned(one, CodebookSharing(bits=4), 30)
    for _, parameter in one.model.named_parameters():
        parameter.requires_grad_(False)
    for name, parameter in one.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    batch = one.batch()
    before = float(one.task.loss(one.model(**one.task.inputs(batch)), batch).detach())
    train(one.learner(AdamW(lr=0.02), [effects], 30), [batch] * 30, callbacks=effects.callbacks)
    after = float(one.task.loss(one.model(**one.task.inputs(batch)), batch).detach())
    assert after < 0.7 * before
    assert all(len(linear.weight.unique()) <= 16 for linear in context.targets.values())


def test_clusters_that_are_drawn_within_the_fit(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=6)
    Full().prepare(one.model, context)
    effects = CodebookSharing(bits=2, begin=0.5).prepare(one.model, context)
    assert effects.settled == 3
    linear = next(iter(context.targets.values()))
    weights: list[Tensor] = []
    values: list[int] = []

    class Watch(type(effects.callbacks[0]).__mro__[1]):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append(linear.parametrizations.weight.original.detach().clone())  # type: ignore[union-attr]
            values.append(len(linear.weight.unique()))

    assert values == []
    assert len(linear.weight.unique()) > 500
    callbacks = [*effects.callbacks, Watch()]
    train(one.learner(AdamW(lr=0.01, weight_decay=0.1), [effects], 6), [one.batch()] * 6, callbacks=callbacks)
    assert [count <= 4 for count in values] == [False, False, True, True, True, True]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [True, True, False, False, False]
    assert bool(book_of(linear).shift.all())


def test_reassignment_follows_the_weights(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    Full().prepare(one.model, context)
    effects = CodebookSharing(bits=3, reassign=2).prepare(one.model, context)
    first = {name: book.indices.clone() for name, book in books(context).items()}
    train(one.learner(AdamW(lr=0.01), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    changed = 0
    for name, linear in context.targets.items():
        latent, book = linear.parametrizations.weight.original.detach(), book_of(linear)  # type: ignore[union-attr]
        centroids = book.centroids(latent).detach()[0]
        assert torch.equal(book.indices.long(), (latent[:, :, None] - centroids).abs().argmin(2))
        changed += int((book.indices != first[name]).sum())
    assert changed > 100


@pytest.mark.parametrize("below", ["nothing", "delta"])
def test_a_reassignment_moves_no_centroid(setting: Callable[..., Any], below: str) -> None:
    one = setting()
    stage = CodebookSharing(bits=3, reassign=2)
    if below == "delta":
        context, _, _ = tuned(one, stage)
    else:
        context = one.context()
        stage.prepare(one.model, context)
    for name, parameter in one.model.named_parameters():
        if name.endswith(("shift", "original")) or "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for linear in context.targets.values():
        book = book_of(linear)
        latent = entering(linear, book)
        before = book.centroids(latent).detach().clone()
        indices = book.indices.clone()
        book.reassign(linear)
        assert torch.allclose(book.centroids(latent), before, atol=1e-6)
        assert not torch.equal(book.indices, indices)


def saved(one: Any, stages: list[Stage], context: Any, folder: Path) -> artifact.Artifact:
    """What is left of a fit: folded, converted, saved and loaded."""
    context.records.update(fold(context.targets))
    edits = [*adapt(one.model), *(edit for stage in stages for edit in stage.finalize(one.model, context))]
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=edits,
    )  # fmt: skip
    return artifact.load(folder)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 3, "rows": 8}, {"bits": 1, "start": "density"}], ids=str)
@pytest.mark.parametrize("sparsity", [None, 0.9])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm"), ("gpt2", "ner")])
def test_what_is_stored_is_what_was_trained(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, family: str, task: str,
    sparsity: float | None, fields: dict[str, Any],
) -> None:  # fmt: skip
    one = setting(family, task)
    context = one.context(steps=2)
    if sparsity:
        Magnitude(sparsity=sparsity).prepare(one.model, context)
    stage = CodebookSharing(**fields)
    effects = stage.prepare(one.model, context)
    train(one.learner(SGD(lr=0.05), [effects], 2), [one.batch()] * 2, callbacks=effects.callbacks)
    trained = one.logits()
    weights = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    found = saved(one, [stage], context, tmp_path / "model")
    assert torch.equal(one.logits(), trained)
    assert torch.equal(one.logits(found.model), trained)
    stored = dense = huffman = 0
    for name, weight in weights.items():
        linear: Any = found.model.get_submodule(name)
        assert isinstance(linear, CodebookLinear)
        assert torch.equal(linear.dequantized(), weight)
        kept = int((weight != 0).sum())
        assert linear.kept == (kept if sparsity else None)
        bits = stage.bits * kept + weight.numel() if sparsity else stage.bits * weight.numel()
        table = 4 * 2**stage.bits * (len(weight) // (stage.rows or len(weight)))
        size = sum(b.numel() * b.element_size() for b in linear.buffers())
        assert bits / 8 + table <= size <= bits / 8 + table + 2
        stored, dense = stored + size, dense + 4 * weight.numel()
        record = context.records[name]
        huffman += shared_bytes(record["indices"], record.get("kept"), stage.bits) + table
    assert context.facts["codebook"] == {"dense_bytes": dense, "packed_bytes": stored, "huffman_bytes": huffman}


def test_another_training_starts_from_dense_weights(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("gpt2")
    context, stage = one.context(), CodebookSharing(bits=2)
    stage.prepare(one.model, context)
    weights = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    saved(one, [stage], context, tmp_path / "model")
    config = one.model.config
    model, gaps = artifact.load_dense(str(tmp_path / "model"), one.task, one.labels, config)
    assert not gaps
    for name, weight in weights.items():
        linear: Any = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("stage", [QAT(bits=8), QAT(bits=4, group=16, activation_bits=None), Int8()], ids=str)
def test_integers_above_keep_the_indices_in_the_file(setting: Callable[..., Any], tmp_path: Path, stage: Stage) -> None:
    one, alone = setting(), setting()
    sizes = []
    for each, above in ((alone, []), (one, [stage])):
        context, share = each.context(), CodebookSharing(bits=3)
        for part in (share, *above):
            part.prepare(each.model, context)
        trained = each.logits()
        found = saved(each, [share, *above], context, tmp_path / str(len(above)))
        assert torch.equal(each.logits(found.model), each.logits())
        assert torch.allclose(each.logits(), trained, atol=0.01)
        sizes.append(artifact.weight_bytes(tmp_path / str(len(above))))
    scales = 0
    for name in context.targets:
        integer: Any = found.model.get_submodule(name)
        assert isinstance(integer, IntegerLinear)
        assert torch.equal(integer.integers(), context.records[name]["codes"])
        assert len(integer.integers().unique()) <= 127
        scales += 4 * integer.scale.numel()
    assert sizes[1] - sizes[0] < scales + 4096  # of names in the header: no codes


def test_after_the_fit_nothing_has_to_be_learned(setting: Callable[..., Any]) -> None:
    one = setting()
    stage = CodebookSharing(bits=4, begin=1.0)
    assert not stage.during_fit
    assert CodebookSharing(bits=4).during_fit
    context = one.context(steps=0)
    effects = stage.prepare(one.model, context)
    assert effects.settled == 0
    assert all(len(linear.weight.unique()) == 16 for linear in context.targets.values())
    assert not any(book.shift.requires_grad for book in books(context).values())


def test_the_clusters_of_a_reload_are_those_of_the_checkpoint(setting: Callable[..., Any]) -> None:
    one, other = setting(), setting(seed=1)
    contexts = [each.context(steps=4) for each in (one, other)]
    for each, context in zip((one, other), contexts, strict=True):
        CodebookSharing(bits=2, begin=0.5).prepare(each.model, context)
    assert len(next(iter(contexts[1].targets.values())).weight.unique()) > 500
    for linear in contexts[0].targets.values():
        book_of(linear).draw(linear, "linear", 0)
    other.model.load_state_dict(one.model.state_dict())
    assert torch.equal(other.logits(), one.logits())


FILE_ROWS = [{"text": f"a {c} rose, {n}", "label": "abc"[n % 3]} for n in range(6) for c in ("red", "blue")]
METHODS = "[prune/magnitude,share/codebook,quantize/int8]"


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tuning: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILE_ROWS))
    data = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings = [f"model=tiny-{family}", f"tuning={tuning}", f"compression={METHODS}", "data=files", *data]
    settings += ["data.batch_size=4", "task.max_length=32", "trainer=debug", "trainer.max_steps=2", "logger=none"]
    settings += ["trainer.precision=fp32", "optimizer.lr=1e-2", "callbacks=[]", "measure.repeats=0"]
    config = compose.compose(settings).config
    (tmp_path / "run").mkdir()
    metrics = pipeline.run(compose.build(config), tmp_path / "run", config)
    assert metrics["parity"] == 0
    sizes = metrics["codebook"]
    assert sizes["packed_bytes"] < 0.2 * sizes["dense_bytes"]
    model = artifact.load(tmp_path / "run" / "model").model
    for name in metrics["targets"]:
        integer = model.get_submodule(name)
        assert isinstance(integer, IntegerLinear)
        assert isinstance(integer.shared, CodebookLinear)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bits": 0}, "bits"), ({"bits": 9}, "bits"), ({"rows": 0}, "rows"), ({"start": "random"}, "start"),
        ({"begin": -0.1}, "begin"), ({"begin": 1.5}, "begin"), ({"reassign": 0}, "reassign"),
        ({"reassign": 5, "begin": 1.0}, "reassign"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.codebook\.{name}=") as caught:
        CodebookSharing(**fields)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_on_the_empty_model() -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=r"codebook\.rows=24: bert\.\S+ has 32 outputs, which it does not divide"):
        CodebookSharing(rows=24).check(anatomy, anatomy.linears())
    with pytest.raises(ConfigError, match=r"codebook\.bits=8: bert\.\S+ has fewer weights to a table than its 256"):
        CodebookSharing(bits=8, rows=4).check(anatomy, anatomy.linears())
    CodebookSharing(bits=7, rows=4).check(anatomy, anatomy.linears())


@pytest.mark.parametrize("fields", [{"begin": 0.5}, {"reassign": 3}])
def test_what_needs_a_fit(fields: dict[str, Any]) -> None:
    assert "needs a fit; trainer.max_epochs=0 has none" in str(CodebookSharing(**fields).needs_fit())
    assert CodebookSharing().needs_fit() is None


class Late(Magnitude):
    """A mask that is drawn after the fit."""

    during_fit = False  # type: ignore[misc]


def test_what_cannot_be_combined() -> None:
    with pytest.raises(ConfigError, match=r"tuning=gradual and share/codebook: centroids learn in place"):
        refuse_conflicts([Gradual(), CodebookSharing()])
    for frozen in (Head(), BitFit(), PromptTuning()):
        with pytest.raises(ConfigError, match=r"and share/codebook with \S+reassign=5: no weight moves, so none would"):
            refuse_conflicts([frozen, CodebookSharing(reassign=5)])
    refuse_conflicts([LoRA(), CodebookSharing(reassign=5)])
    with pytest.raises(ConfigError, match=r"share/codebook with begin=1 and quantize/qat: "):
        refuse_conflicts([QAT(), CodebookSharing(begin=1.0)])
    late = Late()
    assert late.phase is Phase.PRUNE
    reason = CodebookSharing().conflict([late])
    assert reason is not None
    assert "set compression.codebook.begin=1" in reason
    assert CodebookSharing(begin=1.0).conflict([late, Gradual()]) is None
    refuse_conflicts([Int8(), CodebookSharing(begin=1.0), Gradual(), Magnitude()])


def test_a_folded_adapter_leaves_no_trace(setting: Callable[..., Any]) -> None:
    one = setting()
    names = set(dict(one.model.named_parameters()))
    context, _, _ = tuned(one, CodebookSharing())
    fold(context.targets)
    unload(one.model)
    assert set(dict(one.model.named_parameters())) == names
