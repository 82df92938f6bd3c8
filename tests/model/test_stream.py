"""The residual stream: found as torch-pruning finds it, and a narrower model is the one in which it is masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.model.anatomy import Anatomy
from niwaki.model.stream import KeepWidth, Stream, keep_channels, stream_of
from niwaki.model.tiny import FAMILIES

KEPT = [0, 2, 3, 5, 8, 13, 21, 30]
TASKS = {"bart": ("classification", "causal_lm"), "llama": ("classification", "ner", "causal_lm")}
TASKS |= {  # whose heads make the stream anew, in ELECTRA and ALBERT a narrower one
    family: ("classification", "masked_lm")
    for family in ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "albert")
}


def mask(model: Any, stream: Stream, kept: list[int]) -> None:
    """Let all that writes to the stream give zeros in the other channels, and its norms be over these alone."""

    def only(norm: Any) -> Callable[[Tensor], Tensor]:
        plain, scale, shift = type(norm).forward, norm.weight.detach(), getattr(norm, "bias", None)

        def forward(values: Tensor) -> Tensor:
            norm.weight = nn.Parameter(scale[kept])
            if shift is not None:
                norm.bias = nn.Parameter(shift.detach()[kept])
            if hasattr(norm, "normalized_shape"):
                norm.normalized_shape = (len(kept),)
            whole = torch.zeros_like(values)
            whole[..., kept] = plain(norm, values[..., kept])
            return whole

        return forward

    for name in stream.norms:
        norm: Any = model.get_submodule(name)
        norm.forward = only(norm)
    shown = torch.zeros(stream.width)
    shown[kept] = 1
    for name in (*stream.tables, *stream.writers):
        model.get_submodule(name).register_forward_hook(lambda _, __, output: output * shown)


def says(model: Any, rows: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=rows, attention_mask=(rows != 0).long()).logits
    return logits


@pytest.mark.parametrize(("family", "task"), [(f, t) for f in FAMILIES for t in TASKS.get(f, ("classification",))])
def test_a_masked_model_and_its_narrower_twin_agree(setting: Callable[..., Any], family: str, task: str) -> None:
    one, twin = setting(family, task), setting(family, task)
    rows = torch.tensor([[9, 8, 7, 6, 3], [11, 12, 3, 0, 0]])
    perturb(one.model)
    perturb(twin.model)
    stream = stream_of(Anatomy.of(one.model))
    mask(twin.model, stream, KEPT)
    before = says(one.model, rows)
    keep_channels(one.model, stream, KEPT)
    masked, narrow = says(twin.model, rows), says(one.model, rows)
    torch.testing.assert_close(narrow, masked, atol=1e-5, rtol=0)
    assert not torch.allclose(narrow, before, atol=1e-3)
    assert stream_of(Anatomy.of(one.model)).width == len(KEPT)
    sizes = {p.shape for n, p in one.model.named_parameters() if "embed" in n and p.dim() == 2}
    assert all(32 not in size[1:] for size in sizes)


def perturb(model: nn.Module) -> None:
    """Give biases and norms values that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_tells_the_same(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    found = stream_of(Anatomy.of(one.model))
    learning = {name: p.requires_grad for name, p in one.model.named_parameters()}
    training = one.model.training
    one.model.to("meta").tie_weights()
    assert stream_of(Anatomy.of(one.model)) == found
    assert {name: p.requires_grad for name, p in one.model.named_parameters()} == learning
    assert one.model.training == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())
    KeepWidth(kept=8).apply(one.model)
    assert stream_of(Anatomy.of(one.model)).width == 8


# Those that torch-pruning 1.6 can follow: GPT-2's fused linears, T5's feed-forward and DeBERTa's table of relative
# positions are lost to it, and it names no norm that is not torch's own.
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert", "albert"])
@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_finds_the_same(setting: Callable[..., Any], family: str) -> None:
    import torch_pruning as tp

    model = setting(family).model.eval()
    anatomy = Anatomy.of(model)
    graph = tp.DependencyGraph()
    graph.build_dependency(
        model, {"input_ids": torch.tensor([[9, 8, 7, 3]])}, forward_fn=lambda m, inputs: m(**inputs).logits
    )
    first = model.get_submodule(anatomy.places("output")[0])
    group = graph.get_pruning_group(first, tp.prune_linear_out_channels, idxs=[3])
    names = {module: name for name, module in model.named_modules()}
    theirs = {(names[dep.target.module], dep.handler.__name__) for dep, _ in group if dep.target.module in names}
    stream = stream_of(anatomy)
    ours = {(name, "prune_in_channels") for name in stream.readers}
    ours |= {(name, "prune_out_channels") for name in (*stream.tables, *stream.writers, *stream.norms)}
    assert ours == theirs


def test_the_places_by_hand(setting: Callable[..., Any]) -> None:
    stream = stream_of(Anatomy.of(setting("bert").model))
    assert stream.readers[-1] == "bert.pooler.dense"  # and not the classifier behind it, which is as wide
    assert len(stream.readers) == 3 * 4 + 1
    assert len(stream.writers) == 3 * 2
    assert [name.rpartition(".")[2] for name in stream.tables] == [
        "word_embeddings", "position_embeddings", "token_type_embeddings",
    ]  # fmt: skip
    narrow = stream_of(Anatomy.of(setting("electra").model))
    assert not narrow.tables  # a linear stands between them and the blocks
    assert narrow.writers[0] == "electra.embeddings_project"


def test_what_is_tied_stays_tied(setting: Callable[..., Any]) -> None:
    model = setting("llama", "causal_lm").model
    keep_channels(model, stream_of(Anatomy.of(model)), KEPT)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[1] == len(KEPT)


def test_what_cannot_be_cut(setting: Callable[..., Any]) -> None:
    model = setting("bert").model
    with pytest.raises(ValueError, match="32 channels, of which 33 cannot stay"):
        KeepWidth(kept=33).apply(model)
    model.bert.encoder.layer[0].intermediate.dense = Odd()
    with pytest.raises(ValueError, match=r"intermediate\.dense \(Odd\) reads the stream in a way that is not known"):
        stream_of(Anatomy.of(model))


class Odd(nn.Module):
    """Reads the stream in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 32))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight.T
