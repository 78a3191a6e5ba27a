"""Draw the paper's two figures from run folders, and print a table of where the runs ended.

    python plot.py [RUN_DIR ...] [--x steps|tokens|cost|flops|hours]

Figure 1: training (faint) and validation loss (strong). Figure 2: HellaSwag accuracy. Ticks on a curve are its stage
boundaries, the large solid circle is where a schedule has spent as much as the whole baseline. Reads only what train.py
wrote: config.json, plan.json and metrics.jsonl.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

from errors import UserError, report_user_errors
from files import read_metrics
from schedule import CURRENCIES, NAMES, text_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito, for all eyes
X_LABELS = {
    "steps": "steps",
    "tokens": "training tokens",
    "cost": "cost (paper's unit, baseline = 1)",
    "flops": "FLOPs (baseline = 1)",
    "hours": "hours of training",
}
TICK = dict(marker="|", markersize=11, markeredgewidth=1.4, linestyle="")
CIRCLE = dict(marker="o", markersize=10, linestyle="")
LEVEL = dict(linewidth=0.9, linestyle=(0, (4, 3)))
STYLE = {
    "figure.figsize": (8.6, 4.4),
    "savefig.dpi": 200,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "figures",  # the same runs give the same file
}


@dataclass
class Args:
    """Draw loss and HellaSwag accuracy of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders; default: every run below out/."""
    x: Literal["steps", "tokens", "cost", "flops", "hours"] = "steps"
    """What the x axis counts."""
    equal: Literal["cost", "flops", "tokens"] = "cost"
    """In which currency the solid circle has spent as much as the baseline."""
    metric: Literal["acc_norm", "acc"] = "acc_norm"
    """HellaSwag metric: lowest mean loss per token, or lowest summed loss."""
    out: Path = Path("plots")
    """Folder for the figures."""
    title: str = ""
    """Put above the figures: what was run, on what, when."""


@dataclass
class Run:
    """One run folder. Columns of metrics.jsonl by name, NaN where a row has no value."""

    name: str
    plan: dict
    task: str  # what figure 2 shows of it: "HellaSwag", or a task of its form that came with the corpus
    columns: dict[str, np.ndarray]
    color: str = field(default="")

    def x(self, axis: str) -> np.ndarray:
        if axis == "hours":
            return self.columns["seconds"] / 3600
        if axis in ("cost", "flops"):
            return self.columns[axis] / self.plan["baseline"][axis]
        return self.columns[{"steps": "step"}.get(axis, axis)]

    def curve(self, column: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y where the column was measured; both empty where it never was."""
        y = self.columns.get(column, np.full(len(self.columns["step"]), np.nan))
        there = ~np.isnan(y)
        return self.x(axis)[there], y[there]

    def at_budget(self, column: str, axis: str, currency: str) -> tuple[float, float] | None:
        """The point of a curve at which the run has spent the baseline's total, interpolated; None where it never did."""
        x, y = self.curve(column, axis)
        step, _ = self.curve(column, "steps")
        spent = np.interp(step, self.columns["step"], self.columns[currency])
        budget = self.plan["baseline"][currency]
        if not len(y) or spent[-1] < budget * (1 - 0.5 / self.plan["baseline"]["steps"]):  # plans round to whole steps
            return None
        return float(np.interp(budget, spent, x)), float(np.interp(budget, spent, y))

    @property
    def is_baseline(self) -> bool:
        """Whether the model never grows, in however many phases."""
        return len({p["n_blocks"] for p in self.plan["phases"]}) == 1

    def stage_starts(self) -> list[int]:
        """Steps at which a stage, or continual training, begins, but for the first."""
        phases = [] if self.is_baseline else self.plan["phases"]
        return [p["start"] for former, p in zip(phases, phases[1:]) if p["stage"] != former["stage"] or p["phase"] == 3]


def load_run(path: Path) -> Run:
    """Read a run folder. Raises UserError where it is none."""
    try:
        plan, config = (json.loads((path / name).read_text()) for name in ("plan.json", "config.json"))
        rows = read_metrics(path / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: {path} is no run folder of train.py") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: plan.json or config.json is damaged: {error}") from None
    for name, parsed, needed in (
        ("plan.json", [plan], {"steps", "phases", "baseline"}),
        ("config.json", [config], {"data_dir", "hellaswag_file"}),
        ("metrics.jsonl", rows, {"step", *CURRENCIES, "seconds"}),
    ):
        if not parsed:
            raise UserError(f"{path}/{name} is empty: the run has measured nothing yet")
        if not all(isinstance(part, dict) and needed <= part.keys() for part in parsed):
            raise UserError(f"{path}/{name} is damaged: it lacks one of {', '.join(sorted(needed))}")
    names = {name for row in rows for name in row}
    values = {n: np.array([np.nan if row.get(n) is None else row[n] for row in rows], dtype=float) for n in names}
    own_task = config["hellaswag_file"] == str(Path(str(config["data_dir"])) / "hellaswag.jsonl")
    return Run(path.name, plan, "HellaSwag-style" if own_task else "HellaSwag", values)


