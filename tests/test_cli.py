import csv
import io
import json
import shutil
import subprocess
import sys

import pytest

from niwaki import artifact, cli, compose, pipeline

TEXTS = {
    "tree": ["a pine in a pot", "the oak of the garden", "bend the maple", "old juniper"],
    "fish": ["the koi in the pond", "feed the carp", "a pond with goldfish", "red koi"],
}
ROWS = [{"text": f"{text} {i}", "label": label} for i in range(6) for label, texts in TEXTS.items() for text in texts]
SENTENCES = [
    {"tokens": ["ada", "met", "alan", "turing"], "tags": ["B-PER", "O", "B-PER", "I-PER"]},
    {"tokens": ["nobody", "came", "to", "kyoto"], "tags": ["O", "O", "O", "B-LOC"]},
] * 12


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder, rows, *overrides):
    """A run of the real pipeline on a tiny model; the same rows are train, validation and test."""
    file = write(folder / "rows.jsonl", rows)
    run = folder / "run"
    run.mkdir()
    data = [f"data.{split}='{file}'" for split in ("train", "validation", "test")]
    settings = [
        "data=files",
        "model=tiny-bert",
        "trainer=debug",
        "logger=none",
        "callbacks=[]",
        "measure=scores",
    ]
    config = compose.compose([*settings, *data, "optimizer.lr=0.01", "trainer.max_steps=20", *overrides]).config
    pipeline.run(compose.build(config), run, config)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a classification task, half of its weights pruned."""
    return train(tmp_path_factory.mktemp("classes"), ROWS, "trainer.max_epochs=10", "compression=[prune/magnitude]")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A finished run of a tagging task."""
    return train(tmp_path_factory.mktemp("tags"), SENTENCES, "task=ner")


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A finished run of a language model."""
    rows = [{"text": row["text"]} for row in ROWS]
    return train(tmp_path_factory.mktemp("lm"), rows, "task=causal_lm", "model=tiny-llama", "task.max_new_tokens=5")


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Two finished runs on one base, each with an adapter beside it: with qlora, and with other settings of it."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    common = ("trainer.max_epochs=5", "tuning=qlora")
    return [train(folder, ROWS, *common, f"tuning.rank={rank}") for folder, rank in zip(folders, (4, 2), strict=True)]


@pytest.fixture
def niwaki(monkeypatch, capsys):
    """`niwaki(*arguments, stdin=...)`: exit code, stdout, stderr of a command."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["niwaki", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def refused(niwaki):
    """`refused(*arguments)`: the one line on stderr with which a command ends."""

    def call(*arguments, **settings):
        code, out, err = niwaki(*arguments, **settings)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return call


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_help_names_the_commands_without_heavy_imports():
    code = (
        "import sys\nfrom niwaki import cli\nsys.argv = ['niwaki', '--help']\n"
        "heavy = 'torch transformers datasets pandas matplotlib hydra yaml rich'.split()\n"
        "try:\n    cli.main()\nfinally:\n"
        "    print('HEAVY', [name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "HEAVY []" in said.stdout
    names = "evaluate predict list report verify add-adapter unpack export speed sensitivity augment"
    for name in names.split():
        assert f"\n  {name} " in said.stdout


def test_evaluate_gives_the_scores_that_the_run_measured(niwaki, run):
    metrics = json.loads((run / "metrics.json").read_text())
    code, out, _ = niwaki("evaluate", run, run.parent / "rows.jsonl")
    assert code == 0
    found = json.loads(out)
    assert found.pop("rows") == 48
    assert found == pytest.approx(metrics["after"]["test"])
    assert found["accuracy"] > 0.7
    assert niwaki("evaluate", run / "model", run.parent / "rows.jsonl", "--batch-size", 5)[0] == 0


def test_evaluate_reads_other_formats_and_column_names(niwaki, run, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "sentence"])
        writer.writerows((row["label"], row["text"]) for row in ROWS[:9])
    _, out, _ = niwaki("evaluate", run, tmp_path / "rows.csv", "--column", "text=sentence", "--column", "label=kind")
    _, expected, _ = niwaki("evaluate", run, write(tmp_path / "same.jsonl", ROWS[:9]))
    assert json.loads(out) == json.loads(expected)
    assert json.loads(out)["rows"] == 9


