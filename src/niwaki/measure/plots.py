"""The pictures: one run before and after, many runs as score against cost, and what pruning costs part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.measure.report import COSTS, compression_name, difference, more_is_better, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

INK, MUTED, FAINT = "#1f2a24", "#6b7770", "#e7ebe8"
BEFORE, AFTER, WORSE = "#b9c2bc", "#2f6f4f", "#a8502f"
DPI = 150


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One point of the scatter: means over seeds and, where there are several, sample spreads."""

    label: str
    x: float
    y: float
    x_spread: float | None = None
    y_spread: float | None = None


def pareto(spots: Sequence[Spot], x_more: bool, y_more: bool) -> list[int]:
    """Indices of the spots that no other one beats (as good in both, better in one), in order of x."""

    def value(spot: Spot) -> tuple[float, float]:
        return (spot.x if x_more else -spot.x, spot.y if y_more else -spot.y)

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in map(value, spots))

    return sorted((i for i, spot in enumerate(spots) if not beaten(value(spot))), key=lambda i: spots[i].x)


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at a place of the figure (0 to 1), cut where it would leave the page."""
    shown = figure.text(x, y, text, **style)
    room, width = figure.bbox.width * (0.985 - x), shown.get_window_extent().width
    while width > room:
        text = text[: min(int(len(text) * room / width), len(text) - 1)]
        shown.set_text(text + "…")
        width = shown.get_window_extent().width


def _panels(metrics: Mapping[str, Any]) -> list[list[tuple[str, str, Any]]]:
    """Columns of the picture, each up to two (metric, title, change): quality, size, speed."""
    tested = metrics["after"]["test"]
    order = sorted(tested, key=lambda name: (name != metrics["metric"], name == "loss"))
    known = {name: (name, label.partition(",")[0], change) for name, label, change in COSTS}
    quality = [(f"test.{name}", f"test {name}", difference) for name in order[:2]]
    return [quality, [known["bytes"], known["nonzero"]], [known["latency_ms"], known["throughput"]]]


def _side(side: Mapping[str, Any] | None, name: str) -> float | None:
    if side is None:
        return None
    group, _, leaf = name.rpartition(".")
    return (side[group] if group else side).get(leaf)


def _change(axes: Axes, metrics: Mapping[str, Any], name: str, change: Any) -> None:
    old, new = _side(metrics["before"], name), _side(metrics["after"], name)
    if old is None or new is None:
        return
    better = more_is_better(name, {metrics["metric"]: metrics["mode"]}) == (new > old)
    words = change(old, new)
    colour = MUTED if new == old or words == "same" else AFTER if better else WORSE
    style: dict[str, Any] = {"ha": "right", "color": colour, "fontsize": 10, "fontweight": "bold"}
    axes.text(1, 1.1, words, transform=axes.transAxes, **style)


def _bars(axes: Axes, metrics: Mapping[str, Any], name: str, title: str) -> None:
    """Two horizontal bars from zero with the value at each one's end."""
    sides = [side for side in (("before", BEFORE), ("after", AFTER)) if metrics[side[0]] is not None]
    shown = [(side, colour, _side(metrics[side], name)) for side, colour in sides]
    longest = max((abs(value) for _, _, value in shown if value is not None), default=0) or 1
    for row, (side, colour, value) in enumerate(shown):
        length = abs(value or 0)
        axes.barh(row, length, height=0.66, color=colour)
        axes.text(-0.33 * longest, row, side, va="center", color=MUTED, fontsize=9)
        axes.text(length + 0.03 * longest, row, number(name, value), va="center", color=INK, fontsize=10)
    axes.set_xlim(-0.33 * longest, longest * 1.55)
    axes.set_ylim(1.5, -0.5)
    axes.axis("off")
    axes.text(0, 1.1, title, transform=axes.transAxes, color=INK, fontsize=10, fontweight="bold")


