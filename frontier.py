"""Compare methods with the baseline at equal compute, over budgets, with intervals.

    python frontier.py results/NAME

results/NAME is a study (see study.py) in which `baseline` and the methods are trained for several
numbers of steps, each run to the end of its learning-rate schedule. The final losses of the
baselines, as a function of compute, are the frontier that a method is compared with. The gain of a
run is the frontier's loss at the compute of the run, minus the loss of the run. Frontier and run
have the same seed, so they read the same data in the same order. Between two baselines, the
frontier is linear in the logarithm of compute. A run outside of the range of the baselines has no
gain.

Writes results/NAME/README.md and gain.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import tyro

import plot
import study
from plot import Run
from stagewise.errors import UserError, file_errors, report_user_errors
from study import PlannedRun

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "baseline"
METRICS = ("flops", "paper_cost", "seconds")
# 97.5% quantiles of Student's t distribution, by degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Args:
    """Compare the methods of a study with its baselines at equal compute."""

    folder: tyro.conf.Positional[Path]
    """Folder with a study.toml and finished runs."""


@dataclass
class Finished:
    """A finished run of the study."""

    planned: PlannedRun
    run: Run

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
        if not self.loss[-1] <= loss <= self.loss[0]:
            return math.nan
        return float(np.exp(np.interp(-loss, -self.loss, np.log(self.compute))))


@dataclass
class Estimate:
    """Mean and half-width of a 95% interval (Student's t) over seeds."""

    mean: float
    half_width: float  # NaN with a single seed
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        known = [v for v in values if not math.isnan(v)]
        if len(known) < len(values) or not known:
            return cls(math.nan, math.nan, len(values))
        n = len(known)
        if n == 1:
            return cls(known[0], math.nan, 1)
        t = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 2.0
        return cls(statistics.fmean(known), t * statistics.stdev(known) / math.sqrt(n), n)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:+.4f}" + (f" ± {self.half_width:.4f}" if self.n > 1 else "")


@dataclass
class Point:
    """A method at a budget: its runs with all seeds."""

    runs: list[Finished]
    frontiers: dict[tuple[str, int], Frontier]  # by metric and seed

    def gain(self, metric: str) -> Estimate:
        """Return the gain over the frontier at equal compute, in nats."""
        return Estimate.of(
            [
                self.frontiers[metric, r.planned.seed].loss_at(r.compute(metric)) - r.loss
                for r in self.runs
            ]
        )

    def saving(self, metric: str) -> Estimate:
        """Return the compute that a baseline needs for the same loss, relative to the run's."""
        return Estimate.of(
            [
                self.frontiers[metric, r.planned.seed].compute_at(r.loss) / r.compute(metric)
                for r in self.runs
            ]
        )

    @property
    def steps(self) -> int:
        return self.runs[0].run.schedule.baseline.steps

    def tokens_per_parameter(self) -> float:
        """Return the tokens of a baseline with the FLOPs of the runs, by non-embedding parameter.

        The tokens are counted in the baseline, because a method may make more steps with the same
        FLOPs.
        """
        run = self.runs[0].run
        flops_per_token = run.schedule.baseline.flops / run.schedule.baseline.tokens
        return float(run.columns["flops"][-1]) / flops_per_token / block_parameters(run)


def block_parameters(run: Run) -> int:
    """Return the number of parameters of all blocks of the final model."""
    d, bias = run.config.n_embd, run.config.bias
    return run.config.n_layer * (12 * d * d + 2 * d + (11 * d if bias else 0))


def load_points(folder: Path) -> tuple[study.Study, dict[str, list[Point]], list[PlannedRun]]:
    """Return the study, the points of every method, and the runs that are not finished.

    Raises:
        UserError: if files are corrupted, or runs were not trained under the same conditions.
    """
    described, planned = study.load_study(folder)
    runs: list[Finished] = []
    missing = []
    for p in planned:
        run = study.load_finished(folder / p.name)
        if run is None:
            missing.append(p)
        else:
            runs.append(Finished(p, run))
    may_differ = study.METHOD | study.RECIPE | {"steps"}
    for finished in runs[1:]:
        study.check_comparable(folder, finished.run, runs[0].run, may_differ)
    frontiers = {}
    for seed in {r.planned.seed for r in runs}:
        own = [r for r in runs if r.planned.entry == BASELINE and r.planned.seed == seed]
        if len(own) > 1:
            frontiers |= {(m, seed): Frontier.of(own, m) for m in METRICS}
    if not frontiers:
        raise UserError(
            f"{folder}: no seed has two finished runs of {BASELINE!r}: train them with python "
            f"study.py run {folder}"
        )
    points: dict[str, dict[str, list[Finished]]] = {}
    for r in runs:
        if r.planned.entry != BASELINE and ("flops", r.planned.seed) in frontiers:
            points.setdefault(r.planned.entry, {}).setdefault(r.planned.label, []).append(r)
    return (
        described,
        {entry: [Point(rs, frontiers) for rs in by.values()] for entry, by in points.items()},
        missing,
    )


