"""A folder of Hugging Face's transformers that `from_pretrained` reads: dense weights, or integers of torchao (Wolf et
al. 2020, arXiv:1910.03771)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.export.export import FLOAT_ORDER, Export, ExportError, rounds_inputs
from niwaki.export.runner import Runner, TorchRunner, TorchWriter

if TYPE_CHECKING:
    from niwaki.artifact import Artifact
    from niwaki.model.anatomy import Anatomy
    from niwaki.stage import Stage
    from niwaki.task.task import Task


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Export):
    """Zeros as zeros, integers as the weights that they stand for, adapters merged; no input is rounded any more.

    `weights`: dense; torchao keeps the codes and scales of integers, in memory too, and needs torchao to be read.
    `tolerance`: the share of the test metric that may be lost where the artifact rounds inputs; else logits decide.
    """

    paper: ClassVar[str] = "Wolf et al. 2020, arXiv:1910.03771"
    texts: ClassVar[bool] = True

    weights: Literal["dense", "torchao"] = "dense"
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ConfigError(f"export.hf.tolerance={self.tolerance}: needs a number of at least 0")

    def check(self, task: Task, anatomy: Anatomy) -> None:
        from niwaki import plain

        super().check(task, anatomy)
        model: Any = anatomy.model
        if "forward" in vars(model):
            raise ConfigError(
                f"export={self.name}: this head is niwaki's own, and no class of transformers has it; leave it out, or "
                "use export=onnx"
            )
        if odd := plain.foreign_names(model, task):
            raise ConfigError(
                f"export={self.name}: {odd[0]} is not what a plain {model.config.model_type} has there, so no folder "
                "that from_pretrained reads can hold it"
            )
        if odd := plain.foreign_shapes(model, task):
            raise ConfigError(
                f"export={self.name}: {odd[0]} will have another shape than a plain {model.config.model_type} has "
                "there, so only niwaki can read this model; leave export=hf out, or cut what its config can tell of"
            )
        odd = [name for name, linear in anatomy.linears().items() if type(linear) is not nn.Linear]
        if self.weights == "torchao" and odd:
            raise ConfigError(f"export.hf.weights=torchao: {odd[0]} is no nn.Linear in transformers; needs dense")

    def conflict(self, stages: Sequence[Stage]) -> str | None:
        from niwaki.compression.quantize.floats import FloatStorage
        from niwaki.stage import Phase

        foreign = [(stage.name, what) for stage in stages if (what := stage.foreign())]
        if foreign:
            name, what = foreign[0]
            return f"export={self.name} and {name}: there will be {what}, and no config of transformers tells of them"
        if self.weights == "dense":
            return None
        grids = [stage for stage in stages if stage.phase is Phase.QUANTIZE and stage.acts_on_linears]
        if not grids:
            return (
                "export.hf.weights=torchao: no linear is stored as integers; add compression=quantize/weight_only, or "
                "leave it dense"
            )
        if isinstance(grids[0], FloatStorage):
            return (
                f"export.hf.weights=torchao and {grids[0].name}: linears are stored as floats, and these tensors of "
                "torchao hold integers; leave it dense"
            )
        return None

    def write(self, saved: Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        from niwaki import artifact, plain
        from niwaki.export import torchao
        from niwaki.model.load import auto_class

        card = {"class": auto_class(saved.task, saved.model.config).__name__, "inputs": list(example)}
        if self.weights == "torchao":
            torchao.write(saved, folder)
        else:
            merged = artifact.merge(saved)
            plain.refuse_foreign(merged, "")
            plain.write(merged, folder)
        return card

    def runner(self, folder: Path) -> Runner:
        import transformers

        card = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        loads = getattr(transformers, card["class"])
        model, report = loads.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            raise ExportError(f"transformers finds no {min(report['missing_keys'])} in the folder")
        kind = TorchWriter if model.can_generate() else TorchRunner
        return kind(model.eval(), card["inputs"], f"transformers {transformers.__version__}")

    def bound(self, model: nn.Module) -> float | None:
        return None if rounds_inputs(model) else FLOAT_ORDER

    def loss_allowed(self, model: nn.Module) -> float | None:
        return self.tolerance if rounds_inputs(model) else None
