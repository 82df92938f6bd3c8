"""On-policy distillation: texts that the student writes, judged where it wrote them, by plain loops; what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, live, recipe_of, save, write_rows, write_teachers

from niwaki.compression.distill import divergence
from niwaki.compression.distill.on_policy import OnPolicy, judged, sample
from niwaki.compression.prune.importance import Meter
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import recorder_of, unseen
from niwaki.model.teacher import Teacher
from niwaki.model.units import units_of


def sides(setting: Callable[..., Any], **fields: Any) -> tuple[Any, Any, Any]:
    one, other = setting("llama", "causal_lm"), setting("llama", "causal_lm", seed=1)
    for parameter in other.model.parameters():
        parameter.data *= 2
    teacher = Teacher(other.model)
    context = one.context(load_teacher=lambda *_: teacher)
    stage = OnPolicy(**({"teacher": "there", "prompt": 3, "new_tokens": 5} | fields))
    return one, teacher, stage.prepare(one.model, context).terms["distill/on_policy"]


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_what_was_written_goes_to_the_end_token_and_follows_the_models_own_chances(
    setting: Callable[..., Any], where: str
) -> None:
    one = setting("llama", "causal_lm")
    starts = one.batch()["input_ids"][:1, :3].repeat(4000, 1)
    with torch.no_grad():
        one.model.lm_head.weight.mul_(20)
        chances = one.model.eval()(starts[:1]).logits[0, -1].softmax(-1)
    end = int(chances.argmax())
    one.model.generation_config.eos_token_id = None
    getattr(one.model, where).eos_token_id = [end]
    texts, written = sample(one.model, starts, 3)
    assert texts.shape == written.shape == (4000, 6)
    assert torch.equal(texts[:, :3], starts)
    assert not written[:, :3].any()
    for row in range(200):
        ended = False
        for place in (3, 4, 5):
            assert bool(written[row, place]) == (not ended)
            ended = ended or int(texts[row, place]) == end
    assert not written[:200, 3:].all()
    counts = torch.bincount(texts[:, 3], minlength=len(chances)) / 4000
    assert float((counts - chances).abs().max()) < 0.03
    assert float(chances.max()) > 0.05


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_the_divergence_by_hand(setting: Callable[..., Any], kind: Any) -> None:
    one, teacher, _ = sides(setting)
    texts = one.batch()["input_ids"][:2, :6]
    written = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    measure = OnPolicy(teacher="x", divergence=kind)
    found = judged(one.model.eval(), teacher, texts, written, divergence.measure_of(measure.divergence, None, None))
    total = 0.0
    with torch.no_grad():
        q, p = (side(texts).logits.softmax(-1) for side in (one.model, teacher.model))
    for row, place in [(0, 3), (0, 4), (1, 3), (1, 4), (1, 5)]:  # the token at `place` was drawn at the one before it
        ours, theirs = q[row, place - 1].tolist(), p[row, place - 1].tolist()
        first, second = (ours, theirs) if kind == "reverse_kl" else (theirs, ours)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(first, second, strict=True))
    assert found.item() == pytest.approx(total / 5, rel=1e-3)


def test_it_teaches_the_student_and_leaves_the_rest_alone(setting: Callable[..., Any]) -> None:
    one, teacher, term = sides(setting, weight=0.5)
    one.model.train()
    batch = one.batch()
    value = term(None, batch)
    assert value.item() > 0
    assert one.model.training
    value.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in one.model.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_the_same_model_has_nothing_to_learn(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    one.model.eval()
    context = one.context(load_teacher=lambda *_: Teacher(setting("llama", "causal_lm").model))
    term = OnPolicy(teacher="x", prompt=3, new_tokens=4).prepare(one.model, context).terms["distill/on_policy"]
    assert term(None, one.batch()).item() == pytest.approx(0.0, abs=1e-5)  # type: ignore[operator]


def test_the_share_of_the_steps(setting: Callable[..., Any]) -> None:
    one, _, term = sides(setting, share=0.25, new_tokens=1)
    values = [term(None, one.batch()).item() for _ in range(60)]
    assert 5 <= sum(value > 0 for value in values) <= 27


def test_rows_that_are_shorter_than_the_prompt_are_left_out(setting: Callable[..., Any]) -> None:
    one, _, term = sides(setting, prompt=100)
    assert term(None, one.batch()).item() == 0.0


def test_other_terms_still_see_the_pass_over_the_data(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    recorder = recorder_of(Anatomy.of(one.model))
    one.model(**one.task.inputs(one.batch()))
    seen = recorder.seen
    assert seen is not None
    with unseen(one.model):
        sample(one.model, one.batch()["input_ids"][:, :3], 2)
        assert recorder.seen is not seen
    assert recorder.seen is seen


def test_under_a_chain_it_is_the_chained_model_that_writes(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    Magnitude(sparsity=0.5).prepare(one.model, one.context())
    starts = one.batch()["input_ids"][:2, :3]
    torch.manual_seed(4)
    texts, _ = sample(one.model, starts, 6)
    torch.manual_seed(4)
    expected = starts
    with torch.no_grad():
        for _ in range(6):  # without a cache, of tokens or of weights
            chances = one.model.eval()(expected).logits[:, -1].float().softmax(-1)
            expected = torch.cat([expected, torch.multinomial(chances, 1)], 1)
    assert torch.equal(texts, expected)


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_what_the_student_writes_does_not_count_as_data(setting: Callable[..., Any], importance: Any) -> None:
    """A meter of neurons gathers of the batch what it gathers without the term, of however many texts that is."""
    one, _, term = sides(setting, prompt=6, new_tokens=4)
    units = units_of(Anatomy.of(one.model), "neurons")[0]
    batch = one.batch()
    batch["attention_mask"][0, 5:] = 0  # too short to go on from: fewer texts are written than there are rows
    meter = Meter(units, importance)
    one.model.get_submodule(units.output).register_forward_pre_hook(meter)
    found = []
    for more in (False, True):
        one.model.zero_grad()
        loss = one.task.loss(outputs := one.model(**one.task.inputs(batch)), batch)
        (loss + term(outputs, batch) if more else loss).backward()
        meter.collect()
        found.append(meter.take())
    assert found[0][1] == found[1][1]
    assert float(found[0][0].sum()) > 0
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("tuning", ["full", "lora", "prefix"])
def test_a_whole_run_with_other_terms(tmp_path: Path, tuning: str) -> None:
    """Resumes bit for bit, since what is sampled follows the generator of the checkpoint."""
    files = write_rows(tmp_path)
    teacher = write_teachers(files, tmp_path / "teachers", larger=True)["causal_lm"]
    terms = ["on_policy", "logits", *(["pkd"] if tuning != "prefix" else [])]
    recipe = recipe_of(
        "causal_lm", files["causal_lm"], f"tuning={tuning}",
        f"compression=[{','.join(f'distill/{term}' for term in terms)}]",
        f"compression.logits.teacher={teacher}", "compression.on_policy.prompt=4", "compression.on_policy.new_tokens=4",
    )  # fmt: skip
    live(recipe, tmp_path)


def test_a_teacher_that_reads_less_than_is_written_is_refused(tmp_path: Path) -> None:
    files = {"causal_lm": write_rows(tmp_path)["causal_lm"]}
    length = ["task.max_length=32", "task.max_new_tokens=8"]
    short = recipe_of("causal_lm", files["causal_lm"], "model.overrides={max_position_embeddings:40}", *length)
    corpus, work = begin(short)
    save(tmp_path / "teacher", short, corpus, work)
    more = [*length, f"compression.on_policy.teacher={tmp_path / 'teacher'}", "compression=distill/on_policy"]
    with pytest.raises(
        ConfigError, match=r"^compression\.on_policy\.teacher=.*: reads at most 40 tokens, and is to .* 41"
    ):
        begin(recipe_of("causal_lm", files["causal_lm"], *more, "compression.on_policy.new_tokens=25"))
    begin(recipe_of("causal_lm", files["causal_lm"], *more, "compression.on_policy.new_tokens=24"))


def test_refusals(setting: Callable[..., Any]) -> None:
    for fields, named in (
        ({"share": 0.0}, "share=0"),
        ({"prompt": 0}, "prompt=0"),
        ({"alpha": 0.5}, "alpha=0.5: has no"),
    ):
        with pytest.raises(ConfigError, match=rf"^compression\.on_policy\.{named}"):
            OnPolicy(teacher="x", **fields)  # type: ignore[arg-type]
    anatomy = setting("bert", "classification").context().anatomy
    with pytest.raises(ConfigError, match=r"^compression\.on_policy: the student goes on from the start of a te"):
        OnPolicy(teacher="x").check(anatomy, {})
    anatomy = setting("llama", "causal_lm").context().anatomy
    with pytest.raises(ConfigError, match=r"new_tokens=100000: the model reads at most"):
        OnPolicy(teacher="x", new_tokens=100_000).check(anatomy, {})
