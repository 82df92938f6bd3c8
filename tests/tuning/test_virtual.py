"""Virtual tokens in every family: the backbone reads them, and nobody above it ever sees one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbones import FAMILIES, OF_BOTH, OF_DECODER, OF_ENCODER, Whole, rows, tiny, turned
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.task.ner import NER
from niwaki.tuning.prompt import PromptTuning
from niwaki.tuning.virtual import AddPrompt, Prompt, add_prompt, prompt_of, reader_of, shortened

TOKENS = 3
SINGLE = [*OF_ENCODER, *OF_DECODER]
LANGUAGE_MODELS = [*OF_DECODER, "bart"]  # of which BART's goes past the wrapper of its decoder
POOLED = ["bert", "roberta", "albert"]


def virtual(family: str) -> Tensor:
    width = tiny(family).get_input_embeddings().weight.shape[1]
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(5))


def grown(family: str, kind: str = "AutoModel") -> Any:
    """A tiny model with virtual tokens that matter."""
    model = tiny(family, kind)
    AddPrompt(tokens=TOKENS).apply(model)
    prompt_of(model).settle(virtual(family))
    return model.eval()


def states(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more)


def by_hand(family: str, ids: Tensor, mask: Tensor, segments: Tensor | None = None) -> Any:
    """The plain model on embeddings that begin with the virtual ones; nothing is cut."""
    model = tiny(family)
    embeds = model.get_input_embeddings()(ids)
    inputs = {
        "inputs_embeds": torch.cat([virtual(family).expand(len(ids), -1, -1), embeds], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(mask), TOKENS), mask], dim=1),
    }
    if segments is not None:
        inputs["token_type_ids"] = torch.cat([segments.new_zeros(len(ids), TOKENS), segments], dim=1)
    with torch.no_grad():
        return model, model(**inputs)


@pytest.mark.parametrize("family", SINGLE)
def test_the_text_has_the_states_that_it_has_behind_the_virtual_tokens(family: str) -> None:
    ids, mask = rows(9, 4)
    _, expected = by_hand(family, ids, mask)
    found = states(grown(family), ids, mask).last_hidden_state
    assert found.shape[:2] == ids.shape
    assert torch.allclose(found[mask.bool()], expected.last_hidden_state[:, TOKENS:][mask.bool()], atol=1e-5)
    plain = states(tiny(family), ids, mask).last_hidden_state
    assert not torch.allclose(found[mask.bool()], plain[mask.bool()], atol=1e-2)


@pytest.mark.parametrize("family", POOLED)
def test_the_pooler_reads_the_texts_own_first_token(family: str) -> None:
    ids, mask = rows(9, 4)
    model, expected = by_hand(family, ids, mask)
    first = expected.last_hidden_state[:, TOKENS]
    weights = model.pooler if isinstance(model.pooler, nn.Linear) else model.pooler.dense
    pooled = torch.tanh(nn.functional.linear(first, weights.weight, weights.bias))
    found = states(grown(family), ids, mask)
    assert torch.allclose(found.pooler_output, pooled, atol=1e-5)
    assert found.last_hidden_state.shape[1] == ids.shape[1]


def test_segments_of_a_pair_stay_with_their_tokens() -> None:
    ids, mask = rows(9, 6)
    segments = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 4 + [0] * 3])
    _, expected = by_hand("bert", ids, mask, segments)
    found = states(grown("bert"), ids, mask, token_type_ids=segments).last_hidden_state
    assert torch.allclose(found[mask.bool()], expected.last_hidden_state[:, TOKENS:][mask.bool()], atol=1e-5)


@pytest.mark.parametrize("family", SINGLE)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_side_of_its_padding(family: str) -> None:
    model = grown(family)
    alone = states(model, *rows(5)).last_hidden_state[0]
    ids, mask = rows(12, 5)
    assert torch.allclose(states(model, ids, mask).last_hidden_state[1, :5], alone, atol=2e-5)
    left, mask = turned(ids, mask)
    assert torch.allclose(states(model, left, mask).last_hidden_state[1, -5:], alone, atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_positions_that_are_given_are_the_texts(family: str) -> None:
    ids, mask = rows(6, 6)
    first = 1 if family == "roberta" else 0
    own = torch.arange(6).expand(2, -1) + first
    model = grown(family)
    expected = states(model, ids, mask).last_hidden_state
    assert torch.allclose(states(model, ids, mask, position_ids=own).last_hidden_state, expected, atol=1e-6)
    moved = states(model, ids, mask, position_ids=own + torch.arange(6) % 2).last_hidden_state
    assert not torch.allclose(moved, expected, atol=1e-3)
    assert torch.allclose(states(model, ids).last_hidden_state, expected, atol=1e-6)  # no mask, no padding


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_all_states_and_attentions_are_those_of_the_text(family: str) -> None:
    model = grown(family)
    model.set_attn_implementation("eager")
    ids, mask = rows(7, 4)
    out = states(model, ids, mask, output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in out.hidden_states] == [7, 7, 7]
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert [tuple(attention.shape[2:]) for attention in out.attentions] == [(7, 7)] * 2
    short = states(model, ids, mask, return_dict=False)
    assert torch.equal(short[0], out.last_hidden_state)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_cached_and_uncached_decoding_agree(family: str) -> None:
    model = grown(family, "AutoModelForCausalLM")
    ids, mask = turned(*rows(9, 4))
    settings: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    one, other = (model.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.logits, other.logits, strict=True))
    plain = tiny(family, "AutoModelForCausalLM").generate(ids, attention_mask=mask, **settings)
    assert not torch.allclose(plain.logits[0], one.logits[0], atol=1e-2)
    for row, length in enumerate((9,) if family == "bart" else (9, 4)):  # BART's positions count padding too
        alone = model.generate(rows(length)[0], attention_mask=rows(length)[1], **settings)
        assert torch.equal(alone.sequences[0, -10:], one.sequences[row, -10:])


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_steps_by_hand_say_what_the_whole_text_says(family: str) -> None:
    """Without positions and without generate's own care: logits of each step against those of one pass."""
    model = grown(family, "AutoModelForCausalLM")
    ids, mask = turned(*rows(8, 5))
    whole = states(model, ids, mask).logits
    first = states(model, ids[:, :6], mask[:, :6], use_cache=True)
    cache, logits = first.past_key_values, [first.logits[:, -1]]
    for step in (6, 7):
        one = states(model, ids[:, step : step + 1], mask[:, : step + 1], past_key_values=cache, use_cache=True)
        logits.append(one.logits[:, -1])
    assert torch.allclose(torch.stack(logits, dim=1), whole[:, 5:], atol=1e-4)


