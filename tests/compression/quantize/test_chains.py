"""Every way to quantize on top of masks, deltas and shared values, as it is read back from the file of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, finish, look, recipe_of, train, write_rows
from torch import Tensor, nn

from niwaki import artifact
from niwaki.combinations import names
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.stage import Phase
from niwaki.tuning.delta import adapters
from niwaki.weights import entering, links

ELSEWHERE = ("quantize/bf16", "quantize/embeddings", "quantize/float8")  # no integers of linears: their own tests
OPTIONS = [name for name in names("compression") if name.startswith("quantize/") and name not in ELSEWHERE]
SETTINGS: dict[str, list[str]] = {  # of the methods that show more than their defaults do, without "compression."
    "quantize/weight_only": ["weight_only.bits=3", "weight_only.group=16", "weight_only.symmetric=false"],
    "quantize/gptq": ["gptq.bits=3", "gptq.group=16", "gptq.rows=9"],
    "quantize/awq": ["awq.group=16", "awq.rows=9", "awq.fold=false"],
    "quantize/hqq": ["hqq.group=16"],
    "quantize/smoothquant": ["smoothquant.rows=9", "smoothquant.fold=false"],
    "quantize/int8_static": ["int8_static.rows=9"],
    "quantize/mixed": ["mixed.bits=4", "mixed.group=16", "mixed.rows=9"],
    "quantize/qat": ["qat.bits=4", "qat.group=16"],
}
WITHOUT_ZERO = ("quantize/binary",)  # a weight is a sign there
BY_ITSELF = tuple(  # each weight's own code
    f"quantize/{method}" for method in ("awq", "gptq", "int8_static", "mixed", "smoothquant")
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows"))["classification"]


@dataclass(frozen=True)
class Ran:
    """The integers of an artifact by the names of their linears, and what was seen of the chains before the fold."""

    integers: dict[str, IntegerLinear]
    seen: dict[str, Any]
    bytes: int


def chosen(*options: str) -> list[str]:
    """The settings that select these methods."""
    return [f"compression=[{','.join(options)}]", *(f"compression.{s}" for o in options for s in SETTINGS.get(o, []))]


def nothing(work: Any) -> dict[str, Any]:
    return {}


def run(
    path: str, folder: Path, *settings: str, start: Callable[[Any], Any] = nothing,
    look: Callable[[Any], dict[str, Any]] = nothing,
) -> Ran:  # fmt: skip
    """A short run, its fit and its fold as `finish` wants them. `start` and `look` get the work before the fit and
    after it, with what is stacked then."""
    recipe = recipe_of("classification", path, *settings, checkpoints=False)
    corpus, work = begin(recipe)
    start(work)
    fit(recipe, corpus, work, folder, {}, resume=False)
    seen = look(work)
    done = finish(recipe, corpus, work, folder)
    found = {name: done.model.get_submodule(name) for name in work.context.targets}
    assert all(isinstance(module, IntegerLinear) for module in found.values())
    return Ran(found, seen, artifact.weight_bytes(done.folder))


def kept(work: Any) -> dict[str, Any]:
    """What the masks keep."""
    found = {name: [link.kept() for link in links(linear)] for name, linear in work.context.targets.items()}
    return {name: next(mask.clone() for mask in masks if mask is not None) for name, masks in found.items()}


def code_of_zero(module: IntegerLinear) -> Tensor:
    """By weight, (out, in)."""
    zero = torch.zeros_like(module.scale) if module.zero is None else module.zero.float()
    return zero.repeat_interleave(module.in_features // zero.shape[1], 1)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_pruned_is_zero_in_the_file(option: str, pattern: str, rows: str, tmp_path: Path) -> None:
    settings = [*chosen("prune/magnitude", option), f"compression.magnitude.pattern='{pattern}'"]
    if option in WITHOUT_ZERO:
        with pytest.raises(ConfigError, match=rf"prune/magnitude and {option}: a pruned weight would not stay zero"):
            look(recipe_of("classification", rows, *settings))
        return
    ran = run(rows, tmp_path, *settings, look=kept)
    for name, module in ran.integers.items():
        gone = ~ran.seen[name]
        assert float(gone.float().mean()) == pytest.approx(0.5)
        assert torch.equal(module.integers()[gone].float(), code_of_zero(module)[gone])
        assert not module.dequantized()[gone].any()
        assert module.dequantized()[~gone].any()
        if pattern == "2:4":
            by_fours = (module.integers() == code_of_zero(module)).unflatten(1, (-1, 4))
            assert int(by_fours.sum(2).min()) >= 2


def moved(work: Any) -> None:
    """Adapters that do something from the start, and much."""
    for name, parameter in work.model.named_parameters():
        if any(part in name for part in ("lora_B", "lora_E")):
            nn.init.normal_(parameter, std=0.3)
        elif "ia3_l" in name:
            nn.init.normal_(parameter, mean=2.0, std=1.5)


def merged(work: Any) -> dict[str, Any]:
    """(base weight, what the adapter makes of it) by the formula of each paper, of the linears that have one."""
    names = {id(linear): name for name, linear in work.context.targets.items()}
    found = {}
    for _, layer in adapters(work.model):
        linear: Any = layer.get_base_layer()
        part: Any = layer
        chains = getattr(linear, "parametrizations", None)
        base = (linear.weight if chains is None else chains["weight"].original).detach().clone()
        if hasattr(part, "ia3_l"):
            together = base * part.ia3_l["default"]  # of the inputs (1, in), or of the outputs (out, 1)
        else:
            down, up, scale = part.lora_A["default"], part.lora_B["default"], part.scaling["default"]
            if hasattr(part, "lora_E"):
                rank = part.ranknum["default"] + 1e-5
                together = base + up @ (down * part.lora_E["default"]) * scale / rank
            else:
                together = base + scale * up.weight @ down.weight
        found[names[id(linear)]] = (base, together.detach().clone())
    return found


def by_hand(option: str, module: IntegerLinear, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Scale (out, groups) and codes (out, in) that a weight gets, where the weight alone decides; else None."""
    groups = module.scale.shape[1]
    parts = (weight if module.factor is None else weight / module.factor).unflatten(1, (groups, -1))
    last, own = 2 ** (module.bits - 1) - 1, module.scale[..., None]
    if option == "quantize/ternary":
        large = parts.abs() > 0.7 * parts.abs().mean(-1, keepdim=True)
        size = (parts.abs() * large).sum(-1) / large.sum(-1)
        return size, (parts.sign() * large).flatten(1)
    if option == "quantize/binary":
        return parts.abs().mean(-1), parts.sign().flatten(1)
    if option in ("quantize/awq", "quantize/hqq"):  # the ends of the grid, or its zeros, are searched for
        zero = 0.0 if module.zero is None else module.zero[..., None]
        return None, (parts / own + zero).round().clamp(-last - (module.zero is not None), last).flatten(1)
    if option == "quantize/weight_only":
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / (2**module.bits - 1)
        zero = (-(2 ** (module.bits - 1)) - low / scale).round()
        return scale, (parts / scale[..., None] + zero[..., None]).round().clamp(-last - 1, last).flatten(1)
    if option in ("quantize/int8", "quantize/int8_static", "quantize/smoothquant", "quantize/qat"):
        scale = parts.abs().amax(-1) / last
        return scale, (parts / scale[..., None]).round().flatten(1)
    return None, None


