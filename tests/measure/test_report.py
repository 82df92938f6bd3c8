import copy
import subprocess
import sys

import pytest
from rich.console import Console

from niwaki.measure import report

SIDE = {
    "parameters": 1000,
    "nonzero": 1000,
    "bytes": 4000,
    "latency_ms": 8.0,
    "throughput": 100.0,
    "macs": 5000,
}
METRICS = {
    "schema": 1,
    "task": "classification",
    "tuning": "lora",
    "compression": ["prune/magnitude", "quantize/qat"],
    "seed": 3,
    "data": "builtin/python_docs",
    "model": "minilm",
    "metric": "accuracy",
    "mode": "max",
    "before": {"test": {"accuracy": 0.125, "loss": 2.0}, **SIDE},
    "after": {
        "test": {"accuracy": 0.875, "loss": 0.5},
        **SIDE,
        "nonzero": 500,
        "bytes": 1000,
        "latency_ms": 16.0,
        "throughput": 150.0,
    },
    "trainable": 50,
    "train_seconds": 83.2,
    "steps": 420,
    "peak_memory_mb": 1234.4,
    "parity": 1.2e-6,
    "targets": {
        "layer.0.query": {"parameters": 100, "sparsity": 0.4, "bits": 8},
        "layer.1.query": {"parameters": 300, "sparsity": 0.6, "bits": 4},
    },
    "validation": {"accuracy": 0.9},
    "machine": "a machine",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def metrics():
    return copy.deepcopy(METRICS)


def test_comparison_has_scores_by_difference_and_costs_by_ratio(metrics):
    header, rows = report.comparison(metrics)
    assert header == ("", "before", "after", "change")
    assert rows == [
        ("test accuracy", "0.1250", "0.8750", "+0.7500"),
        ("test loss", "2.0000", "0.5000", "-1.5000"),
        ("parameters", "1,000", "1,000", "same"),
        ("non-zero parameters", "1,000", "500", "2.0x fewer"),
        ("sparsity", "0.0%", "50.0%", "+50.0 points"),
        ("bytes on disk", "4.00 kB", "1.00 kB", "4.0x smaller"),
        ("latency, batch 1", "8.00 ms", "16.0 ms", "2.0x slower"),
        ("throughput, batch 32", "100 rows/s", "150 rows/s", "1.50x faster"),
        ("MACs", "5.00k", "5.00k", "same"),
    ]


def test_comparison_without_before_has_one_column(metrics):
    metrics["before"] = None
    header, rows = report.comparison(metrics)
    assert header == ("", "after")
    assert rows[0] == ("test accuracy", "0.8750")
    assert all(len(row) == 2 for row in rows)


def test_a_missing_number_is_a_dash(metrics):
    metrics["after"]["macs"] = None
    assert report.comparison(metrics)[1][-1] == ("MACs", "5.00k", "-", "-")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(10, 5, "2.0x less"), (5, 10, "2.0x more"), (1000, 998, "same"), (130, 100, "1.30x less"), (5, 0, "-")],
)
def test_ratio(before, after, words):
    assert report.ratio("less", "more")(before, after) == words


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("after.bytes", 22_713_216, "22.7 MB"),
        ("bytes", 999, "999 B"),
        ("bytes", 999_600, "1.00 MB"),
        ("after.nonzero", 22_713_216, "22.7M"),
        ("after.test.accuracy", 0.91234, "0.9123"),
        ("after.test.perplexity", 1234.5678, "1,234.57"),
        ("parity", 0.0000012, "1.2e-06"),
        ("parity", 0.0, "0.0000"),
        ("train_seconds", 3600, "60 min"),
        ("after.test.f1", None, "-"),
    ],
)
def test_number(name, value, text):
    assert report.number(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (42, "42 s"), (119.4, "119 s"), (360, "6 min"), (5400, "1.5 h")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "mean", "spread", "text"),
    [
        ("after.latency_ms", 8.1, 0.04, "8.10 ± 0.04 ms"),
        ("after.bytes", 2e6, 1e3, "2.00 MB ± 1.00 kB"),
        ("after.test.f1", 0.9, 0.0006, "0.9000 ± 0.0006"),
        ("after.test.f1", 0.9, None, "0.9000 ± -"),
    ],
)
def test_with_spread(name, mean, spread, text):
    assert report.with_spread(name, mean, spread) == text


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("after.bytes", False),
        ("after.throughput", True),
        ("after.test.accuracy", True),
        ("after.test.loss", False),
        ("after.test.surprise", False),
    ],
)
def test_more_is_better(name, better):
    assert report.more_is_better(name, {"surprise": "min"}) is better


