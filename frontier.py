"""Compare methods with the baseline at equal compute, at several budgets, with 95% intervals.

    python frontier.py results/NAME

results/NAME is a study (see study.py) in which `baseline` and the methods are trained for several
numbers of steps, each run to the end of its learning-rate schedule. There can be variants of the
baseline and of methods, for example with different learning rates. At each number of steps, the
best variant is used. The final loss of the baselines as a function of compute is the frontier.
Between two baselines, it is linear in the logarithm of compute. The gain of a run is the loss of
the frontier at the compute of the run, minus the loss of the run. The run and the baselines have
the same seed, so they read the same data in the same order. A run whose compute is outside the
range of the baselines has no gain.

Writes README.md, gain.png and gain.svg to results/NAME.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import collections
import itertools
import math
import os
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import matplotlib
import numpy as np
import tyro
from scipy import stats

import plot
import study
from plot import COLORS
from runs import Run
from stagewise.config import Config, load_config
from stagewise.errors import UserError, file_errors, report_user_errors
from study import BASELINE, PlannedRun

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Key = TypeVar("Key", bound=Hashable)
MIN_SEEDS = 3  # for a comparison to count
# Lines of Markdown between which --readme writes.
BEGIN, END = "<!-- written by frontier.py -->", "<!-- end -->"
METRICS = ("flops", "paper_cost", "seconds")
FIGURE = "gain.png"


@dataclass
class Args:
    """Compare the methods of a study with its baselines at equal compute."""

    folder: tyro.conf.Positional[Path]
    """Folder with a study.toml and finished runs."""
    readme: Path | None = None
    """Also write the findings, the figure and the summary to this file, between the lines
    "<!-- written by frontier.py -->" and "<!-- end -->"."""


@dataclass
class Finished:
    """A finished run of the study."""

    planned: PlannedRun
    run: Run
    method: str
    compared_with: str  # method of the runs with which it is compared

    @property
    def loss(self) -> float:
        loss = self.run.last("val_loss")
        assert loss is not None
        return loss

    def compute(self, metric: str) -> float:
        """Return the total cost of the run, or its seconds."""
        if metric == "seconds":
            return study.total_seconds(self.run)
        return float(self.run.columns[metric][-1])

    @property
    def rate(self) -> float:
        """Learning rate."""
        return self.run.config.learning_rate

    @property
    def steps(self) -> int:
        """The steps of the run's baseline, which identify the budget."""
        return self.run.schedule.baseline.steps


@dataclass
class Frontier:
    """The final loss of baselines with the same seed as a function of compute."""

    compute: np.ndarray  # increasing
    loss: np.ndarray

    @classmethod
    def of(cls, baselines: Sequence[Finished], metric: str) -> "Frontier":
        points = sorted((run.compute(metric), run.loss) for run in baselines)
        compute, loss = np.array(points).T
        return cls(compute, loss)

    def loss_at(self, compute: float) -> float:
        """Return the interpolated loss, or NaN outside of the range of the baselines."""
        if not self.compute[0] * 0.999 <= compute <= self.compute[-1] * 1.001:
            return math.nan
        return float(np.interp(math.log(compute), np.log(self.compute), self.loss))

    def compute_at(self, loss: float) -> float:
        """Return the compute at which a baseline has this loss, or NaN outside of the range."""
        best = np.minimum.accumulate(self.loss)  # a longer run may be worse
        if not best[-1] <= loss <= best[0]:
            return math.nan
        return float(np.exp(np.interp(-loss, -best, np.log(self.compute))))


