import copy
import csv
import json

import pytest
import yaml

from niwaki.errors import ArtifactError, ConfigError
from niwaki.measure.gather import gather, report_command, setting, tabulate, to_csv, to_markdown, to_picture

SIDE = {
    "parameters": 1000,
    "nonzero": 500,
    "bytes": 4000,
    "latency_ms": 8.0,
    "throughput": 100.0,
    "macs": 5000,
}
METRICS = {
    "schema": 1,
    "task": "classification",
    "data": "builtin/python_docs",
    "model": "minilm",
    "metric": "accuracy",
    "mode": "max",
    "before": {"test": {"accuracy": 0.125, "loss": 2.0}, **SIDE},
    "after": {"test": {"accuracy": 0.875, "loss": 0.5}, **SIDE},
    "train_seconds": 83.2,
    "targets": {"layer.0.query": {"parameters": 100, "sparsity": 0.4, "bits": 8}},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def write(tmp_path):
    """Writes one run; keywords are the config's, `accuracy` and `bytes` the measured ones."""

    def one(name, accuracy=0.9, size=1000, tuning="lora", compression=(), seed=0, **config):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        metrics = copy.deepcopy(METRICS) | {"tuning": tuning, "compression": list(compression), "seed": seed}
        metrics["after"]["test"]["accuracy"] = accuracy
        metrics["after"]["bytes"] = size
        (folder / "metrics.json").write_text(json.dumps(metrics))
        settings = {
            "seed": seed,
            "tuning": {"_target_": tuning},
            "data": {"seed": seed},
            "name": name,
            **config,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return one


@pytest.fixture
def study(tmp_path, write):
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        write(f"full{seed}", accuracy, 4000, "full", seed=seed)
        write(f"lora{seed}", accuracy - 0.1, 1000, "lora", ["prune/magnitude", "quantize/qat"], seed)
    return tmp_path


def test_gather_flattens_settings_and_metrics(tmp_path, write):
    write("deep/er/run", compression=["prune/magnitude"], model={"layers": [0, 3]}, bare=None, on=True)
    (run,) = gather([tmp_path])
    assert run.settings["compression"] == "[prune/magnitude]"
    assert run.settings["model.layers"] == "[0,3]"
    assert run.settings["tuning"] == "lora"
    assert run.settings["bare"] == "null"
    assert run.settings["on"] == "true"
    assert run.metrics["after.test.accuracy"] == 0.9
    assert run.metrics["after.sparsity"] == 0.5
    assert run.metrics["before.bytes"] == 4000
    assert not any(key.startswith("targets") for key in run.metrics)


def test_a_run_named_twice_counts_once(tmp_path, write):
    folder = write("a")
    assert len(gather([tmp_path, folder, folder / ".." / "a"])) == 1


def test_a_run_is_not_searched_for_runs_within(tmp_path, write):
    write("a")
    write("a/wandb/files")
    assert len(gather([tmp_path])) == 1


def test_default_rows_are_what_differs_but_no_seed_or_place(study):
    table = tabulate(gather([study]))
    assert table.rows == ("tuning", "compression")  # each axis, though compression goes along with tuning here
    assert [group.key for group in table.groups] == [("full", "[]"), ("lora", "[prune/magnitude,quantize/qat]")]
    assert table.metrics[0] == "after.test.accuracy"


def test_default_rows_name_a_setting_within_one_method(tmp_path, write):
    for level in (0.9, 0.5, 0.25):
        write(f"at{level}", compression=["prune/magnitude"], compression_={"sparsity": level}, other=1)
    table = tabulate(gather([tmp_path]))
    assert table.rows == ("compression_.sparsity",)
    assert [group.key for group in table.groups] == [("0.25",), ("0.5",), ("0.9",)]


def test_default_rows_have_every_axis_and_only_then_other_settings(tmp_path, write):
    for tuning, compression, rate in (("full", [], 1), ("lora", ["prune/magnitude"], 2), ("lora", [], 3)):
        write(f"{tuning}{rate}", tuning=tuning, compression=compression, first={"lr": rate}, second={"lr": rate})
    assert tabulate(gather([tmp_path])).rows == ("tuning", "compression")
    write("other", tuning="lora", first={"lr": 4}, second={"lr": 4})
    assert tabulate(gather([tmp_path])).rows == ("tuning", "compression", "first.lr")


@pytest.mark.parametrize("baseline", ["tuning=full,compression=[]", "compression=[],tuning=full"])
def test_a_baseline_may_name_any_axis_that_varies(study, baseline):
    assert tabulate(gather([study]), baseline=baseline).baseline == ("full", "[]")


def test_default_rows_of_equal_runs(tmp_path, write):
    write("a", seed=0)
    write("b", seed=1)
    table = tabulate(gather([tmp_path]))
    assert len(table.groups) == 1
    assert len(table.groups[0].runs) == 2


def test_mean_spread_and_change(study):
    table = tabulate(gather([study]), ["tuning"], ["after.test.accuracy", "after.bytes"], "tuning=full")
    full, lora = table.groups
    assert lora.cells["after.test.accuracy"].mean == pytest.approx(0.82)
    assert lora.cells["after.test.accuracy"].spread == pytest.approx(0.02)  # ddof 1; 0.0163 with 0
    assert lora.cells["after.test.accuracy"].change == pytest.approx(-0.1)
    assert lora.cells["after.bytes"].change == pytest.approx(0.25)
    assert full.cells["after.bytes"].change == 1
    text = to_markdown(table)
    assert "| lora | 3 | 0.8200 ± 0.0200 (-0.1000) | 1.00 kB ± 0 (0.25x) |" in text
    assert "against tuning=full" in text


def test_one_run_has_no_spread(tmp_path, write):
    write("a")
    assert "| lora | 1 | 0.9000 ± - |" in to_markdown(tabulate(gather([tmp_path]), ["tuning"], ["after.test.accuracy"]))


def test_a_missing_value_is_left_out_of_its_cell_only(tmp_path, write):
    write("a", 0.8, seed=0)
    write("b", 0.9, seed=1)
    write("c", None, seed=2)
    table = tabulate(gather([tmp_path]), ["tuning"], ["after.test.accuracy", "after.bytes"])
    cells = table.groups[0].cells
    assert cells["after.test.accuracy"].count == 2
    assert cells["after.test.accuracy"].mean == pytest.approx(0.85)
    assert cells["after.bytes"].count == 3
    assert "0.8500 ± 0.0707 [n=2]" in to_markdown(table)


def test_repeated_seeds_in_a_row_are_said(study):
    text = to_markdown(tabulate(gather([study]), ["task"]))
    assert "- task=classification: 6 runs but 3 seeds" in text
    assert "seeds;" not in to_markdown(tabulate(gather([study]), ["tuning"]))


@pytest.mark.parametrize(
    "baseline",
    [
        "compression=[]",
        "compression=[prune/magnitude,quantize/qat]",
        "tuning=lora,compression=[prune/magnitude, quantize/qat]",
    ],
)
def test_baseline_may_hold_lists(study, baseline):
    table = tabulate(gather([study]), ["tuning", "compression"], baseline=baseline)
    assert table.baseline == (("full", "[]") if "[]" in baseline else ("lora", "[prune/magnitude,quantize/qat]"))


def test_baseline_of_one_method_needs_no_brackets(tmp_path, write):
    write("a", compression=["prune/magnitude"])
    write("b")
    assert tabulate(gather([tmp_path]), ["compression"], baseline="compression=prune/magnitude").baseline == (
        "[prune/magnitude]",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": ["tunnig"]}, "rows: no run has 'tunnig'; did you mean tuning?"),
        ({"metrics": ["after.test.acuracy"]}, "did you mean after.test.accuracy?"),
        ({"metrics": ["accuracy"]}, "did you mean after.test.accuracy?"),
        ({"rows": ["tuning"], "baseline": "tuning=half"}, "names no row, there are: tuning=full; tuning=lora"),
        ({"baseline": "tunin=full"}, "did you mean tuning?"),
        ({"baseline": "full"}, "'full' is not key=value"),
        (
            {"rows": ["tuning", "seed"], "baseline": "tuning=full"},
            "names several rows, say which: tuning=full,seed=0;",
        ),
    ],
)
def test_unknown_names_are_refused_in_one_line(study, arguments, words):
    with pytest.raises(ConfigError) as error:
        tabulate(gather([study]), **arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_broken_metrics_name_the_file(tmp_path, write, content):
    path = write("a") / "metrics.json"
    path.write_text(content)
    with pytest.raises(ArtifactError) as error:
        gather([tmp_path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_number_is_broken_metrics(tmp_path, write):
    path = write("a", float("nan")) / "metrics.json"
    with pytest.raises(ArtifactError, match="holds NaN") as error:
        gather([tmp_path])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, "a: [", "just words", "\0"])
def test_broken_config_names_the_file(tmp_path, write, content):
    path = write("a") / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ArtifactError) as error:
        gather([tmp_path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no run in .*empty"):
        gather([study / "full0", tmp_path / "empty"])
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        gather([tmp_path / "nowhere"])


def test_unfinished_runs_are_listed(study, capsys):
    (study / "lora0" / "metrics.json").unlink()
    report_command([study], output=study / "out")
    said = capsys.readouterr().out
    assert f"not finished, left out: {study / 'lora0'}" in said
    assert "| lora | [prune/magnitude,quantize/qat] | 2 |" in said
    assert said.strip() in (study / "out" / "report.md").read_text()
    assert (study / "out" / "report.png").stat().st_size > 5000


def test_nothing_finished_is_refused(write, tmp_path):
    (write("a") / "metrics.json").unlink()
    with pytest.raises(ConfigError, match=r"no run has finished.*a$"):
        report_command([tmp_path])


def test_csv_in_full_precision(study):
    to_csv(tabulate(gather([study]), ["tuning"], ["after.bytes"], "tuning=full"), study / "t.csv")
    with (study / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "tuning": "lora",
        "n": "3",
        "after.bytes": "1000.0",
        "after.bytes.std": "0.0",
        "after.bytes.n": "3",
        "after.bytes.change": "0.25",
    }


@pytest.fixture
def scatters(monkeypatch):
    calls = []
    monkeypatch.setattr("niwaki.measure.plots.draw_scatter", lambda *given, **named: calls.append((*given, named)))
    return calls


def test_picture_has_a_point_a_row(study, scatters):
    to_picture(gather([study]), study / "p.png", x="after.throughput", y="after.test.loss")
    (points, path, named) = scatters[0]
    assert [spot.label for spot in points] == ["full, no compression", "lora, prune/magnitude + quantize/qat"]
    assert path == study / "p.png"
    assert named == {
        "x": "after.throughput",
        "y": "after.test.loss",
        "x_more": True,
        "y_more": False,
        "note": "",
    }


def test_picture_says_what_it_leaves_out(tmp_path, write, scatters):
    write("a")
    write("b", None, tuning="full", compression=["prune/magnitude"])
    to_picture(tabulate(gather([tmp_path]), ["tuning", "compression"]), tmp_path / "p.png")
    points, _, named = scatters[0]
    assert [spot.label for spot in points] == ["lora, no compression"]
    assert named["note"] == "1 row without both values left out"


def test_picture_of_nothing_or_of_an_unknown_metric_is_refused(tmp_path, write):
    write("a", None)
    with pytest.raises(ConfigError, match="no row has both"):
        to_picture(gather([tmp_path]), tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"did you mean after\.bytes"):
        to_picture(gather([tmp_path]), tmp_path / "p.png", x="bytes")


@pytest.mark.parametrize(("value", "text"), [([], "[]"), (["a", None], "[a,null]"), (False, "false"), (0.5, "0.5")])
def test_setting(value, text):
    assert setting(value) == text
