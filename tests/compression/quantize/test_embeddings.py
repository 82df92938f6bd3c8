"""Integer embeddings: what the fit sees, what the file holds, tied output layers, files, exports."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import saved
from lifecycle import check_in_a_fresh_process, live, look, recipe_of, write_rows
from safetensors.torch import load_file
from torch.nn import functional

from niwaki import artifact, storage
from niwaki.compression.factorize.embeddings import Embeddings as Factors
from niwaki.compression.prune.vocabulary import Vocabulary
from niwaki.compression.quantize.embeddings import Embeddings
from niwaki.compression.quantize.gptq import GPTQ
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import to_codes
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.quantize.tables import IntegerEmbedding, IntegerOutput
from niwaki.errors import ConfigError
from niwaki.measure.size import count
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import Pretrained
from niwaki.model.tiny import Tiny
from niwaki.stage import ordered, refuse_conflicts
from niwaki.task.classification import Classification
from niwaki.weights import packed

TIED = [("bert", "masked_lm"), ("llama", "causal_lm"), ("gpt2", "causal_lm"), ("bart", "causal_lm"),
        ("bart", "translation"), ("t5", "translation"), ("electra", "masked_lm"), ("albert", "masked_lm")]  # fmt: skip
SIBLINGS = {"bert": 2, "roberta": 2, "distilbert": 1, "electra": 2, "albert": 2, "gpt2": 1, "modernbert": 0,
            "llama": 0, "bart": 0, "t5": 0}  # fmt: skip


def by_hand(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row on a symmetric grid that just holds it."""
    rows = []
    for row in weight.detach():
        step = float(row.abs().max()) / (2 ** (bits - 1) - 1) or 1.0
        rows.append([round(float(value) / step) * step for value in row])
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_fit_sees_rounded_rows_and_a_straight_gradient(setting: Callable[..., Any], bits: int) -> None:
    """The gradient is that of a table which holds the rounded values, and so learns the table that is not rounded."""
    one, plain = setting("bert"), setting("bert")
    context = one.context()
    table = context.anatomy.embeddings.weight
    Embeddings(bits=bits).prepare(one.model, context)
    with torch.no_grad():
        plain.model.get_input_embeddings().weight.copy_(by_hand(table, bits))
        for name in ("position_embeddings", "token_type_embeddings"):
            beside = getattr(plain.model.bert.embeddings, name).weight
            beside.copy_(by_hand(beside, bits))
    assert torch.allclose(one.logits(), plain.logits(), atol=1e-5)
    batch = one.batch()
    for setting_ in (one, plain):
        setting_.task.loss(setting_.model(**setting_.task.inputs(batch)), batch).backward()
    theirs = plain.model.get_input_embeddings().weight.grad
    assert table.grad is not None
    assert torch.allclose(table.grad, theirs, atol=1e-6)
    assert float(theirs.abs().max()) > 1e-4
    assert not table.grad[plain.tokenizer.pad_token_id].any()


