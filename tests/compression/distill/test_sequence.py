"""Sequence-level distillation: what is learned is what the teacher's beam search finds, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, finish, recipe_of, save, train, write_rows, write_teachers

from niwaki import compose
from niwaki.compression.distill.cross_vocabulary import CrossVocabulary
from niwaki.compression.distill.logits import Logits
from niwaki.compression.distill.sequence import SequenceLevel
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher
from niwaki.stage import refuse_conflicts
from niwaki.task.causal_lm import CausalLM
from niwaki.task.task import IGNORED

KINDS = [("bart", "translation"), ("t5", "translation"), ("llama", "causal_lm"), ("bart", "causal_lm")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def sides(setting: Callable[..., Any], family: str, task: str, **fields: Any) -> tuple[Any, Any, Any]:
    """A student, its teacher, and what is done to the student's batches."""
    one, other = setting(family, task), setting(family, task, seed=1)
    if task == "causal_lm":
        one.task = CausalLM(max_length=8, max_new_tokens=5)
    for parameter in other.model.parameters():
        parameter.data *= 3
    teacher = Teacher(other.model)
    stage = SequenceLevel(teacher="there", **fields)
    (retell,) = stage.prepare(one.model, one.context(load_teacher=lambda *_: teacher)).retells
    return one, teacher, retell


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_answers_are_those_of_the_teachers_search(
    setting: Callable[..., Any], family: str, task: str, num_beams: int
) -> None:
    one, teacher, retell = sides(setting, family, task, num_beams=num_beams)
    model, batch = teacher.model, one.numbered()
    order = torch.tensor([1, 0])
    told = retell({name: tensor[order] for name, tensor in batch.items()})
    for place, number in enumerate(order.tolist()):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        start = 4 if task == "causal_lm" else None
        if start and len(ids) <= start:
            continue
        written = model.generate(ids[None, :start], num_beams=num_beams, max_new_tokens=4 if start else 16)[0]
        labels = told["labels"][place]
        found = labels[labels != IGNORED].tolist()
        whole = written[start or 1 :].tolist()
        end = model.config.eos_token_id
        assert found == whole[: whole.index(end) + 1 if end in whole else None]
        if start:
            assert told["input_ids"][place, :start].tolist() == ids[:start].tolist()
            assert told["input_ids"][place, start : start + len(found)].tolist() == found
            assert told["attention_mask"][place].sum() == start + len(found)
    loss = one.task.loss(one.model(**one.task.inputs(told)), told)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for p in model.parameters())


def test_a_block_too_short_to_go_on_from_stays(setting: Callable[..., Any]) -> None:
    one, _, retell = sides(setting, "llama", "causal_lm")
    batch = one.numbered()
    short = batch["attention_mask"].sum(1) <= 4
    assert short.any()
    told = retell(batch)
    width = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(told[name][short, :width], batch[name][short])


def test_the_teacher_writes_once_and_not_at_all_the_next_time(setting: Callable[..., Any]) -> None:
    ends = []
    for calls in (True, False):
        one, teacher, retell = sides(setting, "bart", "translation")
        asked: list[int] = []
        teacher.model.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        ends.append(retell(one.numbered())["labels"])
        first = len(asked)
        retell(one.numbered())
        assert bool(first) is calls
        assert len(asked) == first
    assert torch.equal(*ends)


def test_what_changes_a_text_is_another_file(setting: Callable[..., Any], cache: Path) -> None:
    def files(settings: dict[str, Any] | None = None, **fields: Any) -> int:
        one, _, retell = sides(setting, "bart", "translation", **fields)
        retell._texts._context.writing = settings or {}
        retell(one.numbered())
        return len([path for path in cache.iterdir() if path.is_dir()])

    assert [files(), files(num_beams=2), files({"max_target_length": 9}), files()] == [1, 2, 3, 3]


def test_a_teacher_that_other_terms_ask_is_kept(setting: Callable[..., Any]) -> None:
    one, other = setting("bart", "translation"), setting("bart", "translation", seed=1)
    teacher = Teacher(other.model)
    teacher.terms = 2
    context = one.context(load_teacher=lambda *_: teacher)
    (retell,) = SequenceLevel(teacher="there").prepare(one.model, context).retells
    (term,) = Logits(teacher="there").prepare(one.model, context).terms.values()
    for _ in range(2):
        told = retell(one.numbered())
        assert term(one.model(**one.task.inputs(told)), told) > 0


