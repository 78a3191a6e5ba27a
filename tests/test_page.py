"""The HTML page: its data, and the page itself in a headless Chromium without a network."""

import html.parser
import json
import shutil
import sys

import pytest
from conftest import script

import plot
from runs import load_run
from stagewise.errors import UserError

TEXT = "</script><script>document.title = 'changed'</script>\nOnce upon a time &amp; <b>"
NAMES = ["baseline", "<b>s4<i> & $x$ &lt;"]  # names of folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder for the runs that `runs` trains once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(run_train, trained, tmp_path):
    """A baseline, and four stages that are compute-matched, with samples and an odd name."""
    options = ({}, dict(stages=4, continual_steps="match_paper_cost"))
    for name, more in zip(NAMES, options):
        if not (trained / name).exists():
            run_train("run", steps=16, eval_interval=2, **more).rename(trained / name)
        shutil.copytree(trained / name, tmp_path / name)
    (tmp_path / NAMES[1] / "samples.txt").write_text(TEXT)
    return [tmp_path / name for name in NAMES]


class Scripts(html.parser.HTMLParser):
    """The scripts of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._open = tag == "script" and [dict(attributes).get("type"), ""]
        self.loads += [v for k, v in attributes if k in ("src", "href")]
        if self._open:
            self.scripts.append(self._open)

    def handle_data(self, data):
        if self.scripts and self._open:
            self._open[1] += data


def write(runs, path, *options):
    pytest.importorskip("plotly")
    out = script(
        "plot.py", *runs, "--html", path, f"--out={path.parent / 'plots'}", *options
    ).stdout
    assert str(path) in out
    return Scripts(path.read_text())


def data_of(page):
    return json.loads(next(text for kind, text in page.scripts if kind == "application/json"))


def test_the_page_contains_the_runs_and_loads_nothing(runs, tmp_path):
    page = write(runs, tmp_path / "new" / "page.html", "--match=flops", "--x=flops")
    assert not page.loads and len(page.scripts) == 3
    data = data_of(page)
    loaded = [load_run(folder) for folder in runs]
    assert [run["name"] for run in data["runs"]] == [run.name for run in loaded]
    for run, expected in zip(data["runs"], loaded):
        for axis in plot.X_LABELS:
            assert run["x"][axis] == pytest.approx(expected.x(axis), rel=1e-6)
            point = expected.compute_matched_point("val_loss", axis, "flops")
            assert run["marks"]["loss"]["matched"][axis] == pytest.approx(point, rel=1e-6)
            edges = [phase["x"][axis] for phase in run["phases"]]
            assert edges[0][0] == pytest.approx(0, abs=1e-3) and edges[-1][1] == pytest.approx(
                expected.x(axis)[-1], rel=1e-6
            )
            assert all(a[1] == b[0] for a, b in zip(edges, edges[1:]))
        rows, y = run["curves"]["val_loss"].values()
        assert y == pytest.approx(expected.curve("val_loss", "steps")[1], rel=1e-6)
        assert [run["x"]["steps"][i] for i in rows] == list(expected.curve("val_loss", "steps")[0])
    states = [phase["states"] for phase in data["runs"][1]["phases"]]
    assert states[0] == [["trained", 0, 1]] and states[1] == [["trained", 0, 1]]
    assert states[2] == [["frozen", 0, 1], ["trained", 1, 1]]
    tables = {table["id"]: table for table in data["tables"]}
    assert [row[0] for row in tables["results"]["rows"]] == [run.name for run in loaded]
    assert {row[0] for row in tables["differences"]["rows"]} == {"stages", "continual_steps"}
    assert len(tables["phases"]["rows"]) == 1 + len(loaded[1].schedule.phases)
    assert data["samples"] == [{"name": loaded[1].name, "text": TEXT}]


def test_a_diverged_run_and_a_run_without_scores(runs, tmp_path):
    path = runs[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "hellaswag" not in k} for row in rows]
    rows[-1] |= {"val_loss": None, "loss": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of(write(runs, tmp_path / "page.html"))
    first = data["runs"][0]
    assert first["curves"]["val_loss"]["y"][-1] is None and first["label"] == "baseline (diverged)"
    assert list(first["marks"]) == ["loss"] and list(data["runs"][1]["marks"]) == [
        "loss",
        "accuracy",
    ]
    data = data_of(write(runs[:1], tmp_path / "page.html"))
    assert [figure["id"] for figure in data["figures"]] == ["loss"]
    assert [table["id"] for table in data["tables"]] == ["results", "phases"]


def test_mistakes_are_named(runs, tmp_path, monkeypatch):
    args = plot.Args(runs=tuple(runs), html=tmp_path / "page.html", out=tmp_path)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "plotly", raising=False)
        patch.setattr(sys, "path", [])
        with pytest.raises(UserError, match="plotly is not installed: pip install plotly"):
            plot.main(args)
    with pytest.raises(UserError, match="--html cannot be used with --schedule"):
        plot.main(plot.Args(schedule=("configs/s4.py",), html=tmp_path / "page.html"))
    pytest.importorskip("plotly")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="page.html: File exists: free disk"):
        plot.write_html([load_run(runs[0])], plot.Args(html=tmp_path / "file" / "page.html"))


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(runs, tmp_path, browser, width):
    """Every x axis is selected, and the values that are drawn are read. Then a figure is zoomed."""
    write(runs, tmp_path / "page.html")
    loaded = [load_run(folder) for folder in runs]
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    page = context.new_page()
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{tmp_path}/page.html")
    page.wait_for_selector("#accuracy .main-svg")
    traces = """([id, name]) => document.querySelector(`#${id} .js-plotly-plot`).data.filter(
        (trace) => trace.mode == "lines+markers" && trace.legendgroup == name)[0]"""
    for axis, title in reversed(plot.X_LABELS.items()):
        page.get_by_label(title, exact=True).check()
        for run in loaded:
            for id, column in (("loss", "val_loss"), ("accuracy", "hellaswag_acc_norm")):
                trace = page.evaluate(traces, [id, run.name])
                x, y = run.curve(column, axis)
                assert trace["x"] == pytest.approx(x, rel=1e-6)
                assert trace["y"] == pytest.approx(y, rel=1e-6)
        assert page.locator("#loss .xtitle").text_content() == title
        assert page.locator("#timeline .xtitle").text_content() == title
    legend = page.locator("#loss .legendtext").all_text_contents()
    assert legend == [run.name for run in loaded]
    n_bars = sum(len(plot.block_states(p)) for run in loaded for p in run.schedule.phases)
    assert page.locator("#timeline .bars .point").count() == n_bars
    loss = f"{loaded[1].last('val_loss'):.4f}"
    assert page.locator("#results tr").nth(2).locator("td").nth(6).inner_text() == loss
    assert page.locator("pre").inner_text().strip() == TEXT.strip()
    assert page.title().startswith("Runs: baseline")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    range_of = "document.querySelector('#loss .js-plotly-plot').layout.xaxis.range"
    before = page.evaluate(range_of)
    page.locator("#loss .nsewdrag").scroll_into_view_if_needed()
    box = page.locator("#loss .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    after = page.evaluate(range_of)
    assert before[1] - before[0] == pytest.approx(4 * (after[1] - after[0]), rel=0.1)
    assert not errors and requests == [f"file://{tmp_path}/page.html"]
