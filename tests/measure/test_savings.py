"""What a run saves, by hand: every byte of the file is of one kind, time is a factor, zeros are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.codebook import CodebookSharing
from niwaki.measure import report
from niwaki.measure.savings import savings, savings_text
from niwaki.measure.size import count
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold

WEIGHTS = 3 * (4 * 32 * 32 + 2 * 32 * 64)
SPEED = {"latency_ms": 8.0, "throughput": 100.0}


def saved(one: Any, folder: Path, *stages: Any, store: Any = "auto") -> artifact.Artifact:
    with torch.no_grad():
        for parameter in one.model.parameters():  # biases begin as zeros
            parameter.normal_(std=0.1)
    base_config, context, edits = one.model.config.to_dict(), one.context(), []
    for stage in stages:
        stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    for stage in stages:
        edits += stage.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits, store=store,
    )  # fmt: skip
    return artifact.load(folder)


def found(one: artifact.Artifact, before: Any = None) -> dict[str, Any]:
    return savings(one, before, {**count(one.model), **SPEED})


KINDS: dict[str, tuple[list[Any], set[str]]] = {
    "nothing": ([], {"dense"}),
    "mask": ([Magnitude()], {"dense", "bitmask"}),
    "places": ([Magnitude(pattern="1:8")], {"dense", "N:M"}),
    "integers": ([QAT(bits=8)], {"dense", "integer codes"}),
    "codebook": ([CodebookSharing(bits=4)], {"dense", "codebook"}),
    "both": ([Magnitude(sparsity=0.8), QAT(bits=8)], {"dense", "integer codes", "integer codes, bitmask"}),
    "adapters": ([LoRA(rank=2, merge=False)], {"dense", "adapters"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_byte_is_of_a_kind(setting: Callable[..., Any], tmp_path: Path, name: str) -> None:
    stages, kinds = KINDS[name]
    one = saved(setting(), tmp_path / "model", *stages)
    disk = found(one)["disk"]
    assert set(disk) == kinds | {"headers"}
    assert sum(kind["bytes"] for kind in disk.values()) == artifact.weight_bytes(one.folder)
    assert all(kind["bytes"] > 0 for kind in disk.values())
    if name == "integers":
        assert disk["integer codes"]["bytes"] == WEIGHTS + 4 * 3 * (5 * 32 + 64)  # codes and scales
    if name in ("mask", "places"):
        kind = disk["bitmask" if name == "mask" else "N:M"]
        assert (kind["tensors"], kind["plain"]) == (18, 4 * WEIGHTS)
        by_hand = {"mask": WEIGHTS * 4 / 2 + WEIGHTS / 8, "places": WEIGHTS / 8 * (4 + 3 / 8)}
        assert kind["bytes"] == by_hand[name]


@pytest.mark.parametrize(("stages", "zeros"), [
    ([], 0),
    ([Magnitude()], WEIGHTS // 2),
    ([Magnitude(pattern="1:8")], WEIGHTS * 7 // 8),
])  # fmt: skip
def test_zeros_are_counted(setting: Callable[..., Any], tmp_path: Path, stages: list[Any], zeros: int) -> None:
    one = saved(setting(), tmp_path / "model", *stages)
    counted = found(one)["zeros"]
    assert (counted["weights"], counted["not_stored"], counted["skipped"]) == (zeros, zeros, 0)
    assert counted["share"] == pytest.approx(zeros / count(one.model)["parameters"])
    dense = found(saved(setting(), tmp_path / "dense", *stages, store="dense"))["zeros"]
    assert (dense["weights"], dense["not_stored"]) == (zeros, 0)


@pytest.mark.parametrize("above", [[], [QAT(bits=8)]], ids=["alone", "integers"])
@pytest.mark.parametrize(("width", "sparsity"), [(32, 0.5), (96, 0.97)])
def test_zeros_that_a_codebook_has_no_index_for_are_not_stored(
    setting: Callable[..., Any], tmp_path: Path, width: int, sparsity: float, above: list[Any]
) -> None:
    """At width 96 most bytes of the packed masks are zero, so that they lie in the file without these."""
    one = setting(overrides={"hidden_size": width})
    zeros = sum(round(sparsity * linear.weight.numel()) for linear in one.context().targets.values())
    kept = saved(one, tmp_path / "model", Magnitude(sparsity=sparsity), CodebookSharing(bits=4), *above)
    counted = found(kept)
    assert ("codebook, bitmask" in counted["disk"]) == (width == 96)
    assert counted["zeros"]["not_stored"] == zeros
    assert counted["zeros"]["weights"] >= zeros  # integers may round more of them to zero, and have their codes


def test_speed_is_a_factor_above_one_for_faster(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = saved(setting(), tmp_path / "model")
    assert found(one)["speed"] == {"latency": None, "throughput": None}
    assert found(one, {"latency_ms": None, "throughput": None})["speed"]["latency"] is None
    assert found(one, {"latency_ms": 16.0, "throughput": 200.0})["speed"] == {"latency": 2.0, "throughput": 0.5}


def test_the_words(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = saved(setting(), tmp_path / "model", Magnitude())
    before = {"bytes": 400_000, "latency_ms": 16.0, "throughput": 98.0}
    after = {**count(one.model), **SPEED, "bytes": 200_000}
    metrics = {"before": before, "after": after, "threads": 2, "savings": savings(one, before, after)}
    text = savings_text(metrics)
    assert "400 kB before, 200 kB after, 2.0x smaller" in text
    assert "(this machine, 2 threads): latency 2.00x faster; throughput the same within 5%." in text
    share = 100 * WEIGHTS / 2 / after["parameters"]
    assert f"{WEIGHTS // 2:,} weights ({share:.1f}%) are zero; the file leaves out {WEIGHTS // 2:,}." in text
    assert "they save no time" in text
    assert "| bitmask | 18 |" in text
    assert "the machine's" not in text
    same = {"before": before | {"macs": 5}, "after": after | {"macs": 5}}
    assert "a difference is the machine's, not the model's" in savings_text(metrics | same)
    fewer = {"before": before | {"macs": 5}, "after": after | {"macs": 4}}
    assert "the machine's" not in savings_text(metrics | fewer)
    slower = savings_text(metrics | {"savings": savings(one, {"latency_ms": 4.0}, after)})
    assert "latency 2.00x slower." in slower
    none = savings_text(metrics | {"before": None, "savings": savings(one, None, after)})
    assert "before was not measured" in none
    assert "not measured against before" in none


def test_facts_of_methods_are_shown_and_long_ones_named() -> None:
    ranks = {"sum": 24, "budget": 24, "after": {"3": 4, "5": 2}}
    text = report.facts({"schema": 1, "after": {}, "ranks": ranks, "kept": [0, 2], "long": list(range(99)),
                         "wide": {str(i): i for i in range(50)}, "share": 0.25})  # fmt: skip
    assert "| ranks sum | 24 |" in text
    assert "| ranks after 5 | 2 |" in text
    assert "| kept | 0, 2 |" in text
    assert "| long | 99 entries, in metrics.json |" in text
    assert "| wide | 50 entries, in metrics.json |" in text
    assert "| share | 0.2500 |" in text
    assert "schema" not in text
    assert report.facts({"schema": 1, "after": {}}) == ""


def test_codes_that_the_file_leaves_out_are_counted_to_the_last(setting: Callable[..., Any], tmp_path: Path) -> None:
    wide = setting(overrides={"hidden_size": 96})
    one = saved(wide, tmp_path / "model", Magnitude(sparsity=0.8), QAT(bits=3))
    codes = [m.integers() for m in one.model.modules() if hasattr(m, "integers")]
    assert set(found(one)["disk"]) == {"dense", "integer codes", "integer codes, bitmask", "headers"}
    assert found(one)["zeros"]["not_stored"] == sum(int((c == 0).sum()) for c in codes)
