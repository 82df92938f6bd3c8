"""Bad input and bad intent: one line that names the field, an exit code that is not 0, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from niwaki import compose, entry
from niwaki.errors import UserError

ROOT = Path(__file__).parents[1]
QUICK = ["model=tiny-bert", "logger=none", "trainer=debug", "callbacks=[checkpoint]", "measure=scores"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A jsonl file of 40 labelled texts."""
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"row {i} {'good' if i % 2 else 'bad'}", "label": "yn"[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def launch(arguments: list[str], folder: Path) -> Any:
    """What train.py does with these arguments, in this process."""
    usual = [*QUICK, f"hydra.run.dir={folder}"]
    arguments = [*arguments, *usual] if arguments[:1] and arguments[0].startswith("-") else [*usual, *arguments]
    if entry.checked(arguments):
        entry.carry_out(compose.compose(arguments).config, folder)
    return folder


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that these arguments get; no run folder is left."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        launch(arguments, folder)
    assert left.value.code not in (0, None)
    assert not folder.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["task=clasification"], r"task=clasification: no such option; did you mean classification\?"),
        (["compression=[prune/magnitud]"], r"compression=prune/magnitud: no such option; did you mean prune/magnitude"),
        (["optimizer.lrr=1"], r"optimizer.lrr: no such setting; did you mean optimizer.lr\?"),
        (["tunning=lora"], r"tunning: no such setting; did you mean tuning\?"),
        (["optimizer.lr=fast"], r"optimizer.lr='fast': needs a number"),
        (["optimizer.lr=-1"], r"optimizer.lr=-1: needs a number above 0"),
        (["tuning=lora", "tuning.rank=2.5"], r"tuning.rank=2.5: needs a whole number"),
        (["+tuning.rnak=2"], r"tuning.rnak: no such setting"),
        (["tuning.rnak=2"], r"tuning.rnak: no such setting; did you mean tuning.rank\?"),
        (["tuning=prompt", "tuning.merge=false"], r"tuning.merge: no such setting of the chosen tuning; .*, lora, "),
        (["task.template=It is: {}"], r"task.template=It is: {}: cannot be read; .* 'task.template=\"It is: {}\"'$"),
        (["compression=[prune/magnitude"], r"compression=\[prune/magnitude: cannot be read; brackets have to close"),
        (["lora"], r"'lora': is no override; needs KEY=VALUE$"),
        (["seed=0,1"], r"seed: several values need -m"),
        (
            ["compression=prune/magnitude", "compression.magnitude.sparsity=1.5"],
            r"magnitude.sparsity=1.5: needs a number",
        ),
        (
            ["compression=prune/magnitude", "compression.magnitude.pattern='4:2'"],
            r"pattern='4:2': needs unstructured, or N:M",
        ),
        (["compression=[quantize/int8,quantize/qat]"], r"quantize/int8 and quantize/qat: .*choose one"),
        (["compression=quantize/qat", "tuning=lora", "tuning.dropout=0.1"], r"tuning.dropout=0.1 and quantize/qat"),
        (["compression=[quantize/gptq,quantize/awq]"], r"quantize/awq and quantize/gptq: each puts .*; choose one"),
        (["compression=[quantize/gptqq]"], r"compression=quantize/gptqq: no such option; did you mean quantize/gptq\?"),
        (
            ["compression=quantize/gptq", "compression.gptq.actorder=true"],
            r"gptq.actorder: no such setting; did you mean compression.gptq.act_order\?",
        ),
        (
            ["compression.gptq.bits=3"],
            r"gptq.bits: no such setting, as quantize/gptq is not chosen; add it: compression=",
        ),
        (["compression=quantize/hqq", "compression.hqq.bits=9"], r"hqq.bits=9: needs a whole number from 2 to 8"),
        (["compression=quantize/hqq", "compression.hqq.bits='4'"], r"hqq.bits='4': needs a whole number"),
        (["compression=quantize/hqq", "compression.hqq.bits=four"], r"hqq.bits='four': needs a whole number"),
        (["compression=quantize/gptq", "compression.gptq.rows=0"], r"gptq.rows=0: needs a whole number of at least 1"),
        *(
            (
                [f"compression=quantize/{name}", f"compression.{name}.group=24"],
                rf"{name}.group=24: .* has 32 inputs, whi",
            )
            for name in ("weight_only", "gptq", "awq", "hqq", "ternary", "binary")
        ),
        (
            ["compression=prune/heads", "compression.heads.keep=[1,2,2]", "export=hf"],
            r"export=hf: bert\..* will have another shape than a plain bert has there, so only niwaki",
        ),
        (["compression=distill/logits"], r"compression.logits.teacher: needs a hub name"),
        (
            ["compression=distill/logits", "compression.logits.teacher=./none"],
            r"logits.teacher='./none': there is no such folder",
        ),
        (["task_weight=0"], r"task_weight=0: nothing is left to learn from"),
        (["model=pretrained"], r"model.name: needs a value"),
        (["model=pretrained", "model.name=./none"], r"model.name='./none': there is no such folder"),
        (["model.layers=[0,7]"], r"model.layers=\[0, 7\]: needs different layer numbers in 0..2"),
        (
            ["compression=quantize/qat", "compression.qat.group=7"],
            r"qat.group=7: .*32 inputs, which it does not divide",
        ),
        (["data=files"], r"data.train: needs a value"),
        (["data=files", "data.train=./none.csv"], r"data.train=.*none.csv"),
        (["name=../../outside"], r"name='../../outside': needs a plain name"),
        (["study=../outside"], r"study='../outside': needs a plain name"),
        (["study=/outside"], r"study='/outside': needs a plain name"),
        (["study=s", "hydra/launcher=joblib"], r"hydra/launcher, hydra/sweeper: have no effect"),
        (["-m", "hydra/launcher=joblib", "seed=0,1"], r"study=None: .*add study=NAME"),
        (["hydra.mode=MULTIRUN"], r"hydra.mode=.*may not be changed"),
        (["+hydra.sweeper.params.seed=1"], r"an override does not fit"),
        (["+task.x._target_=classification.touch"], r"task.x._target_=.* may only stand at the root of a group"),
        (["optimizer.lr=inf"], r"optimizer.lr=inf: needs a number, and a finite one"),
        (
            ["compression=[prune/magnitude]", "compression.magnitude.pattern=124"],  # what YAML makes of 2:4
            r"magnitude.pattern=124: needs text; if it says 2:4 in a file, quote it, pattern: '2:4'",
        ),
        (["optimizer.betas=[0.9,nan]"], r"optimizer.betas=\[0.9, nan\]: .* finite"),
        (["model.overrides.scale=inf"], r"model.overrides=.*inf.* finite"),
        (["trainer.devices=2"], r"trainer.devices=2: needs 1; this version runs on one device"),
        (["trainer.precision=fp16"], r"trainer.precision='fp16': .*fp16 needs trainer=gpu"),
        (
            ["compression=prune/magnitude", "+compression.b._target_=niwaki.compression.prune.magnitude.Magnitude"],
            r"compression: prune/magnitude and prune/magnitude: ",
        ),
        (["resume=./none"], r"resume='./none': needs a run folder|a resumed run keeps its settings"),
    ],
)
def test_settings_that_cannot_be(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(expected, refused(arguments, tmp_path / "run", capsys))


def test_data_that_cannot_be(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, files = tmp_path / "run", ["data=files", f"data.train={rows}"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a b", "label": "y"}\n{"text": "a b c", "label": "maybe"}\n')
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": "fine", "label": "y"}\n{"text": "", "label": "n"}\n')

    def said(*arguments: str) -> str:
        return refused([*files, *arguments], folder, capsys)

    assert re.search(r"sentence.*data.columns.text", said("data.columns.text=sentence")) is not None
    assert "tokens" in said("task=ner")
    assert "empty.jsonl" in said(f"data.test={empty}")
    assert "maybe" in said(f"data.test={strange}")
    assert "line 2" in said(f"data.validation={blank}")
    rewound = ["compression=prune/magnitude", "compression.magnitude.schedule=rewind", "trainer.max_steps=3"]
    assert re.search(r"rounds=3: a fit of \d optimizer steps has no room for them", said(*rewound)) is not None


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be loaded."""

    def load(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("niwaki.model.tiny.Tiny.load", load)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing(
    package: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == package else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for export in ("onnx", "onnx_int8"):
        line = refused(["data=files", f"data.train={rows}", f"export={export}"], tmp_path / "run", capsys)
        assert line == f"error: export={export}: needs {package}; pip install 'niwaki[onnx]'"


@pytest.mark.usefixtures("unloaded")
def test_what_no_export_can_be_or_calibrate_is_said_before_a_weight_is_loaded(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, empty = tmp_path / "pairs.jsonl", tmp_path / "empty.jsonl"
    pairs.write_text("".join(json.dumps({"source": f"a {i}", "target": f"b {i}"}) + "\n" for i in range(20)))
    empty.write_text("")
    translation = ["task=translation", "model=tiny-bart", "data=files", f"data.train={pairs}", "export=onnx_int8"]
    assert "export=onnx_int8: task=translation writes texts" in refused(translation, tmp_path / "run", capsys)
    for method in ("gptq", "awq", "smoothquant", "int8_static"):
        nothing = ["data=files", f"data.train={empty}", f"compression=quantize/{method}"]
        assert refused(nothing, tmp_path / "run", capsys) == f"error: data.train={empty}: has no rows"


CANARY = """
from pathlib import Path
Path(__file__).with_name("canary").touch()
def touch(*args, **kwargs):
    Path(__file__).with_name("canary").touch()
class Stage:
    def __init__(self, **kwargs):
        touch()
"""


@pytest.mark.parametrize(
    "node",
    [
        {"task": {"_target_": "intruder.Stage"}},
        {"compression": {"x": {"_target_": "intruder.touch"}}},
        {
            "task": {
                "_target_": "niwaki.task.classification.Classification",
                "max_length": {"_target_": "intruder.touch"},
            }
        },
        {"model": {"_target_": "niwaki.model.tiny.Tiny", "overrides": {"a": [{"_target_": "intruder.touch"}]}}},
        {"task": {"_target_": "niwaki.artifact.hashlib.sha256"}},
        {"task": {"_target_": "niwaki.entry.sys.exit"}},
        {"task": {"_target_": "niwaki.entry.leave"}},
        {"task": {"_target_": "niwaki.task.classification.Classification", "_partial_": True}},
        {"task": {"_target_": "niwaki.task.classification.Classification", "_args_": [1]}},
        {"tuning": {"_target_": "niwaki.task.classification.Classification"}},
        {"callbacks": {"x": {"_target_": "pytorch_lightning.callbacks.os.system"}}},
        {"callbacks": {"x": {"_target_": "hydra.utils.call", "_partial_": True}}},
        {"seed": {"_target_": "builtins.int"}},
        {"_target_": "intruder.Stage"},
        {"data": {"_target_": "torch.load", "f": "x"}},
    ],
)
def test_a_target_outside_the_allowlist_is_not_run(
    node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "intruder.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose.compose(QUICK).config
    for key, value in node.items():
        config[key] = {**config[key], **value} if key in ("compression", "callbacks") else value
    with pytest.raises(UserError, match=r"_target_|_partial_|_args_|needs"):
        compose.build(config)
    assert not (tmp_path / "canary").exists()
    assert "intruder" not in sys.modules


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears when the module `intruder` is imported or called."""
    (tmp_path / "intruder.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "intruder", raising=False)
    return tmp_path / "canary"


FOREIGN = [
    "+hydra.callbacks.x._target_=intruder.touch",
    "hydra.launcher._target_=intruder.touch",
    "hydra.launcher._target_=hydra.utils.call",
    "+hydra.job_logging.handlers.x.()=intruder.touch",
    "+hydra.job_logging.handlers.x.class=intruder.touch",
    "+hydra.hydra_logging.handlers.x.class=intruder.touch",
    "+hydra.hydra_logging.handlers.x.stream='ext://intruder.touch'",
    "+hydra.job.env_set.PYTHONSTARTUP=intruder.py",
    "hydra.verbose=true",
    "hydra/job_logging=default",
    "hydra.searchpath=[pkg://intruder]",
    "+hydra.searchpath=[pkg://intruder]",
    "++hydra.searchpath=[pkg://intruder]",
    "hydra={searchpath:[pkg://intruder]}",
]


@pytest.mark.parametrize("asked", [[], ["--cfg", "job"]], ids=["run", "query"])
@pytest.mark.parametrize("override", FOREIGN)
def test_hydra_runs_no_target_of_a_command_line_either(
    override: str, asked: list[str], canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([*asked, override], tmp_path / "run", capsys)
    assert not canary.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "elsewhere"],
        ["--config-name", "other"],
        ["--config-path", "elsewhere"],
        ["--experimental-rerun", "config.pickle"],
        ["--cfg", "job", "--config-dir", "elsewhere"],
    ],
)
def test_no_other_config_than_the_checked_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not taken" in refused(arguments, tmp_path / "run", capsys)


@pytest.mark.parametrize("question", [["--help"], ["--cfg", "job", "-p", "task"], ["--info"], ["-sc", "install=bash"]])
def test_a_question_passes_and_makes_no_folder(question: list[str], tmp_path: Path) -> None:
    arguments = [*question, "data=files"] if question[0] == "--cfg" else list(question)  # data.train is missing
    assert entry.checked(arguments) == arguments


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for configs/experiment/shared.yaml, in a copy of the configs."""
    shutil.copytree(compose.config_folder(), tmp_path / "configs")
    monkeypatch.setattr(compose, "config_folder", lambda: tmp_path / "configs")
    return tmp_path / "configs" / "experiment" / "shared.yaml"


@pytest.mark.parametrize(
    "block",
    [
        "job_logging: {handlers: {x: {class: intruder.touch}}}",
        "callbacks: {x: {_target_: intruder.touch}}",
        "launcher: {_target_: intruder.touch}",
        "job: {env_set: {A: b}}",
        "searchpath: [pkg://intruder]",
        "runtime: {choices: {hydra/launcher: joblib}}\n  launcher: {_target_: intruder.touch}",
    ],
)
def test_nor_of_an_experiment_from_elsewhere(
    block: str, experiment: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment.write_text(f"# @package _global_\nhydra:\n  {block}\n")
    assert "hydra." in refused(["+experiment=shared"], tmp_path / "run", capsys)
    assert not canary.exists()


JOBLIB = "hydra/launcher=joblib"


def test_an_installed_launcher_takes_plain_settings_from_the_command_line(experiment: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert not compose.compose([JOBLIB, "hydra.launcher.n_jobs=2"]).plain_launch
    for setting in ("_target_=intruder.touch", "temp_folder=${model.overrides}", "n_jobs={_target_:intruder.touch}"):
        with pytest.raises(UserError):
            compose.compose([JOBLIB, f"hydra.launcher.{setting}"])
    head = "# @package _global_\ndefaults: [override /hydra/launcher: joblib]\n"
    experiment.write_text(head)
    assert not compose.compose(["+experiment=shared"]).plain_launch
    experiment.write_text(f"{head}hydra: {{launcher: {{temp_folder: elsewhere}}}}\n")
    with pytest.raises(UserError, match=r"hydra.launcher.temp_folder='elsewhere': .* from the command line"):
        compose.compose(["+experiment=shared"])


def test_debug_leaves_the_other_axes_alone() -> None:
    chosen = ["measure=scores", "data=files", "data.train=rows.jsonl", "data.limit=7"]
    plain, debug = (compose.compose([*chosen, f"trainer={name}"]).config for name in ("cpu", "debug"))
    assert {key for key in plain if plain[key] != debug[key]} == {"trainer"}
    assert debug["trainer"]["max_steps"] == 2


def test_every_way_to_start_trains_alike() -> None:
    said = [
        subprocess.run([sys.executable, *how, "seed=x"], capture_output=True, text=True).stderr
        for how in ([str(ROOT / "train.py")], ["-m", "niwaki.train"])
    ]
    assert said == ["error: seed='x': needs a whole number\n"] * 2


def test_a_folder_that_cannot_be_written_fails_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused([], tmp_path / "file" / "run", capsys)
    assert "hydra.run.dir=" in line
    assert "cannot be written" in line


def test_a_run_folder_is_not_used_twice(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = launch(["data=files", f"data.train={rows}"], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit):
        launch(["data=files", f"data.train={rows}"], folder)
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        entry.checked([f"resume={folder}"])
    assert "has finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_leaves_what_it_promises(rows: Path, tmp_path: Path) -> None:
    arguments = ["data=files", f"data.train={rows}", "tuning=lora", "compression=[quantize/qat,prune/magnitude]"]
    folder = launch([*arguments, "measure=full"], tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"config.yaml", "metrics.json", "report.md", "report.png", "checkpoints", "model"} <= {
        path.name for path in folder.iterdir()
    }
    assert metrics["schema"] == 1
    assert (metrics["task"], metrics["tuning"]) == ("classification", "lora")
    assert metrics["compression"] == ["prune/magnitude", "quantize/qat"]
    assert metrics["parity"] == 0.0
    assert set(metrics["before"]) == set(metrics["after"])
    assert metrics["after"]["bytes"] == (folder / "model" / "compact.safetensors").stat().st_size
    assert metrics["after"]["bytes"] < metrics["before"]["bytes"]
    assert all(t["sparsity"] >= 0.5 and t["bits"] == 8 for t in metrics["targets"].values())
    assert yaml.safe_load((folder / "config.yaml").read_text())["tuning"]["rank"] == 16


def test_a_loss_that_is_no_number_stops_and_names_step_and_checkpoint(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data=files", f"data.train={rows}", "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_steps=20"]
    arguments += ["callbacks.checkpoint.every_steps=1", "trainer.gradient_clip=null", "data.batch_size=4"]
    with pytest.raises(SystemExit):
        launch(arguments, tmp_path / "run")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: the (loss is|weights are) .* optimizer step \d+; .*(last.ckpt|no checkpoint)", line)
    assert not (tmp_path / "run" / "metrics.json").exists()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if last.exists():
        state = torch.load(last, weights_only=True)["state_dict"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_the_last_step_is_validated_when_it_ends_an_epoch_early(rows: Path, tmp_path: Path) -> None:
    arguments = ["data=files", f"data.train={rows}", "trainer.max_steps=5", "data.batch_size=4", "trainer.max_epochs=3"]
    folder = launch(arguments, tmp_path / "run")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 5


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        launch(["optimizer.lr=-1", "debug=true"], tmp_path / "run")


LONG = [
    "model=tiny-bert", "tuning=lora", "compression=[prune/magnitude,quantize/qat]",
    "compression.magnitude.schedule=cubic",
    "compression.magnitude.end=0.9", "compression.magnitude.interval=5", "trainer.max_epochs=40", "data.batch_size=4",
    "trainer.precision=fp32", "trainer.threads=1", "logger=none", "callbacks=[checkpoint]", "measure=scores",
    "callbacks.checkpoint.every_steps=7", "data=files",
]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_end(how: signal.Signals, rows: Path, tmp_path: Path) -> None:
    settings = [*LONG, f"data.train={rows}"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first, second = (start([*settings, f"hydra.run.dir={folder}"]) for folder in (whole, stopped))
    checkpoint = stopped / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and second.poll() is None:
        time.sleep(0.02)
    second.send_signal(how)
    said = second.communicate()[1]
    assert second.returncode == (-9 if how == signal.SIGKILL else 128 + how), said
    if how != signal.SIGKILL:
        assert f"{how.name} at optimizer step" in said
        assert f"go on with: python train.py resume={stopped}" in said
    assert not (stopped / "metrics.json").exists()
    third = start([f"resume={stopped}"])
    for process in (first, third):
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    left, right = state_of(whole), state_of(stopped)
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, stopped)]
    assert numbers[0]["after"]["test"] == numbers[1]["after"]["test"]
    assert numbers[0]["steps"] == numbers[1]["steps"]
    shutil.rmtree(whole)