OTHERS = [(tuning, option) for tuning in ("adalora", "ia3") for option in ("quantize/weight_only", "quantize/qat")]


@pytest.mark.parametrize(("tuning", "option"), [*(("lora", option) for option in OPTIONS), *OTHERS])
def test_the_merged_weight_is_on_the_grid(tuning: str, option: str, rows: str, tmp_path: Path) -> None:
    ran = run(rows, tmp_path, f"tuning={tuning}", *chosen(option), start=moved, look=merged)
    assert ran.seen
    for name, (base, together) in ran.seen.items():
        module = ran.integers[name]
        found = module.dequantized()
        assert float((found - together).norm()) < 0.95 * float((found - base).norm())
        scale, codes = by_hand(option, module, together)
        if scale is not None:
            torch.testing.assert_close(module.scale, scale, rtol=1e-4, atol=1e-7)
        if codes is not None:  # but for those that lie in the middle of two, by the last bit of a sum
            off = (module.integers().float() - codes).abs()
            assert float(off.max()) <= 1
            assert float(off.mean()) < 0.002
        if option == "quantize/gptq":  # the first group is drawn before anything was moved
            first = together[:, :16].abs().amax(1) / 3
            torch.testing.assert_close(module.scale[:, 0], first, rtol=1e-4, atol=1e-7)
            assert torch.equal(module.integers()[:, 0].float(), (together[:, 0] / first).round())


