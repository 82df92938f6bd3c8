"""`niwaki export`: what it refuses in one line, and that rows come from a file or from the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from lifecycle import write_rows

from niwaki import artifact, compose, pipeline
from niwaki.errors import ConfigError
from niwaki.export.command import chosen, export_command, rows_of
from niwaki.export.onnx import Onnx


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = write_rows(folder, count=40)["classification"]
    config = compose.compose([
        "data=files", f"data.train={path}", "model=tiny-bert", "trainer.precision=fp32", "trainer.max_steps=1",
        "logger=none", "callbacks=[]", "measure=scores", "compression=quantize/weight_only",
    ]).config  # fmt: skip
    pipeline.run(compose.build(config), folder, config)
    return folder


def test_settings_are_those_of_the_option() -> None:
    assert chosen("onnx", []) == Onnx()
    assert chosen("onnx", ["opset=25", "kernels=onnxruntime"]) == Onnx(opset=25, kernels="onnxruntime")


@pytest.mark.parametrize(
    ("to", "settings", "said"),
    [
        ("onx", [], r"^--to onx: no such export; did you mean onnx\?"),
        ("onnx", ["opst=25"], r"^export\.onnx\.opst: no such setting; did you mean opset\?"),
        ("onnx", ["opset=new"], r"^export\.onnx\.opset='new': needs a whole number or null"),
        ("onnx", ["opset"], r"^--set opset: needs SETTING=VALUE$"),
        ("onnx", ["kernels=mine"], r"^export\.onnx\.kernels='mine': needs portable or onnxruntime"),
    ],
)
def test_what_there_is_not_is_refused(to: str, settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen(to, settings)


def test_rows_are_the_test_rows_of_the_run_or_all_of_a_file(run: Path, tmp_path: Path) -> None:
    saved = artifact.load(run / "model")
    assert len(rows_of(run, None, {}, saved, 8).features["test"]) == 4
    file = Path(write_rows(tmp_path, count=9)["classification"])
    assert len(rows_of(run, file, {}, saved, 8).features["test"]) == 9
    with pytest.raises(ConfigError, match=r"^export .*model: needs a file with labelled rows, or the folder of a run"):
        rows_of(run / "model", None, {}, saved, 8)
    with pytest.raises(ConfigError, match=r"^--column: names a column of a file"):
        rows_of(run, None, {"text": "words"}, saved, 8)


def test_a_folder_that_is_there_is_left_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export_command(run, None, {}, "hf", [], tmp_path, 0, 8)


def test_a_value_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"^--set opset=\[: \[ is no value"):
        chosen("onnx", ["opset=["])


def test_an_artifact_goes_out(run: Path, tmp_path: Path) -> None:
    """Of integers too, which a plain folder has as the weights that they stand for."""
    found = export_command(run, None, {}, "hf", [], tmp_path / "hf", 0, 8)
    assert found["parity"] < 1e-5
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "hf" / "export.json").is_file()
