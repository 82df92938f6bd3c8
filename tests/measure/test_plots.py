import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from niwaki.measure import plots
from niwaki.measure.plots import Spot, pareto


def spots(*places):
    return [Spot(label=f"row {i}", x=x, y=y) for i, (x, y) in enumerate(places)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, with their texts still to be asked."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    return figures


def boxes(figure):
    """Extents of every text in the figure, those at the ticks aside."""
    found = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label))]
    return {text: text.get_window_extent() for text in found if text.get_text()}


def inside_and_apart(figure):
    shown = boxes(figure)
    page = figure.bbox
    for text, box in shown.items():
        assert box.x0 >= 0, text
        assert box.x1 <= page.x1, text
        assert box.y0 >= 0, text
        assert box.y1 <= page.y1, text
    for (one, first), (two, second) in itertools.combinations(shown.items(), 2):
        assert not first.overlaps(second), (one, two)


def test_pareto_keeps_what_no_other_beats():
    many = spots((1, 1), (2, 3), (3, 2), (4, 4), (1, 0))
    assert pareto(many, x_more=False, y_more=True) == [0, 1, 3]
    assert pareto(many, x_more=False, y_more=False) == [4]
    assert pareto(many, x_more=True, y_more=True) == [3]


def test_pareto_keeps_equals():
    assert pareto(spots((1, 1), (1, 1)), x_more=False, y_more=True) == [0, 1]


SIDE = {"parameters": 22_713_216, "nonzero": 22_713_190, "bytes": 90_852_864, "macs": 1}
BEFORE = {
    "test": {"loss": 2.31, "f1": 0.087, "accuracy": 0.1},
    "latency_ms": 8.1,
    "throughput": 1231.5,
    **SIDE,
}
AFTER = {
    "test": {"loss": 0.42, "f1": 0.87, "accuracy": 0.9},
    "latency_ms": 126.2,
    "throughput": 1402.1,
    **SIDE,
}


def metrics(**changes):
    same = {
        "task": "classification",
        "model": "minilm",
        "tuning": "lora",
        "data": "builtin/python_docs",
        "seed": 0,
    }
    watched = {"metric": "accuracy", "mode": "max", "threads": 2, "machine": "a machine with two cores"}
    return {**same, **watched, "compression": ["quantize/qat"], "before": BEFORE, "after": AFTER, **changes}


def words(figure):
    return [text.get_text() for text in boxes(figure)]


def test_report_shows_the_watched_score_first_and_no_text_covers_another(tmp_path, drawn):
    plots.draw_report(metrics(), tmp_path / "report.png")
    shown = words(drawn[0])
    assert "test accuracy" in shown
    assert "test f1" in shown
    assert "test loss" not in shown
    assert {"+0.8000", "0.9000", "90.9 MB", "15.6x slower"} <= set(shown)
    inside_and_apart(drawn[0])
    assert imread(tmp_path / "report.png").shape[:2] == (630, 1500)


def test_report_marks_a_loss_of_speed(tmp_path, drawn):
    plots.draw_report(metrics(), tmp_path / "report.png")
    colours = {text.get_text(): text.get_color() for text in boxes(drawn[0])}
    assert colours["15.6x slower"] == plots.WORSE
    assert colours["+0.8000"] == plots.AFTER
    assert colours["same"] == plots.MUTED


def test_report_with_long_names_and_missing_numbers_stays_on_the_page(tmp_path, drawn):
    after = {**AFTER, "latency_ms": None, "throughput": None}
    long = metrics(compression=["prune/magnitude"] * 9, machine="m" * 300, before=None, after=after)
    plots.draw_report(long, tmp_path / "report.png")
    inside_and_apart(drawn[0])
    assert "before" not in words(drawn[0])


def scatter(path, points):
    plots.draw_scatter(points, path, x="after.bytes", y="after.test.f1", x_more=False, y_more=True)


def test_few_points_are_labelled_beside_them(tmp_path, drawn):
    points = spots((1e6, 0.9), (1.01e6, 0.901), (2e6, 0.92), (3e6, 0.95), (3e6, 0.9502), (2.5e6, 0.9))
    scatter(tmp_path / "a.png", points)
    assert {spot.label for spot in points} <= set(words(drawn[0]))
    inside_and_apart(drawn[0])


def test_many_points_get_numbers_and_a_key(tmp_path, drawn):
    generator = np.random.default_rng(0)
    points = [
        Spot(label=f"row {i}", x=x, y=y, x_spread=2e4, y_spread=0.01)
        for i, (x, y) in enumerate(zip(generator.uniform(1e6, 9e6, 20), generator.uniform(0, 1, 20), strict=True))
    ]
    scatter(tmp_path / "a.png", points)
    labels = [text.get_text() for text in boxes(drawn[0]) if isinstance(text, Annotation)]
    assert sorted(labels, key=int) == [str(i) for i in range(1, 21)]
    inside_and_apart(drawn[0])


def test_the_front_is_green_and_joined_in_order(tmp_path, drawn):
    scatter(tmp_path / "a.png", spots((3, 3), (1, 1), (2, 0.5), (2, 2)))
    lines = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3]]
    colours = {text.get_text(): text.get_color() for text in boxes(drawn[0])}
    assert colours["row 0"] == plots.AFTER
    assert colours["row 2"] == plots.INK


def test_one_point_alone(tmp_path):
    scatter(tmp_path / "a.png", spots((0, 0)))
    assert (tmp_path / "a.png").stat().st_size > 5000
