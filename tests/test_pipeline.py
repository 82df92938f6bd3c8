"""What the pipeline refuses while nothing is loaded yet, and that a score is the same wherever it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lifecycle import begin, recipe_of, save, write_rows

from niwaki import artifact, compose, inference, pipeline
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.measure.evaluate import evaluate
from niwaki.model.tiny import Tiny
from niwaki.pipeline import fold_and_convert, settle
from niwaki.weights import fold


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`refused(*overrides)`: the one line with which a run ends before any weights are read."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}", "label": "yn"[i % 2]}) + "\n" for i in range(40)))

    def call(*overrides: str) -> str:
        config = compose.compose(
            ["data=files", f"data.train={file}", "model=tiny-bert", "trainer=debug", "logger=none", *overrides]
        ).config
        recipe = compose.build(config)
        folder = tmp_path / "run"
        folder.mkdir()
        monkeypatch.setattr(type(recipe.model), "load", lambda *_: pytest.fail("a model was loaded"))
        monkeypatch.setattr(artifact, "load", lambda *_: pytest.fail("an artifact was loaded"))
        with pytest.raises(ConfigError) as caught:
            pipeline.run(recipe, folder, config)
        assert not list(folder.iterdir())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


def test_a_language_model_that_sees_the_whole_text(refused: Any) -> None:
    assert refused("task=causal_lm").startswith("task=causal_lm: needs a model that reads from left to right")


def test_more_text_than_the_model_reads(refused: Any) -> None:
    assert refused("task.max_length=513") == "task.max_length=513: the model reads at most 512 tokens"


def test_a_teacher_with_other_labels(refused: Any, setting: Any, tmp_path: Path) -> None:
    one = setting()
    artifact.save(
        tmp_path / "teacher", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    said = refused("compression=distill/logits", f"compression.logits.teacher={tmp_path / 'teacher'}")
    assert said.startswith("compression.logits.teacher=")
    assert "its labels are not the student's (maybe, n, no)" in said


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("attention", "block 0 of the student has 4 attention heads, block 1 of the teacher 8, and scores are"),
        ("hidden", "compression.hidden.layers: [0, 7]: the teacher has the blocks 0..5"),
        ("minilm", "compression.minilm.teacher_block=6: the teacher has the blocks 0..5"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_teacher_of_another_shape(
    refused: Any, setting: Any, tmp_path: Path, method: str, said: str, plain: bool
) -> None:
    one = setting()
    one.labels = ("n", "y")
    model = Tiny(overrides={"num_hidden_layers": 6, "num_attention_heads": 8}).load(one.task, one.labels, 0)
    if plain:
        model.save_pretrained(tmp_path / "teacher")
        one.tokenizer.save_pretrained(tmp_path / "teacher")
    else:
        artifact.save(
            tmp_path / "teacher", model=model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
            base_config=model.config.to_dict(), edits=[],
        )  # fmt: skip
    settings = [f"compression=distill/{method}", f"compression.{method}.teacher={tmp_path / 'teacher'}"]
    settings += {"hidden": ["compression.hidden.layers=[[0,7]]"]}.get(method, [])
    settings += {"minilm": ["compression.minilm.teacher_block=6"]}.get(method, [])
    assert said in refused(*settings)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_artifact_knows_the_columns_of_its_training(tmp_path: Path, pairs: bool) -> None:
    rows = [{"text": f"row {i}", "label": "yn"[i % 2]} | ({"text_pair": "x"} if pairs else {}) for i in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data=files", f"data.train={file}", "model=tiny-bert", "trainer=debug", "trainer.max_steps=1"]
    config = compose.compose([*settings, "logger=none", "callbacks=[]", "measure=scores"]).config
    pipeline.run(compose.build(config), tmp_path, config)
    saved = artifact.load(tmp_path / "model")
    assert set(saved.columns) == {"text", "label", *(["text_pair"] if pairs else [])}


@pytest.mark.parametrize("tuning", ["adapter", "adapter_pfeiffer", "adapter_parallel"])
def test_a_size_that_a_pattern_does_not_divide(refused: Any, tuning: str) -> None:
    settings = [f"tuning={tuning}", "tuning.size=6", "compression=prune/magnitude"]
    said = refused(*settings, "compression.magnitude.pattern=2:4", "compression.magnitude.sparsity=null")
    assert "adapter.default.up has 6 inputs, which 4 does not divide" in said


@pytest.mark.parametrize("tuning", ["adapter", "adapter_pfeiffer", "adapter_parallel"])
def test_a_run_that_starts_from_adapters(tmp_path: Path, tuning: str) -> None:
    """Tuned with adapters; gone on with from the artifact, the teacher the artifact itself; then evaluated."""
    rows = [{"text": f"row {i} {'good' if i % 2 else 'bad'}", "label": "yn"[i % 2]} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "data=files",
        f"data.train={file}",
        "trainer=debug",
        "logger=none",
        "callbacks=[]",
        "measure=scores",
        "measure.before=true",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    runs = {
        first: ["model=tiny-bert", f"tuning={tuning}", "tuning.size=4", "trainer.max_steps=3", "optimizer.lr=0.01"],
        second: [
            "model=pretrained", f"model.name={first}", "tuning=head", "compression=[distill/logits,quantize/int8]",
            f"compression.logits.teacher={first}", "trainer.max_steps=1",
        ],
    }  # fmt: skip
    metrics = {}
    for folder, settings in runs.items():
        folder.mkdir()
        config = compose.compose([*common, *settings]).config
        metrics[folder] = pipeline.run(compose.build(config), folder, config)
    one, two = (artifact.load(folder / "model") for folder in (first, second))
    assert [type(edit).__name__ for edit in one.edits] == ["AddBottlenecks"]
    assert [type(edit).__name__ for edit in two.edits] == ["AddBottlenecks", "UseIntegers"]
    assert metrics[second]["before"]["test"] == metrics[first]["after"]["test"]
    assert metrics[second]["before"]["parameters"] == metrics[first]["after"]["parameters"]
    grown = metrics[first]["after"]["parameters"] - metrics[first]["before"]["parameters"]
    assert grown == 3 * (2 if tuning == "adapter" else 1) * (2 * 4 * 32 + 32 + 4)
    inside = [name for name in metrics[second]["targets"] if ".adapter.default." in name]
    assert len(inside) == 3 * 2 * (2 if tuning == "adapter" else 1)
    assert all(metrics[second]["targets"][name]["bits"] == 8 for name in inside)
    scores = inference.scores(one, inference.WholeFile(train=str(file)))[0]
    assert scores["rows"] == 40
    assert 0 <= scores["accuracy"] <= 1


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_score_is_one_number_before_the_merge_after_it_and_of_the_file(tmp_path: Path, task: str) -> None:
    """LoRA below a 2:4 mask and 8-bit integers; of the merged, saved weights two of every four are zeros."""
    settings = ["tuning=lora", "compression=[prune/magnitude,quantize/qat]", "compression.magnitude.pattern=2:4"]
    recipe = recipe_of(
        task, write_rows(tmp_path, count=48)[task], *settings, "compression.magnitude.sparsity=null",
        "trainer.max_steps=60", "trainer.max_epochs=9", "optimizer.lr=1e-2", checkpoints=False,
    )  # fmt: skip
    corpus, work = begin(recipe)
    fit(recipe, corpus, work, tmp_path, {}, resume=False)

    def score(model: Any) -> float:
        scores = evaluate(model, corpus.evaluation("test"), recipe.task, corpus.labels).compute()
        return float(scores[recipe.task.metric])

    settle(recipe, work)
    before = score(work.model)
    work.context.records.update(fold(work.context.targets))
    merged = score(work.model)
    fold_and_convert(recipe, work)
    save(tmp_path / "model", recipe, corpus, work)
    reloaded = artifact.load(tmp_path / "model").model
    assert before == merged == score(reloaded)
    assert 0.3 < before < 1
    for name in work.context.targets:
        module: Any = reloaded.get_submodule(name)
        assert module.bits == 8
        assert int((module.dequantized().view(-1, 4) == 0).sum(1).min()) >= 2
