"""Where the parts of a model are, for every family."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, family_of, known_families
from niwaki.model.load import has_head
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification
from niwaki.task.ner import NER
from niwaki.weights import replace_module

KINDS = [
    (family, task.name)
    for family in FAMILIES
    for task in (Classification(), NER(), CausalLM())
    if has_head(task, Tiny(name=family).config())
]

ALONE = [("bart", "causal_lm"), ("t5", "ner")]  # have one of the two stacks
# Of the backbone, neither in a block nor in the head nor an embedding.
BESIDE = {
    "llama": r"^model\.norm\.",
    "qwen2": r"^model\.norm\.",
    "qwen3": r"^model\.norm\.",
    "modernbert": r"^model\.final_norm\.",
    "albert": r"^albert\.encoder\.embedding_hidden_mapping_in\.",
    "gpt2": r"^transformer\.(wte|wpe|ln_f)\.",
    "bart": r"^model\.(shared|(en|de)coder\.(embed_positions|layernorm_embedding))\.",
    "t5": r"^transformer\.(shared|(en|de)coder\.final_layer_norm)\.",
    "deberta-v2": r"^deberta\.encoder\.LayerNorm\.",  # of the relative positions
}


def anatomy_of(setting: Callable[..., Any], family: str, task: str) -> Anatomy:
    return Anatomy.of(setting(family, task).model)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_linears_are_those_of_the_blocks(setting: Callable[..., Any], family: str, task: str) -> None:
    anatomy = anatomy_of(setting, family, task)
    inside = {id(m) for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    found = anatomy.linears()
    assert {id(linear) for linear in found.values()} == inside
    assert all(anatomy.model.get_submodule(name) is linear for name, linear in found.items())
    assert len(anatomy.blocks) == {"albert": 1, "bart": 6, "t5": 6}.get(family, 3) // (
        2 if (family, task) in ALONE else 1
    )
    assert anatomy.embeddings is anatomy.model.get_input_embeddings()  # type: ignore[operator]


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_blocks_head_and_embeddings_make_up_the_model(setting: Callable[..., Any], family: str, task: str) -> None:
    anatomy = anatomy_of(setting, family, task)
    head = {id(p) for p in anatomy.head_parameters().values()}
    blocks = {id(p) for p in anatomy.blocks.parameters()}
    below = {n for n, p in anatomy.model.named_parameters() if id(p) not in head | blocks}
    assert head
    assert not head & blocks
    assert all(re.search(rf"embeddings|embed_tokens|{BESIDE.get(family, '^$')}", name) for name in below)


def test_heads_by_name(setting: Callable[..., Any]) -> None:
    assert set(anatomy_of(setting, "bert", "classification").head_parameters()) == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    assert set(anatomy_of(setting, "bert", "ner").head_parameters()) == {
        "classifier.weight",
        "classifier.bias",
    }
    assert set(anatomy_of(setting, "llama", "classification").head_parameters()) == {"score.weight"}
    tied = anatomy_of(setting, "llama", "causal_lm")
    assert [id(p) for p in tied.head_parameters().values()] == [id(tied.embeddings.weight)]


def test_known_families_and_the_refusal_of_others() -> None:
    assert known_families() == [
        "albert", "bart", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "modernbert", "qwen2",
        "qwen3", "roberta", "t5",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"the family 'mamba' is not known; known: albert, bart, .*/mamba\.py to"):
        family_of(SimpleNamespace(model_type="mamba"))


class Adapted(nn.Module):
    """A layer that grew in place of a linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.adapter = nn.Sequential(nn.Linear(linear.out_features, 2), nn.ReLU(), nn.Linear(2, linear.out_features))


@pytest.mark.parametrize(("family", "place"), [("bert", "output.dense"), ("gpt2", "mlp.c_proj")])
def test_linears_inside_of_a_layer_that_grew(setting: Callable[..., Any], family: str, place: str) -> None:
    anatomy = anatomy_of(setting, family, "classification")
    before = list(anatomy.linears())
    for block in anatomy.blocks:
        replace_module(block, place, Adapted(block.get_submodule(place)))  # type: ignore[arg-type]
    expected = []
    for name in before:
        grown = name.endswith(f".{place}") and ".attention." not in name
        expected += [f"{name}.{inner}" for inner in ("linear", "adapter.0", "adapter.2")] if grown else [name]
    assert list(anatomy.linears()) == expected
    assert all(anatomy.model.get_submodule(name) is linear for name, linear in anatomy.linears().items())
    assert anatomy.part_names(["feed_out"]) == [name for name in expected if f".{place}." in name]


def test_the_linears_of_given_parts(setting: Callable[..., Any]) -> None:
    bert = anatomy_of(setting, "bert", "ner")
    assert bert.part_names(["value", "query"]) == [
        f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(3) for part in ("query", "value")
    ]
    fused = anatomy_of(setting, "gpt2", "ner")
    assert (
        fused.part_names(["value", "query"])
        == fused.part_names(["key"])
        == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    )
    assert fused.part_names(["feed_gate"]) == []
    gated = anatomy_of(setting, "modernbert", "ner")
    assert (
        gated.part_names(["feed_gate"])
        == gated.part_names(["feed_in"])
        == [f"model.layers.{i}.mlp.Wi" for i in range(3)]
    )