def test_table_shows_every_row_on_the_terminal(metrics):
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table(metrics))
    text = console.export_text()
    for row in report.comparison(metrics)[1]:
        assert all(cell in text for cell in row)


def test_report_says_what_was_run_and_how(tmp_path, metrics):
    config = {"seed": 3, "tuning": {"_target_": "a.B", "rank": 8}, "hydra": {"run": 1}, "limit": None}
    report.write_report(tmp_path, metrics, config)
    text = (tmp_path / "report.md").read_text()
    assert "**classification** on `builtin/python_docs`, model `minilm`, tuning `lora`" in text
    assert "compression `prune/magnitude + quantize/qat`, seed 3" in text
    assert "tuning.rank=8\n" in text
    assert "limit=null\n" in text
    assert "hydra" not in text
    assert "_target_" not in text
    assert "| sparsity | 2 | 40.00% | 55.00% | 60.00% |" in text  # 0.25 x 0.4 + 0.75 x 0.6
    assert "| bits | 2 | 4 | 5 | 8 |" in text
    assert "| `layer.1.query` | 300 | 60.00% | 4 |" in text
    assert "50 (5.00% of 1,000)" in text
    assert "| peak memory (GPU: of the fit; CPU: of the whole process) | 1,234 MB |" in text
    assert "a machine, 2 threads. torch 2.13.0" in text
    assert "## Classes" not in text


def test_report_lists_classes_with_their_averages(metrics):
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 1234}
    metrics |= {"per_class": {"a|b": scores}, "averages": {"macro": {**scores, "f1": None}}}
    text = report.markdown(metrics, {})
    assert "| a\\|b | 0.9000 | 0.8000 | 0.8500 | 1,234 |" in text
    assert "| *macro average* | 0.9000 | 0.8000 | - | 1,234 |" in text


def test_report_of_a_layer_without_bits(metrics):
    metrics["targets"] = {"layer": {"parameters": 10, "sparsity": 0.5, "bits": None}}
    text = report.markdown(metrics, {})
    assert "| `layer` | 10 | 50.00% | - |" in text
    assert "\n| bits |" not in text


def test_report_without_before(tmp_path, metrics):
    metrics["before"] = None
    report.write_report(tmp_path, metrics, {})
    text = (tmp_path / "report.md").read_text()
    assert "| test accuracy | 0.8750 |" in text
    assert "`before`" not in text
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_flatten():
    assert report.flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_import_loads_nothing_heavy():
    heavy = "{'torch', 'matplotlib', 'pandas', 'transformers', 'rich', 'yaml'}"
    code = f"import sys, niwaki.study, niwaki.measure.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_each_export_stands_beside_the_artifact_of_its_own_turns() -> None:
    one = {"test": {"accuracy": 0.5}, "bytes": 10, "latency_ms": 2.0, "throughput": 50.0, "parity": 0.0}
    first, second = ({**one, "artifact": {"latency_ms": ms, "throughput": 20.0}} for ms in (4.0, 8.0))
    metrics = {"after": {"test": {"accuracy": 0.5}, "bytes": 20}, "exports": {"onnx": first, "onnx_int8": second}}
    lines = report.exports(metrics).splitlines()
    (again,) = (line for line in lines if line.startswith("| of the artifact in the same turns: latency"))
    assert [cell.strip() for cell in again.split("|")[2:5]] == ["-", "4.00 ms", "8.00 ms"]
    alone = report.exports({**metrics, "exports": {"onnx": first}})
    assert "in the same turns" not in alone
    assert "4.00 ms" in alone