@dataclass
class Estimate:
    """Mean and half-width of a 95% interval (Student's t) over seeds."""

    mean: float
    half_width: float  # NaN with a single seed
    n: int
    p: float = math.nan  # of a two-sided t test of mean = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        known = [v for v in values if not math.isnan(v)]
        if len(known) < len(values) or not known:
            return cls(math.nan, math.nan, len(values))
        n = len(known)
        if n == 1:
            return cls(known[0], math.nan, 1)
        mean, error = statistics.fmean(known), statistics.stdev(known) / math.sqrt(n)
        t = abs(mean) / error if error else math.inf if mean else 0.0
        half_width = float(stats.t.ppf(0.975, n - 1)) * error
        return cls(mean, half_width, n, 2 * float(stats.t.sf(t, n - 1)))

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below zero, otherwise 0; 0 for fewer than 3 seeds."""
        if self.n < MIN_SEEDS or math.isnan(self.mean) or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        text = f"{self.mean:+.4f}" + (f" ± {self.half_width:.4f}" if self.n > 1 else "")
        return f"**{text}**" if self.sign else text

    def as_factor(self, label: str = "") -> str:
        """Format an estimate of a logarithm as a factor with its interval, after `label`."""
        if math.isnan(self.mean):
            return "-"
        low, high = (math.exp(self.mean + sign * self.half_width) for sign in (-1, 1))
        interval = f" ({label}{low:.2f} to {high:.2f})" if self.n > 1 else ""
        return f"{math.exp(self.mean):.2f}{interval}"


@dataclass
class Point:
    """A method at a budget: its runs with all seeds."""

    runs: list[Finished]
    frontiers: dict[tuple[str, int], Frontier]  # by metric and seed
    baseline: Run  # of any length

    def gain(self, metric: str) -> Estimate:
        """Return the gain over the frontier at equal compute, in nats."""
        return Estimate.of(
            [
                self.frontiers[metric, r.planned.seed].loss_at(r.compute(metric)) - r.loss
                for r in self.runs
            ]
        )

    def log_multiplier(self, metric: str) -> Estimate:
        """Return the logarithm of the compute multiplier."""
        return Estimate.of(list(self.log_multipliers(metric).values()))

    def log_multipliers(self, metric: str) -> dict[int, float]:
        """Return the logarithm of the compute multiplier of every run, by seed.

        This is the compute that a baseline needs for the loss of the run, divided by the run's.
        """
        result = {}
        for r in self.runs:
            needed = self.frontiers[metric, r.planned.seed].compute_at(r.loss)
            result[r.planned.seed] = math.log(needed / r.compute(metric))
        return result

    def rank(self) -> tuple[float, float]:
        """Return what methods are sorted by: the compute multiplier, then the gain.

        Gains at different FLOPs are not comparable, so the multiplier comes first. It is unknown if
        the loss of a run is below or above those of all baselines.
        """
        gain, multiplier = self.gain("flops").mean, self.log_multiplier("flops").mean
        return math.copysign(math.inf, gain) if math.isnan(multiplier) else multiplier, gain

    @property
    def steps(self) -> int:
        return self.runs[0].steps

    def tokens_per_parameter(self) -> float:
        """Return the tokens of a baseline with the FLOPs of the runs, per non-embedding parameter.

        These are tokens of the baseline, because a method may read more tokens with the same FLOPs.
        """
        schedule = self.baseline.schedule.baseline
        flops_per_token = schedule.flops / schedule.tokens
        return self.runs[0].compute("flops") / flops_per_token / block_parameters(self.baseline)


def block_parameters(run: Run) -> int:
    """Return the number of parameters of all blocks of the final model."""
    d, bias = run.config.n_embd, run.config.bias
    return run.config.n_layer * (12 * d * d + 2 * d + (11 * d if bias else 0))


def load_runs(folder: Path) -> tuple[study.Study, list[Finished], list[PlannedRun]]:
    """Return the study, its finished runs, and the runs that are not finished.

    Raises:
        UserError: if files are corrupted, or runs were not trained under the same conditions.
    """
    described, planned = study.load_study(folder)
    runs: list[Finished] = []
    missing, times = [], study.load_times(folder)
    configs: dict[str, Config] = {}  # by label
    for p in planned:
        run = study.load_finished(folder / p.name)
        if run is None:
            missing.append(p)
            continue
        if p.label not in configs:
            configs[p.label] = load_config([*p.options], Config())
        # Not the options of all runs, which --options of study.py may replace.
        words = p.options[len(described.options) :]
        names = {w.removeprefix("--").split("=")[0] for w in words} & study.RECIPE - {"seed"}
        check_recipe(folder / p.name, run, configs[p.label], names)
        run.step_seconds = times.medians(p.entry)
        against = described.runs[p.entry].against
        runs.append(Finished(p, run, described.method(p.entry), described.method(against)))
    # The CPU, the number of threads and the size of micro-batches change rounding and dropout
    # masks, so runs with the same seed diverge, but not systematically.
    may_differ = study.METHOD | study.RECIPE | {"steps", "batch_size", "cpu", "threads"}
    controls = described.controls()
    same_depth = [r for r in runs if r.method not in controls]
    for r in runs if same_depth else ():
        depth = {"n_layer"} if r.method in controls else set()
        study.check_comparable(folder, r.run, same_depth[0].run, may_differ | depth)
    return described, runs, missing


def check_recipe(folder: Path, run: Run, config: Config, names: set[str]) -> None:
    """Raise UserError if a run was trained with other values of `names` than study.toml says."""
    for name in sorted(names):
        before, now = getattr(run.config, name), getattr(config, name)
        if before != now:
            raise UserError(
                f"{folder}: was trained with {name}={before}, but study.toml says {name}={now}: "
                f"correct it, or move {folder} elsewhere and train the run again"
            )


def variants(runs: list[Finished]) -> dict[tuple[str, int], dict[str, list[Finished]]]:
    """Return the runs by method and number of steps, and then by entry."""
    result: dict[tuple[str, int], dict[str, list[Finished]]] = {}
    for r in runs:
        result.setdefault((r.method, r.steps), {}).setdefault(r.planned.entry, []).append(r)
    return result


def best_variants(runs: list[Finished]) -> list[Finished]:
    """Return the runs of the best variant of every method at every number of steps.

    This is the variant with the lowest loss of those in `losses_of`.
    """
    best = []
    for entries in variants(runs).values():
        losses, _ = losses_of(entries)
        best += entries[min(losses, key=losses.__getitem__)]
    return best


def losses_of(entries: dict[str, list[Finished]]) -> tuple[dict[str, float], int]:
    """Return the mean losses of variants over their common seeds, and the number of these seeds.

    Variants with fewer than MIN_SEEDS seeds are left out, unless no variant has more.
    """
    enough = min(MIN_SEEDS, max(map(len, entries.values())))
    by_seed = {
        entry: {r.planned.seed: r.loss for r in own}
        for entry, own in entries.items()
        if len(own) >= enough
    }
    common = set.intersection(*map(set, by_seed.values()))
    if not common:  # such as two variants with one seed each
        return {entry: statistics.fmean(own.values()) for entry, own in by_seed.items()}, enough
    means = {e: statistics.fmean(own[seed] for seed in common) for e, own in by_seed.items()}
    return means, len(common)


def points_of(described: study.Study, best: list[Finished]) -> dict[str, list[Point]]:
    """Return the points of every method that is compared with the baselines, by its label.

    Args:
        best: the runs of the best variants.

    Raises:
        UserError: if there are not enough baselines.
    """
    baselines = [r for r in best if r.method == BASELINE]
    frontiers = frontiers_of(baselines)
    if not frontiers:
        raise UserError(
            f"no seed has two finished runs of {BASELINE!r}: train them first, with python "
            "study.py run"
        )
    points: dict[str, dict[int, list[Finished]]] = {}
    for r in best:
        has_frontier = ("flops", r.planned.seed) in frontiers
        if r.method != BASELINE and r.compared_with == BASELINE and has_frontier:
            points.setdefault(r.method, {}).setdefault(r.steps, []).append(r)
    return {
        method: [Point(rs, frontiers, baselines[0].run) for rs in by.values()]
        for method, by in points.items()
    }


def frontiers_of(baselines: list[Finished]) -> dict[tuple[str, int], Frontier]:
    """Return the frontier of every metric and seed with at least two runs."""
    frontiers: dict[tuple[str, int], Frontier] = {}
    for seed in {r.planned.seed for r in baselines}:
        own = [r for r in baselines if r.planned.seed == seed]
        if len(own) > 1:
            frontiers |= {(m, seed): Frontier.of(own, m) for m in METRICS}
    return frontiers


def compared_with_control(
    points: dict[str, list[Point]], control: list[Point]
) -> dict[str, list[Point]]:
    """Return the points of methods, but compared with a control instead of the baseline.

    Seeds with fewer than two runs of the control, and methods without a gain over it, are left out.
    """
    frontiers = frontiers_of([r for p in control for r in p.runs])
    result: dict[str, list[Point]] = {}
    for method, series in points.items():
        for p in series:
            runs = [r for r in p.runs if ("flops", r.planned.seed) in frontiers]
            point = Point(runs, frontiers, p.baseline)
            if not math.isnan(point.gain("flops").mean):
                result.setdefault(method, []).append(point)
    return result


def contrast(runs: list[Finished], others: list[Finished]) -> dict[tuple[int, int], float]:
    """Return the loss of `runs` minus that of `others`, by the steps of the baseline and the seed.

    Only runs with the same seed and the same FLOPs are compared.
    """
    differences: dict[tuple[int, int], float] = {}
    for a in runs:
        for b in others:
            paired = a.planned.seed == b.planned.seed and a.steps == b.steps
            if paired and abs(a.compute("flops") / b.compute("flops") - 1) < study.CLOSE:
                differences[a.steps, a.planned.seed] = a.loss - b.loss
    return differences


def draw(groups: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Draw the gain at equal FLOPs over the budget: a panel per group, a line per method.

    The methods of the other groups are gray. Markers are hollow if there are fewer than MIN_SEEDS
    seeds.
    """
    known = {name: series for points in groups.values() for name, series in points.items()}
    lines = {name: line for name, series in known.items() if len(line := _line(series))}
    columns = min(3 if len(groups) > 4 else 2, len(groups))
    rows = -(-len(groups) // columns)
    with plt.style.context(plot.STYLE):
        size = ((8.6, 10.0, 13.0)[columns - 1], 3.3 * rows + 0.4)
        fig, axes = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (group, points) in zip(axes.flat, groups.items()):
            ax.axhline(0, color="black", linewidth=1)
            for name in [name for name in lines if name not in points]:
                x, y, *_ = lines[name].T
                ax.plot(x, y, color="#DDDDDD", linewidth=1, marker=".", zorder=0)
            own = [name for name in points if name in lines]
            for i, name in enumerate(own):
                x, y, error, n = lines[name].T
                style = dict(color=COLORS[i % len(COLORS)], marker="os^Dv"[i % 5], markersize=4)
                # Shifts of a few percent keep the intervals of different methods apart.
                x = x * 1.02 ** (i - len(own) / 2)
                few = n < MIN_SEEDS
                ax.errorbar(
                    x, y, np.where(few, 0, error), label=name, capsize=2, linewidth=1.4, **style
                )
                ax.plot(x[few], y[few], linestyle="none", zorder=3, **style | {"mfc": "white"})
            ax.set_title(group, fontsize=10)
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 4, 6)))
            ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ax.tick_params(labelbottom=True)
            if own:
                ax.legend(fontsize=7.5)
        for ax in axes.flat[len(groups) :]:
            ax.remove()
        if lines:  # so that one wide interval does not determine the scale
            y = np.concatenate([line[:, 1] for line in lines.values()])
            margin = 0.02 + 0.25 * float(np.ptp(np.append(y, 0)))
            axes.flat[0].set_ylim(min(0, y.min()) - margin, max(0, y.max()) + margin)
            x = np.concatenate([line[:, 0] for line in lines.values()])
            axes.flat[0].set_xlim(x.min() / 1.4, x.max() * 1.4)
        fig.supxlabel(
            "tokens per non-embedding parameter, of a baseline with the same FLOPs", size=10
        )
        fig.supylabel("gain over the baseline at equal FLOPs (nats)", size=10)
        plot.save(fig, path)
        plt.close(fig)