def _heading(figure: Figure, metrics: Mapping[str, Any]) -> None:
    title = f"{metrics['task']}: {metrics['model']}, {metrics['tuning']}, {compression_name(metrics)}"
    place = [f"data {metrics['data']}", f"seed {metrics['seed']}", f"{metrics.get('threads')} threads"]
    place += [str(metrics["machine"])] if metrics.get("machine") else []
    _write(figure, 0.03, 0.92, title, fontsize=13, fontweight="bold", color=INK)
    _write(figure, 0.03, 0.855, "  ·  ".join(place), fontsize=9, color=MUTED)
    notes = ["before: the model as loaded, its new head untrained"] if metrics["before"] else []
    notes += ["after: the artifact, saved and loaded again", "latency: batch 1", "throughput: batch 32"]
    figure.text(0.03, 0.035, "  ·  ".join(notes), fontsize=8.5, color=MUTED)


def draw_report(metrics: Mapping[str, Any], path: Path) -> None:
    """One run before and after, as a PNG 1500 pixels wide: quality, size and speed, two bars each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=DPI, facecolor="white")
    _heading(figure, metrics)
    edges = {"left": 0.03, "right": 0.97, "top": 0.735, "bottom": 0.11}
    grid = figure.add_gridspec(2, 3, wspace=0.2, hspace=0.6, **edges)
    for column, panels in enumerate(_panels(metrics)):
        for row, (name, title, change) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            _bars(axes, metrics, name, title)
            _change(axes, metrics, name, change)
    figure.savefig(path)


def _covered(box: Any, taken: Sequence[Any], frame: Any) -> float:
    """How bad a label lies: square pixels shared with what is drawn, thrice those outside."""
    shared = 0.0
    for other in taken:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        shared += max(width, 0) * max(height, 0)
    width = min(box.x1, frame.x1) - max(box.x0, frame.x0)
    height = min(box.y1, frame.y1) - max(box.y0, frame.y0)
    return shared + 3 * (box.width * box.height - max(width, 0) * max(height, 0))


NEAR = [(7, 0), (-7, 0), (0, 7), (0, -7), (7, 6), (-7, 6), (7, -6), (-7, -6)]
FAR = [(0, 22), (0, -22), (16, 20), (-16, 20), (16, -20), (-16, -20)]
FAR += [(26, 34), (-26, 34), (26, -34), (-26, -34)]
PLACES = NEAR + FAR
PIECES = 200
DIRECT = 8  # more points than this get numbers and a key


def _put(label: Annotation, right: float, up: float) -> None:
    label.set_horizontalalignment("left" if right > 0 else "right" if right < 0 else "center")
    label.set_verticalalignment("bottom" if up > 0 else "top" if up < 0 else "center")
    label.set_position((right, up))


def _drawn(axes: Axes, spots: Sequence[Spot], front: Sequence[int]) -> list[Any]:
    """Boxes, in pixels, of the markers, their error bars, and the front's line in small pieces."""
    from matplotlib.transforms import Bbox

    boxes, where = [], [axes.transData.transform((spot.x, spot.y)) for spot in spots]
    for spot, (x, y) in zip(spots, where, strict=True):
        left, low = axes.transData.transform((spot.x - (spot.x_spread or 0), spot.y - (spot.y_spread or 0)))
        boxes.append(Bbox.from_extents(x - 9, y - 9, x + 9, y + 9))
        boxes.append(Bbox.from_extents(left, y - 3, 2 * x - left, y + 3))
        boxes.append(Bbox.from_extents(x - 3, low, x + 3, 2 * y - low))
    for start, end in pairwise(front):
        for step in range(1, PIECES):
            x, y = where[start] + (where[end] - where[start]) * step / PIECES
            boxes.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _label(axes: Axes, spots: Sequence[Spot], texts: Sequence[str], front: Sequence[int]) -> None:
    """Texts beside their points, each where it covers the least of what is drawn so far."""
    from matplotlib.patheffects import withStroke

    frame, taken = axes.get_window_extent(), _drawn(axes, spots, front)
    line = {"arrowstyle": "-", "color": BEFORE, "lw": 0.8, "shrinkA": 0, "shrinkB": 4}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    style: dict[str, Any] = {
        "textcoords": "offset points",
        "fontsize": 8.5,
        "path_effects": halo,
        "zorder": 5,
    }
    # the front first: its labels are the ones that must lie well
    for i in sorted(range(len(spots)), key=lambda i: i not in front):
        colour = AFTER if i in front else INK
        label = axes.annotate(texts[i], (spots[i].x, spots[i].y), xytext=PLACES[0], color=colour, **style)
        tried = []
        for order, place in enumerate(PLACES):
            _put(label, *place)
            tried.append((_covered(label.get_window_extent(), taken, frame), order))
        place = PLACES[min(tried)[1]]
        _put(label, *place)
        if place in FAR:
            axes.annotate("", label.xy, xytext=place, textcoords="offset points", arrowprops=line)
        taken.append(label.get_window_extent())