@pytest.mark.parametrize(("share", "expected"), [(1.0, 200), (0.3, 60)])
def test_a_share_of_the_batches_is_the_teachers(setting: Callable[..., Any], share: float, expected: int) -> None:
    one, _, retell = sides(setting, "bart", "translation", share=share)
    batch = one.numbered()
    told = sum(retell(batch) is not batch for _ in range(200))
    assert abs(told - expected) <= 3 * (200 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("model", ["tiny-bart", "tiny-t5"])
def test_a_whole_run(model: str, tmp_path: Path) -> None:
    """Trained, resumed bit for bit, folded, saved and reloaded; alone and with word-level distillation."""
    files = {"translation": write_rows(tmp_path)["translation"]}
    settings = [f"model={model}"]
    teacher = recipe_of("translation", files["translation"], *settings, "seed=1")
    corpus, work = begin(teacher)
    save(tmp_path / "teacher", teacher, corpus, work)
    place = f"compression.sequence.teacher={tmp_path / 'teacher'}"
    for number, methods in enumerate(("distill/sequence", "distill/sequence,distill/logits,distill/hidden")):
        recipe = recipe_of(
            "translation", files["translation"], *settings, "tuning=lora", f"compression=[{methods}]", place,
            "compression.sequence.num_beams=2", "compression.sequence.share=0.5",
        )  # fmt: skip
        corpus, work = begin(recipe)
        folder = tmp_path / str(number)
        folder.mkdir()
        train(recipe, corpus, work, folder)
        finish(recipe, corpus, work, folder)


@pytest.mark.parametrize(
    "methods",
    [
        ["prune/neurons", "compression.neurons.importance=activation", "compression.neurons.schedule=cubic"],
        ["prune/magnitude,quantize/qat", "compression.magnitude.schedule=cubic"],
    ],
    ids=lambda one: one[0],
)
def test_other_methods_read_the_texts_of_the_teacher(methods: list[str], tmp_path: Path) -> None:
    files = {"translation": write_rows(tmp_path)["translation"]}
    teacher = recipe_of("translation", files["translation"], "seed=1")
    corpus, work = begin(teacher)
    save(tmp_path / "teacher", teacher, corpus, work)
    recipe = recipe_of(
        "translation", files["translation"], f"compression=[{methods[0]},distill/sequence]", *methods[1:],
        f"compression.sequence.teacher={tmp_path / 'teacher'}", "compression.sequence.num_beams=2",
    )  # fmt: skip
    corpus, work = begin(recipe)
    train(recipe, corpus, work, tmp_path)
    finish(recipe, corpus, work, tmp_path)


def test_a_text_without_room_to_go_on_is_refused(setting: Callable[..., Any], cache: Path) -> None:
    one, _, retell = sides(setting, "llama", "causal_lm")
    one.task = CausalLM(max_length=200, max_new_tokens=5)
    retell._texts._context.write = one.task.write
    with pytest.raises(ConfigError, match=r"^compression\.sequence: no block of the training text is long enough"):
        retell(one.numbered())
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_teacher_whose_decoder_starts_elsewhere_is_refused(tmp_path: Path) -> None:
    files = {"translation": write_rows(tmp_path)["translation"]}
    teacher = recipe_of("translation", files["translation"], "model.overrides={decoder_start_token_id: 2}")
    corpus, work = begin(teacher)
    save(tmp_path / "teacher", teacher, corpus, work)
    place = f"compression.logits.teacher={tmp_path / 'teacher'}"
    with pytest.raises(ConfigError, match="its decoder starts from token 2, the student's from 3"):
        begin(recipe_of("translation", files["translation"], "compression=distill/logits", place))


def test_the_causal_students_run(tmp_path: Path) -> None:
    files = {"causal_lm": write_rows(tmp_path)["causal_lm"]}
    teacher = write_teachers(files, tmp_path / "teachers", larger=True)["causal_lm"]
    recipe = recipe_of(
        "causal_lm", files["causal_lm"], "compression=distill/sequence", f"compression.sequence.teacher={teacher}",
        "task.max_new_tokens=8", "compression.sequence.num_beams=2",
    )  # fmt: skip
    corpus, work = begin(recipe)
    train(recipe, corpus, work, tmp_path)
    finish(recipe, corpus, work, tmp_path)


def refused(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.build(compose.compose([*settings]).config)
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(setting: Callable[..., Any]) -> None:
    plain = ["task=translation", "model=tiny-bart", "compression=distill/sequence", "compression.sequence.teacher=x"]
    assert refused(*plain, "compression.sequence.num_beams=0").startswith("compression.sequence.num_beams=0: needs a")
    assert refused(*plain, "compression.sequence.share=0").startswith("compression.sequence.share=0")
    assert refused(*plain, "task_weight=0").startswith("task_weight=0: nothing is left to learn from")
    one = setting("bert", "classification")
    with pytest.raises(ConfigError, match=r"^compression\.sequence: the teacher writes; needs a model that does"):
        SequenceLevel(teacher="x").check(one.context().anatomy, {})
    with pytest.raises(ConfigError, match="sequence and distill/cross_vocabulary"):
        refuse_conflicts([SequenceLevel(teacher="x"), CrossVocabulary(teacher="y")])
    with pytest.raises(ConfigError, match=r"logits\.cache=true and distill/sequence"):
        refuse_conflicts([SequenceLevel(teacher="x"), Logits(cache=True)])