def test_a_format_that_the_ending_does_not_tell(niwaki, run, tmp_path):
    write(tmp_path / "rows.jsonl", ROWS[:9])
    (tmp_path / "rows.data").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    _, expected, _ = niwaki("evaluate", run, tmp_path / "rows.jsonl")
    _, out, _ = niwaki("evaluate", run, tmp_path / "rows.data", "--format", "jsonl")
    assert json.loads(out) == json.loads(expected)
    _, said, _ = niwaki("predict", run, "--file", tmp_path / "rows.data", "--format", "jsonl")
    assert len(said.splitlines()) == 9
    code, _, error = niwaki("predict", run, "x", "--format", "jsonl")
    assert (code, error) == (2, "error: --format jsonl: says what --file is; give one\n")


def test_evaluate_reports_every_class(niwaki, tagger):
    metrics = json.loads((tagger / "metrics.json").read_text())
    _, out, _ = niwaki("evaluate", tagger, tagger.parent / "rows.jsonl", "--report")
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in out.splitlines()]
    support = {row[0]: int(row[4].replace(",", "")) for row in table[2:] if not row[0].startswith("*")}
    assert support == {tag: row["support"] for tag, row in metrics["per_class"].items()}
    assert sum(support.values()) == 96
    assert sum(row[0].startswith("*") for row in table) == len(metrics["averages"])


def test_evaluate_measures_a_language_model(niwaki, writer):
    metrics = json.loads((writer / "metrics.json").read_text())
    _, out, _ = niwaki("evaluate", writer, writer.parent / "rows.jsonl")
    assert json.loads(out)["perplexity"] == pytest.approx(metrics["after"]["test"]["perplexity"])


def test_a_task_without_classes_has_no_table_of_them(refused, writer):
    assert refused("evaluate", writer, writer.parent / "rows.jsonl", "--report") == (
        "--report: causal_lm has no table per class; leave it out"
    )


def test_evaluate_names_a_label_that_the_artifact_does_not_know(refused, run, tmp_path):
    file = write(tmp_path / "odd.jsonl", [*ROWS[:2], {"text": "a shrub", "label": "trees"}])
    assert refused("evaluate", run, file) == (
        f"{file} row 3: label 'trees' is none of the 2 that the artifact knows; the nearest is 'tree'"
    )


def test_evaluate_names_the_line_and_the_option_that_would_help(refused, run, tmp_path):
    file = write(tmp_path / "other.jsonl", [{"texts": "a", "label": "tree"}])
    assert refused("evaluate", run, file) == f"{file}: no column 'text'; found texts, label; use --column text=texts"
    file = write(tmp_path / "gap.jsonl", [*ROWS[:2], {"text": " ", "label": "tree"}])
    assert refused("evaluate", run, file) == f"{file} line 3: column 'text' is empty"
    assert refused("evaluate", run, tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: no such file"
    assert (
        refused("evaluate", run, file, "--column", "text") == "--column text: needs NAME=THEIRS, such as text=sentence"
    )


def test_predict_answers_each_text_in_order_as_the_model_does(niwaki, run):
    texts = [row["text"] for row in ROWS]
    code, out, err = niwaki("predict", run, *texts)
    assert (code, err) == (0, "")
    found = lines(out)
    assert [answer["text"] for answer in found] == texts
    saved = artifact.load(run / "model")
    for answer in found[:4]:
        logits = saved.model(**saved.tokenizer(answer["text"], return_tensors="pt")).logits[0]
        assert answer["label"] == saved.labels[int(logits.argmax())]
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-3)
    right = sum(answer["label"] == row["label"] for answer, row in zip(found, ROWS, strict=True))
    assert right / len(ROWS) == json.loads((run / "metrics.json").read_text())["after"]["test"]["accuracy"]


def test_predict_reads_arguments_files_and_stdin_alike(niwaki, run, tmp_path):
    texts = [row["text"] for row in ROWS[:5]]
    expected = lines(niwaki("predict", run, *texts)[1])
    (tmp_path / "texts.txt").write_text("\ufeff" + "\r\n".join(texts) + "\r\n", encoding="utf-8")
    (tmp_path / "texts.csv").write_text("id,sentence\n" + "".join(f"{i},{t}\n" for i, t in enumerate(texts)))
    write(tmp_path / "texts.jsonl", [{"text": text, "label": "unread"} for text in texts])
    for arguments in (
        ["--file", tmp_path / "texts.txt"],
        ["--file", tmp_path / "texts.csv", "--column", "text=sentence"],
        ["--file", tmp_path / "texts.jsonl", "--batch-size", "2"],
    ):
        assert [answer["label"] for answer in lines(niwaki("predict", run, *arguments)[1])] == [
            a["label"] for a in expected
        ]
    assert lines(niwaki("predict", run, stdin="\n".join(texts))[1]) == expected


