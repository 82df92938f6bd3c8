"""Factorised embeddings: the nearest of their rank, in every family; tied output layers; files; reload."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from niwaki import artifact
from niwaki.compression.factorize.embeddings import Embeddings, factors
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.depth import depths
from niwaki.model.embeddings import FactorizedEmbedding, FactorizedOutput, KeepTokens
from niwaki.model.load import Pretrained
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.classification import Classification

KINDS = [(family, "classification") for family in FAMILIES]
KINDS += [(family, "causal_lm") for family in ("llama", "qwen3", "gpt2", "bart")]


def test_the_product_is_the_nearest_of_its_rank() -> None:
    """Eckart and Young: the error is made of the singular values that are left out, and of no less by any other way."""
    table = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    singular = torch.linalg.svdvals(table.double())
    for rank in (1, 5, 11):
        narrow, projection = factors(table, rank)
        assert (narrow.shape, projection.shape) == ((50, rank), (rank, 12))
        error = (narrow @ projection - table).double().norm() ** 2
        assert float(error) == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-5)
        assert torch.allclose(projection @ projection.T, torch.eye(rank), atol=1e-5)
        assert torch.allclose(narrow.norm(dim=0).double(), singular[:rank], rtol=1e-5)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_model_computes_with_the_nearest_table(
    setting: Callable[..., Any], family: str, task: str, tmp_path: Path
) -> None:
    """Independently: the model as it was, with the truncated singular value decomposition as its table."""
    one, dense = setting(family, task), setting(family, task)
    config, rank = one.model.config.to_dict(), 4
    table = dense.model.get_input_embeddings().weight
    left, values, right = torch.linalg.svd(table.detach().double(), full_matrices=False)
    with torch.no_grad():
        table.copy_(left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank])
    edits = Anatomy.of(one.model).family.edits(one.model.config)
    context = one.context()
    edits += Embeddings(rank=rank).prepare(one.model, context).edits
    assert 0 < context.facts["embedding_error"] < 1
    assert torch.allclose(one.logits(), dense.logits(), atol=3e-4)  # norms enlarge what rounds another way
    before = sum(tensor.numel() for tensor in artifact.unique_tensors(dense.model).values())
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=config, edits=edits,
    )  # fmt: skip
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), one.logits())
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / artifact.WEIGHTS).values())
    tokens, width = table.shape
    assert before - stored == tokens * width - rank * (tokens + width)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_a_tied_output_layer_is_tied_to_both_factors(
    setting: Callable[..., Any], train: Callable[..., Any], family: str
) -> None:
    one = setting(family, "causal_lm")
    assert one.model.config.tie_word_embeddings
    Embeddings().prepare(one.model, one.context())
    output, embeddings = one.model.get_output_embeddings(), one.model.get_input_embeddings()
    assert isinstance(output, FactorizedOutput)
    train(one.learner(), [one.batch()] * 3)
    assert output.table.weight is embeddings.table.weight
    assert output.projection.weight is embeddings.projection.weight
    assert torch.equal(output.weight, embeddings.weight)
    last: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    found = one.logits()
    assert torch.allclose(found, last[0] @ embeddings.weight.T, atol=1e-5)


def test_an_output_layer_with_weights_of_its_own_keeps_them(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm", overrides={"tie_word_embeddings": False})
    output = one.model.get_output_embeddings()
    before = output.weight.detach().clone()
    Embeddings().prepare(one.model, one.context())
    assert one.model.get_output_embeddings() is output
    assert torch.equal(output.weight, before)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("gpt2", "causal_lm")])
def test_a_fresh_process_and_another_training_have_them(
    setting: Callable[..., Any], family: str, task: str, tmp_path: Path
) -> None:
    one = setting(family, task)
    config = one.model.config.to_dict()
    edits = Anatomy.of(one.model).family.edits(one.model.config)
    edits += Embeddings().prepare(one.model, one.context()).edits
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=config, edits=edits,
    )  # fmt: skip
    torch.save({"inputs": one.task.inputs(one.batch()), "logits": one.logits()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from niwaki import artifact\n"
        "stored = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "with torch.inference_mode(): found = artifact.load(sys.argv[1] + '/model').model(**stored['inputs']).logits\n"
        "assert torch.equal(found, stored['logits']); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-2000:]
    again = Pretrained(name=str(tmp_path / "model"))
    model = again.load(one.task, one.labels, 0)
    assert torch.equal(one.logits(model), one.logits())
    assert isinstance(again.empty(one.task, one.labels).get_input_embeddings(), FactorizedEmbedding)
    with pytest.raises(ConfigError, match=r"^compression\.factorize_embeddings: .* are factors already"):
        Embeddings().check(Anatomy.of(model), {})


def test_tokens_are_cut_from_the_narrow_table(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    Embeddings().prepare(one.model, one.context())
    with torch.no_grad():
        before = one.model.eval()(input_ids=torch.tensor([[2, 9, 40]])).logits
        KeepTokens.of([0, 1, 2, 3, 9, 40]).apply(one.model)
        after = one.model(input_ids=torch.tensor([[2, 4, 5]])).logits
    assert torch.allclose(after, before[..., [0, 1, 2, 3, 9, 40]], atol=1e-6)
    assert one.model.get_input_embeddings().num_embeddings == 6


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_both_factors_are_as_deep_as_embeddings(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    Embeddings().prepare(one.model, one.context())
    found = {n: d for n, d in depths(Anatomy.of(one.model)).items() if ".table." in n or ".projection." in n}
    assert len(found) == 2
    assert set(found.values()) == {4}


def test_refusals() -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    tokens, width = anatomy.embeddings.weight.shape
    most = tokens * width // (tokens + width)
    Embeddings(rank=most).check(anatomy, {})
    with pytest.raises(
        ConfigError, match=rf"^compression\.factorize_embeddings\.rank={most + 1}: .* needs at most {most}"
    ):
        Embeddings(rank=most + 1).check(anatomy, {})
    with pytest.raises(ConfigError, match=r"^compression\.factorize_embeddings\.rank=0: needs a whole number"):
        Embeddings(rank=0)
