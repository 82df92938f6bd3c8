"""What holds for every tuning of PEFT: it is PEFT's model, its link is its merge, nothing is lost in the chain, in the
saved file or in a resumed fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS
from niwaki.optimizer import AdamW
from niwaki.stage import refuse_conflicts
from niwaki.tuning.adalora import AdaLoRA
from niwaki.tuning.boft import BOFT
from niwaki.tuning.delta import adapters
from niwaki.tuning.dora import DoRA
from niwaki.tuning.fourierft import FourierFT
from niwaki.tuning.hra import HRA
from niwaki.tuning.ia3 import IA3
from niwaki.tuning.loha import LoHa
from niwaki.tuning.lokr import LoKr
from niwaki.tuning.lora import LoRA
from niwaki.tuning.oft import OFT
from niwaki.tuning.peft_tuning import PeftTuning
from niwaki.tuning.vera import VeRA
from niwaki.weights import fold, links

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")]
STEPS = 6
SCALED = {"bert": [f"bert.encoder.layer.{i}.output.dense" for i in range(3)],
          "llama": [f"model.layers.{i}.mlp.down_proj" for i in range(3)]}  # fmt: skip

# The tuning, and the config of PEFT that a user would write: (names of the linears, family) -> config
METHODS: dict[str, tuple[PeftTuning, Callable[[list[str], str], peft.PeftConfig]]] = {
    "lora": (LoRA(rank=4, alpha=6.0), lambda names, _: peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)),
    "pissa": (
        LoRA(rank=4, alpha=6.0, init="pissa"),
        lambda names, _: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=names),
    ),
    "olora": (
        LoRA(rank=4, alpha=4.0, init="olora", rank_stabilized=True),
        lambda names, _: peft.LoraConfig(
            r=4, lora_alpha=4, init_lora_weights="olora", use_rslora=True, target_modules=names
        ),
    ),
    "dora": (
        DoRA(rank=4, alpha=8.0),
        lambda names, _: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=names),
    ),
    "adalora": (
        AdaLoRA(rank=4, target_rank=2, alpha=8.0, orthogonality=0.0, interval=1),
        lambda names, _: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=STEPS, target_modules=names),
    ),
    "adalora-early": (  # its ranks are final before the fit is resumed
        AdaLoRA(rank=4, target_rank=2, alpha=8.0, begin=0.0, end=0.3, interval=1),
        lambda names, _: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=STEPS, target_modules=names),
    ),
    "vera": (
        VeRA(rank=16),
        lambda names, _: peft.VeraConfig(r=16, projection_prng_key=0, save_projection=True, target_modules=names),
    ),
    "loha": (LoHa(rank=3, alpha=6.0), lambda names, _: peft.LoHaConfig(r=3, alpha=6, target_modules=names)),
    "lokr": (LoKr(rank=2, alpha=4.0), lambda names, _: peft.LoKrConfig(r=2, alpha=4, target_modules=names)),
    "lokr-both": (
        LoKr(rank=1, alpha=2.0, factor=4, decompose_both=True),
        lambda names, _: peft.LoKrConfig(r=1, alpha=2, decompose_factor=4, decompose_both=True, target_modules=names),
    ),
    "fourierft": (
        FourierFT(frequencies=40, scaling=3.0, init="normal"),
        lambda names, _: peft.FourierFTConfig(n_frequency=40, scaling=3.0, random_loc_seed=0, target_modules=names),
    ),
    "ia3": (
        IA3(),
        lambda names, family: peft.IA3Config(
            target_modules=[n for n in names if n.endswith(("key", "value", "k_proj", "v_proj", *SCALED[family]))],
            feedforward_modules=SCALED[family],
        ),
    ),
    "oft": (OFT(block=8), lambda names, _: peft.OFTConfig(oft_block_size=8, target_modules=names)),
    "oft-exact": (
        OFT(block=16, terms=None, share_blocks=True),
        lambda names, _: peft.OFTConfig(
            oft_block_size=16, use_cayley_neumann=False, block_share=True, target_modules=names
        ),
    ),
    "boft": (
        BOFT(block=4, factors=3),
        lambda names, _: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=names),
    ),
    "hra": (HRA(rank=4), lambda names, _: peft.HRAConfig(r=4, target_modules=names)),
}  # fmt: skip
each = pytest.mark.parametrize("method", METHODS)
ANYWHERE = ("lora", "dora", "adalora", "vera", "loha", "lokr", "oft", "hra")  # whose linears need no part
BY_HAND = [(method, *kind) for method in METHODS for kind in KINDS] + [
    (method, family, "classification") for method in ANYWHERE for family in ("gpt2", "modernbert", "t5", "bart")
]


class BlockDiagonal:
    """What PEFT's CUDA kernel for BOFT computes, so that PEFT's own forward runs here: (n, d, h, h) -> (n, dh, dh)."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*row) for row in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        count, size = blocks.shape[1:3]
        split = gradient.reshape(len(gradient), count, size, count, size)
        return [torch.stack([split[:, i, :, i] for i in range(count)], dim=1)]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal)