def test_an_adapter_beside_its_base_is_scored_as_in_the_run(niwaki, beside):
    first, second = beside
    rows = first.parent / "rows.jsonl"
    for run in beside:
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["parity"] == 0
        found = json.loads(niwaki("evaluate", run, rows)[1])
        assert found.pop("rows") == 48
        assert found == pytest.approx(metrics["after"]["test"])
    scores = {place: niwaki("evaluate", first, rows, "--adapter", place)[1] for place in (second, "none", "adapter")}
    assert scores[second] == niwaki("evaluate", second, rows)[1]
    assert scores["adapter"] == niwaki("evaluate", first, rows)[1]
    assert len(set(scores.values())) == 3


def test_predict_with_another_adapter_answers_as_its_own_run(niwaki, refused, beside, run):
    first, second = beside
    texts = [row["text"] for row in ROWS[:6]]
    own = niwaki("predict", first, *texts)[1]
    other = niwaki("predict", first, *texts, "--adapter", second)
    assert other == niwaki("predict", second, *texts)
    assert other[1] != own
    saved = artifact.load(first / "model")
    for answer in lines(own):
        logits = saved.model(**saved.tokenizer(answer["text"], return_tensors="pt")).logits[0]
        assert answer["label"] == saved.labels[int(logits.argmax())]
    assert refused("predict", first, "a", "--adapter", "none-such").startswith("--adapter none-such: no such adapter")
    assert refused("predict", run, "a", "--adapter", "none").startswith("--adapter none: the artifact")
    assert refused("predict", first, "a", "--adapter", run).endswith("needs a run with tuning.merge=false")


def test_an_adapter_is_added_under_a_name(niwaki, refused, beside, tmp_path):
    first, second = beside
    copy = tmp_path / "model"
    shutil.copytree(first / "model", copy)
    assert niwaki("add-adapter", copy, second, "other") == (0, f"{copy / 'other'}\n", "")
    assert niwaki("predict", copy, "a pine", "--adapter", "other") == niwaki("predict", second, "a pine")
    assert niwaki("predict", copy, "a pine") == niwaki("predict", first, "a pine")
    assert refused("add-adapter", copy, second, "other").endswith("of that name already")


def test_verify_counts_the_adapter(niwaki, beside):
    metrics = json.loads((beside[0] / "metrics.json").read_text())["after"]
    shown = dict(line.split(maxsplit=1) for line in niwaki("verify", beside[0])[1].splitlines())
    assert shown["bytes"].startswith(f"{metrics['bytes']:,} (")
    assert shown["parameters"].startswith(f"{metrics['parameters']:,}, ")
    assert "UseNormalFloat" in shown["edits"]
    assert "UseAdapter (folder adapter" in shown["edits"]


def test_predict_finds_entities_at_their_offsets(niwaki, tagger):
    text = "ada met alan turing in kyoto"
    (answer,) = lines(niwaki("predict", tagger, text)[1])
    assert answer["text"] == text
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert entity["entity"] in ("PER", "LOC")


def test_predict_writes_on(niwaki, writer):
    (answer,) = lines(niwaki("predict", writer, "a pine")[1])
    assert set(answer) == {"text", "generated"}


def test_predict_takes_rows_by_their_columns(niwaki, refused, run):
    text = "a pine in a pot 0"
    expected = niwaki("predict", run, text)
    row = json.dumps({"text": text, "label": "unread"})
    assert niwaki("predict", run, row) == niwaki("predict", run, stdin=row + "\n") == expected
    assert refused("predict", run, text, '{"texts": "a"}') == """argument 2: has no 'text'; give {"text": "..."}"""


def test_predict_takes_pairs_and_says_what_is_missing(niwaki, refused, tmp_path, capsys):
    rows = [{**row, "text_pair": "no" if row["label"] == "fish" else "yes"} for row in ROWS]
    pairs = train(tmp_path, rows)
    capsys.readouterr()
    file = write(tmp_path / "pairs.jsonl", rows[:3])
    by_file = lines(niwaki("predict", pairs, "--file", file)[1])
    assert by_file == lines(niwaki("predict", pairs, *map(json.dumps, rows[:3]))[1])
    assert [answer["text_pair"] for answer in by_file] == [row["text_pair"] for row in rows[:3]]
    said = refused("predict", pairs, "a pine")
    assert said.startswith("text 'a pine': has no text_pair, which the artifact was trained on; give {")
    assert """{"text": "...", "text_pair": "..."}""" in said
    assert json.loads(niwaki("evaluate", pairs, file)[1])["rows"] == 3


