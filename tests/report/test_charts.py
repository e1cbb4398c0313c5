"""Charts: what is drawn is where its value says, names are text, and colours are the page's."""

import math
import re
import xml.etree.ElementTree

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
from drawn import NUMBER, Drawn, box, middle

from bipe_jax.errors import UserError
from bipe_jax.report import charts, comparing, palette, pictures
from bipe_jax.report.cells import Cell, Field
from bipe_jax.report.charts import Bar, Bars, Curve, Lines, Point
from bipe_jax.report.results import Accuracy, Evaluation, Perplexity, Targets, Tasks

BAD = "$x_1$ <b>&\x1b{{ 7 }} " + "long" * 90


def between(ticks: dict[str, float], scale, value: float) -> float:
    """The place of a value, by the outermost ticks and a scale."""

    def number(label):
        factor = {"k": 1024, "M": 1 << 20, "%": 0.01}.get(label[-1], 1)
        return float(label.rstrip("kM%").replace(",", "")) * factor

    (low, start), *_, (high, end) = sorted((number(label), at) for label, at in ticks.items())
    share = (scale(value) - scale(low)) / (scale(high) - scale(low))
    return start + share * (end - start)


SCALES = {
    "doublings": (charts.DOUBLINGS, math.log2, [128, 256, 512, 1024, 4096]),
    "bins": (charts.DOUBLING_BINS, lambda d: math.log2(d) + 1 if d >= 1 else d, [0, 1, 2, 4, 64]),
    "of next": (charts.DOUBLINGS_OF_NEXT, math.log1p, [0, 1, 2, 4, 8, 16, 32, 64]),
}


@pytest.mark.parametrize("kind", ["log", "narrow log", "linear", "shares"])
@pytest.mark.parametrize("name", SCALES)
def test_points_and_error_bars_are_where_the_ticks_say(name, kind):
    scale, of_x, ticks = SCALES[name]
    spread = {"log": 100, "narrow log": 1.2, "linear": 3, "shares": 1}[kind]
    generator = np.random.default_rng(0)
    xs = generator.uniform(ticks[0], ticks[-1], 9)
    ys = [1, *np.exp(generator.uniform(0, math.log(max(spread, 1.1)), 8))]
    ys = [y * (0.4 if kind == "shares" else 20) for y in ys]
    points = [
        Point(x, y, f"point {i}", 0.1 * y if i % 2 else 0.0)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]
    log = "log" in kind
    chart = Lines(
        [Curve(charts.series(0), points)],
        "x",
        "y",
        ticks,
        (),
        scale,
        log=log,
        shares=kind == "shares",
    )
    drawn = Drawn(charts.inline(chart, "t"))
    of_y = math.log if log else float
    assert len(drawn.x) >= 3 and len(drawn.y) >= 3 and list(drawn.tips) == [p.title for p in points]
    for p in points:
        mark, *bar, hit = drawn.tips[p.title]
        place = between(drawn.x, of_x, p.x), between(drawn.y, of_y, p.y)
        assert middle(mark) == pytest.approx(place, abs=0.1)
        assert middle(hit) == pytest.approx(place, abs=0.1) and hit.get("fill-opacity") == "0"
        assert bool(bar) == bool(p.error)
        if p.error:
            line, *caps = bar
            low, high = (between(drawn.y, of_y, p.y + sign * p.error) for sign in (-1, 1))
            assert box(line) == pytest.approx((place[0], high, place[0], low), abs=0.1)
            assert sorted(middle(cap)[1] for cap in caps) == pytest.approx([high, low], abs=0.1)
    # The line goes through the marks.
    (line,) = [n for n in drawn.root if n.get("stroke") == "var(--s0)" and n.tag == "path"]
    ends = [middle(drawn.tips[p.title][0]) for p in points]
    numbers = [float(n) for n in re.findall(NUMBER, line.get("d"))]
    np.testing.assert_allclose(np.reshape(numbers, (-1, 2)), ends, atol=0.02)