def draw(runs: list[Run], column: str, args: Args, ylabel: str, train_column: str = "", stderr_column: str = ""):
    """One figure: `column` of every run over args.x, its legend beside it. Returns matplotlib's figure and axes."""
    fig, ax = plt.subplots(layout="constrained")
    has_tick = has_circle = has_level = False
    runs = [run for run in runs if len(run.curve(column, "steps")[0])]
    for run in runs:
        if train_column:
            ax.plot(*run.curve(train_column, args.x), color=run.color, alpha=0.22, linewidth=0.8)
        x, y = run.curve(column, args.x)
        if stderr_column:
            _, error = run.curve(stderr_column, args.x)
            ax.fill_between(x, y - error, y + error, color=run.color, alpha=0.12, linewidth=0)
        ax.plot(x, y, color=run.color, linewidth=1.8, label=run.name)
        steps, _ = run.curve(column, "steps")
        at = np.array(run.stage_starts(), dtype=float)
        at = at[at <= steps[-1]]
        if len(at):
            has_tick = True
            ax.plot(np.interp(at, steps, x), np.interp(at, steps, y), color=run.color, **TICK)
        point = run.at_budget(column, args.x, args.equal)
        if point and run.is_baseline:
            has_level = True
            ax.axhline(point[1], color=run.color, alpha=0.6, zorder=1, **LEVEL)
        elif point:
            has_circle = True
            ax.plot(*point, color=run.color, zorder=5, **CIRCLE)

    legend = [plt.Line2D([], [], color=run.color, linewidth=1.8, label=run.name) for run in runs]
    if train_column:
        legend.append(plt.Line2D([], [], color="#555555", linewidth=1.8, label="validation"))
        legend.append(plt.Line2D([], [], color="#555555", linewidth=0.8, alpha=0.4, label="training"))
    if stderr_column:
        legend.append(matplotlib.patches.Patch(color="#555555", alpha=0.15, linewidth=0, label="standard error"))
    marks = (
        (has_tick, "stage boundary", TICK),
        (has_circle, f"at equal {NAMES[args.equal]}", CIRCLE),
        (has_level, "the baseline there", LEVEL),
    )
    legend += [plt.Line2D([], [], color="#555555", label=label, **mark) for drawn, label, mark in marks if drawn]
    fig.legend(handles=legend, loc="outside right upper")
    ax.set_xlabel(X_LABELS[args.x])
    ax.set_ylabel(ylabel)
    ax.set_xlim(left=0)
    if args.x in ("tokens", "steps"):
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if args.title:
        ax.set_title(args.title, fontsize=9, loc="left", color="#444444")
    return fig, ax


def figure_loss(runs: list[Run], args: Args):
    """Figure 1. The first tenth of a run, where the loss falls from ln V, may leave the picture at the top."""
    fig, ax = draw(runs, "val_loss", args, "loss (nats per token)", train_column="loss")
    curves = [run.curve("val_loss", "steps") for run in runs]
    late = np.concatenate([y[x >= x[-1] / 10] for x, y in curves if len(x)])
    if len(late) > 1:
        margin = 0.08 * (late.max() - late.min())
        ax.set_ylim(late.min() - margin, late.max() + margin)
    return fig


def figure_hellaswag(runs: list[Run], args: Args):
    """Figure 2, with the standard error as a band and chance as a dotted line."""
    name = f"hellaswag_{args.metric}"
    fig, ax = draw(runs, name, args, f"{runs[0].task} accuracy ({args.metric})", stderr_column=f"{name}_stderr")
    ax.axhline(0.25, color="#888888", linewidth=0.9, linestyle=":")
    ax.annotate("chance", (1, 0.25), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#666666")
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    return fig


def table(runs: list[Run], args: Args) -> str:
    """Where the runs ended, and their validation loss where they had spent the baseline's budget."""
    rows = [("run", "steps", "tokens", "cost", "FLOPs", "minutes", "val loss", f"at equal {args.equal}", args.metric)]
    for run in runs:
        last = {name: values[-1] for name, values in run.columns.items()}
        _, losses = run.curve("val_loss", "steps")
        point = run.at_budget("val_loss", "steps", args.equal)
        _, accuracy = run.curve(f"hellaswag_{args.metric}", "steps")
        _, error = run.curve(f"hellaswag_{args.metric}_stderr", "steps")
        rows.append((
            run.name,
            f"{last['step']:,.0f}",
            f"{last['tokens']:,.0f}",
            f"{100 * run.x('cost')[-1]:.1f} %",
            f"{100 * run.x('flops')[-1]:.1f} %",
            f"{last['seconds'] / 60:.1f}",
            f"{losses[-1]:.4f}" if len(losses) else "-",
            f"{point[1]:.4f}" if point else "-",
            f"{100 * accuracy[-1]:.1f} +- {100 * error[-1]:.1f} %" if len(accuracy) else "-",
        ))  # fmt: skip
    return text_table(rows)


def save(fig, path: Path) -> None:
    """Write a figure as path.png and path.svg, the same bytes for the same runs."""
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        fig.savefig(f"{path}{suffix}", metadata=metadata)
    print(f"{path}.png and .svg")


def main(args: Args) -> None:
    paths = args.runs or sorted(p.parent for p in Path("out").rglob("metrics.jsonl"))
    if not paths:
        raise UserError("no runs below out/: train one with train.py, or name run folders")
    runs = [load_run(path) for path in paths]
    for run, color in zip(runs, COLORS * len(runs)):
        run.color = color
    plt.rcParams.update(STYLE)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={args.out}: no folder can be made there ({error.strerror}): name another") from None
    figures = {"figure1_loss": figure_loss(runs, args)}
    if any(f"hellaswag_{args.metric}" in run.columns for run in runs):
        figures["figure2_hellaswag"] = figure_hellaswag(runs, args)
    print(table(runs, args))
    if len({json.dumps(run.plan["baseline"]) for run in runs}) > 1:
        print("note: these runs have different baselines; shares of cost and FLOPs are relative to each one's own")
    for name, fig in figures.items():
        save(fig, args.out / name)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
