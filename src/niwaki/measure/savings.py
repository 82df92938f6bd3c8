"""What compression saves: bytes by the kind of tensor, time as measured, and zeros that save nothing but bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from niwaki import artifact, storage
from niwaki.artifact import Artifact
from niwaki.measure.report import markdown_table, number, ratio
from niwaki.weights import Packed, packed

SAME_WORK = " It multiplies the same numbers as before, so that a difference is the machine's, not the model's."
NOISE = 0.05  # a change of time below this share is not called one
Kinds = dict[str, dict[str, int]]


def savings(saved: Artifact, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """For metrics.json: `disk` (by kind of tensor: how many, their bytes, and those of the same tensors as they lie in
    memory), `speed` (factors, above 1 for faster; None where it was not measured), `zeros` (how many weights are zero,
    how many of them the file leaves out, how many the product skips)."""
    state, forms = storage.parts(artifact.weights_of(saved.folder))
    left_out = zeros_left_out(saved.model, state, forms)
    zeros = after["parameters"] - after["nonzero"]
    return {
        "disk": disk(saved, state, forms),
        "speed": {
            "latency": factor(before, after, "latency_ms", more=False),
            "throughput": factor(before, after, "throughput", more=True),
        },
        "zeros": {"weights": zeros, "share": zeros / after["parameters"], "not_stored": left_out, "skipped": 0},
    }


def disk(saved: Artifact, state: Mapping[str, Any], forms: Mapping[str, storage.Form]) -> Kinds:
    """Tensors and bytes by kind; the rest of the files (headers) is a kind of its own, so that all is counted."""
    holds = kinds_of_packed(saved.model)
    plain = storage.decode(state, forms)
    found: Kinds = {}
    for name, tensor in plain.items():
        parts = [name] if name not in forms else [f"{name}:{part}" for part in storage.PARTS[forms[name].name]]
        owner = holds.get(name.rpartition(".")[0]) if not name.endswith(".bias") else None
        words = [owner or "", forms[name].name if name in forms else ""]
        known = found.setdefault(", ".join(filter(None, words)) or "dense", {"tensors": 0, "bytes": 0, "plain": 0})
        known["tensors"] += 1
        known["bytes"] += sum(state[part].nbytes for part in parts)
        known["plain"] += tensor.nbytes
    beside = list(saved.folder.glob("*/*.safetensors"))
    if beside:
        size = sum(path.stat().st_size for path in beside)
        found["adapters"] = {"tensors": len(beside), "bytes": size, "plain": size}
    rest = artifact.weight_bytes(saved.folder) - sum(known["bytes"] for known in found.values())
    found["headers"] = {"tensors": 0, "bytes": rest, "plain": rest}
    return found


def kinds_of_packed(model: nn.Module) -> dict[str, str]:
    """What the tensors of each packed linear are called, by its name in the file."""
    return {
        name.removesuffix(".base_layer"): module.holds
        for name, module in model.named_modules()
        if isinstance(module, Packed)
    }


def zeros_left_out(model: nn.Module, state: Mapping[str, Any], forms: Mapping[str, storage.Form]) -> int:
    """How many weights are zero and not in the file: those that a form leaves out, and those for which what is packed
    has no code. A form of anything else that is packed (a mask, indices, a scale) leaves out no weights."""
    owners = {name.removesuffix(".base_layer"): module for name, module in packed(model)}
    of_weights = {n: form for n, form in forms.items() if n.endswith(".codes") or not inside(n, owners)}
    by_form = sum(form.count - stored_items(state, name, form) for name, form in of_weights.items())
    return by_form + sum(module.zeros_without_code for module in owners.values())


def inside(name: str, owners: Mapping[str, Any]) -> bool:
    """Whether a tensor of this name is part of one of these modules; a bias is a weight like any other."""
    return not name.endswith(".bias") and any(name.startswith(f"{owner}.") for owner in owners)


def stored_items(state: Mapping[str, Any], name: str, form: storage.Form) -> int:
    """Items of a tensor that the file holds."""
    if form.group:
        return form.count // form.group * form.keep
    return int(np.bitwise_count(state[f"{name}:mask"].numpy()).sum())


def factor(before: Mapping[str, Any] | None, after: Mapping[str, Any], name: str, *, more: bool) -> float | None:
    """How many times faster than before."""
    old, new = (before or {}).get(name), after.get(name)
    if not old or not new:
        return None
    return float(new / old if more else old / new)


def savings_text(metrics: Mapping[str, Any]) -> str:
    """A short block for report.md."""
    parts = [_smaller(metrics), _kinds(metrics["savings"]["disk"]), _faster(metrics), _zeros(metrics)]
    return "\n\n".join(parts)


def _smaller(metrics: Mapping[str, Any]) -> str:
    new, old = metrics["after"]["bytes"], (metrics["before"] or {}).get("bytes")
    if old is None:
        return f"**On disk**: {number('bytes', new)}; before was not measured."
    return f"**On disk**: {number('bytes', old)} before, {number('bytes', new)} after, {_same(old, new)}."


def _same(old: float, new: float) -> str:
    words = ratio("smaller", "larger")(old, new)
    return "as large" if words == "same" else words


def _kinds(disk: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [
            kind,
            f"{known['tensors']:,}" if known["tensors"] else "",
            *(number("bytes", known[n]) for n in ("bytes", "plain")),
        ]
        for kind, known in disk.items()
    ]
    return markdown_table(["kind", "tensors", "in the file", "in memory, as stored there"], rows)


def _faster(metrics: Mapping[str, Any]) -> str:
    """Measured speed in words; a change within the noise is none."""
    speed = metrics["savings"]["speed"]
    known = [(name, value) for name, value in speed.items() if value is not None]
    if not known:
        return "**Speed**: not measured against before."
    where = f"{metrics.get('machine') or 'this machine'}, {metrics.get('threads')} threads"
    words = f"**Speed** ({where}): {'; '.join(f'{name} {_pace(value)}' for name, value in known)}."
    return words + (SAME_WORK if does_the_same(metrics) else "")


def does_the_same(metrics: Mapping[str, Any]) -> bool:
    """Whether the artifact multiplies as many numbers as the model before, and of the same type."""
    macs = [metrics[side].get("macs") for side in ("before", "after")]
    codes = [kind for kind in metrics["savings"]["disk"] if "codes" in kind or "codebook" in kind]
    return macs[0] is not None and macs[0] == macs[1] and not codes


def _pace(value: float) -> str:
    if abs(value - 1) < NOISE:
        return f"the same within {100 * NOISE:g}%"
    return f"{value:.2f}x faster" if value > 1 else f"{1 / value:.2f}x slower"


def _zeros(metrics: Mapping[str, Any]) -> str:
    zeros = metrics["savings"]["zeros"]
    if zeros["share"] < 0.001:
        return "**Zeros**: next to none."
    kept = "all of them are stored" if not zeros["not_stored"] else f"the file leaves out {zeros['not_stored']:,}"
    return (
        f"**Only zeros**: {zeros['weights']:,} weights ({100 * zeros['share']:.1f}%) are zero; {kept}. In memory they "
        "take the room of any other weight, and each is multiplied like any other: they save no time."
    )
