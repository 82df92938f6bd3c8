"""Remembered answers: they are what the teacher says, row by row; whatever changes, they are another file."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from lifecycle import begin, look, recipe_of, write_rows, write_teachers

from niwaki.compression.distill import remembered
from niwaki.compression.distill.answers import Kept, RememberedLogits
from niwaki.compression.distill.hidden import Hidden
from niwaki.compression.distill.logits import Logits, softened_divergence
from niwaki.compression.distill.remembered import remove_oldest, spans
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.model.teacher import Teacher
from niwaki.stage import refuse_conflicts

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def sides(
    setting: Callable[..., Any], family: str, task: str, overrides: dict[str, Any] | None = None, **fields: Any
) -> tuple[Any, Any, dict[bool, Any]]:
    """A student, a teacher (with `overrides` of its config), and their terms: without a cache and with one."""
    one, other = setting(family, task), setting(family, task, seed=1, overrides=overrides or {})
    for parameter in other.model.parameters():
        parameter.data *= 3
    teacher = Teacher(other.model)  # with a cache
    terms = {}
    for kept, side in ((False, Teacher(other.model)), (True, teacher)):
        context = one.context(load_teacher=lambda *_, side=side: side)
        stage = Logits(**({"teacher": "there", "temperature": 3.0, "weight": 0.7, "cache": kept} | fields))
        terms[kept] = stage.prepare(one.model, context).terms["distill/logits"]
    return one, teacher, terms


def shuffled(one: Any) -> dict[str, torch.Tensor]:
    """Some of the rows, in another order and in a batch of other padding."""
    whole = one.numbered()
    order = torch.tensor([2, 0]) if len(whole["row"]) > 2 else torch.tensor([1, 0])
    return {name: tensor[order] for name, tensor in whole.items()}


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 1}, {"top_k": 2, "divergence": "reverse_kl"}, {"divergence": "skewed_kl"}]
)
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_loss_is_that_of_the_teacher_itself(
    setting: Callable[..., Any], family: str, task: str, fields: dict[str, Any]
) -> None:
    one, _, terms = sides(setting, family, task, **fields)
    for batch in (one.numbered(), shuffled(one)):
        outputs = one.model(**one.task.inputs(batch))
        live, kept = (terms[kind](outputs, batch) for kind in (False, True))
        assert live.item() > 1e-4
        assert kept.item() == pytest.approx(live.item(), rel=1e-4)
    kept.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in one.model.parameters())


def test_the_teacher_runs_once_for_each_row_and_not_at_all_the_next_time(
    setting: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in (1, 0):
        one, teacher, terms = sides(setting, "bert", "classification")
        calls = []
        teacher.model.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        batch = one.numbered()
        for _ in range(3):
            terms[True](one.model(**one.task.inputs(batch)), batch)
        assert len(calls) == expected
        assert capsys.readouterr().err.count("its teacher answers each training row once") == expected


def test_the_model_of_the_teacher_is_let_go_once_all_is_known(setting: Callable[..., Any]) -> None:
    one, teacher, terms = sides(setting, "bert", "classification")
    model, batch = weakref.ref(teacher.model), one.numbered()
    del terms[False]
    terms[True](one.model(**one.task.inputs(batch)), batch)
    gc.collect()
    assert model() is None


def test_what_changes_an_answer_is_another_file(setting: Callable[..., Any], cache: Path) -> None:
    def made(change: Callable[[Any, Any], None] = lambda *_: None, autocast: bool = False, **fields: Any) -> int:
        one, teacher, terms = sides(setting, "bert", "ner", **fields)
        change(one, teacher)
        batch = one.numbered()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms[True](one.model(**one.task.inputs(batch)), batch)
        return len([path for path in cache.iterdir() if path.is_dir()])

    def another_weight(_: Any, teacher: Any) -> None:
        next(iter(teacher.model.parameters())).data[0, 0] += 1e-3

    def another_row(one: Any, _: Any) -> None:
        one.rows["tokens"][0] = ["another", *one.rows["tokens"][0][1:]]

    def in_bf16(_: Any, teacher: Any) -> None:
        teacher.precision = "bf16"

    assert made() == made() == 1
    assert made(another_weight) == 2
    assert made(another_row) == 3
    assert made(in_bf16) == 4
    assert made(autocast=True) == 5
    assert made(top_k=1) == 6
    assert made(top_k=1, temperature=1.0) == 7
    assert made(temperature=1.0) == 7  # all logits are there
    assert made(overrides={"hidden_act": "relu"}) == 8  # the same tensors


@pytest.mark.parametrize(
    ("family", "setting_of", "value"),
    [
        ("bert", "hidden_act", "relu"), ("bert", "num_attention_heads", 2), ("bert", "layer_norm_eps", 0.1),
        ("modernbert", "local_attention", 4), ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
    ],
)  # fmt: skip
def test_a_setting_that_changes_no_tensor_makes_another_teacher(
    setting: Callable[..., Any], family: str, setting_of: str, value: Any
) -> None:
    one, same, other = (setting(family, overrides=o).model for o in ({}, {}, {setting_of: value}))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    same.config._name_or_path = "elsewhere"
    assert Teacher(one).fingerprint() == Teacher(same).fingerprint() != Teacher(other).fingerprint()


def test_other_code_gives_other_answers(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = inspect.getsource
    for number, changed in enumerate((None, "divergence", "answers", "remembered", "states", "teacher"), start=1):
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda m, c=changed: read(m) + "#" * m.__name__.endswith(f".{c}"))
            one, _, terms = sides(setting, "bert", "classification")
            terms[True](one.model(**one.task.inputs(one.numbered())), one.numbered())
        assert len([path for path in cache.iterdir() if path.is_dir()]) == number


def test_all_logits_serve_any_temperature_and_the_likeliest_one() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 9.0]])
    assert torch.equal(Kept(classes=3).of(logits).values, logits[:, :3])
    kept = Kept(classes=3, top_k=1, temperature=2.0).of(logits)
    chances = torch.softmax(torch.tensor([1.5, 0.0, 0.5]), 0)
    assert torch.allclose(kept.values.exp(), torch.stack([chances[0], chances[1] + chances[2]])[None])
    assert kept.places is not None
    assert kept.places.tolist() == [[0]]


def test_the_places_of_rows() -> None:
    starts, counts = spans(np.array([2, 2, 2, 0, 3, 3]), 5)
    assert starts.tolist() == [3, 0, 0, 4, 0]
    assert counts.tolist() == [1, 0, 3, 2, 0]


def test_two_that_want_the_same_answers_at_once_share_one_pass(setting: Callable[..., Any], cache: Path) -> None:
    asked = [sides(setting, "bert", "classification") for _ in range(2)]
    calls: list[int] = []
    errors: list[BaseException] = []

    def ask(one: Any, teacher: Any, terms: Any) -> None:
        teacher.model.register_forward_hook(lambda *_: calls.append(1))
        batch = one.numbered()
        try:
            terms[True](one.model(**one.task.inputs(batch)), batch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=side) for side in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(calls) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_pass_that_breaks_off_leaves_nothing(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, terms = sides(setting, "bert", "classification")
    batch = one.numbered()
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            terms[True](one.model(**one.task.inputs(batch)), batch)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    terms[True](one.model(**one.task.inputs(batch)), batch)


@pytest.fixture
def aged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four answers, d the oldest, and room for two."""
    monkeypatch.setattr(remembered, "LARGEST", 25)
    for age, name in enumerate("dcba"):
        (tmp_path / "four" / name).mkdir(parents=True)
        (tmp_path / "four" / name / "values").write_bytes(b"0123456789")
        os.utime(tmp_path / "four" / name, (1000 + age, 1000 + age))
    return tmp_path / "four"


def folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_the_oldest_answers_go_first(aged: Path) -> None:
    remove_oldest(aged, aged / "d")
    assert folders(aged) == ["a", "d"]


def test_answers_that_a_process_opens_just_now_stay(aged: Path) -> None:
    with FileLock(aged / "c.lock"):
        remove_oldest(aged, aged / "d")
    assert folders(aged) == ["c", "d"]


def test_answers_that_another_process_takes_away_meanwhile(aged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Path.is_dir

    def and_lose(path: Path) -> bool:
        found = look(path)
        if path.name == "b":
            shutil.rmtree(path, ignore_errors=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", and_lose)
        remove_oldest(aged, aged / "d")
    assert folders(aged) == ["a", "d"]


def test_they_are_opened_under_their_lock_and_count_as_used(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, locked = RememberedLogits._read, []

    def reading(answers: RememberedLogits, folder: Path) -> Any:
        with pytest.raises(Timeout), FileLock(f"{folder}.lock", blocking=False):
            pass
        locked.append(folder)
        return read(answers, folder)

    monkeypatch.setattr(RememberedLogits, "_read", reading)
    for _ in range(2):
        one, _, terms = sides(setting, "bert", "classification")
        terms[True](one.model(**one.task.inputs(one.numbered())), one.numbered())
        (folder,) = set(locked)
        assert folder.stat().st_mtime > 1000
        os.utime(folder, (1000, 1000))
    assert len(locked) == 2


def test_what_was_taken_away_does_not_come_back_as_a_file(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, terms = sides(setting, "bert", "classification")
    monkeypatch.setattr(remembered, "remove_oldest", lambda _, path: shutil.rmtree(path))
    with pytest.raises(ConfigError, match="cannot be used"):
        terms[True](one.model(**one.task.inputs(one.numbered())), one.numbered())
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_pass_left_goes_with_the_next_one(setting: Callable[..., Any], cache: Path) -> None:
    for left in (False, True):
        one, _, terms = sides(setting, "bert", "classification")
        terms[True](one.model(**one.task.inputs(one.numbered())), one.numbered())
        if not left:
            (name,) = folders(cache)
            shutil.rmtree(cache / name)
            for stale in (f".{name}.x", ".another.y"):
                (cache / stale).mkdir()
                (cache / stale / "values.f32").write_bytes(b"0")
    assert folders(cache) == [".another.y", name]


def test_a_disk_without_room_is_refused(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, terms = sides(setting, "bert", "classification")
    monkeypatch.setattr(remembered, "SPARE", 2**60)
    batch = one.numbered()
    with pytest.raises(ConfigError, match=r"^compression\.logits\.cache=true: the answers need"):
        terms[True](one.model(**one.task.inputs(batch)), batch)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("family", "task", "fields"),
    [
        ("bert", "classification", {}),
        ("bert", "ner", {"top_k": 1}),
        ("llama", "causal_lm", {}),
        ("t5", "translation", {}),
    ],
)
def test_the_room_that_is_needed_is_counted_exactly(
    setting: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch, family: str, task: str,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    """The first batch is the longest, and as large as all others together."""
    for room in (0, -1):
        one, _, terms = sides(setting, family, task, **fields)
        rows = sorted(one.features(), key=lambda row: -len(row["input_ids"]))
        batches = [one.task.collate([dict(row)], one.tokenizer) for row in rows]
        numbered = [{**batch, "row": torch.tensor([number])} for number, batch in enumerate(batches)]
        terms[True]._answers._context.training = lambda numbered=numbered: numbered
        if room == 0:
            terms[True](one.model(**one.task.inputs(numbered[0])), numbered[0])
            (folder,) = [path for path in cache.iterdir() if path.is_dir()]
            whole = sum((folder / name).stat().st_size for name in ("values.f32", "places.i32"))
            shutil.rmtree(folder)
        monkeypatch.setattr(remembered, "SPARE", 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=whole + room: SimpleNamespace(free=free))
        one, _, terms = sides(setting, family, task, **fields)
        terms[True]._answers._context.training = lambda numbered=numbered: numbered
        outputs = one.model(**one.task.inputs(numbered[0]))
        if room < 0:
            with pytest.raises(ConfigError, match="the answers need"):
                terms[True](outputs, numbered[0])
        else:
            terms[True](outputs, numbered[0])
            shutil.rmtree(folder)


def test_nothing_is_kept_of_tokens_that_are_hidden_anew_in_each_epoch(tmp_path: Path) -> None:
    settings = ["compression=[distill/logits]", "compression.logits.teacher=x", "compression.logits.cache=true"]
    with pytest.raises(
        ConfigError, match=r"^compression\.logits\.cache=true: other tokens are hidden in each epoch, of w"
    ):
        look(recipe_of("masked_lm", "rows.txt", *settings))
    look(recipe_of("causal_lm", "rows.txt", *settings))


def test_a_term_that_needs_the_teacher_anyway() -> None:
    with pytest.raises(ConfigError, match=r"logits\.cache=true and distill/hidden: the teacher runs for the other"):
        refuse_conflicts([Logits(teacher="x", cache=True), Hidden()])
    for place in ("x", "x/", "./x"):
        with pytest.raises(ConfigError, match="the teacher runs for the other term anyway"):
            refuse_conflicts([Hidden(teacher=place), Logits(teacher="x", cache=True)])


def test_a_term_with_another_teacher_leaves_the_answers_as_they_are(setting: Callable[..., Any]) -> None:
    refuse_conflicts([Logits(teacher="x", cache=True), Hidden(teacher="y")])
    (one, _, terms), third = sides(setting, "bert", "classification"), setting(seed=2)
    live = Teacher(third.model)
    live.terms = 1
    context = one.context(load_teacher=lambda *_: live)
    (hidden,) = Hidden(teacher="y").prepare(one.model, context).terms.values()
    batch, found = one.numbered(), []
    for _ in range(2):
        outputs = one.model(**one.task.inputs(batch))
        found.append((terms[True](outputs, batch).item(), hidden(outputs, batch).item()))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(terms[False](outputs, batch).item(), rel=1e-4)


@pytest.mark.parametrize("task", ["classification", "ner", "causal_lm"])
def test_a_fit_with_them_ends_where_one_without_does(tmp_path: Path, task: str) -> None:
    files = write_rows(tmp_path)
    teacher = write_teachers(files, tmp_path / "teachers", larger=True)[task]
    ends = []
    for number, cached in enumerate(("false", "true", "true")):
        recipe = recipe_of(
            task, files[task], "compression=distill/logits", f"compression.logits.teacher={teacher}",
            f"compression.logits.cache={cached}", "trainer.max_epochs=3", checkpoints=False,
        )  # fmt: skip
        corpus, work = begin(recipe)
        (tmp_path / str(number)).mkdir()
        fit(recipe, corpus, work, tmp_path / str(number), {}, resume=False)
        ends.append(work.model.state_dict())
    assert all(torch.allclose(ends[1][name], value, atol=1e-4) for name, value in ends[0].items())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[2].items())


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("ours", "theirs"), [(7, 5), (5, 7)])
def test_classes_that_only_one_side_has_do_not_count(ours: int, theirs: int, top_k: int | None) -> None:
    student, teacher = torch.randn(4, ours), torch.randn(4, theirs)
    student[:, 5:] = teacher[:, 5:] = 9.0  # embeddings are padded behind the vocabulary
    stage = Logits(teacher="x", top_k=top_k, temperature=2.0, cache=True)
    said = Kept(classes=5, top_k=top_k, temperature=2.0 if top_k else None).of(teacher)
    live = softened_divergence(student, teacher, 2.0, stage.measure(), top_k)
    torch.testing.assert_close(stage.compare_remembered(student, said, classes=5), live)
