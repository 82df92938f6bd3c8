"""An artifact as a plain folder: from_pretrained gives the same answers, or it is said why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from niwaki import artifact, plain
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ArtifactError
from niwaki.model.anatomy import adapt
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold


def saved(one: Any, folder: Path, *stages: Any, tuning: Any = None, moved: bool = False) -> Path:
    """The artifact of a model after these stages, without a fit, as small as it gets."""
    base_config, context, edits = one.model.config.to_dict(), one.context(), adapt(one.model)
    if tuning:
        edits += tuning.grow(one.model, context.anatomy)
        context.targets = context.anatomy.linears()
        tuning.prepare(one.model, context)
        for name, parameter in one.model.named_parameters():
            if moved and ".lora_B." in name:
                torch.nn.init.normal_(parameter)
    for stage in stages:
        stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    for stage in [*([tuning] if tuning else []), *stages]:
        edits += stage.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits, store="auto",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(("family", "task"), [
    ("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm"), ("gpt2", "causal_lm"),
    ("t5", "classification"),
])  # fmt: skip
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_from_pretrained_reads_what_was_unpacked(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, bits: int | None
) -> None:
    one = setting(family, task)
    integers = [QAT(bits=bits, activation_bits=None)] if bits else []
    place = saved(one, tmp_path / "model", Magnitude(pattern="1:4"), *integers)
    assert (place / artifact.COMPACT).is_file()
    folder = plain.unpack(place, tmp_path / "plain")
    model, report = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(one.logits(model), one.logits(), rtol=0, atol=1e-6 if bits else 0)
    assert transformers.AutoTokenizer.from_pretrained(folder)("garden")["input_ids"]
    assert not (folder / artifact.CARD).exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_adapter_beside_the_base_is_merged(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    tuning = LoRA(rank=2, merge=False)
    base = one.logits()
    place = saved(one, tmp_path / "model", tuning=tuning, moved=True)
    assert float((one.logits() - base).abs().max()) > 1e-3
    folder = plain.unpack(place, tmp_path / "plain")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(one.logits(model), one.logits(), rtol=0, atol=1e-5)


def test_layers_that_transformers_does_not_know_are_refused(setting: Callable[..., Any], tmp_path: Path) -> None:
    place = saved(setting(), tmp_path / "model", tuning=Houlsby())
    with pytest.raises(ArtifactError, match=r"is not what a plain bert has there .* only niwaki reads") as caught:
        plain.unpack(place, tmp_path / "plain")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_folder_that_exists_is_left_alone(setting: Callable[..., Any], tmp_path: Path) -> None:
    place = saved(setting(), tmp_path / "model")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        plain.unpack(place, tmp_path / "plain")
