import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from niwaki import study
from niwaki.errors import ConfigError
from niwaki.study import Point, digest, quoted, run_study, slug

# Stands in for train.py: writes what a run leaves; `act` says how it goes, `times` counts the starts.
CHILD = """
import json, os, pathlib, signal, sys, time
import yaml

given = dict(argument.split("=", 1) for argument in sys.argv[1:])
where = given.pop("resume", None) or given.pop("hydra.run.dir")
folder = pathlib.Path(where.strip("'"))
with open(folder / "starts.jsonl", "a") as file:
    file.write(json.dumps({"arguments": sys.argv[1:], "omp": os.environ.get("OMP_WAIT_POLICY")}) + "\\n")
if (folder / "config.yaml").exists() and not given:
    given = yaml.safe_load((folder / "config.yaml").read_text())
config = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in given.items()}
(folder / "config.yaml").write_text(yaml.safe_dump({**config, "name": "n", "hydra": {"run": str(folder)}}))
act = "finish" if (folder / "finish").exists() else config.get("act")
if act == "fail":
    print("\\x1b[31mValueError: sparsity=1.5 must be below 1\\x1b[0m\\nwandb: bye")
    sys.exit(1)
if act == "silent":
    sys.exit(0)
if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":
    print("ready", flush=True)
    try:
        (folder / "waits").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_text("saved")
        sys.exit(130)
if act == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "waits").touch()
    time.sleep(60)
if act == "count":
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(time.monotonic()))
    (folder / "waits").touch()
    while not came or time.monotonic() < came[0] + 0.5:
        time.sleep(0.01)
    (folder / "count").write_text(str(len(came)))
    sys.exit(130)
side = {"test": {"accuracy": 0.9}, "parameters": 10, "nonzero": 10, "bytes": 40, "latency_ms": 1.0}
metrics = {
    "schema": 1, "task": "classification", "compression": [],
    "tuning": config.get("tuning", "full"),
    "data": "d", "model": "m", "seed": config.get("seed", 0), "metric": "accuracy", "mode": "max",
    "before": None,
    "after": {**side, "throughput": 10.0}, "train_seconds": 1.0,
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    return [sys.executable, str(tmp_path / "child.py")]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "logs" / "a study"


def point(*overrides, config=None):
    resolved = {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in overrides)}
    return Point(overrides=overrides, swept=overrides, config={**resolved, **(config or {})})


def starts(folder):
    path = folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_point_runs_in_its_own_folder_and_process(folder, command, capsys):
    points = [point("seed=0", "tuning=lora"), point("seed=1", "tuning=lora")]
    assert run_study(points, folder, command) == 0
    for seed in (0, 1):
        run = folder / f"seed={seed},tuning=lora"
        expected = [f"seed={seed}", "tuning=lora", f"hydra.run.dir='{run}'"]
        assert starts(run) == [{"arguments": expected, "omp": "PASSIVE"}]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1/2] seed=0 tuning=lora ... done in ")
    assert ", accuracy 0.9000, about " in said[0]
    assert said[1].endswith(", accuracy 0.9000")
    assert said[2].startswith("2 points: 2 done, 0 skipped, 0 failed in ")
    assert "| m |" not in (folder / "report.md").read_text()
    assert "| 2 |" in (folder / "report.md").read_text()


def test_the_wait_policy_of_the_user_stays(folder, command, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run_study([point("seed=0")], folder, command)
    assert starts(folder / "seed=0")[0]["omp"] == "ACTIVE"


def test_finished_points_are_skipped(folder, command, capsys):
    points = [point("seed=0"), point("seed=1")]
    run_study(points[:1], folder, command)
    capsys.readouterr()
    assert run_study(points, folder, command) == 0
    assert len(starts(folder / "seed=0")) == 1
    assert len(starts(folder / "seed=1")) == 1
    said = capsys.readouterr().out
    assert "[1/2] seed=0 ... finished before, accuracy 0.9000" in said
    assert "1 done, 1 skipped" in said


def test_a_setting_that_names_a_place_does_not_count(folder, command):
    run_study([point("seed=0", config={"name": "n", "hydra": {"run": "there"}})], folder, command)
    run_study([point("seed=0", config={"name": "other", "study": "x"})], folder, command)
    assert len(starts(folder / "seed=0")) == 1


def test_another_config_gets_a_folder_of_its_own(folder, command):
    old, new = (
        point("seed=0"),
        Point(overrides=("seed=0", "rank=4"), swept=("seed=0",), config={"seed": 0, "rank": 4}),
    )
    run_study([old], folder, command)
    for _ in range(2):
        assert run_study([new], folder, command) == 0
    fresh = folder / f"seed=0-{digest(new.config)}"
    assert len(starts(folder / "seed=0")) == 1
    assert len(starts(fresh)) == 1
    assert yaml.safe_load((folder / "seed=0" / "config.yaml").read_text()).get("rank") is None


def test_a_failure_does_not_stop_the_study(folder, command, capsys):
    points = [
        point("seed=0", "act=fail"),
        point("seed=1", "act=silent"),
        point("seed=2", "act=killed"),
        point("seed=3"),
    ]
    assert run_study(points, folder, command) == 1
    assert (folder / "seed=3" / "metrics.json").exists()
    said = capsys.readouterr().out
    assert "failed in" in said
    assert f"failed: {folder / 'act=fail,seed=0'}: ValueError: sparsity=1.5 must be below 1 (see" in said
    assert f"failed: {folder / 'act=silent,seed=1'}: exit status 0, but no metrics.json" in said
    assert f"failed: {folder / 'act=killed,seed=2'}: ended by SIGKILL (out of memory?)" in said
    assert "4 points: 1 done, 0 skipped, 3 failed" in said
    assert "ValueError" in (folder / "act=fail,seed=0" / "output.log").read_text()


def test_a_failed_point_runs_again(folder, command):
    points = [point("act=fail")]
    assert run_study(points, folder, command) == 1
    (folder / "act=fail" / "finish").touch()
    assert run_study(points, folder, command) == 0
    assert len(starts(folder / "act=fail")) == 2


def test_a_started_point_is_resumed(folder, command):
    run = folder / "seed=0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "config.yaml").write_text("seed: 0\n")
    assert run_study([point("seed=0")], folder, command) == 0
    assert [start["arguments"] for start in starts(run)] == [[f"resume='{run}'"]]


def test_checkpoints_of_another_config_are_left_alone(folder, command):
    run = folder / "seed=0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "config.yaml").write_text("seed: 0\nrank: 8\n")
    assert run_study([point("seed=0")], folder, command) == 0
    assert not starts(run)
    assert len(starts(folder / f"seed=0-{digest({'seed': 0})}")) == 1


def test_broken_metrics_do_not_count_as_finished(folder, command):
    run_study([point("seed=0")], folder, command)
    (folder / "seed=0" / "metrics.json").write_text("{")
    assert run_study([point("seed=0")], folder, command) == 0
    assert len(starts(folder / "seed=0")) == 2


def test_points_that_look_alike_do_not_share_a_folder(folder, command):
    alike = [point("x=a/b"), point("x=a.b"), point("x=a/b")]
    for _ in range(2):
        assert run_study(alike, folder, command) == 0
    runs = [path.parent for path in folder.glob("*/metrics.json")]
    assert len(runs) == 2
    assert {yaml.safe_load((run / "config.yaml").read_text())["x"] for run in runs} == {"a/b", "a.b"}
    assert all(len(starts(run)) == 1 for run in runs)


def test_points_that_look_alike_and_fail_do_not_share_a_folder(folder, command):
    alike = [
        Point(overrides=(f"x={x}", "act=fail"), swept=(f"x={x}",), config={"x": x, "act": "fail"})
        for x in ("a/b", "a.b")
    ]
    assert run_study(alike, folder, command) == 1
    assert len(starts(folder / "x=a.b")) == 1
    assert len(starts(folder / f"x=a.b-{digest(alike[1].config)}")) == 1


def test_a_broken_report_does_not_lose_the_study(folder, command, capsys):
    stray = folder / "stray"
    stray.mkdir(parents=True)
    (stray / "metrics.json").write_text("{")
    assert run_study([point("seed=0")], folder, command) == 0
    assert f"no report written: {stray / 'metrics.json'}" in capsys.readouterr().out


def test_a_command_that_is_missing_is_a_failure_in_one_line(folder, capsys):
    assert run_study([point("seed=0")], folder, ["/nowhere/python"]) == 1
    assert "No such file or directory: '/nowhere/python'" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, command):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        run_study([point("seed=0")], tmp_path / "file" / "study", command)


def test_no_points_are_refused(folder, command):
    with pytest.raises(ConfigError, match="no points"):
        run_study([], folder, command)


# A study in a process of its own, so that signals and locks are real.
STUDY = """
import sys
from pathlib import Path
from niwaki.errors import UserError
from niwaki.study import Point, run_study