def _line(series):
    """Return rows (tokens per parameter, mean gain, half of the interval, number of seeds)."""
    gains = [(p.tokens_per_parameter(), p.gain("flops")) for p in series]
    rows = sorted((x, g.mean, g.half_width, g.n) for x, g in gains if not math.isnan(g.mean))
    return np.array(rows).reshape(-1, 4)


def by_budget(points: dict[str, list[Point]]) -> dict[int, dict[str, Point]]:
    """Return the points by number of steps, in increasing order, and by method."""
    budgets: dict[int, dict[str, Point]] = {}
    for name, series in points.items():
        for p in series:
            budgets.setdefault(p.steps, {})[name] = p
    return {steps: budgets[steps] for steps in sorted(budgets)}


def overview(points: dict[str, list[Point]], metric: str) -> str:
    """Return a table with a row per method and a column per budget. Bold: not zero."""
    budgets = by_budget(points)
    rows = []
    for name in points:
        row = [name]
        for at in budgets.values():
            gain = at[name].gain(metric) if name in at else Estimate(math.nan, math.nan, 0)
            row.append(str(gain))
        rows.append(row)
    header = ["method"]
    for steps, at in budgets.items():
        header.append(f"{steps:,} steps ({nominal(at)})")
    return study.markdown(header, rows)


