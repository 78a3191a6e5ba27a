"""Comparison at equal compute, from real runs."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import statistics

import msgspec
import numpy as np
import pytest
from conftest import ROOT, metrics
from scipy import stats
from test_study import instead_of_training, train_here, write_study

import frontier
import study
from frontier import Estimate, Frontier
from stagewise.errors import UserError

TOML = """
title = "Tiny"
about = "What it is for."
options = {options}
contrasts = [
    ["Do copies help?", "matched", "matched_copies"],
    ["Rate?", "baseline", "constant"],
    ["More?", "matched", "matched_copies", "baseline", "constant"],
]
[runs.baseline]
steps = [8, 16, 32]
seeds = [1, 2, 3]
[runs.stacked]
about = "first a half, then all"
options = ["--stages=2", "--freezing=none", "--growth=stack"]
steps = [16, 32]
seeds = [1, 2, 3]
[runs.matched]
options = ["--stages=2", "--continual_steps=match_flops"]
steps = [16]
seeds = [1, 2, 3]
[runs.matched_copies]
options = ["--stages=2", "--continual_steps=match_flops", "--growth=stack"]
steps = [16]
seeds = [1, 2]
[runs.constant]
options = ["--lr_schedule=constant"]
steps = [16]
against = "constant"
[runs.shorter]
options = ["--skip_policy=layer_dropout", "--skip_rate=0.9"]
steps = [8]
seeds = [1, 2, 3]
[runs.small]
control = true
options = ["--n_layer=1"]
steps = [16, 32]
seeds = [1, 2, 3]
[runs.later]
steps = [8]
"""


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "tiny"
    options = dict(lr_schedule="wsd", min_lr=0, eval_interval=32, hellaswag_data="none")
    write_study(folder, TOML, data_dir=corpus, log_interval=2, **options)
    handlers = {number: signal.getsignal(number) for number in study.StopRequest.SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        instead_of_training(patch, train_here)
        only = ("baseline", "stacked", "matched", "matched_copies", "constant", "shorter", "small")
        study.main(study.RunArgs(folder, only=only, out=folder / "out"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


def points_of(folder):
    described, runs, _ = frontier.load_runs(folder)
    return frontier.points_of(described, frontier.best_variants(runs))


def methods_of(folder):
    return {name: series for name, series in points_of(folder).items() if name != "small"}


def final(folder, name):
    row = metrics(folder / name)[-1]
    return row["flops"], row["val_loss"]


def test_the_gain_is_the_difference_to_the_interpolated_baseline_of_the_same_seed(tiny):
    points, missing = points_of(tiny), frontier.load_runs(tiny)[2]
    assert {name: [p.steps for p in series] for name, series in points.items()} == {
        "stacked": [16, 32],
        "matched": [16],
        "matched_copies": [16],
        "shorter": [8],
        "small": [16, 32],
    }
    assert [run.name for run in missing] == ["later_8_seed1"]
    gains = []
    for seed in (1, 2, 3):
        (f0, l0), (f1, l1) = (final(tiny, f"baseline_{s}_seed{seed}") for s in (16, 32))
        flops, loss = final(tiny, f"stacked_32_seed{seed}")
        assert f0 < flops < f1
        share = math.log(flops / f0) / math.log(f1 / f0)
        gains.append(l0 + share * (l1 - l0) - loss)
    gain = points["stacked"][1].gain("flops")
    assert gain.n == 3 and gain.mean == pytest.approx(statistics.fmean(gains))
    expected = 4.302653 * statistics.stdev(gains) / math.sqrt(3)
    assert gain.half_width == pytest.approx(expected)
    # tokens of a baseline with the same FLOPs
    f8 = final(tiny, "baseline_8_seed1")[0]
    tokens = 8 * 1024 * final(tiny, "stacked_32_seed1")[0] / f8
    blocks = 4 * (12 * 32**2 + 13 * 32)
    assert points["stacked"][1].tokens_per_parameter() == pytest.approx(tokens / blocks)
    # fewer FLOPs than the shortest baseline: nothing to compare with
    assert math.isnan(points["shorter"][0].gain("flops").mean)


def test_a_baseline_has_no_gain_over_itself():
    curve = Frontier(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.5]))
    for compute, loss in zip(curve.compute, curve.loss):
        assert curve.loss_at(compute) == pytest.approx(loss)
        assert curve.compute_at(loss) == pytest.approx(compute)
    assert curve.loss_at(math.sqrt(2)) == pytest.approx(2.5)
    assert math.isnan(curve.loss_at(0.5)) and math.isnan(curve.loss_at(4.1))
    assert math.isnan(curve.compute_at(1.4))
    noisy = Frontier(np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 2.5, 2.6, 2.0]))
    assert 4 < noisy.compute_at(2.4) < 8 and 1 < noisy.compute_at(2.55) < 2


def test_intervals_are_those_of_students_t():
    values = [0.1, 0.3, 0.2, 0.4, 0.0]  # mean 0.2, standard error 0.0707; t = 2.776
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(0.2) and estimate.half_width == pytest.approx(
        0.1963, 1e-3
    )
    assert str(estimate) == "**+0.2000 ± 0.1963**" and str(Estimate.of([0.1])) == "+0.1000"
    assert str(Estimate.of([0.1, 0.1004])) == "+0.1002 ± 0.0025"  # two seeds: not bold
    assert Estimate(0.0, math.log(2), 3).as_factor() == "1.00 (0.50 to 2.00)"
    assert Estimate(math.log(1.2), math.nan, 1).as_factor() == "1.20"
    assert str(Estimate.of([0.1, math.nan])) == "-"
    estimate = Estimate.of(list(range(11)))  # standard error 1; t = 2.228
    assert estimate.half_width == pytest.approx(2.228, 1e-3)
    assert estimate.p == pytest.approx(stats.ttest_1samp(list(range(11)), 0).pvalue)
    assert (
        Estimate.of([0.1, 0.1]).p == 0
        and Estimate.of([0.0, 0.0]).p == 1
        and math.isnan(Estimate.of([0.1]).p)
    )


def test_holms_correction():
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "unknown": math.nan}
    estimates = {name: Estimate(1.0, 0.5, 3, p) for name, p in p_values.items()}
    # 0.05 is divided by 5, 4, 3; 0.03 is above 0.05 / 3.
    assert frontier.holm(estimates) == ["d", "a"]
    assert frontier.holm({"b": estimates["b"]}) == ["b"]


def test_the_page_has_a_row_for_every_method_and_budget(tiny, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    frontier.main(frontier.Args(folder))
    page = (folder / "README.md").read_text()
    gain = points_of(folder)["stacked"][1].gain("flops")
    # a row in the list of methods and in each overview, two rows of all runs
    assert len(re.findall(r"^\| stacked +\|", page, re.MULTILINE)) == 5
    assert page.count(str(gain)) >= 2 and "1 runs" in page
    assert "first a half, then all" in page and "| Do copies help?" in page
    assert (folder / "gain.png").exists() and (folder / "gain.svg").exists()
    for steps, seed in itertools.product((16, 32), (1, 2, 3)):
        shutil.rmtree(folder / f"baseline_{steps}_seed{seed}")
    with pytest.raises(UserError, match="no seed has two finished runs of 'baseline'"):
        frontier.main(frontier.Args(folder))


def test_a_control_is_compared_but_not_counted(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    small = points_of(folder)["small"][1]
    flops = final(tiny, "small_32_seed1")[0]
    f32 = final(tiny, "baseline_32_seed1")[0]
    baseline = frontier.load_runs(tiny)[1][0].run  # four blocks
    parameters = frontier.block_parameters(baseline)
    tokens = 32 * baseline.config.tokens_per_step
    assert small.tokens_per_parameter() == pytest.approx(flops / f32 * tokens / parameters)
    frontier.main(frontier.Args(folder))
    before, controls = (folder / "README.md").read_text().split("## Controls")
    sentence = f"nats, is {small.gain('flops')} ({small.tokens_per_parameter():.1f} tokens per"
    assert (
        f"The control `small` is compared with the baseline, too. Its gain, in {sentence}" in before
    )
    assert "| small " not in before
    assert re.search(r"^\| small +\| +32 \|", controls, re.MULTILINE)
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace("control = true\n", ""))
    with pytest.raises(UserError, match="small_16_seed1: n_layer is 1, but 4 in"):
        frontier.load_runs(folder)


def test_methods_are_compared_with_a_control_as_with_the_baseline(tiny):
    points, controls = methods_of(tiny), {"small": points_of(tiny)["small"]}
    over = frontier.compared_with_control(points, controls["small"])
    assert {name: [p.steps for p in series] for name, series in over.items()} == {"shorter": [8]}
    gains = []
    for seed in (1, 2, 3):
        (f0, l0), (f1, l1) = (final(tiny, f"small_{s}_seed{seed}") for s in (16, 32))
        flops, loss = final(tiny, f"shorter_8_seed{seed}")
        assert f0 < flops < f1 < final(tiny, f"stacked_16_seed{seed}")[0]
        share = math.log(flops / f0) / math.log(f1 / f0)
        gains.append(l0 + share * (l1 - l0) - loss)
    (point,) = over["shorter"]
    assert point.gain("flops").mean == pytest.approx(statistics.fmean(gains)) and len(gains) == 3
    _, sentence = frontier.control_findings(controls, points, {})
    assert sentence.startswith("At equal FLOPs, with 8 steps ")
    assert "of 1 method that can be compared is significantly better than `small`" in sentence
    assert "Holm's correction leaves: " in sentence
    two_seeds = [dataclasses.replace(p, runs=p.runs[:2]) for p in controls["small"]]
    assert frontier.control_findings({"small": two_seeds}, points, {}) == []


def test_the_interpolation_is_checked_with_each_baseline_between_two_others(tiny):
    errors = []
    for seed in (1, 2, 3):
        (f0, l0), (f1, l1), (f2, l2) = (
            final(tiny, f"baseline_{s}_seed{seed}") for s in (8, 16, 32)
        )
        errors.append(l0 + math.log(f1 / f0) / math.log(f2 / f0) * (l2 - l0) - l1)
    best = frontier.best_variants(frontier.load_runs(tiny)[1])
    text = frontier.interpolation_error(best, ["baseline", "small"])  # small: two lengths
    assert f"is {min(errors):+.3f} to {max(errors):+.3f} nats for `baseline`" in text
    assert f"(mean {statistics.fmean(errors):+.3f})" in text
    assert frontier.interpolation_error([], ["baseline"]) == ""


def test_seconds_are_shown_if_all_step_times_were_measured(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)

    def page(entries):
        times = study.StepTimes("a machine", entries)
        (folder / study.TIMES).write_bytes(msgspec.json.encode(times))
        frontier.main(frontier.Args(folder))
        return (folder / "README.md").read_text()

    frontier.main(frontier.Args(folder))
    assert "equal seconds" not in (folder / "README.md").read_text()
    _, runs, _ = frontier.load_runs(folder)
    phases = {r.planned.entry: [p.name for p in r.run.schedule.phases] for r in runs}
    entries = {e: study.MeasuredEntry("", {n: [0.5] for n in names}) for e, names in phases.items()}
    text = page(entries)
    assert "equal seconds" in text and "Each was measured once. The" in text
    entries["baseline"].seconds["all blocks"] = [0.5, 0.8, 0.4]
    text = page({e: entries[e] for e in entries if e != "small"})  # not for a control
    assert "on a machine. Each is the median of 1 to 3 measurements" in text
    every = {e: study.MeasuredEntry("", {n: [0.8, 0.4, 0.5] for n in phases[e]}) for e in phases}
    assert "median of 3 measurements, and their range is 80.0% of it" in page(every)
    entries["stacked"].seconds.popitem()
    assert "equal seconds" not in page(entries)
    del entries["stacked"]
    assert "equal seconds" not in page(entries)


def test_micro_batches_and_the_cpu_may_differ_but_not_the_model(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    path = next(folder.glob("stacked_*_seed1")) / "config.json"
    config = json.loads(path.read_text())
    other = {"batch_size": 2, "cpu": "another CPU", "threads": 7}
    path.write_text(json.dumps(config | other))
    before, after = (points_of(f)["stacked"] for f in (tiny, folder))
    assert [str(p.gain("flops")) for p in before] == [str(p.gain("flops")) for p in after]
    frontier.main(frontier.Args(folder))
    assert "and 7 threads of another CPU (runs: 1) with torch" in (folder / "README.md").read_text()
    path.write_text(json.dumps(config | {"n_head": 1}))
    with pytest.raises(UserError, match="stacked_.*n_head is 1, but 2 in"):
        frontier.load_runs(folder)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def test_the_summary_counts_the_methods_on_either_side_of_the_baseline(tiny):
    points = methods_of(tiny)
    text = frontier.summary(frontier.compared(points))
    header, _, *rows = (cells(row) for row in text.splitlines() if row.startswith("|"))
    names = {16: ("stacked", "matched"), 32: ("stacked",)}  # matched_copies has two seeds
    for row, (steps, at) in zip(rows, names.items(), strict=True):
        at_steps = {n: next(p for p in points[n] if p.steps == steps) for n in at}
        gains = {n: p.gain("flops") for n, p in at_steps.items()}
        multipliers = {n: p.log_multiplier("flops") for n, p in at_steps.items()}
        better = [n for n, g in gains.items() if g.sign == 1]
        best = max(better, key=lambda n: multipliers[n].mean, default=None)
        assert row == [
            f"{steps} ({frontier.nominal(at_steps)})",
            str(len(at)),
            str(sum(g.mean > g.half_width for g in gains.values())),
            str(sum(g.mean < -g.half_width for g in gains.values())),
            best or "-",
            f"{at_steps[best].tokens_per_parameter():.1f}" if best else "",
            str(gains[best]) if best else "",
            multipliers[best].as_factor() if best else "",
            "",  # the multiplier of `stacked` is unknown
        ]
    assert header[:4] == ["steps (tokens / parameter)", "methods", "better", "worse"]
    above, around = Estimate(0.2, 0.1, 3), Estimate(0.1, 0.1, 3)
    assert above.sign == 1 and Estimate(-0.2, 0.1, 3).sign == -1 and around.sign == 0
    assert Estimate(0.2, 0.1, 2).sign == 0 and Estimate(0.2, math.nan, 1).sign == 0
    assert frontier.compared({"matched_copies": points["matched_copies"]}) == []  # two seeds
    assert frontier.answer([]) == frontier.NOTHING


def with_losses(tiny, folder, losses):
    """Copy the study, with other final losses, which may depend on those of two baselines."""
    shutil.copytree(tiny, folder)
    for seed in (1, 2, 3):
        low, high = (final(tiny, f"baseline_{steps}_seed{seed}")[1] for steps in (32, 16))
        assert low < high
        for label, loss in losses(seed, low, high).items():
            path = folder / f"{label}_seed{seed}" / "metrics.jsonl"
            rows = path.read_text().splitlines()
            last = json.loads(rows[-1]) | {"val_loss": loss}
            path.write_text("\n".join([*rows[:-1], json.dumps(last)]) + "\n")
    return points_of(folder)


@pytest.mark.parametrize("change, expected", [(1, (0, 1)), (-1, (1, 0)), (0, (0, 0))])
def test_multipliers_are_compared_between_budgets(tiny, tmp_path, change, expected):
    """The losses are those of a baseline with as many FLOPs, or more, or fewer."""

    def losses(seed, low, high):
        result = {}
        for steps, log_factor in {16: 0, 32: 0.2 * (change or seed - 2)}.items():
            compute = final(tiny, f"stacked_{steps}_seed{seed}")[0] * math.exp(log_factor)
            (x, loss), (x2, loss2) = (
                final(tiny, f"baseline_{n}_seed{seed}") for n in (steps // 2, steps)
            )
            share = math.log(compute / x) / math.log(x2 / x)
            assert 0 < share < 1
            result[f"stacked_{steps}"] = loss + share * (loss2 - loss)
        return result

    points = with_losses(tiny, tmp_path / "copy", losses)
    multipliers = [p.log_multipliers("flops") for p in points["stacked"]]
    for seed in (1, 2, 3):
        found = multipliers[1][seed] - multipliers[0][seed]
        assert found == pytest.approx(0.2 * (change or seed - 2))
    lower, higher = expected
    text = f"| {lower} lower, {higher} higher, {1 - lower - higher} n.s. |"
    assert text in re.sub(" +", " ", frontier.summary(frontier.compared(points)))


def test_a_loss_below_that_of_all_baselines_ranks_first(tiny, tmp_path):
    points = with_losses(
        tiny,
        tmp_path / "copy",
        lambda seed, low, high: {"stacked_16": low - 0.5, "matched_16": (low + high) / 2},
    )
    assert math.isnan(points["stacked"][0].log_multiplier("flops").mean)
    text = frontier.summary(frontier.compared(points))
    row = next(cells(row) for row in text.splitlines() if row.startswith("| 16"))
    assert row[2] == "2" and row[4] == "stacked" and row[-2] == "-"
    assert "lower, " not in text  # the multiplier of the only method with both budgets is unknown


@dataclasses.dataclass
class Given(frontier.Point):
    """A point with a given gain and compute multipliers; three seeds."""

    gain_of_seeds: tuple[float, ...] = ()
    multipliers: tuple[float, ...] = ()
    others: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # by metric

    def gain(self, metric):
        return Estimate.of(self.others.get(metric, self.gain_of_seeds))

    def log_multipliers(self, metric):
        return dict(enumerate(map(math.log, self.multipliers)))


@pytest.fixture
def given(tiny):
    """Return a function that makes the points of a method from {steps: (gains, multipliers)}."""
    of_steps = {p.steps: p for p in points_of(tiny)["stacked"]}

    def make(values):
        return [
            Given(of_steps[n].runs, of_steps[n].frontiers, of_steps[n].baseline, *both)
            for n, both in values.items()
        ]

    return make


SURE, BETTER = (0.1, 0.1001, 0.0999), (0.1, 0.13, 0.07)
NOISY, WORSE = (0.9, 0.1, -0.1), (-0.1, -0.13, -0.07)


def test_the_answer_counts_methods_and_names_the_best(given):
    points = {
        "good": given({16: (SURE, (1.2, 1.3, 1.2)), 32: (BETTER, (1.1, 1.1, 1.0))}),
        "fair": given({16: (BETTER, (1.1, 1.1, 1.2))}),
        "noisy": given({16: (NOISY, (2.0, 3.0, 4.0)), 32: (NOISY, (2.0, 4.0, 3.0))}),
        "bad": given({16: (WORSE, (0.9, 0.8, 0.9))}),
    }
    budgets = frontier.compared(points)
    small, large = (frontier.nominal(at.points) for at in budgets)
    best, later = (
        Estimate.of([math.log(m) for m in values]) for values in ((1.2, 1.3, 1.2), (1.1, 1.1, 1.0))
    )
    assert frontier.answer(budgets) == (
        f"At equal FLOPs, with 16 steps ({small} tokens per parameter), 2 of 4 methods are "
        "significantly better than the baseline and 1 is significantly worse; with 32 steps "
        f"({large}), 1 of 2 methods is better and none is worse. The FLOPs that the baseline needs "
        "to reach the loss of the best method, divided by those of the method, are "
        f"{best.as_factor('95% interval: ')} with 16 steps (`good`) and {later.as_factor()} with "
        "32 steps (`good`)."
    )
    assert "1.23 (95% interval: 1.1" in frontier.answer(budgets)
    assert frontier.corrected(budgets) == (
        "Even if no method differed from the baseline, about 5% of these 6 comparisons would count "
        "as better or worse by chance. After Holm's correction for multiple comparisons, these "
        "differences remain: `good` (better, 16 steps)."
    )
    assert frontier.trend(budgets) == (
        "From 16 to 32 steps, the compute multiplier is significantly lower for 1 of 2 methods and "
        "higher for 0."
    )
    (row,) = (cells(r) for r in frontier.summary(budgets).splitlines() if r.startswith("| 16"))
    assert row[2:5] == ["2", "1", "good"]  # not noisy, whose multiplier is higher


def test_results_with_other_metrics(given):
    points = {
        "same": given({16: (SURE, (1, 1, 1), {"seconds": BETTER})}),
        "other": given({16: (NOISY, (1, 1, 1), {"seconds": WORSE, "paper_cost": SURE})}),
        "lost": given({16: (SURE, (1, 1, 1), {"seconds": NOISY})}),
        "outside": given({16: (SURE, (1, 1, 1), {"seconds": (math.nan,) * 3})}),
    }
    budgets = frontier.compared(points)
    same = "of 3 comparisons have the same result (better, worse or n.s.) as at equal FLOPs."
    others = "`other` with 16 steps (worse instead of n.s.), `lost` with 16 steps (n.s. instead of"
    assert frontier.agreement(budgets, "seconds") == f"1 {same} The others are {others} better)."
    text = frontier.agreement(budgets, "paper_cost")
    assert text.startswith("3 of 4") and text.endswith(
        "`other` with 16 steps (better instead of n.s.)."
    )
    assert frontier.agreement(budgets, "flops").startswith("4 of 4")
    (point,) = points["lost"]
    config = dataclasses.replace(point.runs[0].run.config, batch_size=1)
    run = dataclasses.replace(point.runs[0].run, config=config)
    point.runs = [dataclasses.replace(point.runs[0], run=run), *point.runs[1:]]
    assert frontier.agreement(budgets, "seconds").startswith("1 of 2")
    assert frontier.agreement([], "seconds") == ""


def test_the_answer_if_no_method_is_better_or_one_is_below_every_baseline(given):
    worse = {"bad": given({16: (WORSE, (0.9, 0.8, 0.9))})}
    budgets = frontier.compared(worse)
    text = frontier.answer(budgets)
    assert text.endswith(
        "none of 1 method is significantly better than the baseline and 1 is significantly worse."
    )
    assert frontier.corrected(budgets).endswith("remain: `bad` (worse, 16 steps).")
    noisy = frontier.compared({"noisy": given({16: (NOISY, (2.0, 3.0, 4.0))})})
    assert frontier.corrected(noisy).endswith("no difference remains.")
    unknown = {"best": given({16: (BETTER, (math.nan,) * 3)}), **worse}
    text = frontier.answer(frontier.compared(unknown))
    assert "1 of 2 methods is significantly better" in text and "needs" not in text
    assert "worse. For `best` with 16 steps, the compute multiplier is unknown, because" in text


def test_the_first_contrast_and_those_that_depend_on_the_budget_are_items():
    better, unclear, worse = (Estimate(mean, 0.1, 3) for mean in (0.2, 0.05, -0.2))
    found = {
        ("Is b better?", "a", "b"): {16: better, 32: unclear},
        ("And c?", "a", "c"): {16: better, 32: better},
        ("And d?", "a", "d"): {16: better, 32: worse},
        ("Is the difference larger?", "a", "b", "c", "d"): {16: better, 32: worse},
        ("Two seeds?", "a", "e"): {16: better, 32: Estimate(-0.2, 0.1, 2)},
    }
    assert frontier.contrast_findings(found) == [
        "Is b better? The difference of the losses at equal FLOPs (`a` minus `b`; positive if "
        "`b` is better), in nats, is **+0.2000 ± 0.1000** (16 steps), +0.0500 ± 0.1000 (32 steps).",
        "And d? `a` minus `d` is **+0.2000 ± 0.1000** (16 steps), **-0.2000 ± 0.1000** (32 steps).",
    ]
    assert frontier.contrast_findings({}) == []


def test_contrasts_are_paired_differences_of_losses(tiny, tmp_path):
    described, runs, _ = frontier.load_runs(tiny)
    of = {name: [r for r in runs if r.planned.entry == name] for name in described.runs}
    estimate = frontier.contrast(of["matched"], of["matched_copies"])
    losses = [
        [final(tiny, f"{name}_16_seed{seed}")[1] for seed in (1, 2)]
        for name in ("matched", "matched_copies")
    ]
    differences = [a - b for a, b in zip(*losses)]
    assert estimate == {(16, seed): d for seed, d in zip((1, 2), differences, strict=True)}
    assert list(frontier.contrast(of["baseline"], of["constant"])) == [(16, 1)]
    assert frontier.contrast(of["baseline"], of["stacked"]) == {}  # fewer FLOPs
    table = frontier.contrast_table(frontier.contrasts_of(described, runs), runs[0].run)
    table = re.sub(" +", " ", table)
    assert f"| Do copies help? | matched - matched_copies | {Estimate.of(differences)}" in table
    rate = frontier.contrast(of["baseline"], of["constant"])[16, 1]
    more = f"(matched - matched_copies) - (baseline - constant) | {differences[0] - rate:+.4f}"
    assert f"| More? | {more} |" in table
    text = (tiny / "study.toml").read_text().replace('line", "constant"', 'line", "other"')
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError, match="contrasts: 'other' is not a run"):
        study.load_study(tmp_path)
    three = (tiny / "study.toml").read_text().replace('"matched_copies", "base', '"base')
    (tmp_path / "study.toml").write_text(three)
    with pytest.raises(
        UserError, match="contrasts: .* is not a question followed by 2 or 4 labels"
    ):
        study.load_study(tmp_path)


def test_the_best_variant_is_used_at_every_number_of_steps(tiny, tmp_path):
    text = (tiny / "study.toml").read_text()
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    variant = '[runs.constant]\nvariant_of = "baseline"\n'
    (folder / "study.toml").write_text(text.replace("[runs.constant]\n", variant))
    _, runs, _ = frontier.load_runs(folder)
    # "constant" has one seed, and "baseline" three, unless only the first is known.
    first = [r for r in runs if r.planned.seed == 1]
    losses = {name: final(tiny, f"{name}_16_seed1")[1] for name in ("baseline", "constant")}
    lowest = min(losses, key=losses.get)
    for known, expected in ((runs, "baseline"), (first, lowest)):
        best = frontier.best_variants(known)
        used = {r.steps: r.planned.entry for r in best if r.method == "baseline"}
        assert used == {8: "baseline", 16: expected, 32: "baseline"}
        assert {r.method for r in best} == {r.method for r in known}
        rows = re.sub(" +", " ", frontier.variant_table(known)).splitlines()
        n = 1 if known is first else 3
        of_baseline = [final(tiny, f"baseline_16_seed{seed}")[1] for seed in (1, 2, 3)[:n]]
        means = {"baseline": statistics.fmean(of_baseline), "constant": losses["constant"]}
        cells = {k: f"**{v:.4f}**" if k == expected else f"{v:.4f}" for k, v in means.items()}
        cells["baseline"] += " (baseline)"  # both have the same rate
        cells["constant"] += " (constant, n = 1)" if n == 3 else " (constant)"
        assert rows[0] == "| method | steps | seeds | 0.001 |"
        assert rows[2:] == [f"| baseline | 16 | {n} | {', '.join(cells.values())} |"]
    frontier.main(frontier.Args(folder))
    assert "## Variants" in (folder / "README.md").read_text()
    again = text.replace("[runs.constant]\n", '[runs.constant]\nvariant_of = "x"\n')
    (folder / "study.toml").write_text(again)
    with pytest.raises(UserError, match="runs.constant: variant_of = 'x' is neither"):
        study.load_study(folder)


def test_variants_are_compared_over_their_common_seeds(tiny, tmp_path, monkeypatch):
    """The third seed of the better variant is so bad that its mean over all seeds is higher."""
    folder = tmp_path / "copy"

    def losses(seed, low, high):
        copies = {} if seed == 3 else {"matched_copies_16": low}
        return {"matched_16": high + 5 if seed == 3 else low - 0.1} | copies

    with_losses(tiny, folder, losses)
    text = (folder / "study.toml").read_text()
    variant = '[runs.matched_copies]\nvariant_of = "matched"\n'
    (folder / "study.toml").write_text(text.replace("[runs.matched_copies]\n", variant))
    _, runs, _ = frontier.load_runs(folder)
    entries = frontier.variants(runs)["matched", 16]
    assert {entry: len(own) for entry, own in entries.items()} == {
        "matched": 3,
        "matched_copies": 2,
    }
    assert list(frontier.losses_of(entries)[0]) == ["matched"]  # two seeds are too few
    monkeypatch.setattr(frontier, "MIN_SEEDS", 2)
    means, n = frontier.losses_of(entries)
    assert n == 2 and means["matched"] == pytest.approx(means["matched_copies"] - 0.1)
    used = [r for r in frontier.best_variants(runs) if r.method == "matched"]
    assert {r.planned.entry for r in used} == {"matched"} and len(used) == 3


def test_variants_of_a_method_need_no_run_of_its_name(tiny, tmp_path):
    """As in a study for choosing learning rates: `baseline` itself is the method of two runs."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    for path in folder.glob("baseline_*"):
        path.rename(folder / path.name.replace("baseline", "main"))
    header = (folder / "study.toml").read_text().split("contrasts")[0]
    (folder / "study.toml").write_text(header + VARIANTS_ONLY)
    expected, points = points_of(tiny), points_of(folder)
    assert points.keys() == {"grown"}
    for point, label in zip(points["grown"], ("shorter", "stacked"), strict=True):
        assert str(point.gain("flops")) == str(expected[label][0].gain("flops"))
    frontier.main(frontier.Args(folder))
    page = re.sub(" +", " ", (folder / "README.md").read_text())
    assert "| method | variant | steps |" in page and "| grown | shorter | 8 |" in page