def test_curves_with_error_bars_stand_beside_each_other():
    def drawn(error):
        curves = [
            Curve(charts.series(i), [Point(n, 10, f"{i}, {n}", error) for n in (1, 2)])
            for i in range(3)
        ]
        tips = Drawn(charts.inline(Lines(curves, "x", "y", [1, 2]), "t")).tips
        return [middle(tips[f"{i}, 1"][0])[0] for i in range(3)]

    assert np.ptp(drawn(0.0)) == 0
    assert np.diff(drawn(1.0)).tolist() == pytest.approx([4, 4])


def test_bars_below_an_axis_and_numbers_that_are_not_finite_are_cut_and_left_out():
    points = [
        Point(1, 10, "to below 0", 11), Point(2, math.inf, "inf"), Point(4, math.nan, "nan"),
        Point(8, 12, "no bar", math.nan), Point(16, 11, "endless", math.inf),
    ]  # fmt: skip
    chart = Lines([Curve(charts.series(0), points)], "x", "y", [1, 2, 4, 8, 16], log=True)
    drawn = Drawn(text := charts.inline(chart, "t"))
    assert list(drawn.tips) == ["to below 0", "no bar", "endless"]
    assert [len(parts) for parts in drawn.tips.values()] == [5, 2, 2]
    assert box(drawn.tips["to below 0"][1])[3] == pytest.approx(202)  # the axis' lower end
    assert not re.search(r"\b(nan|inf)\b", text.replace(">inf<", "").replace(">nan<", ""))


def test_trained_lengths_are_marked():
    def drawn(*trained):
        curves = [Curve(charts.series(0), [Point(n, 1, str(n)) for n in (8, 64)])]
        return Drawn(charts.inline(Lines(curves, "x", "y", [8, 16, 32, 64], trained), "t"))

    shown = drawn(8, 32, 4096)
    lines = [n for n in shown.root if n.get("stroke-dasharray")]
    assert [box(line)[0] for line in lines] == pytest.approx([shown.x["8"], shown.x["32"]])
    assert shown.texts.count("trained to 8") == shown.texts.count("trained to 32") == 1
    assert "trained to 4,096" not in shown.texts
    assert not [n for n in drawn().root if n.get("stroke-dasharray")]


def ticks(values, ys=(1, 2), **changes) -> Drawn:
    points = [Point(values[0], y, str(i)) for i, y in enumerate(ys)]
    return Drawn(
        charts.inline(Lines([Curve(charts.series(0), points)], "x", "y", values, **changes), "t")
    )


def test_ticks():
    lengths = ticks([128, 256, 512, 1024, 2048])
    assert [*lengths.x] == ["128", "256", "512", "1k", "2k"]
    assert np.ptp(np.diff([*lengths.x.values()])) < 0.1
    many = ticks([*range(1000, 1030), 2000])
    assert 2 <= len(many.x) < 8  # the others have no room
    assert ticks([100]).x["100"] == pytest.approx(199)  # the middle
    assert [*ticks([1, 2], (20, 5000), log=True).y] == ["30", "100", "300", "1,000", "3,000"]
    narrow = ticks([1, 2], (33.4, 34.9), log=True)
    assert len(narrow.y) >= 3 and "34" in narrow.y
    share = ticks([1, 2], (0.2, 1.0), shares=True).y
    assert (share["0%"], share["100%"]) == (202, 34)
    assert max(ticks([1, 2], (0.2,), shares=True, y_reach=[1]).y) >= "80%"
    for ys in ((), (0.0,), (5.0,), (1e-9, 1e9), (3.3, 3.3), (0.0, 0.0)):
        for log in (True, False):
            for shares in (True, False):
                drawn = ticks([1, 2], ys, log=log and not shares, shares=shares)
                assert 1 <= len(drawn.y) <= 14
                for parts in drawn.tips.values():
                    assert 22 <= middle(parts[0])[1] <= 210


