"""BART and T5: two stacks, a head that reads the last end token, and models of one stack alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from niwaki import artifact, compose, inference, pipeline
from niwaki.compression.quantize.int8 import Int8
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import Pretrained
from niwaki.model.tiny import Tiny
from niwaki.weights import fold

BOTH = ["bart", "t5"]
GATED = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}


@pytest.mark.parametrize("family", BOTH)
def test_cross_attention_is_seen(setting: Callable[..., Any], family: str) -> None:
    anatomy = Anatomy.of(setting(family).model)
    encoder, decoder = anatomy.stacks
    assert encoder.cross_attention is None
    assert (len(anatomy.blocks_of(encoder)), len(anatomy.blocks_of(decoder))) == (3, 3)
    for block in anatomy.blocks_of(decoder):
        for name in (decoder.cross_attention, decoder.cross_norm):
            block.get_submodule(name)  # type: ignore[arg-type]
    cross = decoder.cross_attention
    for part in ("query", "key", "value", "output"):
        names = anatomy.part_names([part])
        assert len(names) == 9
        assert sum(f".{cross}." in name for name in names) == 3


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("pairs", [False, True])
def test_a_text_that_spells_the_end_token(family: str, pairs: bool, tmp_path: Path) -> None:
    """Its row would have one more than the others, and the head would refuse the batch."""
    rows = [{"text": f"a {i}", "label": "yn"[i % 2]} | ({"text_pair": "b"} if pairs else {}) for i in range(12)]
    rows[3]["text"] = "a [SEP] b [SEP]"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings = [f"model=tiny-{family}", "data=files", *data, "trainer=debug", "trainer.max_steps=1", "logger=none"]
    config = compose.compose([*settings, "callbacks=[]", "measure=scores"]).config
    recipe = compose.build(config)
    pipeline.run(recipe, tmp_path, config)
    saved = artifact.load(tmp_path / "model")
    texts = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    found = list(inference.answers(saved, texts, 4))
    assert [row["text"] for row in found] == [row["text"] for row in rows]


@pytest.mark.parametrize("family", BOTH)
def test_a_tokenizer_that_ends_no_text(
    setting: Callable[..., Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting(family)
    one.model.save_pretrained(tmp_path)
    tokenizer = Tiny(name=family).tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(type(one.model), "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=rf"puts no end token \(number 3\) behind a text, .* a {family} for class"):
        Pretrained(name=str(tmp_path)).empty(one.task, one.labels)


@pytest.mark.parametrize("family", BOTH)
def test_padding_changes_no_answer(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    together = one.logits()
    with torch.no_grad():
        for i, row in enumerate(one.features()):
            alone = one.model(**one.task.inputs(one.task.collate([row], one.tokenizer))).logits
            assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize(("family", "field"), [("bart", "decoder_layers"), ("t5", "num_decoder_layers")])
def test_stacks_of_different_depth_are_not_cut(setting: Callable[..., Any], family: str, field: str) -> None:
    one = setting(family, overrides={field: 2})
    with pytest.raises(
        ConfigError, match=r"^model\.layers=\[0, 1\]: counts in every stack .* they have 3 and 2 blocks"
    ):
        Anatomy.of(one.model).keep_blocks([0, 1])


def test_a_cut_t5_keeps_its_tables_and_tells_its_stacks(setting: Callable[..., Any]) -> None:
    one = setting("t5")
    tables = {n for n, _ in one.model.named_parameters() if "relative_attention_bias" in n}
    Anatomy.of(one.model).keep_blocks([0, 2])
    assert {n for n, _ in one.model.named_parameters() if "relative_attention_bias" in n} == tables
    assert len(tables) == 2
    config = one.model.config
    assert (config.num_layers, config.num_decoder_layers) == (2, 2)
    assert one.model.transformer.encoder.config.num_layers == one.model.transformer.decoder.config.num_layers == 2


def test_the_gated_feed_forward_of_t5(setting: Callable[..., Any]) -> None:
    one = setting("t5", overrides=GATED)
    anatomy = Anatomy.of(one.model)
    inside = {id(m) for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert {id(linear) for linear in anatomy.linears().values()} == inside
    assert [name.rpartition(".")[2] for name in anatomy.part_names(["feed_gate", "feed_in"])] == ["wi_0", "wi_1"] * 6
    assert len(anatomy.part_names(["feed_gate"])) == len(anatomy.part_names(["feed_in"])) == 6


@pytest.mark.parametrize("overrides", [{}, GATED])
def test_t5_runs_on_integers(setting: Callable[..., Any], overrides: dict[str, Any]) -> None:
    one = setting("t5", overrides=overrides)
    expected, context, stage = one.logits(), one.context(), Int8()
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    assert torch.allclose(one.logits(), expected, atol=0.1)  # of values up to 1.6


def test_barts_decoder_alone_does_without_the_attention_that_it_never_runs(setting: Callable[..., Any]) -> None:
    one = setting("bart", "causal_lm")
    whole = transformers.AutoModelForCausalLM.from_config(one.model.config).eval()
    missing, unexpected = whole.load_state_dict(one.model.state_dict(), strict=False)
    assert missing
    assert all("encoder_attn" in name for name in missing)
    assert not unexpected
    assert torch.equal(one.logits(whole), one.logits())


def test_a_whole_bart_becomes_a_language_model(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("bart", "causal_lm")
    config = Tiny(name="bart").config()
    whole = transformers.BartForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    model = Pretrained(name=str(tmp_path)).load(one.task, (), 0)
    assert torch.equal(model.model.decoder.layers[2].fc1.weight, whole.model.decoder.layers[2].fc1.weight)
    assert torch.equal(model.lm_head.weight, whole.model.shared.weight)
    assert Anatomy.of(model).causal