def _key(figure: Figure, spots: Sequence[Spot], order: Sequence[int], front: Sequence[int]) -> None:
    """The numbered names of the points, in a column beside the axes, the best score first."""
    size = min(8.5, 210 / len(order))
    for place_number, i in enumerate(order, start=1):
        place = 0.9 - 0.78 * (place_number - 1) / max(len(order), 18)
        style: dict[str, Any] = {"fontsize": size, "color": AFTER if i in front else INK, "va": "top"}
        figure.text(0.695, place, str(place_number), ha="right", **style)
        _write(figure, 0.703, place, spots[i].label, **style)


def _limits(values: Sequence[float], spreads: Sequence[float | None], margin: float) -> tuple[float, float]:
    low = min(value - (spread or 0) for value, spread in zip(values, spreads, strict=True))
    high = max(value + (spread or 0) for value, spread in zip(values, spreads, strict=True))
    room = margin * (high - low or abs(high) or 1)
    return low - room, high + room


def _title(name: str) -> str:
    known = {f"after.{cost}": label for cost, label, _ in COSTS}
    return known.get(name) or name.removeprefix("after.").replace(".", " ").replace("_", " ")


def _frame(axes: Axes, spots: Sequence[Spot], x: str, y: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    xs, ys = [spot.x for spot in spots], [spot.y for spot in spots]
    low, high = _limits(xs, [spot.x_spread for spot in spots], 0.16)
    axes.set_xlim(max(low, 0) if min(xs) >= 0 else low, high)
    axes.set_ylim(*_limits(ys, [spot.y_spread for spot in spots], 0.16))
    for axis, name in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_label_text(_title(name), color=INK, fontsize=10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(x, value)))
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(BEFORE)


def _points(axes: Axes, spots: Sequence[Spot], front: Sequence[int]) -> None:
    for i, spot in enumerate(spots):
        colour = AFTER if i in front else BEFORE
        axes.errorbar(
            spot.x, spot.y, xerr=spot.x_spread, yerr=spot.y_spread, fmt="o", markersize=7, color=colour,
            ecolor=colour, elinewidth=1.2, capsize=3, zorder=3 if i in front else 2,
        )  # fmt: skip


def draw_scatter(
    spots: Sequence[Spot], path: Path, *, x: str, y: str, x_more: bool, y_more: bool, note: str = ""
) -> None:
    """Score against cost, one point a row of the table; `x_more`, `y_more`: more of it is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), dpi=DPI, facecolor="white")
    direct = len(spots) <= DIRECT
    width = 0.86 if direct else 0.565
    axes = figure.add_axes((0.1, 0.12, width, 0.78))
    front = pareto(spots, x_more, y_more)
    _frame(axes, spots, x, y)
    line = [(spots[i].x, spots[i].y) for i in front]
    axes.plot(*zip(*line, strict=True), color=AFTER, lw=1.4, alpha=0.55, zorder=1)
    _points(axes, spots, front)
    order = sorted(range(len(spots)), key=lambda i: spots[i].y, reverse=y_more)
    texts = [spot.label if direct else str(order.index(i) + 1) for i, spot in enumerate(spots)]
    _label(axes, spots, texts, front)
    if not direct:
        _key(figure, spots, order, front)
    better = f"better: {'more' if y_more else 'less'} {_title(y)}, {'more' if x_more else 'less'} {_title(x)}"
    figure.text(0.1, 0.94, better, fontsize=9, color=MUTED)
    figure.text(0.1 + width, 0.94, "Pareto front in green", fontsize=9, color=AFTER, ha="right")
    figure.text(0.1, 0.025, note, fontsize=8.5, color=MUTED)
    figure.savefig(path)


def _grid(facts: Mapping[str, Any], sparsity: float) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows, columns and losses (NaN where there is none) of a heat map: blocks x places in them, or units alone."""
    sign = 1 if facts["mode"] == "max" else -1
    values = {
        unit: math.inf if one is None else sign * (facts["base"] - one)
        for unit, known in facts["units"].items()
        for one in [known["scores"][f"{sparsity}"]]
    }
    if facts["unit"] != "linear":
        return list(values), [f"{100 * sparsity:g}%"], [[value] for value in values.values()]
    where = facts["places"]
    blocks = list(dict.fromkeys(block for block, _ in where.values()))
    inner = list(dict.fromkeys(place for _, place in where.values()))
    named = {tuple(place): values[name] for name, place in where.items()}
    return blocks, inner, [[named.get((block, place), math.nan) for place in inner] for block in blocks]