def nominal(at: dict[str, Point]) -> str:
    """Return the tokens per non-embedding parameter of a baseline with as many steps."""
    run = next(iter(at.values())).runs[0].run
    return per_parameter(run.schedule.baseline.tokens / block_parameters(run))


def per_parameter(tokens: float) -> str:
    """Format tokens per parameter as an integer, or with two digits if there is less than one."""
    return f"{tokens:.0f}" if tokens >= 1 else f"{tokens:.2g}"


def table(points: dict[str, list[Point]], metrics: Sequence[str]) -> str:
    rows = []
    for name, series in points.items():
        for p in sorted(series, key=lambda p: p.steps):
            rows.append(
                [
                    name,
                    "" if (entry := p.runs[0].planned.entry) == name else entry,
                    f"{p.steps:,}",
                    f"{p.runs[0].run.config.learning_rate:g}",
                    f"{p.tokens_per_parameter():.1f}",
                    str(len(p.runs)),
                    f"{statistics.fmean(r.loss for r in p.runs):.4f}",
                    *(str(p.gain(metric)) for metric in metrics),
                    p.log_multiplier("flops").as_factor(),
                ]
            )
    header = ["method", "variant", "steps", "learning rate", "tokens / parameter", "seeds"]
    header += ["val loss", *(f"gain, equal {study.LABELS[m]}" for m in metrics)]
    header.append("compute multiplier")
    if not any(row[1] for row in rows):
        for row in (header, *rows):
            del row[1]
        return study.markdown(header, rows)
    return study.markdown(header, rows, n_left=2)


def variant_table(runs: list[Finished]) -> str:
    """Return the losses of methods with several variants by learning rate. Bold: the best."""
    used = {r.planned.label for r in best_variants(runs)}
    several = {at: entries for at, entries in variants(runs).items() if len(entries) > 1}
    rates = sorted({own[0].rate for entries in several.values() for own in entries.values()})
    methods = list(dict.fromkeys(method for method, _ in several))
    rows = []
    for method, steps in sorted(several, key=lambda at: (methods.index(at[0]), at[1])):
        cells: dict[float, list[str]] = {rate: [] for rate in rates}
        losses, n_seeds = losses_of(several[method, steps])
        same_rate = collections.Counter(own[0].rate for own in several[method, steps].values())
        for entry, own in several[method, steps].items():
            cell = f"{losses.get(entry, statistics.fmean(r.loss for r in own)):.4f}"
            cell = f"**{cell}**" if own[0].planned.label in used else cell
            notes = [entry] if same_rate[own[0].rate] > 1 else []
            notes += [f"n = {len(own)}"] if entry not in losses else []
            cells[own[0].rate].append(cell + (f" ({', '.join(notes)})" if notes else ""))
        rows.append([method, f"{steps:,}", str(n_seeds), *map(", ".join, cells.values())])
    header = ["method", "steps", "seeds", *(f"{rate:g}" for rate in rates)]
    return study.markdown(header, rows) if rows else ""


def contrasts_of(
    described: study.Study, best: list[Finished]
) -> dict[tuple[str, ...], dict[int, Estimate]]:
    """Return the estimates of every direct comparison that has one, by number of steps."""
    found = {}
    for row in described.contrasts:
        first, *rest = (
            contrast(*([r for r in best if r.method == label] for label in pair))
            for pair in (row[1:3], row[3:])
            if pair
        )
        if rest:
            first = {at: first[at] - rest[0][at] for at in first.keys() & rest[0].keys()}
        budgets = sorted({steps for steps, _ in first})
        if budgets:
            found[row] = {
                n: Estimate.of([value for (steps, _), value in first.items() if steps == n])
                for n in budgets
            }
    return found


def contrast_table(found: dict[tuple[str, ...], dict[int, Estimate]], baseline: Run) -> str:
    """Return the direct comparisons of a study as a table."""
    budgets = sorted({steps for estimates in found.values() for steps in estimates})
    per_step = baseline.config.tokens_per_step / block_parameters(baseline)
    header = ["question", "loss difference"]
    header += [f"{steps:,} steps ({per_parameter(steps * per_step)})" for steps in budgets]
    rows = [
        [question, ("{} - {}" if len(labels) == 2 else "({} - {}) - ({} - {})").format(*labels)]
        + [str(estimates[steps]) if steps in estimates else "" for steps in budgets]
        for (question, *labels), estimates in found.items()
    ]
    return study.markdown(header, rows, n_left=2)


