"""How many heads and neurons go, and which: by hand; and what is refused, in one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune.heads import Heads
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.neurons import Neurons
from niwaki.compression.prune.structured import Choice
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.model.units import units_of
from niwaki.stage import ordered, refuse_conflicts
from niwaki.task.classification import Classification
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.full import Full
from niwaki.tuning.head import Head
from niwaki.tuning.lora import LoRA
from niwaki.tuning.oft import OFT


def drawn(choice: Choice, scores: list[list[float]], fraction: float = 1.0) -> list[list[int]]:
    return [mask.int().tolist() for mask in choice.draw([torch.tensor(row) for row in scores], fraction)]


def test_the_lowest_of_each_sublayer_go() -> None:
    scores = [[3.0, 1.0, 2.0, 4.0], [9.0, 8.0, 7.0, 6.0]]
    assert drawn(Choice([2, 1], [[], []], False), scores) == [[1, 0, 0, 1], [1, 1, 1, 0]]
    assert drawn(Choice([2, 1], [[], []], False), scores, 0.5) == [[1, 0, 1, 1], [1, 1, 1, 1]]


def test_named_units_stay_whatever_their_importance() -> None:
    assert drawn(Choice([2], [[1, 2]], False), [[3.0, 1.0, 2.0, 4.0]]) == [[0, 1, 1, 0]]


def test_over_the_whole_model_the_best_of_each_stays() -> None:
    scores = [[0.1, 0.3, 0.2], [5.0, 6.0, 7.0]]
    assert drawn(Choice([3], [[], []], True), scores) == [[0, 1, 0], [0, 1, 1]]


def test_taylor_terms_are_compared_after_their_norm() -> None:
    # 3/5 and 4/5 against 8/17 and 15/17: the lowest is the third, which has the largest raw value but one
    assert drawn(Choice([1], [[], []], True, normalize=True), [[3.0, 4.0], [800.0, 1500.0]]) == [[1, 1], [0, 1]]
    assert drawn(Choice([1], [[], []], True), [[3.0, 4.0], [800.0, 1500.0]]) == [[0, 1], [1, 1]]


def test_what_is_cut_is_least_and_what_stays_is_as_it_was(setting: Callable[..., Any]) -> None:
    one, plain = setting(), setting()
    with torch.no_grad():
        for model in (one.model, plain.model):
            entry = model.bert.encoder.layer[0].intermediate.dense
            entry.weight[:10] = 5.0
    effects = Neurons(keep=10).prepare(one.model, one.context())
    kept, was = one.model.bert.encoder.layer[0], plain.model.bert.encoder.layer[0]
    assert torch.equal(kept.intermediate.dense.weight, was.intermediate.dense.weight[:10])
    assert torch.equal(kept.intermediate.dense.bias, was.intermediate.dense.bias[:10])
    assert torch.equal(kept.output.dense.weight, was.output.dense.weight[:, :10])
    assert effects.edits[0].kept == {f"bert.encoder.layer.{i}.output.dense": 10 for i in range(3)}  # type: ignore[attr-defined]


def test_grouped_query_attention_loses_whole_groups(setting: Callable[..., Any]) -> None:
    one = setting("llama")
    Heads(keep=[[1], [0], 1]).prepare(one.model, one.context())
    for block in one.model.model.layers:
        own = block.self_attn
        assert (own.q_proj.out_features, own.k_proj.out_features, own.v_proj.out_features) == (16, 8, 8)
        assert own.num_key_value_groups == 2
    plain = setting("llama").model.model.layers[0].self_attn
    assert torch.equal(one.model.model.layers[0].self_attn.q_proj.weight, plain.q_proj.weight[16:])


def test_layers_may_end_with_different_sizes(setting: Callable[..., Any]) -> None:
    one = setting()
    for index, units in enumerate(units_of(Anatomy.of(one.model), "neurons")):
        for name in (*units.rows, units.output):
            one.model.get_submodule(name).weight.data *= 1 + index
    Neurons(scope="global", ratio=0.5).prepare(one.model, one.context())
    sizes = [units.count for units in units_of(Anatomy.of(one.model), "neurons")]
    assert sum(sizes) == 96
    assert sizes == sorted(sizes)
    assert sizes[0] >= 1 < sizes[2]


def test_depth_is_cut_before_width() -> None:
    class Earlier(Full):
        phase = Heads.phase

    assert [type(stage) for stage in ordered([Heads(), Full(), Earlier()])] == [Earlier, Heads, Full]


def empty(family: str = "bert", **fields: Any) -> Anatomy:
    return Anatomy.of(Tiny(name=family, **fields).empty(Classification(), ("a", "b")))


def test_an_empty_model_takes_the_shapes_that_will_be_left() -> None:
    anatomy = empty("t5")
    for stage in (Heads(ratio=0.25), Neurons(ratio=0.25)):
        stage.check(anatomy, anatomy.linears())
        stage.outline(anatomy.model)
    assert {units.count for units in units_of(anatomy, "heads")} == {3}
    assert {units.count for units in units_of(anatomy, "neurons")} == {48}
    assert all(parameter.is_meta for parameter in anatomy.model.parameters())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": 0.9}, r"heads\.ratio=0\.9: leaves none of the 4 heads of bert\.encoder\.layer\.0\.attention\.self"),
        ({"ratio": 0.1}, r"heads\.ratio=0\.1: has no effect on 4 heads"),
        ({"keep": 4}, r"heads\.keep=4: has no effect on 4 heads"),
        ({"keep": 5}, r"heads\.keep=5: \S+ has 4 heads; needs at most"),
        ({"keep": [1, 2]}, r"heads\.keep=\[1, 2\]: has 2 entries; the model has 3 sublayers"),
        ({"keep": [1, 2, [4]]}, r"heads\.keep=\[1, 2, \[4\]\]: \S+ has no number 4; needs numbers in 0\.\.3"),
        ({"ratio": 0.8, "scope": "global"}, r"heads\.ratio=0\.8: leaves 2 of 12 heads for 3 sublayers"),
        ({"ratio": 0.01, "scope": "global"}, r"heads\.ratio=0\.01: has no effect on 12 heads"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.{says}") as caught:
        Heads(**fields).check(empty(), {})
    assert "\n" not in str(caught.value)


def test_a_model_with_one_key_head_keeps_it() -> None:
    with pytest.raises(ConfigError, match="has no effect on 1 heads"):
        Heads().check(empty("llama", overrides={"num_key_value_heads": 1}), {})


def test_an_attention_whose_heads_are_not_known() -> None:
    anatomy = empty()
    del anatomy.model.bert.encoder.layer[1].attention.self.attention_head_size  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"prune/heads: \S+layer\.1\.attention\.self does not tell the size"):
        Heads().check(anatomy, {})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"ratio": 0.0}, "ratio"), ({"ratio": 1.0}, "ratio"), ({"ratio": 0.5, "keep": 2}, "ratio"),
        ({"keep": 0}, "keep"), ({"keep": []}, "keep"), ({"keep": [2, 0]}, "keep"), ({"keep": [[1, 1]]}, "keep"),
        ({"keep": [[]]}, "keep"), ({"keep": [[-1]]}, "keep"), ({"keep": 2, "scope": "global"}, "scope"),
        ({"scope": "block"}, "scope"), ({"importance": "random"}, "importance"), ({"calibration": 0}, "calibration"),
        ({"calibration": 8}, "calibration"),
        ({"calibration": 8, "importance": "taylor", "schedule": "cubic"}, "calibration"),
        ({"schedule": "linear"}, "schedule"), ({"schedule": "cubic", "begin": 0.6}, "begin"),
        ({"schedule": "cubic", "interval": 0}, "interval"), ({"interval": 3}, "interval"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Heads, Neurons])
def test_refusals_name_the_field(kind: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.{kind.kind}\.{name}[=:]") as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([Heads(scope="global"), QAT(group=8)], "prune/heads with scope=global and quantize/qat with groups"),
        ([Neurons(scope="global"), Magnitude(pattern="2:4")], "prune/neurons with scope=global and prune/magnitude"),
        ([Neurons(schedule="cubic"), QAT(group=8)], "prune/neurons with schedule=cubic and quantize/qat with groups"),
        ([Neurons(scope="global"), OFT()], "prune/neurons with scope=global and tuning=oft"),
        ([Heads(schedule="cubic"), LoRA()], "importance=magnitude and tuning=lora"),
        ([Heads(schedule="cubic"), Head()], "importance=magnitude and tuning=head"),
        ([Heads(schedule="cubic"), Houlsby()], "importance=magnitude and tuning=adapter"),
        ([Heads(schedule="cubic", importance="taylor"), LoRA(merge=False)], "tuning=lora with tuning.merge=false"),
    ],
)
def test_pairs_that_are_refused(stages: list[Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        refuse_conflicts(stages)
    refuse_conflicts([Heads(), Neurons(), QAT(group=8), Magnitude(pattern="2:4"), LoRA(merge=True)])


def test_a_schedule_needs_a_fit() -> None:
    assert "compression.heads.schedule=cubic: needs a fit" in str(Heads(schedule="cubic").needs_fit())
    assert Heads().needs_fit() is None