VARIANTS_ONLY = """
[runs.main]
variant_of = "baseline"
steps = [8, 16, 32]
seeds = [1, 2, 3]
against = "main"
[runs.constant]
variant_of = "baseline"
options = ["--lr_schedule=constant"]
steps = [16]
against = "constant"
[runs.shorter]
variant_of = "grown"
options = ["--skip_policy=layer_dropout", "--skip_rate=0.9"]
steps = [8]
seeds = [1, 2]
against = "main"
[runs.stacked]
variant_of = "grown"
options = ["--stages=2", "--freezing=none", "--growth=stack"]
steps = [16]
seeds = [1, 2, 3]
against = "main"
"""


def test_a_run_that_was_not_trained_as_planned_is_an_error(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(
        text.replace(
            '"--growth=stack"]\nsteps = [16, 32]',
            '"--growth=stack", "--learning_rate=1"]\nsteps = [16, 32]',
        )
    )
    with pytest.raises(
        UserError, match=r"stacked_16_seed1: was trained with learning_rate=\S+, but"
    ):
        frontier.load_runs(folder)


def test_the_finding_is_written_between_the_marks(tiny, tmp_path):
    folder, page = tmp_path / "copy", tmp_path / "page.md"
    shutil.copytree(tiny, folder)
    page.write_text(f"before\n{frontier.BEGIN}\nformer\n{frontier.END}\nafter\n")
    frontier.main(frontier.Args(folder, readme=page))
    text = page.read_text()
    budgets = frontier.compared(methods_of(folder))
    assert text.startswith(f"before\n{frontier.BEGIN}\n{frontier.answer(budgets)}\n\n![gain")
    assert f"{frontier.corrected(budgets)}\n\nDo copies help? The difference" in text
    assert text.endswith(f"{frontier.END}\nafter\n") and "](copy/gain.png)" in text
    assert "former" not in text and frontier.summary(budgets) in text
    assert "\n\nThe control `small` is compared" in text
    own = (folder / "README.md").read_text()
    assert (
        "\n- Do copies help? The difference" in own and "\n- The control `small` is compared" in own
    )
    assert (folder / "gain.png").exists() and "](gain.png)" in own
    page.write_text("nothing\n")
    with pytest.raises(UserError, match="has no lines <!-- written by frontier.py -->"):
        frontier.main(frontier.Args(folder, readme=page))
    assert page.read_text() == "nothing\n"


def test_the_small_study_is_valid(tmp_path, corpus):
    shutil.copy(ROOT / "configs/study_small.toml", tmp_path / "study.toml")
    runs = study.load_study(tmp_path)[1]
    _, flops = study.check_runs(runs, [f"data_dir={corpus}"])
    longest = max(flops, key=lambda name: flops[name])
    assert len(flops) == 33 and longest.startswith("baseline_300")  # no method is outside