def test_predict_refuses_what_it_cannot_answer(refused, run, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("a\n\nb\n")
    assert refused("predict", run, "--file", file) == f"{file} line 2: is empty"
    assert refused("predict", run, stdin="\nb\n") == "stdin line 1: is empty"
    file.write_bytes(b"\xff\xfe\n")
    assert refused("predict", run, "--file", file) == f"{file} line 1: not UTF-8; convert it first"
    assert refused("predict", run, "a", "--file", file) == "predict: give texts or --file, not both"
    assert "No such file" in refused("predict", run, "--file", tmp_path / "none.txt")
    assert refused("predict", run, "a", "--column", "text=x") == "--column text=x: names a column of --file; give one"


def test_a_folder_without_an_artifact_is_refused(refused, tmp_path):
    assert refused("predict", tmp_path, "a") == (
        f"artifact {tmp_path}: needs the folder of a run or its model/, with niwaki.json in it"
    )


def test_verify_shows_what_the_artifact_holds(niwaki, run):
    metrics = json.loads((run / "metrics.json").read_text())["after"]
    code, out, _ = niwaki("verify", run)
    assert code == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["task"].startswith("classification (max_length 128")
    assert shown["labels"] == "2: fish, tree"
    assert shown["edits"] == "none"
    assert shown["bytes"].startswith(f"{metrics['bytes']:,} (")
    assert float(shown["sparsity"]) == pytest.approx(1 - metrics["nonzero"] / metrics["parameters"], abs=1e-4)
    assert float(shown["sparsity"]) > 0.2


def test_verify_finds_an_altered_file(refused, run, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(run / "model", copy)
    weights = artifact.weights_of(copy)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "compact.safetensors was altered" in refused("verify", copy)
    weights.write_bytes(content[:-1])
    assert "compact.safetensors is truncated" in refused("verify", copy)


def test_list_prints_the_catalogue(niwaki, refused):
    _, out, _ = niwaki("list", "tuning")
    assert len(out.splitlines()) > 2
    assert all(line.startswith("tuning=") for line in out.splitlines())
    assert "| option | what it is | paper |" in niwaki("list", "--markdown")[1]
    assert "did you mean task?" in refused("list", "tasks")


def test_report_gathers_runs(niwaki, refused, run, tmp_path):
    other = tmp_path / "dense"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("model"))
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"tuning": "none"}))
    chosen = ("--rows", "tuning, task", "--metrics", "after.test.f1,after.bytes", "--baseline", "tuning=full")
    code, out, _ = niwaki("report", run, other, *chosen, "--output", tmp_path / "all")
    assert code == 0
    header = [cell.strip() for cell in out.splitlines()[0].strip("| ").split("|")]
    assert header == ["tuning", "task", "n", "test.f1", "bytes"]
    assert "against tuning=full" in out
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"report.md", "report.csv", "report.png"}
    assert refused("report", run, "--x", "after.bytes") == "--x: belongs to the picture; give --output"
    assert "report: no folder" in refused("report", tmp_path / "empty")


def test_a_closed_pipe_is_no_error(tmp_path):
    code = "from niwaki import cli\nimport sys\nsys.argv = ['niwaki', 'list']\ncli.main()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1


@pytest.fixture
def measured(niwaki, run, tmp_path):
    """`measured(*arguments)`: the folder with what `niwaki sensitivity` wrote, and its lines on stderr."""

    def call(*arguments, place=run, output=tmp_path / "out"):
        code, out, err = niwaki("sensitivity", place, *arguments, "--output", output)
        assert (code, out) == (0, f"{output}\n"), err
        return output, err.splitlines()

    return call


def test_sensitivity_measures_each_linear_alone(measured, run):
    """Each number again, by a plain loop."""
    import torch

    from niwaki.inference import WholeFile, scores

    file = run.parent / "rows.jsonl"
    folder, said = measured(file, "--sparsities", "0.6,0.95", "--target", "0.8")
    names = {"measured.json", "sensitivity.json", "sensitivity.md", "sensitivity.png", "sparsity-0.8.json"}
    assert {path.name for path in folder.iterdir()} == names
    facts = json.loads((folder / "sensitivity.json").read_text())
    assert len(facts["units"]) == 18
    assert len(said) == 36
    name = "bert.encoder.layer.2.output.dense"
    saved = artifact.load(run / "model")
    source = WholeFile(train=str(file))
    assert facts["base"] == pytest.approx(scores(saved, source)[0]["accuracy"])
    weight = saved.model.get_submodule(name).weight.data
    for sparsity in (0.6, 0.95):
        weight[weight.abs() <= weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values] = 0
        assert torch.count_nonzero(weight) == weight.numel() - round(sparsity * weight.numel())
        found = facts["units"][name]["scores"][str(sparsity)]
        assert found == pytest.approx(scores(saved, source)[0]["accuracy"])
    assert {score for unit in facts["units"].values() for score in unit["scores"].values()} != {facts["base"]}
    text = (folder / "sensitivity.md").read_text()
    assert f"| `{name}` | 2,048 |" in text
    assert "80% in all" in text