def contrast_findings(found: dict[tuple[str, ...], dict[int, Estimate]]) -> list[str]:
    """Describe the first direct comparison, and those whose result depends on the budget.

    Comparisons with more than two labels are left out.
    """
    items: list[str] = []
    for i, ((question, *labels), estimates) in enumerate(found.items()):
        depends = {1, -1} <= {estimate.sign for estimate in estimates.values()}
        if len(labels) != 2 or not (i == 0 or depends):
            continue
        values = ", ".join(f"{e} ({steps:,} steps)" for steps, e in estimates.items())
        a, b = labels
        what = f"`{a}` minus `{b}`"
        if not items:
            what = f"The difference of the losses at equal FLOPs ({what}"
            what += f"; positive if `{b}` is better), in nats,"
        items.append(f"{question} {what} is {values}.")
    return items


@dataclass
class Budget:
    """The methods that are compared with the baseline at one number of steps."""

    steps: int
    points: dict[str, Point]  # with at least MIN_SEEDS seeds and a gain; by method
    gains: dict[str, Estimate]  # of the same methods, at equal FLOPs
    remaining: list[str]  # methods whose gain is significant after Holm's correction

    @property
    def better(self) -> list[str]:
        return [name for name, gain in self.gains.items() if gain.sign == 1]

    @property
    def worse(self) -> list[str]:
        return [name for name, gain in self.gains.items() if gain.sign == -1]

    @property
    def best(self) -> str:
        """The method with the highest compute multiplier of those that are better."""
        return max(self.better, key=lambda name: self.points[name].rank())

    def changes(self, before: "Budget") -> list[Estimate]:
        """Return how the logarithm of the compute multiplier changes, for methods at both budgets.

        The differences are paired by seed. Methods with an unknown multiplier are left out.
        """
        result = []
        for name in self.points.keys() & before.points.keys():
            new, old = (at.points[name].log_multipliers("flops") for at in (self, before))
            result.append(Estimate.of([new[seed] - old[seed] for seed in new if seed in old]))
        return [change for change in result if not math.isnan(change.mean)]


def compared(points: dict[str, list[Point]]) -> list[Budget]:
    """Return the budgets at which methods have enough seeds, from the smallest to the largest."""
    gains: dict[tuple[int, str], Estimate] = {}
    budgets = by_budget(points)
    for steps, at in budgets.items():
        for name, point in at.items():
            gain = point.gain("flops")
            if gain.n >= MIN_SEEDS and not math.isnan(gain.mean):
                gains[steps, name] = gain
    remaining = holm(gains)
    result = []
    for steps, at in budgets.items():
        if own := {name: gain for (n, name), gain in gains.items() if n == steps}:
            enough = {name: at[name] for name in own}
            left = [name for n, name in remaining if n == steps]
            result.append(Budget(steps, enough, own, left))
    return result


def answer(budgets: list[Budget]) -> str:
    """Return a paragraph that says what the study has found, for readers who know no details."""
    return f"{counts(budgets)} {multipliers(budgets)}".strip() if budgets else NOTHING


def counts(budgets: list[Budget], control: str = "") -> str:
    """Say how many methods are better and worse than the baseline or a control at every budget."""
    other = f"`{control}`" if control else "the baseline"
    those = " that can be compared" if control else ""
    items: list[str] = []
    for at in budgets:
        better, worse, n = len(at.better), len(at.worse), len(at.gains)
        tokens = nominal(at.points) + ("" if items else " tokens per parameter")
        than = "" if items else f" significantly better than {other}"
        items.append(
            f"with {at.steps:,} steps ({tokens}), {better or 'none'} of {n} "
            f"method{'s' * (n > 1)}{those} {'is' if better <= 1 else 'are'}{than or ' better'} and "
            f"{worse or 'none'} {'is' if worse <= 1 else 'are'} "
            f"{'' if items else 'significantly '}worse"
        )
    return f"At equal FLOPs, {'; '.join(items)}."


def multipliers(budgets: list[Budget]) -> str:
    """Give the compute multiplier of the best method at every budget; "" if none is better."""
    known: list[str] = []
    unknown: list[str] = []
    for at in [at for at in budgets if at.better]:
        best, estimate = f"`{at.best}`", at.points[at.best].log_multiplier("flops")
        if math.isnan(estimate.mean):
            unknown.append(f"{best} with {at.steps:,} steps")
        else:
            factor = estimate.as_factor("" if known else "95% interval: ")
            known.append(f"{factor} with {at.steps:,} steps ({best})")
    sentences = []
    if known:
        sentences.append(
            "The FLOPs that the baseline needs to reach the loss of the best method, divided by "
            f"those of the method, are {_list(known)}."
        )
    if unknown:
        sentences.append(
            f"For {_list(unknown)}, the compute multiplier is unknown, because the loss of at "
            "least one run is outside the range of the baselines."
        )
    return " ".join(sentences)


def _list(items: list[str]) -> str:
    """Join items as in "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def corrected(budgets: list[Budget]) -> str:
    """Say which differences from the baseline are significant after Holm's correction."""
    n, left = sum(len(at.gains) for at in budgets), remaining(budgets)
    return (
        f"Even if no method differed from the baseline, about 5% of these {n} comparisons would "
        "count as better or worse by chance. After Holm's correction for multiple comparisons, "
        + (f"these differences remain: {left}." if left else "no difference remains.")
    )


def remaining(budgets: list[Budget]) -> str:
    """List the methods that are better or worse after Holm's correction, by budget."""
    left = []
    for at in budgets:
        for sign, word in ((1, "better"), (-1, "worse")):
            if names := [f"`{name}`" for name in at.remaining if at.gains[name].sign == sign]:
                left.append(f"{', '.join(names)} ({word}, {at.steps:,} steps)")
    return "; ".join(left)


