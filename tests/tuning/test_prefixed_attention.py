"""Attention with a prefix: by hand, and in every family against a plain softmax over prefix and text."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from backbones import FAMILIES, OF_BOTH, OF_DECODER, OF_ENCODER, Whole, rows, tiny, turned
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.tuning.prefixed_attention import AddPrefixes, Prefix, attention_shapes, eager, register, with_prefix

WORKING = [family for family in FAMILIES if family != "deberta-v2"]
TOKENS = 3


def attend(implementation: str, module: nn.Module, *tensors: Any, **settings: Any) -> Tensor:
    from transformers import AttentionInterface

    register()
    function = AttentionInterface()[with_prefix(implementation)]
    return function(module, *tensors, scaling=1.0, dropout=0.0, **settings)[0]


def calling(key: list[list[float]], value: list[list[float]], *, causal: bool = False) -> Any:
    """An attention module of one head that holds this prefix."""
    from transformers.models.bert.modeling_bert import BertSelfAttention

    module = BertSelfAttention.__new__(BertSelfAttention)  # for its eager function
    nn.Module.__init__(module)
    module.is_causal = causal  # type: ignore[attr-defined]
    module.prefix = Prefix(len(key), [1, len(key[0]), len(value[0])])
    module.prefix.settle(torch.tensor([key]), torch.tensor([value]))
    return module.eval()


def one_head(numbers: list[list[float]]) -> Tensor:
    """(1, 1, positions, width)"""
    return torch.tensor([[numbers]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_by_hand(implementation: str) -> None:
    """Scores ln 3 and 0: weights 3/4 and 1/4, so 3/4 of the prefix's value and 1/4 of the text's."""
    module = calling([[math.log(3), 0.0]], [[4.0, 8.0]])
    out = attend(
        implementation, module, one_head([[1.0, 0.0]]), one_head([[0.0, 0.0]]), one_head([[0.0, 4.0]]), None
    )  # (1, positions, heads, width)
    assert torch.allclose(out.flatten(), torch.tensor([3.0, 7.0]))


@pytest.mark.parametrize(
    ("implementation", "mask"),
    [
        ("sdpa", None),
        ("sdpa", torch.ones(2, 2).tril().bool()[None, None]),
        ("eager", torch.tensor([[[[0.0, -1e30], [0.0, 0.0]]]])),
        ("sdpa", torch.tensor([[[[0.0, -1e30], [0.0, 0.0]]]])),
    ],
)
def test_every_position_sees_the_prefix_and_the_past(implementation: str, mask: Tensor | None) -> None:
    """All scores are 0, so each position has the mean of what it sees: prefix 6 and 0, text 3 and 11."""
    module = calling([[0.0], [0.0]], [[6.0], [0.0]], causal=True)
    text = one_head([[0.0], [0.0]])
    out = attend(implementation, module, text, text, one_head([[3.0], [11.0]]), mask)
    assert torch.allclose(out.flatten(), torch.tensor([9 / 3, 20 / 4]))


def test_one_new_position_sees_all_of_a_cache_without_a_mask() -> None:
    module = calling([[0.0]], [[8.0]], causal=True)
    out = attend("sdpa", module, one_head([[0.0]]), one_head([[0.0], [0.0]]), one_head([[1.0], [3.0]]), None)
    assert torch.allclose(out.flatten(), torch.tensor([4.0]))


def test_a_bias_by_position_is_the_texts_alone() -> None:
    """Bias ln 2 on the text: weights 1/3 and 2/3."""
    module = calling([[0.0]], [[3.0]])
    bias = torch.full((1, 1, 1, 1), math.log(2))
    zero = one_head([[0.0]])
    out = attend("sdpa", module, zero, zero, one_head([[9.0]]), None, position_bias=bias)
    assert torch.allclose(out.flatten(), torch.tensor([1.0 + 6.0]))


def test_a_module_without_a_prefix_attends_as_ever() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    expected = sdpa_attention_forward(module, query, key, value, None, scaling=1.0)[0]
    assert torch.equal(attend("sdpa", module, query, key, value, None), expected)


def softmax_over_both(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> Any:
    """The formula, head by head in fp64: scores of the text with its mask, then those of the prefix beside them."""
    rows_, heads, length, width = query.shape
    scale = settings["scaling"] if settings.get("scaling") is not None else width**-0.5
    learned: Any = module.prefix
    out = query.new_zeros(rows_, length, heads, value.shape[3])
    for row in range(rows_):
        for head in range(heads):
            group = head // (heads // key.shape[1])
            q = query[row, head].double()
            scores = q @ key[row, group].double().T * scale
            if settings.get("position_bias") is not None:
                scores = scores + settings["position_bias"].expand(rows_, -1, -1, -1)[row, head].double()
            if mask is not None:
                scores = scores + mask.expand(rows_, heads, -1, -1)[row, head].double()
            before = q @ learned.key[group].double().T * scale
            weights = torch.cat([before, scores], dim=1).softmax(1)
            values = torch.cat([learned.value[group], value[row, group]]).double()
            out[row, :, head] = (weights @ values).to(query.dtype)
    return out, None


def grown(family: str, kind: str = "AutoModel", attention: str = "sdpa") -> Any:
    """A tiny model with prefixes that matter."""
    model = tiny(family, kind, attention)
    AddPrefixes(tokens=TOKENS, shapes=attention_shapes(Whole(model))).apply(model)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, Prefix):
            module.settle(*(torch.randn(p.shape, generator=generator) for p in (module.key, module.value)))  # type: ignore[union-attr]
    return model.eval()


def inputs_of(family: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"decoder_input_ids": torch.tensor([[2, 7, 9, 4]] * len(ids))} if family in OF_BOTH else inputs


def states(model: Any, family: str, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family, ids, mask)).last_hidden_state


@pytest.mark.parametrize("family", WORKING)
def test_it_is_the_softmax_over_prefix_and_text(family: str) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("softmax_over_both", softmax_over_both)
    AttentionMaskInterface.register("softmax_over_both", eager_mask)
    model, (ids, mask) = grown(family), rows(11, 4)
    found = states(model, family, ids, mask)
    model.set_attn_implementation("softmax_over_both")
    expected = states(model, family, ids, mask)
    seen = slice(None) if family in OF_BOTH else mask.bool()
    assert torch.allclose(found[seen], expected[seen], atol=2e-5)


@pytest.mark.parametrize("family", WORKING)
def test_both_underlying_functions_agree_and_the_prefix_matters(family: str) -> None:
    ids, mask = rows(9, 9)
    plain, fast, slow = tiny(family), grown(family), grown(family, attention="eager")
    assert torch.allclose(states(fast, family, ids, mask), states(slow, family, ids, mask), atol=2e-5)
    assert not torch.allclose(states(fast, family, ids, mask), states(plain, family, ids, mask), atol=1e-2)
    assert states(fast, family, ids, mask).shape == states(plain, family, ids, mask).shape


@pytest.mark.parametrize("family", WORKING)
def test_asking_for_another_function_does_not_lose_the_prefix(family: str) -> None:
    model, batch = grown(family), rows(9, 4)
    expected = states(model, family, *batch)
    model.set_attn_implementation("eager")
    seen = slice(None) if family in OF_BOTH else batch[1].bool()
    for _ in range(2):
        assert torch.allclose(states(model, family, *batch)[seen], expected[seen], atol=2e-5)


@pytest.mark.parametrize("family", WORKING)
def test_a_row_does_not_depend_on_its_batch(family: str) -> None:
    model = grown(family)
    alone = states(model, family, *rows(5))
    beside = states(model, family, *rows(12, 5))[1:]
    length = alone.shape[1]
    assert torch.allclose(alone, beside[:, :length], atol=2e-5)


@pytest.mark.parametrize("family", [*OF_DECODER, *OF_BOTH])
def test_cached_and_uncached_decoding_agree(family: str) -> None:
    kind = "AutoModelForSeq2SeqLM" if family in OF_BOTH else "AutoModelForCausalLM"
    model = grown(family, kind)
    ids, mask = rows(9, 4)
    if family in OF_DECODER:
        ids, mask = turned(ids, mask)
    settings: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    one, other = (model.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.logits, other.logits, strict=True))
    for row, length in enumerate((9, 4)):
        alone = model.generate(rows(length)[0], attention_mask=rows(length)[1], **settings)
        assert torch.equal(alone.sequences[0, -10:], one.sequences[row, -10:])


@pytest.mark.parametrize("family", WORKING)
def test_the_shapes_are_those_of_the_modules_and_measuring_leaves_no_trace(family: str) -> None:
    model = tiny(family).train()
    before = model.config._attn_implementation
    state = torch.get_rng_state()
    shapes = attention_shapes(Whole(model))  # type: ignore[arg-type]
    assert model.config._attn_implementation == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    heads = {"llama": [2, 8, 8], "qwen2": [2, 8, 8], "qwen3": [2, 16, 16]}.get(family, [4, 8, 8])
    count = {"albert": 1, "t5": 6, "bart": 6}.get(family, 2)  # of encoder, decoder and cross attention
    assert list(shapes.values()) == [heads] * count
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert attention_shapes(Whole(empty)) == shapes  # type: ignore[arg-type]


def test_pruned_heads_are_measured_as_they_are() -> None:
    model = tiny("bert")
    attention = model.encoder.layer[1].attention.self
    attention.num_attention_heads, attention.all_head_size = 2, 16
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(32, 16))
    model.encoder.layer[1].attention.output.dense = nn.Linear(16, 32)
    shapes = attention_shapes(Whole(model))  # type: ignore[arg-type]
    assert list(shapes.values()) == [[4, 8, 8], [2, 8, 8]]


def test_a_family_with_attention_of_its_own_is_refused() -> None:
    message = r"^tuning=prefix: this deberta-v2 model computes its attention in a way of its own .* use tuning=prompt"
    with pytest.raises(ConfigError, match=message):
        attention_shapes(Whole(tiny("deberta-v2")))  # type: ignore[arg-type]


def test_a_copy_is_a_model_of_its_own() -> None:
    model = grown("bert")
    twin = copy.deepcopy(model)
    batch = rows(6, 3)
    before = states(twin, "bert", *batch)
    for module in model.modules():
        if isinstance(module, Prefix):
            nn.init.zeros_(module.value)  # type: ignore[arg-type]
    assert torch.equal(states(twin, "bert", *batch), before)
    assert not torch.allclose(states(model, "bert", *batch), before, atol=1e-3)


def test_every_family_has_an_eager_function_where_it_is_looked_for() -> None:
    import sys

    for family in WORKING:
        model = tiny(family)
        names = attention_shapes(Whole(model))  # type: ignore[arg-type]
        modules = {type(model.get_submodule(name)).__module__ for name in names}
        assert all(hasattr(sys.modules[module], eager.__name__ + "_attention_forward") for module in modules)


def test_encoders_are_among_the_families() -> None:
    assert set(OF_ENCODER) < set(FAMILIES)
    assert re.fullmatch(r"\w+", with_prefix("sdpa"))