def test_bars_are_as_high_as_their_shares():
    shares = [0.1, 0.8, 0.0, 1e-6, 0.35]
    bars = [Bar(str(1 << i), share, f"bar {i}") for i, share in enumerate(shares)]
    drawn = Drawn(charts.inline(Bars(bars, 0.8), "t"))
    assert [*drawn.y] == ["0%", "40%", "80%"] and [*drawn.x] == ["1", "2", "4", "8", "16"]
    for i, (share, label) in enumerate(zip(shares, drawn.x, strict=True)):
        hit, bar = drawn.tips[f"bar {i}"]
        high = max(share / 0.8 * 116, 1 if share else 0)  # the smallest shows
        assert box(bar)[3] - box(bar)[1] == pytest.approx(high, abs=0.05)
        assert box(bar)[3] == pytest.approx(drawn.y["0%"], abs=0.05)
        assert middle(bar)[0] == pytest.approx(drawn.x[label], abs=0.05)
        assert (box(hit)[1], box(hit)[3]) == pytest.approx((drawn.y["80%"], drawn.y["0%"]))
    many = [Bar(str(i), 0.01, str(i)) for i in range(100)]
    assert 5 <= len(Drawn(charts.inline(Bars(many, 0.1), "t")).x) <= 7


def rows_of(drawn) -> dict[str, float]:
    """Labels of rows -> their middles."""
    ends = [n for n in drawn.root if n.tag == "text" and n.get("text-anchor") == "end"]
    return {n.text: float(n.get("y")) - 4 for n in ends}


def test_a_heat_map():
    cells = {(0.5, 64): Cell("a", 0.25, "25"), (1.0, 128): Cell("b", 0.9, "90"),
             (0.5, 1024): Cell("c", 1.5, "150"), (1.0, 64): Cell("d", -1.0, "-1")}  # fmt: skip
    field = Field({0.5: "50%", 1.0: "100%"}, {64: "64", 128: "128", 1024: "1k"}, ("depth", "length"),
                  cells, after=1)  # fmt: skip
    drawn = Drawn(charts.inline(field, "t"))
    assert {*drawn.tips} == {"a", "b", "c", "d"} and {"depth", "length"} <= set(drawn.texts)
    rows = rows_of(drawn)
    for (row, column), cell in cells.items():
        rectangle, text = drawn.tips[cell.title]
        place = drawn.x[field.columns[column]], rows[field.rows[row]]
        assert middle(rectangle) == pytest.approx(place, abs=0.3)
        assert float(text.get("x")) == pytest.approx(place[0], abs=0.1) and text.text == cell.text
        assert float(rectangle.get("fill-opacity", 1 if cell.strength > 0 else 0)) == pytest.approx(
            min(max(cell.strength, 0), 1)
        )
        assert text.get("fill") == ("var(--on-heat)" if cell.strength > 0.85 else "var(--ink)")
    (line,) = [n for n in drawn.root if n.get("stroke-dasharray")]
    assert box(line)[0] == pytest.approx((drawn.x["64"] + drawn.x["128"]) / 2, abs=0.1)
    assert drawn.root.get("width") == drawn.root.get("viewBox").split()[2]  # keeps its size


def test_small_bars():
    shares = {
        (layer, head): [0.1 + 0.2 * layer, 0.0, 0.3 * head] for layer in (0, 3) for head in (0, 1)
    }
    cells = {key: Cell(f"{key}", shares=of_key) for key, of_key in shares.items()}
    uniform = [0.2, 0.4, 0.1]
    labels = {0: "0", 3: "3"}, {0: "0", 1: "1"}
    drawn = Drawn(
        charts.inline(Field(*labels, ("layer", "head"), cells, top=0.4, uniform=uniform), "t")
    )
    for (layer, head), of_key in shares.items():
        rectangle, bars, lines = drawn.tips[f"{(layer, head)}"]
        assert middle(rectangle) == pytest.approx(
            (drawn.x[str(head)], rows_of(drawn)[str(layer)]), abs=0.3
        )
        floor = box(rectangle)[3] - 1
        ends = np.reshape([float(n) for n in re.findall(NUMBER, bars.get("d"))], (-1, 4))
        assert ends[:, 3].tolist() == pytest.approx(
            [floor - 34 * min(s / 0.4, 1) for s in of_key if s]
        )
        assert (ends[:, 1] == floor).all()
        levels = np.reshape([float(n) for n in re.findall(NUMBER, lines.get("d"))], (-1, 4))
        assert levels[:, 1].tolist() == levels[:, 3].tolist()
        assert levels[:, 1].tolist() == pytest.approx([floor - 34 * s / 0.4 for s in uniform])
        left, _, right, _ = box(rectangle)
        assert left < ends.T[0].min() <= ends.T[0].max() < right


