"""P-tuning: the encoders against their formulas and PEFT's, how much learns, and that nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.tuning.p_tuning import ENCODERS, PTuning
from niwaki.tuning.virtual import prompt_of

WIDTH = 32


def started(one: Any, tuning: PTuning, seed: int = 0) -> Any:
    context = one.context()
    context.seed = seed
    tuning.grow(one.model, context.anatomy)
    tuning.prepare(one.model, context)
    return context


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 1), ("lstm", 3)])
def test_the_encoder_is_pefts(encoder: str, layers: int) -> None:
    from peft import PromptEncoder, PromptEncoderConfig

    theirs = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=6,
            token_dim=WIDTH,
            num_transformer_submodules=1,
            encoder_hidden_size=5,
            encoder_reparameterization_type=encoder.upper(),
            encoder_num_layers=layers,
            encoder_dropout=0.0,
        )
    )
    own = ENCODERS[encoder](6, WIDTH, 5, layers)
    own.embedding.load_state_dict(theirs.embedding.state_dict())
    own.feed_forward.load_state_dict(theirs.mlp_head.state_dict())
    if own.recurrent is not None:
        own.recurrent.load_state_dict(theirs.lstm_head.state_dict())
    assert torch.allclose(own(), theirs(torch.arange(6)[None])[0], atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_as_many_parameters_as_the_formulas_say(setting: Callable[..., Any], layers: int) -> None:
    """MLP: n w + (w + 1) h + (layers - 1) (h + 1) h + (h + 1) w. LSTM: 4 gates of h units in 2 directions, each with
    inputs, state and two biases, then the MLP."""
    n, h, w = 5, 7, WIDTH
    of_lstm = sum(2 * 4 * h * ((w if layer == 0 else 2 * h) + h + 2) for layer in range(layers))
    expected = {
        "mlp": n * w + (w + 1) * h + (layers - 1) * (h + 1) * h + (h + 1) * w,
        "lstm": n * w + of_lstm + (2 * h + 1) * 2 * h + (2 * h + 1) * w,
    }
    for encoder in ("mlp", "lstm"):
        one = setting("llama", "causal_lm")
        before = sum(p.numel() for p in one.model.parameters())
        tuning = PTuning(tokens=n, hidden=h, layers=layers, encoder=encoder)  # type: ignore[arg-type]
        context = started(one, tuning)
        assert sum(p.numel() for p in one.model.parameters() if p.requires_grad) == expected[encoder]
        tuning.finalize(one.model, context)
        assert sum(p.numel() for p in one.model.parameters()) - before == n * w


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")])
def test_only_the_embeddings_are_left_and_the_outputs_stay(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, encoder: Any
) -> None:
    one = setting(family, task)
    plain, names = one.logits(), set(one.model.state_dict())
    tuning = PTuning(tokens=4, encoder=encoder)
    context = started(one, tuning)
    start = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    train(one.learner(steps=3), [one.batch()] * 3)
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in one.model.named_parameters() if p.requires_grad}
    assert any(".prompt.encoder." in name for name in moved)
    trained = one.logits()
    assert not torch.allclose(trained, plain, atol=1e-4)
    tuning.finalize(one.model, context)
    assert torch.equal(one.logits(), trained)
    (left,) = set(one.model.state_dict()) - names
    assert left.endswith(".prompt.weight")


def test_the_start_follows_the_seed_and_nothing_else_does(setting: Callable[..., Any]) -> None:
    def start(seed: int, drawn: int) -> torch.Tensor:
        one = setting()
        torch.rand(drawn)
        before = torch.get_rng_state()
        started(one, PTuning(encoder="lstm"), seed)
        assert torch.equal(torch.get_rng_state(), before)
        return prompt_of(one.model)().detach()

    assert torch.equal(start(1, 0), start(1, 9))
    assert not torch.equal(start(1, 0), start(2, 0))


def test_autocast_does_not_reach_the_encoder(setting: Callable[..., Any]) -> None:
    one = setting()
    started(one, PTuning())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompt_of(one.model)().dtype == torch.float32


@pytest.mark.parametrize("field", ["tokens", "layers", "hidden"])
def test_refusals_name_the_field(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{field}=0: needs"):
        PTuning(**{field: 0})
    assert isinstance(ENCODERS["mlp"](1, 2, 3, 1).feed_forward, nn.Sequential)