HEADS = {
    ("distilbert", "classification"): "pre_classifier.* classifier.*",
    ("distilbert", "ner"): "classifier.*",
    ("electra", "classification"): "classifier.dense.* classifier.out_proj.*",
    ("electra", "ner"): "classifier.*",
    ("deberta-v2", "classification"): "pooler.dense.* classifier.*",
    ("deberta-v2", "ner"): "classifier.*",
    ("modernbert", "classification"): "head.dense.weight head.norm.weight classifier.*",
    ("modernbert", "ner"): "head.dense.weight head.norm.weight classifier.*",
    ("qwen3", "classification"): "score.weight",
    ("qwen3", "ner"): "score.*",
    ("albert", "classification"): "albert.pooler.* classifier.*",
    ("albert", "ner"): "classifier.*",
    ("gpt2", "classification"): "score.weight",
    ("gpt2", "ner"): "classifier.*",
    ("bart", "classification"): "classification_head.dense.* classification_head.out_proj.*",
    ("t5", "classification"): "classification_head.dense.* classification_head.out_proj.*",
    ("t5", "ner"): "classifier.*",
}


@pytest.mark.parametrize(("kind", "names"), HEADS.items(), ids=lambda value: "-".join(value) if len(value) == 2 else "")
def test_the_head_of_every_family(setting: Callable[..., Any], kind: tuple[str, str], names: str) -> None:
    expected = {full for name in names.split() for full in (name.replace("*", "weight"), name.replace("*", "bias"))}
    head = anatomy_of(setting, *kind).head_parameters()
    assert set(head) == expected


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bart"])
def test_a_tied_output_is_the_head_of_a_language_model(setting: Callable[..., Any], family: str) -> None:
    anatomy = anatomy_of(setting, family, "causal_lm")
    assert [id(p) for p in anatomy.head_parameters().values()] == [id(anatomy.embeddings.weight)]


@pytest.mark.parametrize("kind", ["roberta", "qwen2"])
def test_families_under_shared_names_fit_their_models(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    anatomy = Anatomy.of(AutoModelForSequenceClassification.from_config(config))
    inside = {id(m) for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert {id(linear) for linear in anatomy.linears().values()} == inside


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_kept_blocks_compute_what_they_did(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    blocks = list(Anatomy.of(one.model).blocks)
    seen: list[Any] = []
    handles = [block.register_forward_hook(lambda block, _, output: seen.append(block)) for block in blocks]
    Anatomy.of(one.model).keep_blocks([2, 0])
    cut = one.logits()
    assert seen == [blocks[2], blocks[0]]
    assert one.model.config.num_hidden_layers == 2
    assert torch.isfinite(cut).all()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bart"])
def test_a_cut_language_model_still_writes(setting: Callable[..., Any], family: str) -> None:
    one = setting(family, "causal_lm")
    Anatomy.of(one.model).keep_blocks([1, 2])
    ids = one.tokenizer("a tree in the garden", return_tensors="pt", add_special_tokens=False)["input_ids"]
    # The cache finds its layers by `layer_idx`: with and without it the same is computed and written.
    with torch.no_grad():
        start = one.model(input_ids=ids[:, :-1], use_cache=True)
        stepped = one.model(input_ids=ids[:, -1:], past_key_values=start.past_key_values)
        assert torch.allclose(stepped.logits[0, -1], one.model(input_ids=ids).logits[0, -1], atol=1e-5)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(one.model.generate(ids, **settings), one.model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("indices", [[], [3], [-1], [0, 0]])
def test_blocks_that_are_not_there(setting: Callable[..., Any], indices: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.layers=.* needs different layer numbers in 0\.\.2"):
        Anatomy.of(setting().model).keep_blocks(indices)


@pytest.mark.parametrize("family", [family for family, task in KINDS if task == "causal_lm"])
def test_who_reads_from_left_to_right(setting: Callable[..., Any], family: str) -> None:
    anatomy = anatomy_of(setting, family, "causal_lm")
    ids = torch.randint(5, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad():
        first, second = (anatomy.model.eval()(input_ids=one).logits[0, :-1] for one in (ids, other))
    assert anatomy.causal is (family not in {"bert", "roberta", "electra"}) is torch.equal(first, second)
    anatomy.model.config.is_decoder = True  # type: ignore[union-attr]
    assert anatomy.causal


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_positions_are_what_the_model_can_read(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    count = Anatomy.of(model).positions
    assert count == {"bert": 20, "roberta": 18}[kind]
    model(input_ids=torch.full((1, count), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, count + 1), 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_every_family(setting: Callable[..., Any], family: str) -> None:
    anatomy = anatomy_of(setting, family, "classification")
    count = anatomy.positions
    # RoBERTa counts from the place after that of the padding token, which is 0 here
    far = dict.fromkeys(("llama", "qwen2", "qwen3"), 2048)  # have no table
    assert count == ({"t5": None, "deberta-v2": None, "roberta": 511} | far).get(family, 512)
    ids = torch.full((1, 513), 5)
    ids[:, [511, 512]] = 3  # the end
    anatomy.model(input_ids=ids[:, : count or 513])
    if family in {"bert", "roberta", "distilbert", "electra", "albert", "gpt2", "bart"}:  # have a table of positions
        with pytest.raises((IndexError, RuntimeError)):
            anatomy.model(input_ids=ids)
