"""A program of torch says what the artifact says, without the model's code, for any number of rows and tokens."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import IN, by_hand, integers, saved, widened

from niwaki import artifact
from niwaki.compression.quantize import kernels
from niwaki.compression.quantize.float8 import Float8
from niwaki.compression.quantize.floats import FloatLinear
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.kernels import FLOATS, PRODUCTS, Product
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.export.export import ExportError
from niwaki.export.torch import COMPILERS, FILE, LIBRARY, TorchExport, TracedIntegers
from niwaki.model.anatomy import Anatomy


def made(setting: Callable[..., Any], folder: Path, family: str, task: str, *stages: Any, **settings: Any) -> Any:
    """The artifact, a batch, and the runner of its program."""
    one = setting(family, task)
    kept = saved(one, folder / "model", *stages)
    batch = one.task.inputs(one.batch())
    (folder / "torch").mkdir()
    export = TorchExport(**settings)
    export.check(one.task, Anatomy.of(one.model))
    facts = export.write(artifact.load(kept.folder), batch, folder / "torch")
    (folder / "torch" / "export.json").write_text(json.dumps(facts))
    return kept, batch, export.runner(folder / "torch")


@pytest.mark.parametrize(
    ("family", "task", "stages"),
    [
        ("bert", "classification", [Int8()]),
        ("llama", "causal_lm", [QAT(bits=4, group=16, activation_bits=8)]),
        ("bert", "ner", []),
    ],
)
def test_it_says_what_the_artifact_says(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, stages: list[Any]
) -> None:
    kept, batch, runner = made(setting, tmp_path, family, task, *stages)
    for inputs in (batch, {name: tensor[-1:, :5] for name, tensor in batch.items()}):
        seen = inputs["attention_mask"].bool() if task != "classification" else ...
        ours, theirs = kept.model(**inputs).logits.detach(), runner(**inputs).logits.detach()
        torch.testing.assert_close(theirs[seen], ours[seen], rtol=0, atol=1e-5 * max(1.0, float(ours.abs().max())))
    assert runner.runtime == f"torch.export {torch.__version__}"
    with zipfile.ZipFile(tmp_path / "torch" / FILE) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"site-packages" not in text


@pytest.mark.parametrize("product", [FLOATS, PRODUCTS["cpu"]])
@pytest.mark.parametrize("width", [16, 2112])  # that floats sum in three parts
@pytest.mark.parametrize("activation_bits", [None, 8, 4])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (2, None)])
def test_each_product_is_that_of_the_linear(
    bits: int, group: int | None, activation_bits: int | None, width: int, product: Product,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "product_of", lambda _: product)
    linear = IntegerLinear(
        width, 6, bits=bits, group=group, activation_bits=activation_bits, bias=torch.nn.Parameter(torch.randn(6))
    )
    top = 2 ** (bits - 1) - 1
    linear.store(torch.randint(-top, top + 1, (6, width), dtype=torch.int8), torch.rand(6, width // (group or width)))
    values = torch.randn(20, 3, width)
    values[0, 0] = 0.0
    torch.testing.assert_close(TracedIntegers(linear)(values), linear(values), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [("whole",), ("real", "factor"), ("factor", "input_scale")])
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_what_else_a_linear_may_hold(group: int | None, activation_bits: int | None, parts: tuple[str, ...]) -> None:
    linear, values = widened(integers(4, group, activation_bits), *parts), torch.randn(6, 5, IN)
    expected = by_hand(linear, values)
    found = TracedIntegers(linear)(values).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def test_inputs_of_8_bit_floats_are_rounded(setting: Callable[..., Any], tmp_path: Path) -> None:
    """As in the artifact, whose answers are others than those of its weights alone."""
    kept, batch, runner = made(setting, tmp_path, "bert", "classification", Float8(activations=True))
    ours, theirs = kept.model(**batch).logits.detach(), runner(**batch).logits.detach()
    for linear in kept.model.modules():
        if isinstance(linear, FloatLinear):
            linear.activations = False
    off = float((kept.model(**batch).logits.detach() - ours).abs().max())
    assert off > 1e-5  # the order of sums moves them by a hundredth of that
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.2 * off)


def test_integer_products_are_refused_where_sums_are_not_exact(
    setting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, stages, product, expected in (
        ("int8", [Int8()], PRODUCTS["cpu"], True),
        ("floats", [Int8()], FLOATS, False),
        ("dense", [], PRODUCTS["cpu"], False),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(kernels, "product_of", lambda _, product=product: product)
        made(setting, tmp_path / name, "bert", "classification", *stages)
        card = json.loads((tmp_path / name / "torch" / "export.json").read_text())
        assert card["integer_products"] is expected
    card["integer_products"] = True
    (tmp_path / "dense" / "torch" / "export.json").write_text(json.dumps(card))
    monkeypatch.setattr("niwaki.export.torch.product_of", lambda _: FLOATS)
    assert TorchExport().runner(tmp_path / "dense" / "torch")
    assert "slow on this CPU" in capsys.readouterr().err
    monkeypatch.setattr("niwaki.export.torch.is_exact", lambda _: False)
    with pytest.raises(ExportError, match=r"^its products are those of integers by torch\._int_mm"):
        TorchExport().runner(tmp_path / "dense" / "torch")


def test_a_compiler_that_is_not_there_is_named_before_the_fit(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    TorchExport().check(one.task, Anatomy.of(one.model))
    with pytest.raises(ConfigError, match=r"^export\.torch\.compile=true: needs a C\+\+ compiler"):
        TorchExport(compile=True).check(one.task, Anatomy.of(one.model))


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_compiled_it_says_the_same(setting: Callable[..., Any], tmp_path: Path) -> None:
    kept, batch, runner = made(setting, tmp_path, "bert", "classification", Int8(), compile=True)
    ours = kept.model(**batch).logits.detach()
    torch.testing.assert_close(runner(**batch).logits.detach(), ours, rtol=0, atol=1e-3)
    assert runner.runtime == f"AOTInductor {torch.__version__}"
    assert {path.name for path in (tmp_path / "torch").iterdir()} == {LIBRARY, "export.json"}
