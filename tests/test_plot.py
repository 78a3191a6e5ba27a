"""Figures and table, from real run folders."""

import dataclasses
import errno
import json
import math
import re
import shutil
import xml.etree.ElementTree

import matplotlib.colors
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import metrics, script

import plot
from cost import make_schedules
from model import GPTConfig
from runs import load_run
from stagewise.config import Config, load_config
from stagewise.errors import UserError

OPTIONS = {
    "baseline": dict(steps=16, eval_interval=2),
    "s4": dict(steps=16, eval_interval=2, stages=4, continual_steps="match_paper_cost"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder for the runs that `runs` trains once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(run_train, trained, tmp_path):
    """A baseline, and a schedule of four stages that is compute-matched in paper cost."""
    for name, options in OPTIONS.items():
        if not (trained / name).exists():
            run_train(name, **options).rename(trained / name)
        shutil.copytree(trained / name, tmp_path / name)
    return [tmp_path / name for name in OPTIONS]


def schedule_of(run):
    return json.loads((run / "schedule.json").read_text())


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_the_difference_from_a_reference_after_growth(runs, run_train, tmp_path):
    """Figure 3, with two seeds; values outside the reference's range are left out."""
    baseline, s4 = map(load_run, runs)
    since, difference = plot.loss_difference(s4, baseline)
    at = {row["tokens"]: row["val_loss"] for row in metrics(runs[0]) if "val_loss" in row}
    grown = 12 * 1024  # the last stage starts after 12 of 16 steps
    expected = {
        row["tokens"] - grown: row["val_loss"] - at[row["tokens"]]
        for row in metrics(runs[1])
        if "val_loss" in row and grown < row["tokens"] <= 16 * 1024
    }
    assert since.tolist() == list(expected) == [2048, 4096]
    assert difference == pytest.approx(list(expected.values()))
    assert plot.last_growth(baseline) == 0
    # Initial weights that cost 500 tokens, counted in every row.
    later = dataclasses.replace(s4, columns=s4.columns | {"tokens": s4.columns["tokens"] + 500})
    assert plot.last_growth(later) == grown + 500
    assert not plot.loss_difference(baseline, baseline)[1].any()

    others = [run_train(f"{name}_seed2", seed=2, **OPTIONS[name]) for name in OPTIONS]
    paths = [runs[1].rename(tmp_path / "s4_seed1"), others[1]]
    args = ("--against", str(runs[0]), str(others[0]), "--out", str(tmp_path / "out"))
    printed = script("plot.py", *map(str, paths), *args, "--tolerance=1e-9").stdout
    image = (tmp_path / "out" / "figure3_difference.svg").read_text()
    assert "s4 (2 seeds)" in image and "since the last growth step" in image
    with plt.style.context(plot.STYLE):
        pairs = [(load_run(paths[0]), baseline), (load_run(paths[1]), load_run(others[0]))]
        figure = plot.figure_difference(pairs, plot.Args())
    one, two, mean = (line.get_ydata() for line in figure.axes[0].lines[:3])
    assert mean == pytest.approx((one + two) / 2) and one == pytest.approx(difference)
    plt.close(figure)
    reached = [plot.tokens_to_reach(since, y, 1e-9) for y in (one, two)]
    row = f"{mean[-1]:+.4f} {sum(map(math.isfinite, reached))} of 2"
    assert f"s4 2 {row}" in re.sub(" +", " ", printed)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [([0.3, 0.2, 0.1], 3), ([0.01, 0.2, 0.1], 3), ([0.01, -0.2, 0.1], 1), ([0.3, 0.2, 0.2], None)],
)
def test_a_run_reaches_its_reference_where_the_difference_stays_small(difference, expected):
    x, y = np.array([1.0, 2.0, 3.0]), np.array(difference)
    assert plot.tokens_to_reach(x, y, 0.15) == (expected or math.inf)


def test_a_difference_needs_a_reference_of_the_same_seed_and_evaluations(runs, run_train, tmp_path):
    other = load_run(run_train("other", seed=2, **OPTIONS["baseline"]))
    with pytest.raises(UserError, match="none of the reference runs has seed 1337, that of .*s4"):
        plot.reference_of(load_run(runs[1]), [other])
    with pytest.raises(UserError, match="have the same seed: specify one reference run per seed"):
        plot.reference_of(other, [other, other])
    short = load_run(run_train("short", steps=4, eval_interval=2))
    with pytest.raises(UserError, match="s4: has no evaluation after its last growth step"):
        plot.figure_difference([(load_run(runs[1]), short)], plot.Args())
    plt.close("all")
    edit(runs[1] / "config.json", corpus="0" * 64)
    with pytest.raises(UserError, match="--against: .*baseline and .*s4: These runs were trained"):
        plot.reference_of(load_run(runs[1]), [load_run(runs[0])])
    with pytest.raises(UserError, match="--tolerance=nan must be a finite number"):
        plot.main(plot.Args((runs[1],), against=(runs[0],), tolerance=math.nan))
    with pytest.raises(UserError, match="--against cannot be used with --schedule"):
        plot.main(plot.Args(schedule=("configs/demo.py",), against=(runs[0],)))


def test_both_figures_and_the_table_from_real_runs(runs, tmp_path):
    result = script("plot.py", *runs, "--out", tmp_path / "plots")
    for name in ("figure1_loss", "figure2_hellaswag"):
        picture = matplotlib.image.imread(tmp_path / "plots" / f"{name}.png")
        assert picture.shape[:2] == (880, 1720) and picture[..., :3].std() > 0.05
        xml.etree.ElementTree.parse(tmp_path / "plots" / f"{name}.svg")
    files = {p.name for p in (tmp_path / "plots").iterdir()}
    assert files == {
        f"{n}.{s}" for n in ("figure1_loss", "figure2_hellaswag") for s in ("png", "svg")
    }
    lines = result.stdout.splitlines()
    assert re.split(r"  +", lines[0].strip()) == [
        *("run", "steps", "tokens", "paper cost", "FLOPs", "minutes", "val loss"),
        *("compute-matched (paper cost)", "acc_norm"),
    ]
    last, base = metrics(runs[1])[-1], schedule_of(runs[1])["baseline"]
    (row,) = [line for line in lines if line.startswith("s4")]
    cells = re.split(r"  +", row.strip())
    assert cells[1:3] == [str(last["step"]), f"{last['tokens']:,}"]
    assert cells[3] == f"{100 * last['paper_cost'] / base['paper_cost']:.1f}%"
    assert cells[4] == f"{100 * last['flops'] / base['flops']:.1f}%"
    assert cells[6] == f"{last['val_loss']:.4f}"
    assert cells[8].startswith(f"{100 * last['hellaswag_acc_norm']:.1f} ± ")


@pytest.mark.parametrize("axis", ["steps", "tokens", "paper_cost", "flops", "hours"])
def test_every_axis_shows_the_runs_own_numbers(runs, axis):
    loaded = [load_run(r) for r in runs]
    _, ax = plot.draw(loaded, "val_loss", plot.Args(x=axis), "loss")
    rows = [row for row in metrics(runs[1]) if "val_loss" in row]
    base = schedule_of(runs[1])["baseline"]
    expected = {
        "steps": lambda r: r["step"],
        "tokens": lambda r: r["tokens"],
        "paper_cost": lambda r: r["paper_cost"] / base["paper_cost"],
        "flops": lambda r: r["flops"] / base["flops"],
        "hours": lambda r: r["seconds"] / 3600,
    }[axis]
    (line,) = [line for line in ax.lines if line.get_label() == "s4"]
    np.testing.assert_allclose(line.get_xdata(), [expected(r) for r in rows])
    np.testing.assert_allclose(line.get_ydata(), [r["val_loss"] for r in rows])


def circles(fig_ax):
    return [x for x in fig_ax[1].lines if x.get_marker() == "o" and len(x.get_xdata())]


@pytest.mark.parametrize("match", ["paper_cost", "flops", "tokens"])
def test_the_circle_is_at_the_compute_matched_step(runs, match):
    run = load_run(runs[1])
    found = circles(plot.draw([run], "val_loss", plot.Args(match=match), "loss"))
    step = schedule_of(runs[1])["compute_matched_step"][match]
    (circle,) = found
    assert circle.get_xdata()[0] == pytest.approx(step, abs=0.6)
    x, y = run.curve("val_loss", "steps")
    assert circle.get_ydata()[0] == pytest.approx(np.interp(step, x, y), abs=0.05)


def test_no_circle_before_the_run_is_compute_matched(run_train):
    run = load_run(run_train("short", stages=4, steps=16))
    assert circles(plot.draw([run], "val_loss", plot.Args(match="paper_cost"), "loss")) == []


def test_a_compute_matched_run_may_end_half_of_its_last_step_early(run_train):
    """Steps of the last phase are four times those of the baseline, and so is the rounding."""
    ramp = dict(tokens_per_step_ramp="0:1024 50%:4096", steps=16)
    run = load_run(run_train("ramp", **ramp))
    assert not run.is_baseline
    end = run.relative_cost["tokens"][-1]
    for end_cost, matched in ((1 - 1.9 / 16, True), (1 - 2.1 / 16, False)):
        run.relative_cost["tokens"] *= end_cost / end
        end = end_cost
        assert (run.compute_matched_point("val_loss", "steps", "tokens") is not None) == matched


def test_stage_boundaries(runs):
    run = load_run(runs[1])
    assert run.stage_starts() == [4, 8, 12, 16] and load_run(runs[0]).stage_starts() == []
    _, ax = plot.draw([run], "val_loss", plot.Args(), "loss")
    (ticks,) = [line for line in ax.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert ticks.get_xdata().tolist() == [4, 8, 12, 16]


def test_a_phase_that_a_ramp_cuts_is_no_stage_boundary(run_train):
    ramp = "0:16 1K:32 11K:64"  # changes within stage 1 and within the continual phase
    path = run_train("ramp", stages=2, steps=8, continual_steps=6, context_ramp=ramp)
    names = [p["name"] for p in schedule_of(path)["phases"]]
    assert sum(", part 2" in name for name in names) == 2
    assert load_run(path).stage_starts() == [4, 8]


def test_a_run_that_has_only_begun_can_be_drawn(runs):
    path = runs[1] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:3]))
    plot.main(plot.Args(runs=tuple(runs), out=runs[0].parent / "plots"))


