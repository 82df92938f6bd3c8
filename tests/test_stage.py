"""Which methods go together."""

import pytest

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
