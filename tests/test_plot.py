"""Figures and table, from real run folders."""

import json
import xml.etree.ElementTree

import matplotlib.image
import numpy as np
import pytest

import plot
from errors import UserError

from conftest import metrics, script


@pytest.fixture
def runs(run_train):
    options = dict(steps=16, eval_interval=2)
    s4 = run_train("s4", stages=4, continual_steps="equal_cost", **options)
    return [run_train("baseline", **options), s4]


def test_both_figures_from_real_runs(runs, tmp_path):
    result = script("plot.py", *runs, "--out", tmp_path / "plots")
    for name in ("figure1_loss", "figure2_hellaswag"):
        picture = matplotlib.image.imread(tmp_path / "plots" / f"{name}.png")
        assert picture.shape[:2] == (880, 1720) and picture[..., :3].std() > 0.05
        xml.etree.ElementTree.parse(tmp_path / "plots" / f"{name}.svg")
    last = metrics(runs[1])[-1]
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("s4")]
    assert row.split()[1:3] == [str(last["step"]), f"{last['tokens']:,}"] and f"{last['val_loss']:.4f}" in row


@pytest.mark.parametrize("axis", ["steps", "tokens", "cost", "flops", "hours"])
def test_every_axis_shows_the_runs_own_numbers(runs, axis):
    args = plot.Args(x=axis)
    loaded = [plot.load_run(r) for r in runs]
    for run in loaded:
        run.color = "k"
    fig, ax = plot.draw(loaded, "val_loss", args, "loss")
    rows = [row for row in metrics(runs[1]) if "val_loss" in row]
    base = json.loads((runs[1] / "plan.json").read_text())["baseline"]
    expected = {
        "steps": lambda r: r["step"],
        "tokens": lambda r: r["tokens"],
        "cost": lambda r: r["cost"] / base["cost"],
        "flops": lambda r: r["flops"] / base["flops"],
        "hours": lambda r: r["seconds"] / 3600,
    }[axis]
    (line,) = [l for l in ax.lines if l.get_label() == "s4"]
    np.testing.assert_allclose(line.get_xdata(), [expected(r) for r in rows])
    np.testing.assert_allclose(line.get_ydata(), [r["val_loss"] for r in rows])


def circles(fig_ax):
    return [l for l in fig_ax[1].lines if l.get_marker() == "o" and len(l.get_xdata())]


@pytest.mark.parametrize("equal", ["cost", "flops", "tokens"])
def test_the_circle_is_where_the_plan_says(runs, equal):
    run = plot.load_run(runs[1])
    run.color = "k"
    found = circles(plot.draw([run], "val_loss", plot.Args(equal=equal), "loss"))
    step = run.plan["equal_step"][equal]
    (circle,) = found
    assert circle.get_xdata()[0] == pytest.approx(step, abs=0.6)
    x, y = run.curve("val_loss", "steps")
    assert circle.get_ydata()[0] == pytest.approx(np.interp(step, x, y), abs=0.05)


def test_no_circle_before_the_budget_is_spent(run_train):
    run = plot.load_run(run_train("short", stages=4, steps=16))
    run.color = "k"
    assert circles(plot.draw([run], "val_loss", plot.Args(equal="cost"), "loss")) == []


def test_stage_boundaries(runs):
    run = plot.load_run(runs[1])
    assert run.stage_starts() == [4, 8, 12, 16] and plot.load_run(runs[0]).stage_starts() == []


def test_a_run_that_has_only_begun_can_be_drawn(runs):
    path = runs[1] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:3]))
    plot.main(plot.Args(runs=tuple(runs), out=runs[0].parent / "plots"))


def test_folders_that_are_no_runs_are_refused(tmp_path, runs):
    with pytest.raises(UserError, match="no run folder of train.py"):
        plot.load_run(tmp_path)
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl is empty"):
        plot.load_run(runs[0])
    for damaged in ('{\n{"step": 1}\n', '[1]\n{"step": 1}\n', '{"step": 1}\n'):
        (runs[0] / "metrics.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            plot.load_run(runs[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out="):
        plot.main(plot.Args(runs=(runs[1],), out=tmp_path / "file"))


def test_a_live_runs_half_written_row_is_left_out(runs):
    whole = plot.load_run(runs[1]).columns["step"]
    with open(runs[1] / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "lo')
    assert plot.load_run(runs[1]).columns["step"].tolist() == whole.tolist()


def test_a_baseline_that_goes_on_is_still_the_baseline(run_train):
    run = plot.load_run(run_train("longer", steps=8, continual_steps=4, eval_interval=2))
    run.color = "k"
    figure = plot.draw([run], "val_loss", plot.Args(), "loss")
    assert run.stage_starts() == [] and circles(figure) == []
    level = next(l for l in figure[1].lines if l.get_linestyle() == "--" and len(set(l.get_ydata())) == 1)
    x, y = run.curve("val_loss", "steps")
    assert level.get_ydata()[0] == pytest.approx(y[list(x).index(8)])