acts = sys.argv[3].split(",")
points = [Point(overrides=(f"act={act}",), swept=(f"act={act}",), config={"act": act}) for act in acts]
try:
    sys.exit(run_study(points, Path(sys.argv[1]), [sys.executable, sys.argv[2]]))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def start(folder, command):
    """Starts a study whose points act as told and waits until one of them waits."""
    running = []

    def one(acts, until=None):
        arguments = [sys.executable, "-c", STUDY, str(folder), command[1], acts]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(arguments, text=True, process_group=0, **streams))
        deadline = time.monotonic() + 20
        while until is not None and not (folder / until).exists():
            assert time.monotonic() < deadline, "the study did not get there"
            time.sleep(0.02)
        return running[-1]

    yield one
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_the_run_save_and_the_same_command_goes_on(folder, command, start, number, capsys):
    process = start("finish,wait,later", "act=wait/waits")
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "stopped in" in said
    assert (folder / "act=wait" / "checkpoints" / "last.ckpt").read_text() == "saved"
    assert not (folder / "act=later").exists()

    (folder / "act=wait" / "finish").touch()
    assert run_study([point(f"act={act}") for act in ("finish", "wait", "later")], folder, command) == 0
    assert "2 done, 1 skipped" in capsys.readouterr().out
    assert starts(folder / "act=wait")[1]["arguments"] == [f"resume='{folder / 'act=wait'}'"]