def draw(points: dict[str, list[Point]], path: Path) -> None:
    """Draw the gain at equal FLOPs over the budget, with intervals, one line per method."""
    with plt.style.context(plot.STYLE):
        fig, ax = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
        ax.axhline(0, color="black", linewidth=1)
        colors = plt.get_cmap("tab20").colors
        for i, (name, series) in enumerate(points.items()):
            rows = sorted((p.tokens_per_parameter(), p.gain("flops")) for p in series)
            rows = [(x, g) for x, g in rows if not math.isnan(g.mean)]
            if not rows:
                continue
            x = np.array([x for x, _ in rows])
            y = np.array([g.mean for _, g in rows])
            error = np.array([0 if math.isnan(g.half_width) else g.half_width for _, g in rows])
            style = dict(color=colors[i % 20], marker="os^Dv"[i // 20 % 5], markersize=4)
            ax.errorbar(x, y, error, label=name, capsize=2, linewidth=1.4, **style)
        ax.set_xscale("log")
        ax.set_xlabel("tokens per non-embedding parameter of a baseline with the same FLOPs")
        ax.set_ylabel("gain over the baseline at equal FLOPs (nats)")
        ax.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        fig.legend(loc="outside right upper", fontsize=8)
        plot.save(fig, path)
        plt.close(fig)


def table(points: dict[str, list[Point]]) -> str:
    rows = []
    for name, series in points.items():
        for p in sorted(series, key=lambda p: p.steps):
            saving = p.saving("flops")
            rows.append(
                [
                    name,
                    f"{p.steps:,}",
                    f"{p.tokens_per_parameter():.1f}",
                    str(len(p.runs)),
                    f"{statistics.fmean(r.loss for r in p.runs):.4f}",
                    *(str(p.gain(metric)) for metric in METRICS),
                    "-" if math.isnan(saving.mean) else f"{saving.mean:.2f}",
                ]
            )
    header = ["method", "steps", "tokens / parameter", "seeds", "val loss"]
    header += [f"gain, equal {study.LABELS[m]}" for m in METRICS] + ["FLOPs ratio"]
    return study.markdown(header, rows)


def summary(points: dict[str, list[Point]]) -> str:
    """Return a paragraph: how many comparisons there are, and how many intervals exclude zero."""
    gains = [(name, p, p.gain("flops")) for name, series in points.items() for p in series]
    known = [(name, p, g) for name, p, g in gains if g.n > 1 and not math.isnan(g.mean)]
    better = [x for x in known if x[2].mean - x[2].half_width > 0]
    worse = [x for x in known if x[2].mean + x[2].half_width < 0]
    parts = [
        f"Of {len(known)} comparisons with several seeds, {len(better)} have a 95% interval above "
        f"zero and {len(worse)} below. By chance, one in twenty would exclude zero on either side."
    ]
    for text, chosen in (("largest gains", known), ("largest losses", known)):
        sign = -1 if text == "largest gains" else 1
        best = sorted(chosen, key=lambda x: sign * x[2].mean)[:3]
        named = [
            f"{n} at {p.tokens_per_parameter():.0f} tokens per parameter ({g})" for n, p, g in best
        ]
        if named:
            parts.append(f"The {text}, with tokens per parameter: {'; '.join(named)}.")
    return " ".join(parts)


HOW_TO_READ = (
    "*Gain*: the loss of the baseline's frontier at the compute of the run, minus the loss of the "
    "run, in nats per token; positive if the method is better. Mean and 95% interval (Student's t) "
    "over paired seeds. *FLOPs ratio*: the FLOPs that a baseline needs for the same loss, divided "
    "by the run's. A dash means that the run is outside of the range of the baselines. The steps "
    "are those of the method; methods have fewer FLOPs than a baseline of as many steps. Seconds "
    "are the number of steps times the median step time of each phase."
)


def main(args: Args) -> None:
    folder = args.folder.absolute() if args.folder.exists() else args.folder
    os.chdir(study.ROOT)
    folder = folder.relative_to(study.ROOT) if folder.is_relative_to(study.ROOT) else folder
    described, points, missing = load_points(folder)
    with file_errors(folder, "make the folder writable"):
        draw(points, folder / "gain")
    first = next(iter(points.values()))[0].runs[0].run if points else None
    page = [
        f"# {described.title}",
        f"*Written by `python frontier.py {folder.as_posix()}` from the run folders next to this "
        "file. Each config.json contains the command of its run.*",
        summary(points),
        "![gain over the baseline at equal FLOPs](gain.png)",
        described.about.strip(),
        *([f"**Not finished yet:** {len(missing)} runs."] if missing else []),
        table(points),
        HOW_TO_READ,
    ]
    if first:
        page.insert(2, f"{first.config.n_layer} blocks of width {first.config.n_embd}.")
    study.write(folder / "README.md", "\n\n".join(page) + "\n")
    print(f"{folder / 'README.md'}: {sum(map(len, points.values()))} points")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