def test_a_run_without_hellaswag_has_one_figure(run_train, tmp_path):
    path = run_train("none", hellaswag_data="none", steps=4)
    out = tmp_path / "plots"
    out.mkdir()
    assert plot.draw_figures([load_run(path)], plot.Args(out=out)) == ["figure1_loss"]


def test_folders_that_are_no_runs_are_refused(tmp_path, runs):
    with pytest.raises(UserError, match="config.json: No such file .* specify a run folder"):
        load_run(tmp_path)
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: is empty"):
        load_run(runs[0])
    for corrupted in ('{\n{"step": 1}\n', '[1]\n{"step": 1}\n', '{"step": 1}\n'):
        (runs[0] / "metrics.jsonl").write_text(corrupted)
        with pytest.raises(UserError, match=r"metrics.jsonl.* (is corrupted|not a valid row)"):
            load_run(runs[0])
    (runs[0] / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: No such file"):
        load_run(runs[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out="):
        plot.main(plot.Args(runs=(runs[1],), out=tmp_path / "file"))


@pytest.mark.parametrize(
    "file, changes, named",
    [
        ("schedule.json", {"steps": "16"}, "steps: expected `int`"),
        ("schedule.json", {"is_baseline": None}, "missing required field `is_baseline`"),
        ("schedule.json", {"phases": []}, "phases: expected `array` of length >= 1"),
        ("schedule.json", {"phases": [{"name": "x"}]}, "phases.*missing required field"),
        ("schedule.json", {"baseline": {"steps": 1}}, "baseline: object missing required field"),
        ("config.json", {"threads": None}, "missing required field `threads`"),
        ("config.json", {"phase1": "script"}, "phase1: invalid enum value 'script'"),
    ],
)
def test_corrupted_files_are_named(run_train, file, changes, named):
    path = run_train("x", steps=2)
    edit(path / file, **changes)
    with pytest.raises(UserError, match=f"{file}: is corrupted.*{named}"):
        load_run(path)


def test_an_option_that_a_kept_run_lacks_has_its_default(run_train):
    path = run_train("x", steps=2)
    edit(path / "config.json", growth=None, skip_rate=None)
    config = load_run(path).config
    assert (config.growth, config.skip_rate, config.steps) == ("random", 0.2, 2)


def test_a_live_runs_truncated_row_is_left_out(runs):
    complete = load_run(runs[1]).columns["step"]
    with open(runs[1] / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "lo')
    assert load_run(runs[1]).columns["step"].tolist() == complete.tolist()


def test_a_baseline_that_continues_is_still_the_baseline(run_train):
    run = load_run(run_train("longer", steps=8, continual_steps=4, eval_interval=2))
    figure = plot.draw([run], "val_loss", plot.Args(), "loss")
    assert run.stage_starts() == [] and circles(figure) == []
    dashed = [line for line in figure[1].lines if line.get_linestyle() == "--"]
    (level,) = [line for line in dashed if len(set(line.get_ydata())) == 1]
    x, y = run.curve("val_loss", "steps")
    assert level.get_ydata()[0] == pytest.approx(y[list(x).index(8)])


def test_only_schedule_json_says_what_a_baseline_is(run_train):
    """A schedule of full depth that skips blocks is none."""
    path = run_train("skips", steps=8, skip_policy="layer_dropout", skip_rate=0.5)
    run = load_run(path)
    assert len(run.schedule.phases) == 1 and not run.is_baseline
    edit(path / "schedule.json", is_baseline=True)
    assert load_run(path).is_baseline


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_that_cannot_be_written_leaves_the_former_one(runs, tmp_path, monkeypatch, suffix):
    args = plot.Args(runs=tuple(runs), out=tmp_path / "plots")
    plot.main(args)
    file = args.out / f"figure1_loss.{suffix}"
    before = {p.name: p.read_bytes() for p in args.out.iterdir()}
    assert len(before) == 4

    def full(fig, f, format, **kwargs):
        real(fig, f, format=format, **kwargs)
        if format == suffix:
            f.truncate(100)
            raise OSError(errno.ENOSPC, "No space left on device")

    real = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(UserError, match=f"{file}: No space left"):
        plot.main(args)
    assert {p.name: p.read_bytes() for p in args.out.iterdir()} == before


def test_the_same_runs_give_the_same_files(runs, tmp_path):
    loaded = [load_run(r) for r in runs]
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plot.draw_figures(loaded, plot.Args(out=tmp_path / name))
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1] and len(files[0]) == 4


def test_runs_with_different_baselines_are_noted(runs, run_train, tmp_path, capsys):
    other = run_train("other", steps=8)
    for pair, noted in (((runs[0], runs[1]), False), ((runs[0], other), True)):
        plot.main(plot.Args(runs=pair, out=tmp_path / "plots"))
        assert ("different baselines" in capsys.readouterr().out) == noted


def test_all_runs_below_out_by_default(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs in out/"):
        plot.main(plot.Args())
    (tmp_path / "out").mkdir()
    for run in runs:
        run.rename(tmp_path / "out" / run.name)
    plot.main(plot.Args())
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert names == ["baseline", "s4"] and len(list((tmp_path / "plots").iterdir())) == 4


# --- odd runs


def write_rows(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_diverged_run_is_reported_as_diverged(runs, tmp_path, capsys):
    rows = metrics(runs[1])
    last = {"loss": None, "val_loss": None, "hellaswag_acc_norm": None}
    write_rows(runs[1], [*rows[:-1], rows[-1] | last])
    plot.main(plot.Args(runs=tuple(runs), out=tmp_path / "plots"))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("s4")]
    assert re.split(r"  +", line)[6:] == ["diverged", "diverged", "diverged"]
    assert "s4 (diverged)" in (tmp_path / "plots" / "figure1_loss.svg").read_text()


def test_names_and_titles_are_drawn_as_they_are(runs, tmp_path):
    odd = runs[1].rename(tmp_path / "$x_{ and $")
    plot.main(plot.Args(runs=(odd,), out=tmp_path / "plots", title="$\\alpha_{ 50 $ \udcff"))
    assert "$x_{ and $" in (tmp_path / "plots" / "figure1_loss.svg").read_text()


def test_a_run_without_rows_does_not_stop_the_others(runs, tmp_path, capsys):
    write_rows(runs[0], [])
    plot.main(plot.Args(runs=tuple(runs), out=tmp_path / "plots"))
    printed = capsys.readouterr()
    assert "note: left out: " in printed.err and "baseline/metrics.jsonl: is empty" in printed.err
    assert (tmp_path / "plots" / "figure1_loss.png").exists() and "s4" in printed.out
    with pytest.raises(UserError, match="metrics.jsonl: is empty"):
        plot.main(plot.Args(runs=(runs[0],), out=tmp_path / "plots"))


@pytest.mark.parametrize("value", ["1e999", "NaN", "Infinity", '"x"', "[]", "[" * 100_000])
def test_a_value_that_is_no_number_is_named_with_its_line(runs, value):
    rows = metrics(runs[1])
    lines = [json.dumps(row) for row in rows]
    lines[2] = json.dumps(rows[2] | {"seconds": "VALUE"}).replace('"VALUE"', value)
    (runs[1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 3: "):
        load_run(runs[1])


def test_runs_with_equal_names_and_other_data_are_told_apart(runs, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    same = runs[0].rename(tmp_path / "other" / "s4")
    edit(same / "config.json", corpus="of other data")
    plot.main(plot.Args(runs=(same, runs[1]), out=tmp_path / "plots"))
    printed = capsys.readouterr().out
    assert f"{same} " in printed and f"{runs[1]} " in printed
    assert "trained on different data" in printed


# --- pictures of schedules


def test_the_picture_of_a_schedule_shows_what_trains():
    def colors(*options):
        schedule, _ = make_schedules(load_config(list(options), Config()), GPTConfig())
        fig = plot.figure_schedule(schedule, "title")
        (image,) = fig.axes[0].get_images()
        states = [matplotlib.colors.to_rgb(c) for c in plot.STATES.values()]
        return image.get_array(), [tuple(round(x, 9) for x in state) for state in states]

    picture, (trained, frozen) = colors("--stages=2", "--n_layer=4", "--steps=100")
    white = (1.0, 1.0, 1.0)

    def column(x):  # embeddings, blocks 1 to 4, head
        return [tuple(cell) for cell in picture[:, x].round(9).tolist()]

    assert column(0) == column(239) == [trained] * 3 + [white] * 2 + [trained]
    assert column(241) == [frozen] * 3 + [trained] * 2 + [frozen]
    assert column(479) == [trained] * 6
    picture, _ = colors("configs/methods/raptr.py", "--steps=100")
    assert np.allclose(picture[1, :], trained)
    inside = picture[6, :120, 0].mean()  # half of the steps are skipped
    assert trained[0] + 0.3 < inside < 0.8


def test_schedules_are_drawn_from_config_files(tmp_path):
    out = script(
        "plot.py", "--schedule", "configs/methods/midas.py", "configs/demo.py configs/s4.py",
        f"--out={tmp_path}",
    ).stdout  # fmt: skip
    assert "schedule_midas.png" in out and "schedule_s4.png" in out
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".svg"}
    result = script("plot.py", "--schedule", "configs/mida.py", f"--out={tmp_path}", check=False)
    assert result.returncode == 1 and "did you mean configs/methods/midas.py" in result.stderr