def trend(budgets: list[Budget]) -> str:
    """Say how compute multipliers change from budget to budget, or return "" if unknown."""
    items: list[str] = []
    for before, after in itertools.pairwise(budgets):
        if signs := [change.sign for change in after.changes(before)]:
            what = "lower" if items else "the compute multiplier is significantly lower"
            items.append(
                f"from {before.steps:,} to {after.steps:,} steps, {what} for {signs.count(-1)} of "
                f"{len(signs)} methods and higher for {signs.count(1)}"
            )
    text = "; ".join(items)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def agreement(budgets: list[Budget], metric: str) -> str:
    """Say which comparisons have another result at equal `metric` than at equal FLOPs, or "".

    Comparisons without a gain in both are left out, and for seconds those of methods with another
    `batch_size` than the baseline.
    """
    words = {1: "better", -1: "worse", 0: "n.s."}
    n, others = 0, []
    for at in budgets:
        for name, gain in at.gains.items():
            point = at.points[name]
            sizes = {run.config.batch_size for run in (point.baseline, point.runs[0].run)}
            other = point.gain(metric)
            if math.isnan(other.mean) or (metric == "seconds" and len(sizes) > 1):
                continue
            n += 1
            if other.sign != gain.sign:
                change = f"{words[other.sign]} instead of {words[gain.sign]}"
                others.append(f"`{name}` with {at.steps:,} steps ({change})")
    if not n:
        return ""
    text = f"{n - len(others)} of {n} comparisons have the same result (better, worse or n.s.) as "
    text += "at equal FLOPs"
    return text + (f". The others are {', '.join(others)}." if others else ".")


def summary(budgets: list[Budget]) -> str:
    """Return a table with a row per budget."""
    rows = []
    for before, at in zip([None, *budgets], budgets):
        best = ["-", "", "", ""]
        if at.better:
            point, gain = at.points[at.best], str(at.gains[at.best])
            factor = point.log_multiplier("flops").as_factor()
            best = [at.best, f"{point.tokens_per_parameter():.1f}", gain, factor]
        signs = [change.sign for change in at.changes(before)] if before else []
        lower, higher, n = signs.count(-1), signs.count(1), len(signs)
        rows.append(
            [f"{at.steps:,} ({nominal(at.points)})", str(len(at.gains)), str(len(at.better))]
            + [str(len(at.worse)), *best]
            + [f"{lower} lower, {higher} higher, {n - lower - higher} n.s." if signs else ""]
        )
    header = ["steps (tokens / parameter)", "methods", "better", "worse", "best method"]
    header += ["compared at (tokens / parameter)", "gain", "compute multiplier"]
    return study.markdown([*header, "compared with the row above"], rows)


CAPTION = (
    "*Mean and 95% interval over seeds. Points are shifted to the side by a few percent to keep "
    "their intervals apart. Gray: the methods of the other panels. Hollow: fewer than "
    f"{MIN_SEEDS} seeds.*"
)
SUMMARY = (
    "Every method is compared with a *baseline*: a model of the same final size that is trained as "
    "a whole from the start, with the same FLOPs. The number after the steps is the number of "
    "tokens per non-embedding parameter on which a baseline is trained in that many steps. Most "
    "methods cost fewer FLOPs, and are compared with a shorter baseline; *compared at* is its "
    "number of tokens per parameter. The *gain* of a method is the baseline's validation loss "
    "minus that of the method, in nats per token. The *compute multiplier* is the FLOPs that a "
    "baseline needs to reach the loss of the method, divided by the FLOPs of the method: above 1, "
    "the method saves compute. Both are given with 95% intervals over the seeds. A method is "
    "*better* or *worse* if the interval of its gain does not contain zero; the gain is then in "
    f"bold. Only methods with at least {MIN_SEEDS} seeds are counted. The *best method* has the "
    "highest compute multiplier of those that are better. It is selected with the same runs, so "
    "its gain and its multiplier tend to be too high."
)
BUDGETS = (
    "With 3 seeds, the width of an interval is itself uncertain. A dash instead of a multiplier "
    "means that it is unknown, because the loss of the run of at least one seed is lower or higher "
    "than that of every baseline. The loss of a shorter baseline is interpolated between two that "
    "were trained. A method that saves FLOPs may still have a higher loss than a baseline that is "
    "trained on the same tokens. *Compared with the row above* counts the methods whose compute "
    "multiplier is lower or higher than in that row. A method is counted as n.s. (not significant) "
    "if the 95% interval of the difference between the logarithms of the two multipliers, paired "
    "by seed, contains zero. Methods whose multiplier is unknown in one of the rows are not "
    "counted."
)
NOTHING = (
    f"There is no comparison yet: it takes a method that is trained with {MIN_SEEDS} seeds and "
    "costs as much as one of the baselines, or an amount between them."
)