def _cells(axes: Axes, cells: Sequence[Sequence[float]], most: float) -> None:
    """The numbers in the cells of a heat map, white where it is dark."""
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if not math.isnan(value):
                text = "–" if value == math.inf else f"{value:.3f}" if most < 10 else f"{value:.3g}"
                colour = "white" if value > 0.55 * most else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _heat(axes: Axes, columns: Sequence[str], cells: Sequence[Sequence[float]], most: float) -> None:
    """One heat map, from white (nothing lost) to dark."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("loss", ["#ffffff", "#f0d9cd", WORSE, "#6b2f17"])
    axes.imshow(
        [[min(max(v, 0.0), most) for v in line] for line in cells], cmap=shades, vmin=0, vmax=most, aspect="auto"
    )
    _cells(axes, cells, most)
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] if len(columns) > 12 else name for name in columns])
    axes.tick_params(colors=MUTED, labelsize=7, length=0)
    for label in axes.get_xticklabels():
        label.set(rotation=60 if len(columns) > 1 else 0, ha="right" if len(columns) > 1 else "center")
    axes.spines[:].set_color(FAINT)


def draw_sensitivity(facts: Mapping[str, Any], path: Path) -> None:
    """What pruning each unit alone costs, as heat maps side by side: one for each sparsity."""
    from matplotlib.figure import Figure

    grids = [_grid(facts, sparsity) for sparsity in facts["sparsities"]]
    losses = [value for _, _, cells in grids for line in cells for value in line if math.isfinite(value)]
    most = max([*losses, 0.0]) or 1.0
    rows, columns = grids[0][0], grids[0][1]
    inches = (max(10.0, 3.2 + len(grids) * (0.7 + 0.48 * len(columns))), 2.6 + 0.26 * len(rows))
    figure = Figure(figsize=inches, dpi=DPI, facecolor="white")
    left = (0.35 + 0.055 * max(len(_short(name)) for name in rows)) / inches[0]
    edges = {"left": left, "right": 0.985, "top": 1 - 0.95 / inches[1], "bottom": 1.35 / inches[1]}
    places = figure.add_gridspec(1, len(grids), wspace=0.06, **edges)
    for number_of, (sparsity, grid) in enumerate(zip(facts["sparsities"], grids, strict=True)):
        axes = figure.add_subplot(places[0, number_of])
        _heat(axes, columns, grid[2], most)
        axes.set_title(f"{100 * sparsity:g}% zeros", fontsize=10, color=INK, fontweight="bold")
        axes.set_yticks(range(len(rows)), [_short(name) for name in rows] if not number_of else [""] * len(rows))
    what = f"{facts['metric']} lost when one {facts['unit']} alone is pruned by magnitude, without training"
    _write(figure, 0.02, 1 - 0.35 / inches[1], what, fontsize=12, fontweight="bold", color=INK)
    note = f"{facts['rows']:,} rows; {facts['metric']} {number(facts['metric'], facts['base'])} as it is"
    _write(figure, 0.02, 1 - 0.58 / inches[1], note, fontsize=9, color=MUTED)
    figure.savefig(path, format="png")


def _short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= 28 else f"…{name[-27:]}"
