"""Tied embeddings: one table at both ends of a language model, on disk once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from niwaki import artifact, compose, pipeline
from niwaki.compression.share.embeddings import Embeddings
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.stage import refuse_conflicts
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification

FAMILIES = ("llama", "qwen3", "gpt2", "bart")
UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["input", "output", "average"])
def test_the_logits_are_products_with_the_table(setting: Callable[..., Any], family: str, start: str) -> None:
    one = setting(family, "causal_lm", overrides=UNTIED)
    table = one.model.get_input_embeddings().weight.detach().clone()
    output = one.model.get_output_embeddings().weight.detach().clone()
    assert not torch.equal(table, output)
    parameters = sum(p.numel() for p in one.model.parameters())
    Embeddings(start=start).prepare(one.model, one.context())  # type: ignore[arg-type]
    expected = {"input": table, "output": output, "average": (table + output) / 2}[start]
    assert torch.equal(one.model.get_input_embeddings().weight, expected)
    assert sum(p.numel() for p in one.model.parameters()) == parameters - table.numel()
    last: list[torch.Tensor] = []
    one.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: last.append(args[0]))
    found = one.logits()
    assert torch.allclose(found, functional.linear(last[0], expected), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_once_and_reloaded(family: str, tmp_path: Path) -> None:
    """A whole run with training: the same logits from a fresh process, fewer bytes, and Hugging Face reads it."""
    from transformers import AutoModelForCausalLM

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a tree {i} in the garden"}) + "\n" for i in range(8)))
    settings = [f"model=tiny-{family}", "++model.overrides.tie_word_embeddings=false", "task=causal_lm"]
    settings += [
        "task.max_length=32",
        "data=files",
        *(f"data.{name}={rows}" for name in ("train", "validation", "test")),
    ]
    settings += ["trainer.max_steps=2", "trainer.precision=fp32", "logger=none", "callbacks=[]", "measure.repeats=0"]
    settings += ["compression=[share/embeddings]", "optimizer.lr=1e-2", "data.batch_size=2"]
    metrics = pipeline.run(compose.build(compose.compose(settings).config), tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    table = saved.model.get_input_embeddings().weight
    assert metrics["parity"] == 0
    assert metrics["before"]["parameters"] - metrics["after"]["parameters"] == table.numel()
    assert metrics["before"]["bytes"] - metrics["after"]["bytes"] == pytest.approx(4 * table.numel(), abs=200)
    assert saved.model.get_output_embeddings().weight is table
    assert saved.model.config.tie_word_embeddings
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    assert [name for name, tensor in stored.items() if tensor.shape == table.shape and torch.equal(tensor, table)]
    assert len([name for name, tensor in stored.items() if len(tensor) == len(table)]) == 1
    ids = torch.tensor([[2, 9, 7, 30]])
    with torch.no_grad():
        said = saved.model(input_ids=ids).logits
    code = (
        "import sys, torch; torch.set_num_threads(1); from niwaki import artifact\n"
        "model = artifact.load(sys.argv[1]).model\n"
        "with torch.inference_mode(): said = model(input_ids=torch.tensor([[2, 9, 7, 30]]))\n"
        "print(repr(said.logits.double().sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert float(done.stdout) == said.double().sum().item(), done.stderr[-2000:]
    if family != "bart":  # whose decoder alone stores its embeddings under another name
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        with torch.no_grad():
            assert torch.allclose(theirs(input_ids=ids).logits, said, atol=1e-6)


def test_refusals_on_the_empty_model() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.share_embeddings: this model has no output layer over its"):
        Embeddings().check(Anatomy.of(Tiny().empty(Classification(), ("a", "b"))), {})
    with pytest.raises(ConfigError, match=r"^compression\.share_embeddings: the output layer .* is tied to its"):
        Embeddings().check(Anatomy.of(Tiny(name="llama").empty(CausalLM(), ())), {})
    odd = Tiny(name="llama", overrides=UNTIED).empty(CausalLM(), ())
    odd.lm_head = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(ConfigError, match=r"the embeddings are \(\d+, 32\), the output layer \(50, 32\);"):
        Embeddings().check(Anatomy.of(odd), {})
    with pytest.raises(ConfigError, match=r"^compression\.share_embeddings\.start='both': needs input, output or"):
        Embeddings(start="both")  # type: ignore[arg-type]


def test_factors_are_no_table() -> None:
    chosen = ["model=tiny-llama", "compression=[share/embeddings,factorize/embeddings]"]
    with pytest.raises(ConfigError, match=r"^share/embeddings and factorize/embeddings: factors are no table"):
        refuse_conflicts(compose.build(compose.compose(chosen).config).stages)