def shared(work: Any) -> dict[str, Any]:
    """The centroid of each weight."""
    found = {}
    for name, linear in work.context.targets.items():
        book = next(link for link in links(linear) if link.phase is Phase.SHARE)
        found[name] = book(entering(linear, book)).detach().clone()
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_centroids_are_what_is_rounded(option: str, rows: str, tmp_path: Path) -> None:
    """So no more values than clusters, by channel or by group of one; nor is the file larger than with the integers of
    as many bits alone."""
    if option in BY_ITSELF:
        with pytest.raises(ConfigError, match=rf"{option} and share/codebook: it chooses the code of each weight"):
            look(recipe_of("classification", rows, *chosen("share/codebook", option)))
        return
    ran = run(rows, tmp_path / "both", *chosen("share/codebook", option), look=shared)
    alone = run(rows, tmp_path / "alone", *chosen(option))
    for name, module in ran.integers.items():
        groups = module.scale.shape[1]
        centroids, found = (one.unflatten(1, (groups, -1)) for one in (ran.seen[name], module.dequantized()))
        assert len(ran.seen[name].unique()) <= 16
        for before, after in zip(centroids.flatten(0, 1), found.flatten(0, 1), strict=True):
            assert len(after.unique()) <= len(before.unique())
            for value in before.unique():
                assert len(after[before == value].unique()) == 1
    assert ran.bytes <= alone.bytes + 2048  # of names in the header


@pytest.mark.parametrize("tuning", ["lora", "adalora"])
@pytest.mark.parametrize("scale", ["absmax", "lsq"])
def test_adapters_learn_through_the_grid(scale: str, tuning: str, rows: str, tmp_path: Path) -> None:
    """The gradient passes mask and grid to both factors, and `finish` finds the same logits before the merge and after
    it. Of learned scales the grid is that of the last step."""
    gradients: dict[str, Tensor] = {}

    def start(work: Any) -> None:
        moved(work)
        for name, parameter in work.model.named_parameters():
            if ".lora_" in name and parameter.requires_grad:
                parameter.register_hook(lambda g, name=name: gradients.update({name: g.detach().clone()}))

    def after(work: Any) -> dict[str, Any]:
        grids: dict[str, Any] = {n: links(linear)[-1] for n, linear in work.context.targets.items() if scale == "lsq"}
        steps = {n: g.step.detach().view(-1, work.context.targets[n].in_features // 16) for n, g in grids.items()}
        return {"merged": merged(work), "kept": kept(work), "steps": steps}

    settings = [f"tuning={tuning}", *chosen("prune/magnitude", "quantize/qat"), f"compression.qat.scale={scale}"]
    ran = run(rows, tmp_path, *settings, start=start, look=after)
    assert {name.split(".lora_")[1][0] for name in gradients} == set("AB" if tuning == "lora" else "ABE")
    assert all(bool(gradient.any()) for gradient in gradients.values())
    for name, module in ran.integers.items():
        masked = (ran.seen["merged"][name][1] * ran.seen["kept"][name]).unflatten(1, (-1, 16))
        sizes = ran.seen["steps"][name] if scale == "lsq" else masked.abs().amax(-1) / 7
        torch.testing.assert_close(module.scale, sizes, rtol=1e-4, atol=1e-7)
        codes = (masked / sizes[..., None]).round().clamp(-7, 7).flatten(1)
        off = (module.integers().float() - codes).abs()
        assert float(off.max()) <= 1
        assert float(off.mean()) < 0.002


@pytest.mark.parametrize(  # of six steps, stopped at the third
    ("inputs", "start", "end"), [("token", 0.3, 0.7), ("lsq", 0.3, 0.4), ("pact", 0.7, 0.9), ("lsq", 0.7, 0.9)]
)
def test_a_resumed_fit_begins_and_holds_where_the_whole_one_did(
    inputs: str, start: float, end: float, rows: str, tmp_path: Path
) -> None:
    scale = "lsq" if inputs == "lsq" else "absmax"
    fields = [f"begin={start}", f"freeze={end}", f"scale={scale}", f"activation_scale={inputs}", "group=16", "bits=4"]
    recipe = recipe_of(
        "classification", rows, "tuning=lora", "compression=[quantize/qat]", *(f"compression.qat.{f}" for f in fields)
    )
    corpus, work = begin(recipe)
    train(recipe, corpus, work, tmp_path)  # bit for bit the same from the checkpoint on
    grids: list[Any] = [links(linear)[-1] for linear in work.context.targets.values()]
    assert all(grid.begun and grid.frozen for grid in grids)
    finish(recipe, corpus, work, tmp_path)