def test_a_second_stop_ends_the_run_at_once(start):
    process = start("stubborn", "act=stubborn/waits")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopping: at once" in said


def test_ctrl_c_of_the_terminal_reaches_the_run_once(folder, start):
    process = start("count", "act=count/waits")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the study and all in its group
    process.communicate(timeout=20)
    assert (folder / "act=count" / "count").read_text() == "1"


def test_a_second_study_on_the_folder_is_refused(folder, command, start):
    first = start("wait", "act=wait/waits")
    second = start("later")
    said, _ = second.communicate(timeout=20)
    assert second.returncode == 1
    assert said == f"error: study: {folder} is in use by another process; wait, or choose another name\n"
    assert not (folder / "act=later").exists()
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=20)
    assert run_study([point("act=later")], folder, command) == 0


def test_handlers_are_put_back(folder, command):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run_study([point("seed=0")], folder, command)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        (("tuning=lora", "seed=0"), "seed=0,tuning=lora"),
        (("compression=[prune/magnitude,quantize/qat]",), "compression=prune.magnitude+quantize.qat"),
        (("compression=[]",), "compression=none"),
        (("+data.train='a b/c.csv'",), "data.train=ab.c.csv"),
        (("x=é;rm -rf",), "x=--rm-rf"),
        (("../..",), "-.."),
        ((), "run"),
    ],
)
def test_slug(swept, name):
    assert slug(swept) == name
    assert slug(swept[::-1]) == name


def test_a_long_slug_is_cut_and_stays_its_own():
    long = [tuple(f"model.some_long_setting_{i}={i + last}" for i in range(20)) for last in (0, 1)]
    names = [slug(swept) for swept in long]
    assert [len(name) for name in names] == [study.LONGEST_NAME] * 2
    assert names[0] != names[1]
    assert names[0] == slug(long[0][::-1])


def test_digest_tells_values_apart_but_not_their_order():
    assert digest({"a": 1, "b": {"c": 2}}) == digest({"b": {"c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest({"a": {}}) != digest({})
    assert digest({"a": 1, "name": {"x": 1}, "names": 2}) == digest({"a": 1, "names": 2})
    assert digest({"a": {"b": 1, "c": 2}}, frozenset({"a.b"})) == digest({"a": {"c": 2}})


@pytest.mark.parametrize("value", ["a b,c=d", "it's", "back\\", "a\\'b", "[x]{y}", "1e-3", "ünï"])
def test_quoted_values_come_back_from_hydra(value):
    parser = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    override = parser.parse_override(f"hydra.run.dir={quoted(value)}")
    assert override.key_or_group == "hydra.run.dir"
    assert override.value() == value


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("start\nKeyError: 'a'\n  \n╭──╮\n", "KeyError: 'a'"),
        ("50%\r80%\rRuntimeError: no\rbye", "RuntimeError: no"),
        ("nothing special", "nothing special"),
        ("", "no output"),
    ],
)
def test_last_error(tmp_path, text, last):
    log = tmp_path / "output.log"
    log.write_text("OldError: of an earlier try\n" + text, newline="")
    assert study._last_error(log, len("OldError: of an earlier try\n")) == last