@pytest.mark.parametrize(("family", "task"), TIED)
def test_a_tied_output_layer_multiplies_with_the_same_rounded_table(
    setting: Callable[..., Any], family: str, task: str, tmp_path: Path
) -> None:
    """In the fit, after the fold and in the artifact, exactly; the file holds one table, and no floats of it."""
    one = setting(family, task)
    context, config = one.context(), one.model.config.to_dict()
    weight = context.anatomy.embeddings.weight
    expected = by_hand(weight, 4)
    stage = Embeddings(bits=4, positions=False)
    edits = Anatomy.of(one.model).family.edits(one.model.config)
    stage.prepare(one.model, context)
    output = one.model.get_output_embeddings()
    assert torch.equal(output.weight, one.model.get_input_embeddings().weight)
    assert torch.allclose(output.weight, expected, atol=1e-6)
    fitted = one.logits()
    from niwaki.weights import fold

    context.records.update(fold({**context.targets, **context.tables}))
    assert one.model.get_output_embeddings().weight is one.model.get_input_embeddings().weight is weight
    assert torch.equal(one.logits(), fitted)
    edits += stage.finalize(one.model, context)
    assert torch.equal(one.logits(), fitted)
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=config, edits=edits,
    )  # fmt: skip
    kept = artifact.load(tmp_path / "model").model
    assert torch.equal(one.logits(kept), fitted)
    assert isinstance(kept.get_output_embeddings(), IntegerOutput)
    assert kept.get_output_embeddings().table is kept.get_input_embeddings().table
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    (codes,) = [name for name in stored if name.endswith(".codes")]
    assert stored[codes].numel() == math.ceil(weight.numel() / 2)
    assert not [name for name, tensor in stored.items() if tensor.shape == weight.shape]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_file_holds_exactly_the_codes(setting: Callable[..., Any], bits: int, tmp_path: Path) -> None:
    one = setting("llama", "causal_lm", overrides={"tie_word_embeddings": False})
    table = one.model.get_input_embeddings().weight.detach().clone()
    parameters = count(one.model)
    kept = saved(one, tmp_path / "model", Embeddings(bits=bits))
    ((name, module),) = list(packed(kept.model))
    stored = storage.read(artifact.weights_of(tmp_path / "model"))  # of 2 bits most are 0, and left out
    codes, scale = to_codes(table, bits)
    assert torch.equal(module.integers(), codes.to(torch.int8))  # type: ignore[operator]
    assert torch.equal(stored[f"{name}.scale"], scale)
    assert stored[f"{name}.codes"].nbytes == table.numel() * bits // 8
    assert isinstance(kept.model.get_output_embeddings(), torch.nn.Linear)
    assert count(kept.model)["parameters"] == parameters["parameters"]
    assert parameters["nonzero"] - count(kept.model)["nonzero"] == int((codes == 0).sum() - (table == 0).sum())


@pytest.mark.parametrize("family", sorted(SIBLINGS))
def test_plain_tables_beside_that_of_the_tokens(setting: Callable[..., Any], family: str, tmp_path: Path) -> None:
    one = setting(family)
    expected = one.logits(), len(Embeddings(positions=False).tables(Anatomy.of(one.model)))
    kept = saved(one, tmp_path / "model", Embeddings())
    names = [name for name, _ in packed(kept.model)]
    assert len(names) == 1 + SIBLINGS[family]
    assert expected[1] == 1
    assert torch.allclose(one.logits(kept.model), expected[0], atol=0.05)
    assert not torch.equal(one.logits(kept.model), expected[0])