def every_chart(name: str) -> list:
    points = [[Point(n, n / 3, f"{name}: {i} {n}", 1.0) for n in (64, 128, 1024)] for i in range(8)]
    curves = [Curve(charts.series(i), points[i]) for i in range(8)]
    ordered = [Curve(charts.ramp(i, 5), points[i]) for i in range(5)]
    cells = {(i, j): Cell(f"{name} {i} {j}", i * j / 9, "1") for i in range(4) for j in range(4)}
    small = {key: Cell(f"{name} {key}", shares=[0.1, 0.2]) for key in cells}
    axes = {i: str(i) for i in range(4)}, {i: str(i) for i in range(4)}, ("layer", "head")
    return [
        Lines(curves, name, name, [64, 128, 1024], [64]),
        Lines(ordered, name, name, [64, 128, 1024]),
        Bars([Bar("1", 0.5, name)], 1.0),
        Field(*axes, cells, after=2),
        Field(*axes, small, uniform=[0.3, 0.3]),
    ]


def test_svg_has_only_the_colours_of_the_page_and_no_ids():
    styles = [charts.series(i) for i in range(20)] + [charts.ramp(i, 9) for i in range(9)]
    pictures_of = [charts.inline(chart, "t") for chart in every_chart("a")]
    for svg in [*pictures_of, *map(charts.key, styles)]:
        root = xml.etree.ElementTree.fromstring(svg)
        for node in root.iter():
            assert not {"id", "style", "href", "clip-path"} & set(node.attrib)
            assert node.tag in ("svg", "g", "title", "path", "text")
            for key in ("fill", "stroke"):
                if node.get(key, "none") != "none":
                    name = re.fullmatch(r"var\(--(.+)\)", node.get(key))[1]
                    assert name in palette.PALETTE
            # Without a fill, it would be black on dark pages too.
            assert node.tag not in ("path", "text") or node.get("fill")
        assert "#" not in svg and "rgb" not in svg and "http" not in svg
    lights = [light for light, _ in palette.PALETTE.values()]
    assert len(lights) == len(set(lights))
    assert len({charts.series(i) for i in range(42)}) == 42
    assert len({charts.ramp(i, 9).name for i in range(9)}) == 9


def test_pictures_are_the_same_whatever_the_settings_of_matplotlib_are():
    plain = [charts.inline(chart, "t") for chart in every_chart("a")]
    changed = {"text.usetex": True, "svg.fonttype": "path", "axes.grid": True, "font.size": 30,
               "xtick.color": "red", "axes.facecolor": "pink", "figure.dpi": 300}  # fmt: skip
    with matplotlib.rc_context(changed):
        assert [charts.inline(chart, "t") for chart in every_chart("a")] == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_names_are_text_in_the_svg():
    for chart in every_chart(BAD):
        svg = charts.inline(chart, BAD)
        drawn = Drawn(svg)
        shown = BAD.replace("\x1b", "\\x1b")
        assert "\x1b" not in svg and drawn.root.get("aria-label") == shown
        assert all(title.startswith(shown) for title in drawn.tips)
        width, height = map(float, drawn.root.get("viewBox").split()[2:])
        assert max(width, height) < 500
        if isinstance(chart, Lines):
            names = [text for text in drawn.texts if text.startswith("$x_1$ <b>&\\x1b{{ 7 }} long")]
            assert len(names) == 2 and max(map(len, names)) <= 60


def evaluations(names) -> list[comparing.Group]:
    rows = tuple(
        Perplexity(set=f"{i}{BAD}", length=n, perplexity=n + i, perplexity_error=error)
        for i in (1, 2)
        for n, error in ((8, 0.5), (16, None), (32, math.nan))
    )
    targets = tuple(Targets(f"{i}{BAD}", "t", "c", ("d",), (9,), (30,)) for i in (1, 2))
    evaluation = Evaluation(training_length=8, results=rows, targets=targets)
    return comparing.alone([(name, evaluation) for name in names])


