"""The page of a run and its charts: right numbers in the right place, whatever the run looked like."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import UserError
from llmos_jax.runtime import charts
from llmos_jax.runtime.charts import Mark, Series
from llmos_jax.runtime.report import loss_chart_svg, write_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run(folder, rows, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config or {"name": "tiny", "train": {"steps": 100}}))
    return folder


def train(step, **values):
    return {"step": step, "kind": "train", **values, "time": 1e9 + step}


def held_out(step, **values):
    return {"step": step, "kind": "eval", **values, "time": 1e9 + step}


def event(step, name, **details):
    return {"step": step, "kind": "event", "event": name, "details": details, "time": 1e9 + step}


def page_of(folder, summary=None):
    text = write_report(folder, summary).read_text()
    return text, Page(text)


def read_out(text):
    """The points behind the pointer, chart by chart."""
    return [json.loads(data) for data in re.findall(r'<script type="application/json">(.*?)</script>', text)]


def test_the_page_holds_the_run_and_loads_nothing(tmp_path):
    rows = [event(0, "compiled", seconds=1.5)]
    rows += [train(s, loss=4 - s / 100, grad_norm=1.0, tokens_per_second=51234.0, mfu=0.4) for s in range(1, 101)]
    rows += [held_out(100, eval_loss=3.125, perplexity=22.76), event(100, "finished")]
    folder = run(tmp_path, rows)
    (folder / "samples.jsonl").write_text('{"step": 100, "prompt": "The jury", "text": " said"}\nnot json\n')
    text, page = page_of(folder, {"parameters": 12345, "memory plan": {"peak": "1.5 GiB"}})
    assert page.links == [] and "@import" not in text and not re.search(r"url\(", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    for expected in ("tiny", ">finished<", "3.0000", "3.1250", "22.76", "51.2k", "40.0% MFU", "12345", "1.5 GiB"):
        assert expected in text, expected
    assert "<b>The jury</b> said" in text
    assert page.tags.count("svg") == 4  # loss, gradient norm, throughput, utilization
    assert [p.name for p in folder.iterdir() if "report" in p.name] == ["report.html"]  # no draft is left


def test_data_is_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script>&\"'<b>"
    rows = [event(1, evil, **{evil: evil}), train(1, loss=1.0), event(1, "resumed", why=evil)]
    folder = run(tmp_path, rows, {"name": evil, "init_from": evil, "model": {evil: evil}})
    (folder / "samples.jsonl").write_text(json.dumps({"step": evil, "prompt": evil, "text": evil}))
    text, page = page_of(folder, {evil: evil})
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert page.tags.count("script") == 2  # the loss chart's points and the page's own


@pytest.mark.parametrize("count", [0, 1, 2, 29, 30, 400])
def test_any_number_of_points(tmp_path, count):
    folder = run(tmp_path, [train(s + 1, loss=3.0, step_seconds=0.5) for s in range(count)])
    text, _ = page_of(folder)
    assert ("No steps have been recorded yet" in text) == (count == 0)
    assert len(read_out(text)) == (2 if count else 0)


def test_a_run_that_only_compiled(tmp_path):
    text, _ = page_of(run(tmp_path, [event(0, "compiled")]))
    assert "no steps yet" in text


@pytest.mark.parametrize(
    "last, state",
    [("finished", "finished"), ("stop_requested", "stopped, can be resumed"), ("spike", "not finished")],
)
def test_state(tmp_path, last, state):
    text, _ = page_of(run(tmp_path, [train(1, loss=1.0), event(1, last)]))
    assert f">{state}<" in text


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path):
    rows = [train(s, loss=2.0 + 0.001 * (s % 7)) for s in range(1, 100_001)]
    rows[44_444]["loss"] = 9.5
    rows[77_777]["loss"] = "nan"
    text, _ = page_of(run(tmp_path, rows))
    assert len(text) < 600_000
    tree = ElementTree.fromstring(loss_chart_svg(tmp_path))
    faint = tree.findall("{*}path")[0].get("d")
    heights = [float(point.split(",")[1]) for point in re.split("[ML]", faint) if point]
    assert len(heights) < 6 * 1140
    assert sum(height < min(heights) + 1 for height in heights) == 1  # the spike is drawn, once
    assert "training is not finite at step 77778" in text


def test_only_nan(tmp_path):
    rows = [train(s, loss="nan", grad_norm="inf") for s in range(1, 50)]
    text, _ = page_of(run(tmp_path, [*rows, held_out(49, eval_loss="nan", perplexity="nan")]))
    assert "is not finite at step 49" in text
    assert all(points == [] for chart in read_out(text) for _, _, points in chart)


def test_lost_steps_are_not_drawn(tmp_path):
    rows = [train(10, loss=3.0), train(20, loss=1.0), event(10, "resumed"), train(15, loss=2.5)]
    (loss,) = read_out(page_of(run(tmp_path, rows))[0])
    assert [(step, value) for _, step, value in loss[0][2]] == [(10, 3.0), (15, 2.5)]


def test_the_time_is_the_time_it_ran(tmp_path):
    rows = [train(0, loss=1.0), train(60, loss=1.0), {**event(60, "resumed"), "time": 1e9 + 9000}]
    rows.append({**train(61, loss=1.0), "time": 1e9 + 9030})
    text, _ = page_of(run(tmp_path, rows))
    assert "<b>1:30</b>" in text and "1 resumed" in text


def test_many_events_are_cut(tmp_path):
    text, page = page_of(run(tmp_path, [event(s, "checkpoint_saved") for s in range(5000)]))
    assert "The last 200 of 5,000" in text
    assert page.tags.count("tr") < 220


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl and no config.json; give the folder"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = run(tmp_path, [train(1, loss=1.0)])
    old = write_report(folder).read_text()

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_text() == old
    assert not list(folder.glob(".*.tmp"))


def test_a_run_in_a_bucket(tmp_path):
    run(tmp_path, [train(1, loss=1.0)], {"train": {"steps": 1}})
    assert write_report(f"file://{tmp_path}") == f"file://{tmp_path}/report.html"
    assert "1.0000" in (tmp_path / "report.html").read_text()
    assert loss_chart_svg(f"file://{tmp_path}") == loss_chart_svg(tmp_path)
    with pytest.raises(UserError, match="unsupported URL scheme"):
        write_report("bogus://x")


def test_stand_alone_svg_is_xml_with_its_own_colours(tmp_path):
    svg = loss_chart_svg(run(tmp_path, [train(s, loss=1.0 / s) for s in range(1, 60)]))
    ElementTree.fromstring(svg)
    for variable in set(re.findall(r"var\((--[\w-]+)\)", svg)):
        assert f"{variable}:" in svg


finite = st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=30), st.booleans())
def test_value_axis_holds_every_value_and_tells_its_ticks_apart(values, from_zero):
    axis = charts.value_axis(values, 6, from_zero)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 1 <= len(axis.ticks) <= 14
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    if not from_zero:
        assert all(0 <= axis.place(value) <= 1 for value in values)


@given(st.floats(1e-9, 1e12), st.floats(1e-3, 1e4))
def test_labels_differ_and_are_short(low, ratio):
    axis = charts.value_axis([low, low * (1 + ratio)], 6)
    assert len(set(axis.labels)) == len(axis.labels)
    assert all(len(label) <= 9 for label in axis.labels)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30), st.integers(2, 12))
def test_step_axis_has_whole_ticks_inside(steps, most):
    axis = charts.step_axis(sorted(steps), most)
    assert all(tick == int(tick) and axis.low <= tick <= axis.high for tick in axis.ticks)
    assert len(axis.ticks) <= most + 1 and len(set(axis.labels)) == len(axis.labels)


@pytest.mark.parametrize(
    "ticks, labels",
    [
        ((0, 0.5, 1.0), ("0", "0.5", "1.0")),
        ((0, 20_000, 40_000), ("0", "20k", "40k")),
        ((2.5e6, 5e6), ("2.5M", "5.0M")),
        ((0, 1e-4, 2e-4), ("0", "1e-4", "2e-4")),
        ((1000, 2000), ("1000", "2000")),
    ],
)
def test_tick_labels(ticks, labels):
    assert charts.tick_labels(ticks) == labels


def test_wide_positive_range_is_logarithmic():
    axis = charts.value_axis([0.5, 800.0], 6)
    assert axis.log and axis.labels == ("1", "10", "100", "1000")
    assert not charts.value_axis([0.0, 800.0], 6).log


def test_smoothing_does_not_lag_and_keeps_gaps():
    ramp = [float(i) for i in range(101)]
    assert charts.smooth(ramp, 5)[50] == pytest.approx(50.0)
    assert charts.smooth([2.0] * 9, 3) == pytest.approx([2.0] * 9)
    with_gap = charts.smooth([1.0, math.nan, 1.0], 3)
    assert math.isnan(with_gap[1]) and with_gap[::2] == [1.0, 1.0]


@given(st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=400), st.integers(1, 20))
def test_thinning_keeps_ends_extremes_order_and_gaps(values, columns):
    series = Series("loss", list(range(len(values))), values)
    thin = charts.thin(series, columns)
    assert thin.steps[0] == 0 and thin.steps[-1] == len(values) - 1
    assert all(a < b for a, b in itertools.pairwise(thin.steps))
    kept = [v for v in thin.values if math.isfinite(v)]
    real = [v for v in values if math.isfinite(v)]
    assert bool(kept) == bool(real) and (not real or (min(kept), max(kept)) == (min(real), max(real)))
    assert any(map(math.isnan, thin.values)) == any(map(math.isnan, values))
    assert len(thin.steps) <= max(2, 5) * columns


def test_a_line_is_broken_at_a_gap():
    svg = charts.draw([Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0])], label="x").svg
    path = next(p.get("d") for p in ElementTree.fromstring(svg).findall("{*}path") if "--line-1" in p.get("style"))
    assert path.count("M") == 2


def test_marks_in_the_same_pixels_are_drawn_once():
    marks = [Mark(step, "checkpoint", "--good", minor=True) for step in range(10_000)]
    svg = charts.draw([Series("loss", [0, 10_000], [1.0, 2.0])], marks, label="x").svg
    assert 50 < svg.count('class="tick"') < 250


def test_labels_of_the_steps_do_not_touch():
    for high in (7, 99, 1234, 99_999, 5_000_000):
        for width in (560, 1140):
            svg = charts.draw([Series("loss", [0, high], [1.0, 2.0])], label="x", width=width).svg
            texts = [t for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text")]
            row = [
                (float(t.get("x")), len(t.text)) for t in texts if t.get("text-anchor") == "middle" and t.text != "step"
            ]
            for (x1, n1), (x2, n2) in itertools.pairwise(row):
                assert x2 - x1 > 3.5 * (n1 + n2) + 6
