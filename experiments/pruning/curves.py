"""Draw movement.png: test accuracy against the sparsity of the encoder, of the runs that `study.sh movement` left.

.venv/bin/python experiments/pruning/curves.py [LOGS]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "pruning-magnitude": "magnitude", "pruning-movement-magnitude": "movement, from magnitude",
    "pruning-movement-zero": "movement, from zero", "pruning-soft-movement": "soft movement",
}  # fmt: skip


def point(run: Path) -> tuple[float, float]:
    """(share of zeros in the linears of the encoder, test accuracy) of a run."""
    metrics = json.loads((run / "metrics.json").read_text())
    table = metrics["targets"].values()
    zeros = sum(row["sparsity"] * row["parameters"] for row in table) / sum(row["parameters"] for row in table)
    return zeros, metrics["after"]["test"]["accuracy"]


def main(logs: Path) -> None:
    """Read the runs, draw, and print the table."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    dense = point(logs / "pruning-dense" / "run")[1]
    axes.axhline(dense, color="grey", linestyle=":", label=f"dense ({dense:.3f})")
    for prefix, label in NAMES.items():
        groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for file in sorted(logs.glob(f"{prefix}*/*/metrics.json")):
            study, run = file.parts[-3:-1]
            if study.rpartition("-")[0] == prefix or study == prefix:
                one = [part for part in run.split(",") if not part.startswith("seed=")]
                groups[f"{study} {one}"].append(point(file.parent))
        if not groups:
            continue
        lines = sorted((fmean(x for x, _ in found), [y for _, y in found]) for found in groups.values())
        x, y = [zeros for zeros, _ in lines], [fmean(scores) for _, scores in lines]
        axes.errorbar(
            x, y, [[m - min(s) for m, (_, s) in zip(y, lines, strict=True)],
                   [max(s) - m for m, (_, s) in zip(y, lines, strict=True)]],
            marker="o", capsize=3, label=label,
        )  # fmt: skip
        for zeros, scores in lines:
            print(f"| {label} | {zeros:.3f} | {fmean(scores):.4f} | {', '.join(f'{one:.4f}' for one in scores)} |")
    axes.set(xlabel="share of zeros in the encoder's linears", ylabel="test accuracy")
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("movement.png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"))