@pytest.fixture
def saved(monkeypatch) -> list:
    """Figures that are written."""
    seen, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (seen.append(f), save(f, *a, **k))
    )
    return seen


def test_files_have_a_panel_a_set_and_name_each_run(tmp_path, saved):
    pictures.perplexity(evaluations(["rope", BAD]), str(tmp_path / "a.svg"))
    pictures.perplexity(evaluations(["rope"]), str(tmp_path / "a.png"))
    both, one = saved
    assert [len(f.axes) for f in saved] == [2, 2] and not one.legends
    names = [text.get_text() for text in both.legends[0].get_texts()]
    assert names[0] == "rope" and names[1].startswith("$x_1$ <b>&\\x1b{{ 7 }} long")
    root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    texts = [node.text for node in root.iter() if node.tag.endswith("}text")]
    for start in ("1$x_1$ <b>&", "2$x_1$ <b>&", "$x_1$ <b>&", "trained to 8", "rope"):
        assert any(text.startswith(start) for text in texts)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    from PIL import Image  # matplotlib needs it

    for name, figure in (("a.png", one),):
        with Image.open(tmp_path / name) as image:
            assert image.width < 3000 and image.height < 1500
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert figure.get_figwidth() < 12


def test_curves_beyond_the_colours_are_grey_and_counted(tmp_path, saved):
    runs = evaluations([f"run {i}" for i in range(palette.SERIES + 3)])
    pictures.perplexity(runs, str(tmp_path / "a.png"))
    (figure,) = saved
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3 others"]
    for axes in figure.axes:  # at the ends of the curves, one below the other
        named = [text for text in axes.texts if text.get_text().startswith("run ")]
        assert [text.get_text() for text in named] == [f"run {i}" for i in range(palette.SERIES)]
        heights = sorted(text.xy[1] * axes.bbox.height for text in named)
        assert min(np.diff(heights)) > 12
    colours = [line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    expected = [palette.colour(f"s{i}") for i in range(palette.SERIES)]
    assert colours == [palette.colour("other")] * 3 + expected


def test_names_are_moved_apart_no_more_than_needed():
    assert charts.apart([], 10) == []
    assert charts.apart([5, 100, 30], 10) == [5, 100, 30]
    assert charts.apart([50, 50, 50], 10) == [40, 50, 60]
    assert charts.apart([50, 0, 55], 10) == [47.5, 0, 57.5]
    generator = np.random.default_rng(0)
    for _ in range(50):
        places = generator.uniform(0, 60, 7)
        moved = np.array(charts.apart(places, 10))
        assert (np.argsort(moved) == np.argsort(places)).all()
        assert np.diff(np.sort(moved)).min() >= 10 - 1e-9
        assert abs((moved - places).mean()) < 10


def test_a_file_of_tasks(tmp_path, saved):
    rows = [
        Accuracy(task=f"{task} {BAD}", length=n, depth=depth, accuracy=n / 512, samples=4)
        for task in range(5)
        for n in (128, 512)
        for depth in (0.0, 1.0)
    ]
    of_run = Tasks(training_length=128, data=f"books {BAD}", results=tuple(rows))
    pictures.accuracy(BAD, of_run, str(tmp_path / "a.svg"))
    (figure,) = saved
    root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    texts = [node.text for node in root.iter() if node.tag.endswith("}text")]
    assert len(figure.axes) == 5 and texts.count("25") == texts.count("100") == 10
    for task in range(5):
        assert any(text.startswith(f"{task} $x_1$ <b>&\\x1b") for text in texts)
    words = " ".join(texts)
    assert "percent right; haystack: books $x_1$ <b>&\\x1b" in words
    assert "right of the dotted line: longer than in training" in words
    assert figure.get_figwidth() < 16


def test_files_that_cannot_be_written_are_named(tmp_path):
    runs = evaluations(["a"])
    for path, says in (
        (tmp_path / "none" / "a.png", "cannot be written: No such file"),
        (tmp_path / "a.xyz", r"a.xyz cannot be written: Format 'xyz' is not supported"),
    ):
        with pytest.raises(UserError, match=says):
            pictures.perplexity(runs, str(path))
