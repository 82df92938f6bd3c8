"""Low rank: numpy's best approximation, SVD-LLM's theorem, ranks by hand, and the pair in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from niwaki import artifact, compose, pipeline
from niwaki.compression.factorize.low_rank import Factorize, LowRankLinear
from niwaki.compression.factorize.svd import SVD, decompose, most_saving
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.share.stored import CodebookLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.classification import Classification


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_plain_is_numpys_best_approximation(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape)
    found = decompose(weight, None)
    down, up = found.truncated(weight, rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    left, values, right = numpy.linalg.svd(weight.double().numpy(), full_matrices=False)
    best = left[:, :rank] @ numpy.diag(values[:rank]) @ right[:rank]
    assert torch.allclose((up @ down).double(), torch.from_numpy(best), atol=1e-5)
    error = float(numpy.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
    assert found.dropped(rank) == pytest.approx(error, abs=1e-9)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-4)


def skewed(inputs: int, tokens: int) -> torch.Tensor:
    """Inputs (in, tokens) whose directions differ much in size, as those of a transformer do."""
    return (torch.randn(inputs, inputs) @ torch.diag(10 ** torch.linspace(-1, 1, inputs))) @ torch.randn(inputs, tokens)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_loss_of_a_truncation_is_what_it_drops(shape: tuple[int, int], rank: int) -> None:
    """SVD-LLM, theorem 3.2 and corollary 3.3: with S the Cholesky factor of X X^T, ||W X - W' X||^2 is the sum of the
    squared singular values of W S that are dropped. W' is computed from the paper's formula, with the inverse."""
    weight, inputs = torch.randn(shape).double(), skewed(shape[1], 300).double()
    moments = inputs @ inputs.t()
    found = decompose(weight, moments)
    down, up = found.truncated(weight, rank)
    whitening = numpy.linalg.cholesky(moments.numpy())
    left, values, right = numpy.linalg.svd(weight.numpy() @ whitening, full_matrices=False)
    theirs = left[:, :rank] @ numpy.diag(values[:rank]) @ right[:rank] @ numpy.linalg.inv(whitening)
    assert torch.allclose(up @ down, torch.from_numpy(theirs), atol=1e-5)
    loss = float(((weight - up @ down) @ inputs).norm())
    assert loss == pytest.approx(float(numpy.sqrt((values[rank:] ** 2).sum())), rel=1e-5)
    assert found.dropped(rank) == pytest.approx(loss / float((weight @ inputs).norm()), rel=1e-5)
    plain_down, plain_up = decompose(weight, None).truncated(weight, rank)
    assert loss < 0.9 * float(((weight - plain_up @ plain_down) @ inputs).norm())


def test_fewer_tokens_than_inputs() -> None:
    weight, inputs = torch.randn(10, 24).double(), torch.randn(24, 5).double()
    down, up = decompose(weight, inputs @ inputs.t()).truncated(weight, 5)
    assert torch.allclose(up @ down @ inputs, weight @ inputs, atol=1e-4)
    down, up = decompose(weight, inputs @ inputs.t()).truncated(weight, 8)
    assert bool(down.isfinite().all() and up.isfinite().all())
    silent = decompose(weight, torch.zeros(24, 24).double()).truncated(weight, 3)
    assert all(bool(factor.isfinite().all()) for factor in silent)


def test_the_rank_of_an_energy() -> None:
    # squares 16, 9, 4, 1 of 30: shares .533 .833 .967 1
    found = decompose(torch.diag(torch.tensor([1.0, 3.0, 4.0, 2.0])), None)
    ranks = [found.rank_of(energy) for energy in (0.1, 0.5, 0.54, 0.83, 0.84, 0.96, 0.97, 0.999)]
    assert ranks == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [  # of 64 x 32 (of 2048 parameters, 96 for each rank) and 32 x 32 (of 1024, 64 for each)
        ({}, (8, 8)), ({"ratio": 0.5, "multiple": 1}, (10, 8)), ({"ratio": 0.9}, (16, 8)),
        ({"ratio": 0.9, "multiple": 1}, (19, 14)), ({"ratio": 0.3}, (0, 0)), ({"rank": 20}, (20, 0)),
        ({"rank": 21}, (21, 0)), ({"rank": 22}, (0, 0)), ({"rank": 15}, (15, 15)),
    ],
)  # fmt: skip
def test_ranks_by_hand(fields: dict[str, Any], ranks: tuple[int, int]) -> None:
    stage = SVD(**fields)
    linears = [nn.Linear(32, 64), nn.Linear(32, 32)]
    assert tuple(map(stage.planned, linears)) == ranks
    assert list(map(most_saving, linears)) == [21, 15]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm"), ("t5", "classification")])
def test_the_model_computes_with_the_pairs(setting: Callable[..., Any], family: str, task: str, aware: bool) -> None:
    one = setting(family, task)
    anatomy = Anatomy.of(one.model)
    before = anatomy.linears()
    parameters = sum(linear.weight.numel() for linear in before.values())
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, linear in before.items():
        linear.register_forward_hook(lambda _, i, o, name=name: outputs.update({name: (i[0], o)}))
    one.logits()
    stage = SVD(ratio=0.6, multiple=1, activation_aware=aware)
    context = one.context()
    (edit,) = stage.prepare(one.model, context).edits
    assert len(edit.ranks) == len(before)  # type: ignore[attr-defined]
    after = anatomy.linears()
    assert set(after) == {f"{name}.{half}" for name in before for half in ("down", "up")}
    assert sum(linear.weight.numel() for linear in after.values()) <= 0.6 * parameters
    mask = one.batch()["attention_mask"].bool()
    for name, old in before.items():
        pair: Any = one.model.get_submodule(name)
        assert isinstance(pair, LowRankLinear)
        assert (pair.in_features, pair.out_features) == (old.in_features, old.out_features)
        assert pair.bias is old.bias
        error = context.facts["svd"]["errors"][name]
        if aware:
            read, made = outputs[name]
            bias = 0 if old.bias is None else old.bias
            wrong = (pair(read) - made)[mask].norm() / (made - bias)[mask].norm()
        else:
            wrong = (pair.up.weight @ pair.down.weight - old.weight).norm() / old.weight.norm()
        assert float(wrong.detach()) == pytest.approx(error, rel=1e-3, abs=1e-4)


def test_only_the_chosen_parts(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    names = Anatomy.of(one.model).part_names(["feed_in", "feed_out"])
    effects = SVD(ratio=0.5, parts=["feed_in", "feed_out"]).prepare(one.model, context)
    assert [f"bert.{name}" for name in effects.edits[0].ranks] == names  # type: ignore[attr-defined]
    assert context.facts["svd"]["left_whole"] == []
    assert sum(isinstance(m, LowRankLinear) for m in one.model.modules()) == 6


def test_energy_decides_layer_by_layer(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    anatomy = Anatomy.of(one.model)
    names = anatomy.part_names(["feed_in"])
    for rank, name in enumerate(names, start=4):  # 4, 5 and 6 directions, and a little of the others
        linear: Any = one.model.get_submodule(name)
        linear.weight.data = torch.randn(64, rank) @ torch.randn(rank, 32) + 1e-3 * torch.randn(64, 32)
    SVD(energy=0.999, multiple=1).prepare(one.model, context)
    facts = context.facts["svd"]
    assert [facts["ranks"][name] for name in names] == [4, 5, 6]
    assert all(facts["errors"][name] <= (1 - 0.999) ** 0.5 for name in facts["ranks"])
    whole = facts["left_whole"]
    assert whole
    assert all(isinstance(one.model.get_submodule(name), nn.Linear) for name in whole)


def test_the_edit_rebuilds_it_on_any_device(setting: Callable[..., Any]) -> None:
    one = setting("gpt2", "causal_lm")
    (edit,) = SVD().prepare(one.model, one.context()).edits
    again = Factorize(**{k: v for k, v in edit.to_json().items() if k != "edit"})
    fresh = setting("gpt2", "causal_lm", seed=1)
    again.apply(fresh.model)
    fresh.model.load_state_dict(one.model.state_dict())
    assert torch.equal(fresh.logits(), one.logits())
    empty = Tiny(name="gpt2").empty(one.task, ())
    again.apply(empty)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in one.model.named_parameters()}


def test_another_training_starts_with_the_pairs(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("gpt2")
    edits = [*adapt(one.model), *SVD().prepare(one.model, one.context()).edits]
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=edits,
    )  # fmt: skip
    for labels in (one.labels, ("x", "y")):
        model, gaps = artifact.load_dense(str(tmp_path / "model"), one.task, labels, one.model.config)
        assert gaps == (set() if labels == one.labels else {"score.weight"})
        assert torch.equal(
            model.get_submodule("transformer.h.1.mlp.c_fc").down.weight,
            one.model.get_submodule("transformer.h.1.mlp.c_fc").down.weight,
        )


def run(folder: Path, family: str, tuning: str, methods: str, *more: str) -> dict[str, Any]:
    file = folder / "rows.jsonl"
    rows = [{"text": f"a {c} rose, {n}", "label": "abc"[n % 3]} for n in range(6) for c in ("red", "blue")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings = [f"model=tiny-{family}", f"tuning={tuning}", f"compression=[{methods}]", "data=files", *data]
    settings += ["data.batch_size=4", "task.max_length=32", "trainer=debug", "trainer.max_steps=2", "logger=none"]
    settings += ["trainer.precision=fp32", "optimizer.lr=1e-2", "callbacks=[]", "measure.repeats=0"]
    config = compose.compose([*settings, *more]).config
    (folder / "run").mkdir()
    return pipeline.run(compose.build(config), folder / "run", config)


@pytest.mark.parametrize("tuning", ["full", "lora", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_all_that_acts_on_the_factors(family: str, tuning: str, tmp_path: Path) -> None:
    methods = "factorize/svd,prune/magnitude,share/codebook"
    metrics = run(tmp_path, family, tuning, methods, "compression.svd.activation_aware=true")
    assert metrics["parity"] == 0
    model = artifact.load(tmp_path / "run" / "model").model
    pairs = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(pairs) == len(metrics["svd"]["ranks"]) > 0
    assert all(isinstance(half, CodebookLinear) for pair in pairs for half in (pair.down, pair.up))
    assert tuning == "adapter" or metrics["after"]["macs"] < metrics["before"]["macs"]
    assert all(0.45 < row["sparsity"] < 0.55 for row in metrics["targets"].values())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rank": 0}, "rank"), ({"ratio": 0.0}, "ratio"), ({"ratio": 1.0}, "ratio"), ({"energy": 1.5}, "energy"),
        ({"rank": 4, "ratio": 0.5}, "ratio"), ({"ratio": 0.4, "energy": 0.5}, "energy"), ({"multiple": 0}, "multiple"),
        ({"rank": 4, "multiple": 4}, "multiple"), ({"parts": []}, "parts"), ({"parts": ["head"]}, "parts"),
        ({"rows": 64}, "rows"), ({"rows": 0, "activation_aware": True}, "rows"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.svd\.{name}=") as caught:
        SVD(**fields)
    assert "\n" not in str(caught.value)


def test_what_saves_nothing_is_refused(setting: Callable[..., Any]) -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=r"svd\.rank=22: saves parameters in no linear .* a rank from 1 to 21$"):
        SVD(rank=22).check(anatomy, anatomy.linears())
    with pytest.raises(ConfigError, match=r"svd\.ratio=0\.2: saves parameters in no linear .* a multiple of 8$"):
        SVD(ratio=0.2).check(anatomy, anatomy.linears())
    with pytest.raises(ConfigError, match=r"svd\.parts=\['feed_gate'\]: this family of models has none of them"):
        SVD(parts=["feed_gate"]).check(anatomy, anatomy.linears())
    one = setting()
    with pytest.raises(ConfigError, match=r"svd\.energy=0\.9999: saves parameters in no linear of this model; lower"):
        SVD(energy=0.9999).prepare(one.model, one.context())


def test_later_methods_are_checked_on_the_factors_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "load", lambda *_: pytest.fail("a model was loaded"))
    given = ("compression.svd.rank=6", "compression.magnitude.pattern='2:4'")
    with pytest.raises(ConfigError, match=r"pattern=2:4: bert\.\S+\.up has 6 inputs, which 4 does not divide"):
        run(tmp_path, "bert", "full", "factorize/svd,prune/magnitude", *given)
    assert not list((tmp_path / "run").iterdir())


def test_later_methods_are_checked_again_where_the_weights_decide(tmp_path: Path) -> None:
    given = ("compression.svd.energy=0.3", "compression.svd.multiple=1", "compression.magnitude.pattern='4:8'")
    with pytest.raises(ConfigError, match=r"pattern=4:8: bert\.\S+\.up has \d+ inputs, which 8 does not divide"):
        run(tmp_path, "bert", "full", "factorize/svd,prune/magnitude", *given)


def test_a_mask_lies_on_each_factor(setting: Callable[..., Any]) -> None:
    one = setting()
    SVD().prepare(one.model, one.context())
    context = one.context()
    Magnitude(sparsity=0.5).prepare(one.model, context)
    assert len(context.targets) == 36
    assert all(int((l.weight == 0).sum()) == l.weight.numel() // 2 for l in context.targets.values())  # noqa: E741