def with_biases(one: Any) -> Any:
    """Biases that are not zero, as those of a random model are."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in one.model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return one


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    """Move the adapters off their start, alike in every model with the same names."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if ".default" in name and parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(one: Any, model: nn.Module) -> None:
    """One step of gradient descent on everything that learns."""
    model.train()
    batch = one.batch()
    one.task.loss(model(**one.task.inputs(batch)), batch).backward()
    with torch.no_grad():
        for parameter in learning(model).values():
            parameter -= 2.0 * parameter.grad


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("linked", [False, True], ids=["beside", "linked"])
@pytest.mark.parametrize(("method", "family", "task"), BY_HAND)
def test_it_is_peft_by_hand_at_the_start_and_after_a_step(
    setting: Callable[..., Any], method: str, family: str, task: str, linked: bool
) -> None:
    one, other = with_biases(setting(family, task)), with_biases(setting(family, task))
    tuning, config = METHODS[method]
    context, names = one.context(STEPS), list(other.context().targets)
    head = list(other.context().anatomy.head_parameters().values()) if one.task.head_learns else []
    torch.manual_seed(3)
    tuning.prepare(one.model, context)
    if linked:
        tuning.link(one.model, context)
    torch.manual_seed(3)
    reference = peft.get_peft_model(other.model, config(names, family)).base_model.model
    for parameter in head:
        parameter.requires_grad_(True)
    if linked or method == "boft":  # a merged weight sums in another order
        one.model.double()
        reference.double()
    assert set(learning(one.model)) == set(learning(reference))
    assert [p.numel() for p in learning(one.model).values()] == [p.numel() for p in learning(reference).values()]
    assert float((one.logits() - other.logits(reference)).abs().max()) <= 1e-6
    disturb(one.model)
    disturb(reference)
    start = one.logits()
    assert float((start - other.logits(reference)).abs().max()) <= 1e-6
    step(one, one.model)
    step(other, reference)
    assert float((one.logits() - start).abs().max()) > 1e-5
    assert float((one.logits() - other.logits(reference)).abs().max()) <= 1e-6
    for name, parameter in learning(reference).items():
        assert torch.allclose(learning(one.model)[name], parameter, atol=1e-6), name


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "fourierft"])  # whose start is normal here
def test_it_starts_as_the_model_itself(setting: Callable[..., Any], method: str, family: str, task: str) -> None:
    one = setting(family, task)
    before = one.logits()
    METHODS[method][0].prepare(one.model, one.context())
    exact = method in (
        "lora",
        "adalora",
        "adalora-early",
        "vera",
        "loha",
        "lokr",
        "lokr-both",
        "ia3",
        "oft",
        "oft-exact",
    )
    assert float((one.logits() - before).abs().max()) <= (0.0 if exact else 1e-6)


@pytest.mark.parametrize(("family", "task"), KINDS)
@each
def test_alone_it_merges_to_what_it_computed(setting: Callable[..., Any], method: str, family: str, task: str) -> None:
    one = with_biases(setting(family, task))
    context, tuning = one.context(), METHODS[method][0]
    tuning.prepare(one.model, context)
    disturb(one.model)
    trained = one.logits()
    fold(context.targets)
    tuning.finalize(one.model, context)
    assert float((one.logits() - trained).abs().max()) <= 1e-6
    assert list(adapters(one.model)) == []
    assert set(one.model.state_dict()) == set(setting(family, task).model.state_dict())
    assert not hasattr(one.model, "peft_config")


@pytest.mark.parametrize(("family", "task"), KINDS)
@each
def test_with_a_mask_and_a_grid_nothing_is_lost(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, method: str, family: str, task: str
) -> None:
    one = with_biases(setting(family, task))
    context, tuning = one.context(STEPS), METHODS[method][0]
    base_config = one.model.config.to_dict()
    mask, grid = Magnitude(pattern="2:4"), QAT(bits=8)
    effects = [tuning.prepare(one.model, context)]
    disturb(one.model)
    tuning.link(one.model, context)
    effects += [stage.prepare(one.model, context) for stage in (mask, grid)]
    frozen = {n: p.detach().clone() for n, p in one.model.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in learning(one.model).items()}
    train(one.learner(AdamW(lr=0.01, weight_decay=0.0), effects, STEPS), [one.batch()] * STEPS)
    assert all(torch.equal(p, frozen[n]) for n, p in one.model.named_parameters() if n in frozen)
    assert [n for n, p in learning(one.model).items() if torch.equal(p, moving[n])] == []
    stacked = one.logits()
    context.records.update(fold(context.targets))
    assert torch.equal(one.logits(), stacked)
    edits = [edit for stage in (tuning, mask, grid) for edit in stage.finalize(one.model, context)]
    converted = one.logits()
    assert float((converted - stacked).abs().max()) <= 0.01
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    saved = artifact.load(tmp_path / "model").model
    assert torch.equal(one.logits(saved), converted)
    for name in context.targets:
        linear: Any = saved.get_submodule(name)
        zeros = linear.integers() == 0
        assert bool((zeros.view(-1, 4).sum(1) >= 2).all())
        assert bool(zeros[~context.records[name]["mask"]].all())


