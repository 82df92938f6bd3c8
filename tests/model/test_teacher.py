"""Teachers: only one that does the same task, on the same labels and the same vocabulary."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from niwaki import artifact, compose
from niwaki.compression.distill.cosine import Cosine
from niwaki.compression.distill.hidden import Hidden
from niwaki.compression.distill.logits import Logits
from niwaki.compression.distill.minilm import MiniLM
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Teacher, Teachers, check_teacher, load_teacher, outline_of_teacher
from niwaki.pipeline import run
from niwaki.stage import refuse_conflicts

FIELD = "compression.some_method.teacher"


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., str]:
    """Save a setting as an artifact (or as a Hugging Face folder)."""

    def save(one: Any, *, plain: bool = False) -> str:
        folder = tmp_path / "teacher"
        if plain:
            one.model.save_pretrained(folder)
            one.tokenizer.save_pretrained(folder)
        else:
            artifact.save(
                folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
                base_config=one.model.config.to_dict(), edits=[],
            )  # fmt: skip
        return str(folder)

    return save


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")])
def test_a_teacher_says_what_the_saved_model_says(
    setting: Callable[..., Any], place: Callable[..., str], family: str, task: str, plain: bool
) -> None:
    one = setting(family, task, seed=3)
    teacher = load_teacher(place(one, plain=plain), one.task, one.labels, one.tokenizer.get_vocab(), FIELD)
    assert torch.equal(one.logits(teacher), one.logits())


def refused(place: str, one: Any, vocabulary: dict[str, int] | None = None, look: Any = check_teacher) -> str:
    """What is said of a teacher before any of its weights are read."""
    with pytest.MonkeyPatch.context() as patch:
        if look is check_teacher:
            patch.setattr(artifact, "load", lambda *_: pytest.fail("weights were read"))
            patch.setattr(type(one.model), "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(ConfigError) as caught:
            look(place, one.task, one.labels, vocabulary or one.tokenizer.get_vocab(), FIELD)
    assert str(caught.value).startswith(f"{FIELD}={place!r}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_task(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    message = refused(place(setting("bert", "ner")), setting("bert", "classification"))
    assert "does the task ner, the student classification" in message


def test_other_labels(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    one = setting()
    where = place(one)
    one.labels = ("maybe", "never", "yes")
    assert "its labels are not the student's (never, no)" in refused(where, one)


@pytest.mark.parametrize("plain", [False, True])
def test_the_same_labels_in_another_order(setting: Callable[..., Any], place: Callable[..., str], plain: bool) -> None:
    one = setting()
    where = place(one, plain=plain)
    one.labels = ("yes", "no", "maybe")
    assert "order" in refused(where, one)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_a_vocabulary_of_the_same_size_and_other_content(
    setting: Callable[..., Any], place: Callable[..., str], family: str, task: str, plain: bool
) -> None:
    one = setting(family, task)
    vocabulary = one.tokenizer.get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    assert "its vocabulary" in refused(place(one, plain=plain), one, vocabulary)


def test_no_trained_head(setting: Callable[..., Any], place: Callable[..., str], tmp_path: Path) -> None:
    one = setting()
    one.model.base_model.save_pretrained(tmp_path / "bare")
    one.tokenizer.save_pretrained(tmp_path / "bare")
    assert "is a BertModel; the task classification needs a BertForSequenceClassification" in refused(
        str(tmp_path / "bare"), one
    )


def test_a_head_that_is_named_and_missing(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    one = setting()
    where = place(one, plain=True)
    state = {name: tensor.contiguous() for name, tensor in one.model.state_dict().items() if "classifier" not in name}
    save_file(state, f"{where}/model.safetensors", metadata={"format": "pt"})
    assert "has no trained head for the task classification (classifier." in refused(where, one, look=load_teacher)


def test_a_place_that_is_not_there(setting: Callable[..., Any]) -> None:
    one = setting()
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_teacher("./nowhere", one.task, one.labels, one.tokenizer.get_vocab(), FIELD)


def counting(one: Any) -> list[int]:
    """A list that grows with each forward pass of the model."""
    runs: list[int] = []
    one.model.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_teacher_runs_once_for_all_terms_of_a_batch(setting: Callable[..., Any]) -> None:
    one, other = setting(), setting(seed=1)
    teacher, runs = Teacher(other.model), counting(other)
    batch, next_one = one.batch(), one.batch()
    effects = []
    for stage in STAGES:

        def load(*_: Any) -> Teacher:
            teacher.terms += 1
            return teacher

        effects.append(stage.prepare(one.model, one.context(load_teacher=load)))
    runs.clear()
    terms = [term for effect in effects for term in effect.terms.values()]
    first = [term(one.model(**one.task.inputs(batch)), batch).item() for term in terms]
    assert len(runs) == 1
    assert teacher._said is None  # let go when all have asked
    again = [term(one.model(**one.task.inputs(next_one)), next_one).item() for term in terms]
    assert len(runs) == 2
    assert first == again
    alone = [stage.prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model))) for stage in STAGES]
    values = [next(iter(e.terms.values()))(one.model(**one.task.inputs(batch)), batch).item() for e in alone]
    assert values == pytest.approx(first, rel=1e-6)


STAGES = (Logits(teacher="x"), Hidden(), MiniLM(), Cosine())


def test_other_batches_are_not_mixed_up(setting: Callable[..., Any]) -> None:
    one = setting()
    teacher = Teacher(one.model)
    teacher.terms = 2
    batch = one.batch()
    shorter = {name: part[:3] for name, part in batch.items()}
    assert teacher(batch).outputs.logits.shape[0] == 8
    assert teacher(shorter).outputs.logits.shape[0] == 3
    assert torch.allclose(teacher(shorter).outputs.logits, one.logits()[:3], atol=1e-6)


def test_the_teachers_of_a_run_are_loaded_once(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    one = setting()
    where = place(one)
    stages = [Logits(teacher=where), Hidden(precision="bf16"), Cosine(teacher=where)]
    teachers = Teachers(stages, one.task, one.labels, one.tokenizer.get_vocab())
    found = [teachers(stage.teacher, FIELD) for stage in stages]
    assert found[0] is found[1] is found[2]
    assert (found[0].terms, found[0].precision) == (3, "bf16")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_teacher_in_bf16(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    expected = one.logits()
    teacher = Teacher(one.model, "bf16")
    assert {p.dtype for p in one.model.parameters()} == {torch.bfloat16}
    said = teacher(one.batch()).outputs.logits
    assert said.dtype == torch.bfloat16
    assert (said.float() - expected).abs().max() < 0.03
    with torch.autocast("cpu", dtype=torch.float16):
        assert teacher(one.batch()).outputs.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_teacher_in_integers(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    expected, names = one.logits(), list(Anatomy.of(one.model).linears())
    teacher = Teacher(one.model, "int8")
    linears = [one.model.get_submodule(name) for name in names]
    assert all(isinstance(linear, IntegerLinear) and linear.integer_product for linear in linears)
    said = teacher(one.batch()).outputs.logits
    assert not torch.equal(said, expected)
    assert (said - expected).abs().max() < 0.03
    teacher.watch(attention=True)
    seen = teacher(one.batch()).seen
    assert seen is not None
    assert seen.flows[0].blocks == len(seen.flows[0].attentions) == 3
    with pytest.raises(ConfigError, match=r"^compression\.x\.precision=int8: the teacher has integers already; leave"):
        Teacher(one.model, "int8", "compression.x.teacher")


def test_segments_for_a_teacher_that_has_none(setting: Callable[..., Any]) -> None:
    one, other = setting(), setting("distilbert")
    batch = one.batch({"text": ["a pine", "no"], "text_pair": ["cut", "it"], "label": ["yes", "no"]})
    assert "token_type_ids" in batch
    assert Teacher(other.model)(batch).outputs.logits.shape == (2, 3)


@pytest.mark.parametrize("tuning", ["lora", "prefix", "prompt", "adapter"])
def test_the_outline_of_a_tuned_and_rounded_artifact(
    setting: Callable[..., Any], place: Callable[..., str], tuning: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}", "label": "yn"[i % 2]}) + "\n" for i in range(20)))
    settings = ["data=files", f"data.train={rows}", "model=tiny-bert", "trainer=debug", "trainer.max_steps=1"]
    settings += [f"tuning={tuning}", "logger=none", "callbacks=[]", "measure=scores"]
    settings += ["compression=quantize/qat", "compression.qat.bits=4"]
    config = compose.compose(settings).config
    run(compose.build(config), tmp_path, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "load", lambda *_: pytest.fail("weights were read"))
        seen = outline_of_teacher(str(tmp_path / "model"), setting().task, ("n", "y"))
    assert [(flow.blocks, flow.states[1].shape) for flow in seen.flows] == [(3, (1, 3, 32))]
    assert [kept.query.shape for kept in seen.flows[0].attentions] == [(1, 4, 3, 8)] * 3


def test_what_was_said_is_let_go_when_all_have_asked_but_those_that_only_say(setting: Callable[..., Any]) -> None:
    one = setting()
    teacher = Teacher(one.model)
    teacher.terms = 3
    teacher.only_say()
    for _ in range(2):
        batch = one.batch()
        said = teacher(batch)
        assert teacher._said is said
        assert teacher(batch) is said
        assert teacher._said is teacher._batch is None
    teacher.let_go()  # of the one that said
    teacher(batch)
    assert teacher._said is not None


def test_what_was_said_before_is_gone_while_the_next_is_made(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting()
    teacher = Teacher(one.model)
    teacher.terms = 2
    before = weakref.ref(teacher(one.batch()).outputs.logits)
    gone: list[bool] = []
    one.model.register_forward_hook(lambda *_: gone.append(before() is None))
    teacher(one.batch())
    assert gone == [True]


def test_a_teacher_that_is_named_in_several_ways_is_loaded_once(
    setting: Callable[..., Any], place: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting()
    path = Path(place(one))
    monkeypatch.chdir(path.parent)
    ways = [path.name, f"{path.name}/", f"./{path.name}"]
    stages = [Logits(teacher=ways[0]), Hidden(teacher=ways[1]), MiniLM(teacher=ways[2], precision="bf16")]
    refuse_conflicts(stages)
    teachers = Teachers(stages, one.task, one.labels, one.tokenizer.get_vocab())
    (teacher,) = {teachers(way, FIELD) for way in ways}
    assert (teacher.terms, teacher.precision) == (3, "bf16")


def conflict(*stages: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_conflicts(stages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_who_names_the_teacher() -> None:
    refuse_conflicts([Logits(teacher="a"), Hidden(), MiniLM()])
    refuse_conflicts(
        [Logits(teacher="a"), Hidden(teacher="b", precision="bf16"), MiniLM(teacher="a", precision="int8")]
    )
    assert conflict(Hidden(), MiniLM()).endswith("teacher: needs a hub name, a folder, or an artifact of this project")
    said = conflict(Logits(teacher="a"), Hidden(teacher="b"), MiniLM())
    assert said.startswith("compression.minilm.teacher: needs")
    assert said.endswith("since the other terms have different ones (a and b)")
    said = conflict(Logits(teacher="a", precision="bf16"), Hidden(precision="int8"))
    assert said.startswith("compression.logits.precision=bf16 and compression.hidden.precision=int8: they share a tea")
    assert "they share a teacher" in conflict(
        Logits(teacher="a", precision="bf16"), Hidden(teacher="./a/", precision="int8")
    )
    refuse_conflicts([Logits(teacher="a"), Hidden(teacher="a/"), MiniLM()])