def control_findings(
    controls: dict[str, list[Point]], points: dict[str, list[Point]], about: dict[str, str]
) -> list[str]:
    """Describe the gain of every control, and how many methods are better than the control."""
    sentences = []
    for name, series in controls.items():
        gains: list[str] = []
        for p in sorted(series, key=lambda p: p.steps):
            gain = p.gain("flops")
            if not math.isnan(gain.mean) and gain.n >= MIN_SEEDS:
                unit = "" if gains else " tokens per parameter of the baseline"
                gains.append(f"{gain} ({p.tokens_per_parameter():.1f}{unit})")
        if not gains:
            continue
        description = f" ({about[name]})" if about.get(name) else ""
        sentences.append(
            f"The control `{name}`{description} is compared with the baseline, too. Its gain, in "
            f"nats, is {_list(gains)}."
        )
        if budgets := compared(compared_with_control(points, series)):
            left = remaining(budgets) or "none"
            sentences.append(f"{counts(budgets, name)} Holm's correction leaves: {left}.")
    return sentences


def holm(estimates: Mapping[Key, Estimate], level: float = 0.05) -> list[Key]:
    """Return the keys of the estimates that differ from zero after Holm's correction.

    Source: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    result = []
    ordered = sorted(estimates, key=lambda name: estimates[name].p)
    for i, name in enumerate(ordered):
        if not estimates[name].p <= level / (len(ordered) - i):
            break
        result.append(name)
    return result


OVERVIEW = (
    "Gain in nats per token: mean and 95% interval over seeds. It is positive if the method is "
    "better, and bold if the interval does not contain zero and there are at least 3 seeds. In "
    "parentheses: the training tokens per non-embedding parameter of the baseline with that number "
    "of steps. Every method is compared at its own FLOPs, which may be fewer than those of that "
    "baseline. A dash means that the method was not trained at this budget, or that the compute of "
    "one of its runs is outside the range of the baselines."
)
CONTROLS = (
    "These runs are not methods, and they are not counted above. Their models can have a different "
    "number of blocks. The columns are those of the table of all runs; *tokens / parameter* are "
    "the tokens that the baseline reads with the FLOPs of the run, per non-embedding parameter of "
    "the baseline."
)
OVER_CONTROL = (
    "The next table shows the gain of every method over `{name}` instead of the baseline: the loss "
    "of `{name}` at the FLOPs of the method, interpolated in the same way, minus the loss of the "
    "method, over the seeds with which `{name}` was trained for several numbers of steps. A dash "
    "means that the method was not trained, or that its FLOPs are outside the range of `{name}`."
)
CONTRASTS = (
    "The next table compares two kinds of runs with the same seed and the same FLOPs (within 2%). "
    "It shows the validation loss of the first minus that of the second, in nats per token (mean "
    "and 95% interval). A positive number means that the second is better. With four kinds, it "
    "shows the difference of the first two minus that of the last two. A number is bold if its "
    f"interval does not contain zero and there are at least {MIN_SEEDS} seeds."
)
VARIANTS = (
    "Some methods were trained in several variants, for example with several learning rates. The "
    "table contains the mean validation loss over the seeds that the variants have in common, with "
    "a column for each learning rate. At each number of steps, the variant in bold, with the "
    "lowest mean, is used with all of its seeds. Variants with the same learning rate are named; "
    f"*n* is given for a variant with fewer than {MIN_SEEDS} seeds, if others have more: it is not "
    "compared. In the table of all runs, *variant* is the entry of study.toml that is used, if it "
    "has another name than the method."
)
HOW_TO_READ = (
    "*Gain*: the loss of a baseline with the compute of the run, minus the loss of the run, in "
    "nats per token; positive if the method is better. Between two baselines, the loss is "
    "interpolated. Every run is compared with baselines of its own seed. The table shows the mean "
    "and the 95% interval (Student's t) over the seeds. *Compute multiplier*: the FLOPs that a "
    "baseline needs to reach the loss of the run, divided by the FLOPs of the run (geometric mean "
    "and 95% interval). A dash means that the compute or the loss of a run is outside the range of "
    "the baselines. *Steps*: the option `--steps`; a run with continual training has more steps. "
    "*Tokens / parameter*: the tokens that a baseline reads with the FLOPs of the run, per "
    "non-embedding parameter."
)
SECONDS = (
    " *Seconds*: the number of steps times the step time of each phase. They are comparable only "
    "if the method has the same `batch_size` as the baseline. The step times were measured "
    "separately with `study.py time`, on {machine}. {error} The intervals do not include this "
    "error."
)


def about_seconds(times: study.StepTimes, entries: set[str]) -> str:
    """Describe how the step times of these entries of study.toml were measured."""
    measured = [s for e in entries for s in times.entries[e].seconds.values()]
    spread = statistics.median((max(s) - min(s)) / statistics.median(s) for s in measured)
    fewest, most = min(map(len, measured)), max(map(len, measured))
    rounds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    error = "Each was measured once."
    if most > 1:
        error = f"Each is the median of {rounds} measurements, and their range is {spread:.1%} of "
        error += "it (median over all phases)."
    return SECONDS.format(machine=times.machine, error=error)


def interpolation_error(best: list[Finished], methods: Sequence[str]) -> str:
    """Describe how well the loss of the baseline, and of controls, is interpolated."""
    found = {}
    for method in methods:
        errors = []
        for seed in {r.planned.seed for r in best}:
            own = [r for r in best if r.method == method and r.planned.seed == seed]
            own.sort(key=lambda r: r.compute("flops"))
            for before, left_out, after in zip(own, own[1:], own[2:], strict=False):
                line = Frontier.of([before, after], "flops")
                errors.append(line.loss_at(left_out.compute("flops")) - left_out.loss)
        if errors:
            found[method] = (
                f"{min(errors):+.3f} to {max(errors):+.3f} nats for `{method}` (mean "
                f"{statistics.fmean(errors):+.3f})"
            )
    if not found:
        return ""
    return (
        "*Accuracy of the interpolation*: each run except the shortest and the longest is left out "
        "in turn, and its loss is interpolated between its neighbors. The interpolated loss minus "
        f"the actual one is {_list([*found.values()])}. The neighbors are about twice as far apart "
        "as the runs that are used for the gain of a method. As far as the error is due to the "
        "curvature of the loss, that of a gain is therefore at most about a quarter of this."
    )


def conditions(runs: list[Run]) -> str:
    """Describe the model, the data and the hardware in a few sentences."""
    c, schedule = runs[0].config, runs[0].schedule
    dates = sorted({run.config.date for run in runs})
    machines = collections.Counter(study.machine(run.config) for run in runs)
    trained_on = [f"{machine} (runs: {n})" for machine, n in machines.items()]
    return (
        f"GPT-2 with {c.n_layer} blocks of width {c.n_embd}, {c.n_head} heads, context "
        f"{c.block_size:,}: {block_parameters(runs[0]):,} parameters in the blocks, "
        f"{schedule.phases[-1].trained_parameters:,} with embeddings. {c.tokens_per_step:,} tokens "
        f"of `{c.data_dir}` per step. Trained on {' and '.join(trained_on)} with torch "
        f"{c.torch_version}, {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}."
    )


def write_summary(readme: Path, folder: Path, text: str) -> None:
    """Replace the lines between BEGIN and END in a Markdown file.

    Raises:
        UserError: if the file is not readable, or does not have both lines.
    """
    with file_errors(readme, "specify a Markdown file"):
        page = readme.read_text()
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise UserError(f"{readme}: has no lines {BEGIN} and {END}: add them")
    link = Path(os.path.relpath(folder, readme.absolute().parent)).as_posix()
    text = text.replace(f"]({FIGURE})", f"]({link}/{FIGURE})")
    study.write(readme, f"{before}{begin}{text}\n{end}{after}")


def main(args: Args) -> None:
    folder, readme = (path and path.absolute() for path in (args.folder, args.readme))
    assert folder is not None
    os.chdir(study.ROOT)
    folder = folder.relative_to(study.ROOT) if folder.is_relative_to(study.ROOT) else folder
    described, runs, missing = load_runs(folder)
    best = best_variants(runs)
    points = points_of(described, best)
    groups: dict[str, dict[str, list[Point]]] = {}
    for name, series in points.items():
        entry = described.runs.get(name)
        groups.setdefault(entry.group if entry else "", {})[name] = series
    with file_errors(folder, "make the folder writable"):
        draw(groups, folder / "gain")
    controls = {n: points.pop(n) for n in list(points) if n in described.controls()}
    about = {name: e.about for name, e in described.runs.items()}
    budgets, contrasts = compared(points), contrasts_of(described, best)
    comparisons = contrast_findings(contrasts)
    about_controls = control_findings(controls, points, about)
    significant = [corrected(budgets)] if budgets else []
    figure = [f"![gain over the baseline at equal FLOPs]({FIGURE})", CAPTION]
    overall = [summary(budgets), SUMMARY] if budgets else []
    if readme:
        text = [answer(budgets), *figure, *overall, *significant, *comparisons[:1]]
        text.append(" ".join(about_controls))
        write_summary(readme, folder, "\n\n".join(filter(None, text)))
    findings = [*significant, *comparisons, *about_controls, trend(budgets)]
    page = [
        f"# {described.title}",
        f"*Written by `python frontier.py {folder.as_posix()}` from the run folders next to this "
        "file. Each config.json contains the command of its run.*",
        answer(budgets),
        "\n".join(f"- {finding}" for finding in findings if finding),
        *figure,
        *overall,
        *([BUDGETS] if budgets else []),
        *([f"**Not finished yet:** {len(missing)} runs."] if missing else []),
        described.about.strip(),
    ]
    if contrasts:
        page += ["## Direct comparisons", CONTRASTS, contrast_table(contrasts, best[0].run)]
    if legend := [[n, e.about] for n, e in described.runs.items() if e.about]:
        page += ["## Methods", study.markdown(["method", "description"], legend, n_left=2)]
    # Other work during training changes the step times.
    counted = [r for r in best if r.method not in controls]
    timed = all(p.name in r.run.step_seconds for r in counted for p in r.run.schedule.phases)
    for metric in METRICS if timed else METRICS[:2]:
        page += [f"## Gain at equal {study.LABELS[metric]}", overview(points, metric)]
        page.append(OVERVIEW if metric == "flops" else agreement(budgets, metric))
    page += ["## All runs", table(points, METRICS if timed else METRICS[:2])]
    page.append(HOW_TO_READ)
    if timed:
        entries = {r.planned.entry for r in counted}
        page[-1] += about_seconds(study.load_times(folder), entries)
    if accuracy := interpolation_error(best, [BASELINE, *controls]):
        page.append(accuracy)
    if controls:
        page += ["## Controls", CONTROLS, table(controls, METRICS[:2])]
    for name, series in controls.items():
        if over := compared_with_control(points, series):
            page += [OVER_CONTROL.format(name=name), overview(over, "flops")]
    if several := variant_table(runs):
        page += ["## Variants", VARIANTS, several]
    page += [
        "## Conditions",
        conditions([r.run for r in best if r.method not in described.controls()]),
    ]
    study.write(folder / "README.md", "\n\n".join(filter(None, page)) + "\n")
    n = sum(map(len, points.values()))
    print(f"{folder / 'README.md'}: {n} combinations of method and budget")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
