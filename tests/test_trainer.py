"""What the trainer refuses, and how many steps it counts."""

from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.trainer import TrainerSettings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": 2}, "devices=2: needs 1"),
        ({"devices": 0}, "devices=0: needs 1"),
        ({"accelerator": "gpu", "devices": 8}, "devices=8: needs 1"),
        ({"precision": "fp16"}, "precision='fp16': needs auto, fp32 or bf16 on a CPU"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0: needs null or a number above 0"),
        ({"gradient_clip": float("nan")}, "gradient_clip=nan: needs"),
        ({"gradient_clip": float("inf")}, "gradient_clip=inf: needs"),
        ({"max_epochs": -1}, "max_epochs=-1: needs"),
        ({"max_steps": 0}, "max_steps=0: needs"),
    ],
)
def test_refusals_name_the_field(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.{said}"):
        TrainerSettings(**settings)


def test_fp16_is_for_a_gpu() -> None:
    assert TrainerSettings(accelerator="gpu", precision="fp16").lightning_precision == "16-mixed"


def test_steps() -> None:
    assert TrainerSettings(max_epochs=3, accumulate=4).steps(10) == 9  # the last of an epoch takes what is left
    assert TrainerSettings(max_epochs=3, max_steps=2).steps(10) == 2
    assert TrainerSettings(max_epochs=0).steps(10) == 0