@pytest.mark.parametrize("family", OF_BOTH)
def test_a_decoder_sees_the_virtual_tokens_of_the_encoder(family: str) -> None:
    ids, mask = rows(9, 4)
    target = torch.tensor([[2, 7, 9]] * 2)
    plain = tiny(family, "AutoModelForSeq2SeqLM")
    embeds = plain.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = plain(
            inputs_embeds=torch.cat([virtual(family).expand(2, -1, -1), embeds], dim=1),
            attention_mask=torch.cat([mask.new_ones(2, TOKENS), mask], dim=1), decoder_input_ids=target,
        ).logits  # fmt: skip
    model = grown(family, "AutoModelForSeq2SeqLM")
    assert torch.allclose(states(model, ids, mask, decoder_input_ids=target).logits, expected, atol=1e-5)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    one, other = (model.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(one, other)
    alone = model.generate(rows(4)[0], attention_mask=rows(4)[1], **settings)
    assert torch.equal(alone[0], one[1])


def test_an_encoder_of_a_family_with_decoders_is_cut_like_any_other() -> None:
    from transformers import T5EncoderModel

    model = T5EncoderModel(tiny("t5").config).eval()
    AddPrompt(tokens=TOKENS).apply(model)
    assert reader_of(model) in (model, model.encoder)
    assert states(model, *rows(9, 4)).last_hidden_state.shape[1] == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_a_model_of_its_own(family: str) -> None:
    model = grown(family)
    twin = copy.deepcopy(model)
    more = {"decoder_input_ids": torch.tensor([[2, 7]])} if family in OF_BOTH else {}
    before = states(twin, *rows(6), **more).last_hidden_state
    prompt_of(model).settle(torch.zeros_like(virtual(family)))
    assert torch.equal(states(twin, *rows(6), **more).last_hidden_state, before)
    assert not torch.allclose(states(model, *rows(6), **more).last_hidden_state, before, atol=1e-3)


def test_what_has_no_position_for_each_token_is_left_alone() -> None:
    tokens, length = 2, 3
    same = [torch.zeros(1, 7, 4), torch.zeros(1, 8), torch.zeros(1, 2, 5, 3), "text", None]
    assert all(shortened(value, tokens, length) is value for value in same)
    assert shortened((torch.zeros(1, 5, 4), [torch.zeros(1, 2, 5, 5)]), tokens, length)[0].shape == (1, 3, 4)


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"virtual tokens need a mask of shape \(rows, positions\)"):
        states(grown("bert"), rows(4)[0], torch.ones(1, 1, 4, 4))


def test_a_text_has_fewer_positions() -> None:
    spec = Tiny(name="bert", overrides={"max_position_embeddings": 140})
    anatomy = Anatomy.of(spec.empty(NER(), ("O",)))
    NER(max_length=140).check(anatomy)
    add_prompt(anatomy.model, anatomy, 20)
    assert anatomy.positions == 120
    with pytest.raises(ConfigError, match=r"^task\.max_length=128: the model reads at most 120 tokens"):
        NER(max_length=128).check(anatomy)
    NER(max_length=120).check(anatomy)


def test_a_text_of_all_the_positions_that_are_left_can_be_read() -> None:
    model = Tiny(name="bert", overrides={"max_position_embeddings": 30}).load(Classification(), ("a", "b"), 0)
    anatomy = Anatomy.of(model)
    add_prompt(model, anatomy, 20)
    ids = torch.full((1, anatomy.positions or 0), 7)
    states(model, ids, torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        states(model, torch.full((1, 11), 7), torch.ones(1, 11, dtype=torch.long))


def test_no_room_for_a_text_is_refused() -> None:
    anatomy = Anatomy.of(Tiny(name="bert").empty(NER(), ("O",)))
    with pytest.raises(ConfigError, match=r"^tuning\.tokens=512: leaves no room for a text; the model reads 512"):
        PromptTuning(tokens=512, init="random").grow(anatomy.model, anatomy)


def test_a_model_that_takes_no_embeddings_is_refused() -> None:
    class Deaf(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    model = tiny("bert")
    whole: Any = Whole(model)
    whole.backbone = Deaf()
    with pytest.raises(ConfigError, match=r"^tuning\.tokens=3: a bert model takes no embeddings for tokens; use "):
        add_prompt(model, whole, 3)


def test_one_prompt_and_no_second_parameter() -> None:
    model = grown("bert")
    assert [name for name, module in model.named_modules() if isinstance(module, Prompt)] == ["prompt"]
    assert set(model.state_dict()) - set(tiny("bert").state_dict()) == {"prompt.weight"}