def test_sensitivity_maps_add_up_to_their_target(measured, run):
    from niwaki.model.anatomy import Anatomy

    folder, _ = measured("--unit", "block", "--target", "0.7", "--limit", "12")
    found = json.loads((folder / "sparsity-0.7.json").read_text())
    linears = Anatomy.of(artifact.load(run / "model").model).linears()
    assert set(found["sparsity"]) == set(linears)
    removed = sum(found["sparsity"][name] * linear.weight.numel() for name, linear in linears.items())
    whole = sum(linear.weight.numel() for linear in linears.values())
    assert round(removed) == round(0.7 * whole)
    assert found["overall"] == pytest.approx(0.7, abs=1 / whole)
    assert set(found["scores"]) == {"map", "uniform"}


def test_sensitivity_takes_over_what_it_measured(measured, run):
    file = run.parent / "rows.jsonl"
    folder, said = measured(file, "--unit", "part", "--sparsities", "0.5")
    assert len(said) == 6
    first = json.loads((folder / "sensitivity.json").read_text())
    _, said = measured(file, "--unit", "part", "--sparsities", "0.5,0.9")
    assert len(said) == 6
    second = json.loads((folder / "sensitivity.json").read_text())
    assert all(second["units"][u]["scores"]["0.5"] == one["scores"]["0.5"] for u, one in first["units"].items())
    _, said = measured(file, "--unit", "part", "--sparsities", "0.5", "--limit", "10")  # other rows
    assert len(said) == 6


def test_sensitivity_of_other_tasks(measured, tagger, writer, tmp_path):
    for place, metric in ((tagger, "f1"), (writer, "perplexity")):
        output = tmp_path / metric
        measured("--unit", "block", "--sparsities", "0.9", "--target", "0.4", place=place, output=output)
        facts = json.loads((output / "sensitivity.json").read_text())
        assert (facts["metric"], len(facts["units"])) == (metric, 3)
        assert facts["mode"] == ("max" if metric == "f1" else "min")


def test_sensitivity_of_an_adapter_beside_its_base(measured, beside):
    folder, said = measured("--unit", "block", "--sparsities", "0.9", place=beside[0])
    assert len(said) == 3
    facts = json.loads((folder / "sensitivity.json").read_text())
    assert list(facts["units"]) == [f"bert.encoder.layer.{i}" for i in range(3)]


def test_sensitivity_refuses(refused, run, tmp_path, monkeypatch, niwaki):
    file = run.parent / "rows.jsonl"
    assert "needs the folder of a run or its model/" in refused("sensitivity", tmp_path, file)
    assert "needs a file with labelled rows, or the folder" in refused("sensitivity", run / "model")
    unlabelled = write(tmp_path / "plain.jsonl", [{"text": "a"}])
    assert "label" in refused("sensitivity", run, unlabelled)
    strange = write(tmp_path / "strange.jsonl", [{"text": "a", "label": "bird"}])
    assert "'bird' is none of the 2" in refused("sensitivity", run, strange)
    assert "none.jsonl" in refused("sensitivity", run, tmp_path / "none.jsonl")
    assert "--sparsities 1.5: needs" in refused("sensitivity", run, file, "--sparsities", "0.5,1.5")
    assert "--sparsities half: needs" in refused("sensitivity", run, file, "--sparsities", "half")
    assert "--target 0.95: needs" in refused("sensitivity", run, file, "--target", "0.95")
    assert "is in the artifact" in refused("sensitivity", run, file, "--output", run / "model" / "x")
    assert "--column: names a column" in refused("sensitivity", run, "--column", "text=a")
    assert not (run / "sensitivity").exists()


def test_sensitivity_that_is_stopped_says_how_to_go_on(niwaki, run, tmp_path, monkeypatch):
    from niwaki.measure import sensitivity

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "measure", stop)
    code, out, err = niwaki("sensitivity", run, "--output", tmp_path / "out")
    assert (code, out) == (130, "")
    assert "the same command goes on" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_unpack_writes_what_from_pretrained_reads(niwaki, refused, run, tmp_path):
    from transformers import AutoModelForSequenceClassification

    code, out, _ = niwaki("unpack", run, tmp_path / "plain")
    assert (code, out) == (0, f"{tmp_path / 'plain'}\n")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert "exists already" in refused("unpack", run, tmp_path / "plain")