def test_a_scale_of_the_embeddings_stays_outside_the_grid(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("bart", overrides={"scale_embedding": True})
    fresh = setting("bart", overrides={"scale_embedding": True})
    weight = fresh.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(by_hand(weight, 4))
    kept = saved(one, tmp_path / "model", Embeddings(bits=4))
    assert kept.model.model.encoder.embed_tokens.factor == pytest.approx(math.sqrt(32))
    assert torch.allclose(one.logits(kept.model), fresh.logits(), atol=1e-5)


def test_zeros_stay_zeros(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("bert")
    table = one.model.get_input_embeddings().weight
    with torch.no_grad():
        table[0] = 0.0
        table[:, ::3] = 0.0
    kept = saved(one, tmp_path / "model", Embeddings(bits=3)).model.get_input_embeddings().weight
    assert not kept[0].any()
    assert not kept[:, ::3].any()


@pytest.mark.parametrize(("family", "rank"), [("gpt2", 8), ("llama", 8)])
def test_the_narrow_table_of_factors(setting: Callable[..., Any], family: str, rank: int, tmp_path: Path) -> None:
    one = setting(family, "causal_lm")
    kept = saved(one, tmp_path / "model", Factors(rank=rank), Embeddings(bits=4, positions=False)).model
    embeddings, output = kept.get_input_embeddings(), kept.get_output_embeddings()
    assert isinstance(embeddings.table, IntegerEmbedding)
    assert output.table.table is embeddings.table.table
    last: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    found = one.logits(kept)
    assert torch.allclose(found, functional.linear(last[0], embeddings.weight), atol=1e-5)


def test_another_training_starts_from_dense_weights(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("llama", "causal_lm")
    kept = saved(one, tmp_path / "model", Embeddings(bits=4), Int8())
    model: Any = Pretrained(name=str(tmp_path / "model")).load(one.task, one.labels, 0)
    assert not list(packed(model))
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, kept.model.get_input_embeddings().weight)


CELLS = [
    ("classification", ["tuning=lora", "compression=[quantize/qat,quantize/embeddings]"]),
    ("causal_lm", ["tuning=lora", "compression=[quantize/qat,quantize/embeddings]"]),
    ("causal_lm", ["tuning=full", "compression=[quantize/embeddings]", "compression.quantize_embeddings.bits=4"]),
    ("causal_lm", ["compression=[quantize/gptq,quantize/embeddings]", "compression.quantize_embeddings.trained=false"]),
    ("classification", ["tuning=prompt", "compression=[quantize/int8,quantize/embeddings]"]),
    ("classification", ["tuning=prefix", "compression=[quantize/embeddings]"]),
    ("classification", ["tuning=qlora", "compression=[quantize/embeddings]"]),
    ("classification", ["compression=[prune/vocabulary,quantize/embeddings]", "compression.vocabulary.alphabet=false"]),
    ("causal_lm", ["compression=[prune/cofi,quantize/embeddings]", "compression.cofi.masks=[heads,neurons,hidden]"]),
    ("causal_lm", ["compression=[prune/width,quantize/embeddings]", "compression.quantize_embeddings.group=4"]),
]  # fmt: skip


def test_whole_runs(files: dict[str, str], tmp_path: Path, subtests: Any) -> None:
    """Trained, resumed, folded, saved, reloaded: the same logits here, and in a fresh process."""
    done = []
    for number, (task, settings) in enumerate(CELLS):
        with subtests.test(" ".join(settings)):
            done.append(live(recipe_of(task, files[task], *settings), tmp_path / str(number)))
            assert isinstance(artifact.load(done[-1]).model.get_input_embeddings(), IntegerEmbedding)
    check_in_a_fresh_process(done)
    assert len(done) == len(CELLS)


def test_two_grids_may_stand_on_different_weights() -> None:
    refuse_conflicts([QAT(), Embeddings()])
    refuse_conflicts([Int8(), Embeddings(trained=False)])
    with pytest.raises(ConfigError, match="quantize/int8 and quantize/qat: each puts the weights on its own grid"):
        refuse_conflicts([Int8(), QAT(), Embeddings()])
    both = ordered([GPTQ(), Embeddings(trained=False)])
    assert [stage.name for stage in both] == ["quantize/embeddings", "quantize/gptq"]
    assert not Embeddings().acts_on_linears
    assert Vocabulary.acts_on == "linears"
    assert not Vocabulary().acts_on_linears


def test_refusals(files: dict[str, str]) -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    Embeddings(group=8).check(anatomy, {})
    with pytest.raises(ConfigError, match=r"^compression\.quantize_embeddings\.group=5: .* has rows of 32, which it"):
        Embeddings(group=5).check(anatomy, {})
    with pytest.raises(
        ConfigError, match=r"^compression\.quantize_embeddings\.bits=9: needs a whole number from 2 to 8"
    ):
        Embeddings(bits=9)
    beside = ["tuning=lora", "tuning.merge=false", "compression=[quantize/embeddings]"]
    with pytest.raises(ConfigError, match=r"^tuning=lora with tuning\.merge=false and quantize/embeddings: PEFT reads"):
        look(recipe_of("classification", files["classification"], *beside))
