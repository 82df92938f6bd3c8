"""Draw shots.png: test accuracy against the number of training rows of each class, of the runs of `study.sh shots`.

.venv/bin/python experiments/tasks/curves.py [LOGS]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

SETS = {"ag_news": "AG News, 4 classes", "banking77": "Banking77, 77 classes"}
STUDIES = ("zero-{}", "shots-{}", "shots-{}-32")


def read(logs: Path, name: str) -> dict[str, dict[int, dict[int, float]]]:
    """{head: {rows of each class: {seed: accuracy}}}."""
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for study in STUDIES:
        for file in sorted(logs.glob(f"tasks-{study.format(name)}/*/metrics.json")):
            config = yaml.safe_load(file.with_name("config.yaml").read_text())
            seeds = found[config["task"]["head"]][config["data"]["shots"]]
            if config["seed"] in seeds:
                sys.exit(f"{file.parent}: a second run of the same head, rows and seed; leave one")
            seeds[config["seed"]] = json.loads(file.read_text())["after"]["test"]["accuracy"]
    return found


def main(logs: Path) -> None:
    """Read the runs, draw, and print the tables: mean ± sample standard deviation (runs)."""
    figure, axes = plt.subplots(1, len(SETS), figsize=(10, 4))
    for part, (name, title) in zip(axes, SETS.items(), strict=True):
        print(f"\n{title}")
        for head, curve in read(logs, name).items():
            shots = sorted(curve)
            means = [fmean(curve[n].values()) for n in shots]
            spread = [stdev(curve[n].values()) if len(curve[n]) > 1 else 0.0 for n in shots]
            cells = (f"{n}: {m:.3f} ± {s:.3f} ({len(curve[n])})" for n, m, s in zip(shots, means, spread, strict=True))
            print(f"| {head} | {' | '.join(cells)} |")
            few = slice(shots[0] == 0, None)
            line = part.errorbar(shots[few], means[few], spread[few], marker="o", capsize=3, label=head)
            if shots[0] == 0:  # no run of the others, nor of the same test rows: a point of its own
                part.plot([2], means[:1], marker="s", color=line[0].get_color(), linestyle="none")
        part.set(title=title, xlabel="training rows of each class", ylabel="test accuracy", xscale="log")
        part.set_xticks([2, 4, 8, 16, 32], ["0", "4", "8", "16", "32"], minor=False)
        part.minorticks_off()
        part.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("shots.png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"))
