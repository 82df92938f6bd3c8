"""Which methods go together."""

import pytest

from niwaki import compose
from niwaki.compression.distill.logits import Logits
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.stage import Effects, Phase, Stage, refuse_conflicts


class Halving(Stage):
    """A second way to prune."""

    phase = Phase.PRUNE
    name = "prune/halving"

    def prepare(self, model, context):
        return Effects()


class Sharing(Halving):
    phase = Phase.SHARE
    name = "share/values"


class OtherSharing(Sharing):
    name = "share/other"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([Magnitude(), Halving()], "prune/halving and prune/magnitude: .*mask.*; choose one"),
        ([Sharing(), OtherSharing()], "share/other and share/values: .*shared values; choose one"),
        ([QAT(), Magnitude(), Int8()], "quantize/int8 and quantize/qat: .*grid; choose one"),
        ([Magnitude(), Magnitude(sparsity=0.1)], "prune/magnitude and prune/magnitude: .*once"),
        ([Logits(teacher="a"), Logits(teacher="b")], "distill/logits and distill/logits: .*once"),
    ],
)
def test_methods_that_stand_in_each_other_s_way(stages: list[Stage], said: str) -> None:
    for order in (stages, stages[::-1]):
        with pytest.raises(ConfigError, match=f"^compression: {said}"):
            refuse_conflicts(order)


def test_one_of_each_goes_together() -> None:
    refuse_conflicts([Logits(teacher="a"), QAT(), Sharing(), Magnitude()])


NEED_A_FIT = {
    "tuning=adalora": "tuning=adalora: needs a fit to learn its ranks from",
    "tuning=gradual": "tuning=gradual: needs a fit",
    "compression=[prune/magnitude] compression.magnitude.schedule=cubic": "schedule=cubic: needs a fit; use one_shot",
    "compression=[prune/movement]": "compression.movement: its scores are learned, which needs a fit",
    "compression=[prune/heads] compression.heads.schedule=cubic": "schedule=cubic: needs a fit",
    "compression=[prune/cofi]": "compression.cofi: has no effect with trainer.max_epochs=0",
    "compression=[share/codebook] compression.codebook.reassign=3": "reassign=3: needs a fit",
    "compression=[distill/logits] compression.logits.teacher=some/model": "compression.logits: has no effect with",
}


@pytest.mark.parametrize(("chosen", "reason"), NEED_A_FIT.items())
def test_what_needs_a_fit_is_refused_by_the_recipe(chosen: str, reason: str) -> None:
    """Before data are read or weights are loaded."""
    compose.build(compose.compose(chosen.split()).config)
    with pytest.raises(ConfigError, match=reason):
        compose.build(compose.compose([*chosen.split(), "trainer.max_epochs=0"]).config)


def test_what_needs_no_fit_is_taken_without_one() -> None:
    chosen = ["compression=[prune/magnitude,quantize/int8]", "tuning=lora", "trainer.max_epochs=0"]
    compose.build(compose.compose(chosen).config)