@each
def test_a_resumed_fit_ends_bit_for_bit_where_the_whole_one_does(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    def fit(seed: int, **settings: Any) -> tuple[pl.Trainer, dict[str, Tensor]]:
        one = setting(seed=seed)
        torch.manual_seed(seed)
        effects = METHODS[method][0].prepare(one.model, one.context(STEPS))
        rows = [one.batch({k: v[i : i + 2] for k, v in one.rows.items()}) for i in (0, 2, 4, 6, 0, 4)]
        learner = one.learner(AdamW(lr=0.01), [effects], STEPS)
        trainer = train(learner, rows, callbacks=effects.callbacks, accumulate_grad_batches=2, **settings)
        return trainer, one.model.state_dict()

    _, whole = fit(0, max_epochs=2)
    trainer, half = fit(0, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert trainer.global_step == STEPS // 2
    # Another base weight, other adapters: all must come from the checkpoint, but for what the run's seed draws.
    trainer, resumed = fit(5, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == STEPS
    assert set(whole) == set(resumed)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert [name for name in whole if not torch.equal(whole[name], half[name])] != []


def test_links_stand_on_targets_alone(setting: Callable[..., Any]) -> None:
    for tuning in (DoRA(rank=2, parts=["query"]), IA3(), OFT(parts=["feed_out"])):
        one = setting()
        context = one.context()
        names = context.anatomy.part_names(tuning.parts)
        tuning.prepare(one.model, context)
        tuning.link(one.model, context)
        tuning.link(one.model, context)
        linked = [name for name, linear in context.targets.items() if links(linear)]
        assert linked == names
        assert all(len(links(linear)) <= 1 for linear in context.targets.values())


@pytest.mark.parametrize("tuning", [DoRA(dropout=0.1), AdaLoRA(dropout=0.1), VeRA(dropout=0.1)], ids=lambda t: t.name)
def test_dropout_and_a_weight_method_are_refused_by_both_names(tuning: PeftTuning) -> None:
    with pytest.raises(
        ConfigError, match=rf"^tuning={tuning.name} with tuning.dropout=0.1 and prune/magnitude: [^\n]*$"
    ):
        refuse_conflicts([tuning, Magnitude()])


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (DoRA, {"rank": 0}, "rank=0"), (DoRA, {"dropout": 1.0}, "dropout=1.0"), (IA3, {"parts": []}, "parts="),
        (LoRA, {"lr_ratio": 0.0}, "lr_ratio=0.0"), (LoRA, {"init": "pisa"}, "init='pisa'"),
        (AdaLoRA, {"target_rank": 12}, "target_rank=12"), (AdaLoRA, {"begin": 0.8}, "begin=0.8"),
        (AdaLoRA, {"betas": [0.5]}, "betas="), (AdaLoRA, {"interval": 0}, "interval=0"),
        (AdaLoRA, {"orthogonality": -1.0}, "orthogonality=-1.0"), (VeRA, {"rank": 0}, "rank=0"),
        (VeRA, {"start": 0.0}, "start=0.0"), (LoHa, {"alpha": 0.0}, "alpha=0.0"), (LoKr, {"factor": 0}, "factor=0"),
        (FourierFT, {"frequencies": 0}, "frequencies=0"), (FourierFT, {"init": "one"}, "init='one'"),
        (OFT, {"block": 1}, "block=1"), (OFT, {"terms": 1}, "terms=1"), (BOFT, {"factors": 0}, "factors=0"),
        (BOFT, {"block": 3}, "block=3"), (HRA, {"rank": 3}, "rank=3"),
    ],
)  # fmt: skip
def test_refusals_name_field_and_value(kind: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert str(caught.value).startswith(f"tuning.{named}")
    assert "needs" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "named"),
    [
        (OFT(block=24), "block=24"), (BOFT(block=4, factors=5), "block=4, factors=5"), (BOFT(block=6), "block=6"),
        (FourierFT(frequencies=1025), "frequencies=1025"), (LoRA(rank=33, init="pissa"), "rank=33"),
        (LoRA(rank=33, init="olora"), "rank=33"), (DoRA(parts=["feed_gate"]), "parts="),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_before_weights_are_loaded(
    setting: Callable[..., Any], tuning: PeftTuning, named: str
) -> None:
    anatomy = setting().context().anatomy
    anatomy.model.to("meta")
    with pytest.raises(ConfigError) as caught:
        tuning.check(anatomy, anatomy.linears())
    assert str(caught.value).startswith(f"tuning.{named}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tuning", [one for one, _ in METHODS.values()], ids=METHODS)
def test_shapes_that_fit_are_not(setting: Callable[..., Any], tuning: PeftTuning) -> None:
    context = setting().context()
    tuning.check(context.anatomy, context.targets)
    assert set(context.anatomy.part_names(tuning.parts)) <= set(context.targets)
    assert set(tuning.parts) <= set(PARTS)
