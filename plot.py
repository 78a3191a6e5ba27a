"""Draw the paper's two figures from run folders, and print a table with the final results.

    python plot.py [RUN_DIR ...] [--x steps|tokens|paper_cost|flops|hours] [--html FILE]
    python plot.py --schedule configs/methods/midas.py "configs/demo.py configs/s4.py --steps=900"

Figure 1 shows the training loss (faint lines) and the validation loss (bold lines). Figure 2 shows
HellaSwag accuracy. Ticks on a curve mark stage boundaries. A solid circle marks the point at which
a run is compute-matched: its cumulative cost equals the total cost of its baseline. This script
reads only config.json, schedule.json and metrics.jsonl, which train.py writes.

With --against, also draw figure 3: the validation loss minus that of a reference run, for example
one that never grew, at the same number of tokens, over the tokens since the last growth step. A
second table shows how many tokens it takes until the difference stays below --tolerance.

With --html, also write a self-contained page: zoomable figures with a choice of x axis, the
schedules, tables of results, phases and options that differ, and samples.txt of each run folder.

With --schedule, draw the schedule given by options of train.py without training it: which blocks
exist, train, are frozen or are skipped, over the training tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import tyro
from tabulate import tabulate

from cost import COST_METRICS, NAMES, Metric, cumulative_cost, make_schedules, short_number
from runs import NoRows, PhaseSummary, Run, RunConfig, in_phase, load_run, speed
from schedule import Phase, Schedule
from stagewise.config import Config, load_config, padded_vocab_size
from stagewise.data import load_meta
from stagewise.errors import UserError, file_errors, report_user_errors
from stagewise.fileio import atomic_file, read_bytes
from stagewise.page import check_plotly, write_page

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The first seven are from the palette of Okabe and Ito, suitable for all types of color vision.
COLORS = [
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#8C510A", "#882255", "#999933",
]  # fmt: skip
X_LABELS = {
    "steps": "steps",
    "tokens": "training tokens",
    "paper_cost": "paper cost (baseline = 1)",
    "flops": "FLOPs (baseline = 1)",
    "hours": "hours of training",
}
LOSS_LABEL = "loss (nats per token)"
# Colors of blocks in the picture of a schedule. Where a block does not exist, the picture is white.
STATES = {"trained": "#0072B2", "frozen": "#BBBBBB"}
TICK: dict[str, Any] = dict(marker="|", markersize=11, markeredgewidth=1.4, linestyle="")
CIRCLE: dict[str, Any] = dict(marker="o", markersize=10, linestyle="")
LEVEL: dict[str, Any] = dict(linewidth=0.9, linestyle=(0, (4, 3)))
STYLE: dict[str, Any] = {
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
    "svg.hashsalt": "figures",  # makes the files reproducible
}


@dataclass
class Args:
    """Draw the loss and the HellaSwag accuracy of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders. Default: all run folders in out/."""
    x: Literal["steps", "tokens", "paper_cost", "flops", "hours"] = "steps"
    """Quantity on the x axis."""
    match: Metric = "paper_cost"
    """Cost metric for the compute-matched point (solid circle)."""
    against: tuple[Path, ...] = ()
    """Reference runs for figure 3, the difference of the validation losses. Each run is compared
    with the one of its seed. Runs named NAME_seedN are averaged over their seeds."""
    tolerance: float = 0.02
    """A run has reached its reference when the difference of the validation losses, in nats, stays
    below this."""
    metric: Literal["acc_norm", "acc"] = "acc_norm"
    """HellaSwag metric: by lowest mean loss per token (acc_norm) or lowest total loss (acc)."""
    out: Path = Path("plots")
    """Folder for the figures."""
    title: str = ""
    """Title of the figures, for example the model, the hardware and the date."""
    html: Path | None = None
    """Also write the results to this file, as a self-contained page. Needs the package plotly."""
    schedule: tuple[str, ...] = ()
    """Draw schedules instead of runs: config files of train.py, or quoted files and options."""


# --------------------------------------------------------------------------------------------------
# figures and table


def draw(
    runs: list[Run],
    column: str,
    args: Args,
    ylabel: str,
    train_column: str = "",
    stderr_column: str = "",
):
    """Plot `column` of every run against `args.x`.

    Returns:
        The matplotlib figure and axes.
    """
    fig, ax = plt.subplots(layout="constrained")
    has_tick = has_circle = has_level = False
    runs = [run for run in runs if run.measured(column).any()]
    for run in runs:
        if train_column:
            ax.plot(*run.curve(train_column, args.x), color=run.color, alpha=0.22, linewidth=0.8)
        x, y = run.curve(column, args.x)
        y[~np.isfinite(y)] = np.nan  # a gap in the curve
        if stderr_column:
            error = run.columns[stderr_column][run.measured(column)]
            ax.fill_between(x, y - error, y + error, color=run.color, alpha=0.12, linewidth=0)
        ax.plot(x, y, color=run.color, linewidth=1.8, label=run.name)
        steps, _ = run.curve(column, "steps")
        starts = np.array(run.stage_starts(), dtype=float)
        starts = starts[starts <= steps[-1]]
        if len(starts):
            has_tick = True
            tick = np.interp(starts, steps, x), np.interp(starts, steps, y)
            ax.plot(*tick, color=run.color, **TICK)
        point = run.compute_matched_point(column, args.x, args.match)
        if not point or not math.isfinite(point[1]):
            continue
        if run.is_baseline:
            has_level = True
            ax.axhline(point[1], color=run.color, alpha=0.6, zorder=1, **LEVEL)
        else:
            has_circle = True
            ax.plot(*point, color=run.color, zorder=5, **CIRCLE)

    legend: list[Any] = [
        plt.Line2D([], [], color=run.color, linewidth=1.8, label=_label(run, column))
        for run in runs
    ]
    gray = "#555555"
    if train_column:
        legend.append(plt.Line2D([], [], color=gray, linewidth=1.8, label="validation"))
        legend.append(plt.Line2D([], [], color=gray, linewidth=0.8, alpha=0.4, label="training"))
    if stderr_column:
        band = matplotlib.patches.Patch(color=gray, alpha=0.15, linewidth=0, label="standard error")
        legend.append(band)
    marks = (
        (has_tick, "stage boundary", TICK),
        (has_circle, f"compute-matched ({NAMES[args.match]})", CIRCLE),
        (has_level, "baseline, same compute", LEVEL),
    )
    legend += [
        plt.Line2D([], [], color=gray, label=label, **mark) for has, label, mark in marks if has
    ]
    fig.legend(handles=legend, loc="outside right center")
    ax.set_xlabel(X_LABELS[args.x])
    ax.set_ylabel(ylabel)
    ax.set_xlim(left=0)
    if args.x in ("tokens", "steps"):
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if args.title:
        ax.set_title(_plain(args.title), fontsize=9, loc="left", color="#444444")
    return fig, ax


def _label(run, column):
    return _plain(run.name) + (" (diverged)" if run.last(column) == math.inf else "")


def _plain(text):
    """Return text that Matplotlib draws literally: no formulas, no characters invalid in XML."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def figure_loss(runs: list[Run], args: Args):
    """Return figure 1.

    The y axis fits the losses after the first tenth of each run, so higher losses may be clipped.
    """
    fig, ax = draw(runs, "val_loss", args, LOSS_LABEL, train_column="loss")
    if limits := loss_range(runs):
        ax.set_ylim(*limits)
    return fig


def loss_range(runs: list[Run]) -> tuple[float, float] | None:
    """Return the range of figure 1's y axis, or None if there are not enough losses."""
    curves = [run.curve("val_loss", "steps") for run in runs]
    late = np.concatenate(
        [np.empty(0)] + [y[(x >= x[-1] / 10) & np.isfinite(y)] for x, y in curves if len(x)]
    )
    if len(late) < 2 or late.min() == late.max():
        return None
    margin = 0.08 * (late.max() - late.min())
    return float(late.min() - margin), float(late.max() + margin)


def figure_hellaswag(runs: list[Run], args: Args):
    """Return figure 2, with the standard error as a band and chance level as a dotted line."""
    name, ylabel = f"hellaswag_{args.metric}", accuracy_label(runs, args)
    fig, ax = draw(runs, name, args, ylabel, stderr_column=f"{name}_stderr")
    ax.axhline(0.25, color="#888888", linewidth=0.9, linestyle=":")
    ax.annotate(
        "chance",
        (1, 0.25),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color="#666666",
    )
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    return fig


def accuracy_label(runs: list[Run], args: Args) -> str:
    """Return the label of figure 2's y axis."""
    task = next(run.task for run in runs if run.measured(f"hellaswag_{args.metric}").any())
    return f"{task} accuracy ({args.metric})"


def last_growth(run: Run) -> int:
    """Return the number of tokens before the last growth step, or 0 if the model does not grow."""
    # The tokens of initial weights count too.
    seen = int(run.columns["tokens"][0]) if run.columns["step"][0] == 0 else 0
    grown = blocks = 0
    for phase in run.schedule.phases:
        if blocks and phase.n_blocks > blocks:
            grown = seen
        blocks, seen = phase.n_blocks, seen + phase.tokens
    return grown


def loss_difference(run: Run, reference: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens since the last growth step, and the validation loss minus the reference's.

    The reference's loss is interpolated linearly between its evaluations. Evaluations outside
    their range, and losses that are not finite, are left out.
    """
    x, y = run.curve("val_loss", "tokens")
    tokens, losses = reference.curve("val_loss", "tokens")
    since = x - last_growth(run)
    expected = np.interp(x, tokens, losses, left=np.nan, right=np.nan)
    known = (since > 0) & np.isfinite(y) & np.isfinite(expected)
    return since[known], (y - expected)[known]


def reference_of(run: Run, references: list[Run]) -> Run:
    """Return the reference run with the seed of `run`.

    Raises:
        UserError: if there is none, or several, or the runs were trained on different data.
    """
    same = [r for r in references if r.config.seed == run.config.seed]
    if not same:
        raise UserError(
            f"--against: none of the reference runs has seed {run.config.seed}, that of "
            f"{run.folder}: add one, or leave out this run"
        )
    if len(same) > 1:
        raise UserError(
            f"--against: {same[0].folder} and {same[1].folder} have the same seed: specify one "
            "reference run per seed"
        )
    (reference,) = same
    if note := run_notes([run, reference], baselines=False):
        raise UserError(f"--against: {reference.folder} and {run.folder}: {note[0]}")
    return reference


def loss_differences(
    pairs: Sequence[tuple[Run, Run]],
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the `loss_difference` of each pair, by the name of the run without the seed.

    Args:
        pairs: Each run with its reference.

    Raises:
        UserError: if a run has no evaluation after its last growth step.
    """
    names: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run, reference in pairs:
        x, y = loss_difference(run, reference)
        if not len(x):
            raise UserError(
                f"{run.folder}: has no evaluation after its last growth step that its reference "
                "run covers: leave it out"
            )
        names.setdefault(re.sub(r"_seed\d+$", "", run.name), []).append((x, y))
    return names


def tokens_to_reach(x: np.ndarray, y: np.ndarray, tolerance: float) -> float:
    """Return the first of `x` from which on `y` stays below `tolerance`; infinity if none."""
    above = np.flatnonzero(y >= tolerance)
    first = above[-1] + 1 if len(above) else 0
    return float(x[first]) if first < len(x) else math.inf


def difference_rows(
    pairs: Sequence[tuple[Run, Run]], tolerance: float
) -> tuple[list[str], list[list[str]]]:
    """Return a table of when runs reach their references; see `loss_differences`.

    Returns:
        The header, and a row per name.
    """
    rows = []
    for name, curves in loss_differences(pairs).items():
        reached = [tokens_to_reach(x, y, tolerance) for x, y in curves]
        mean = float(np.mean(reached))
        rows.append(
            [
                name,
                str(len(curves)),
                f"{np.mean([y[-1] for _, y in curves]):+.4f}",
                f"{sum(map(math.isfinite, reached))} of {len(curves)}",
                f"{mean:,.0f}" if math.isfinite(mean) else "-",
            ]
        )
    header = ["run", "seeds", "final difference", f"seeds below {tolerance:g}"]
    return [*header, "tokens until then (mean)"], rows


def figure_difference(pairs: Sequence[tuple[Run, Run]], args: Args):
    """Return figure 3. Faint lines are single runs, bold lines means over seeds.

    Seeds that were evaluated at different steps have no mean.

    Args:
        pairs: Each run with its reference.

    Raises:
        UserError: if a run has no evaluation after its last growth step.
    """
    fig, ax = plt.subplots(layout="constrained")
    names = loss_differences(pairs)
    for (name, curves), color in zip(names.items(), COLORS * len(names)):
        first, _ = curves[0]
        same = all(np.array_equal(x, first) for x, _ in curves)
        for x, y in curves if len(curves) > 1 else ():
            ax.plot(x, y, color=color, alpha=0.4, linewidth=0.8)
        if same:
            mean = np.mean([y for _, y in curves], axis=0)
            ax.plot(first, mean, color=color, linewidth=1.8, marker=".")
        seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
        ax.plot([], [], color=color, linewidth=1.8, label=_plain(name) + seeds)
    ax.axhline(0, color="#555555", linewidth=0.9)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.set_xlabel("training tokens since the last growth step")
    ax.set_ylabel("validation loss minus reference (nats per token)")
    fig.legend(loc="outside right center")
    if args.title:
        ax.set_title(_plain(args.title), fontsize=9, loc="left", color="#444444")
    return fig


def draw_difference(pairs: Sequence[tuple[Run, Run]], args: Args) -> None:
    """Write figure 3 to `args.out`; see `figure_difference`.

    Raises:
        UserError: as in `loss_differences`, or if a file cannot be written.
    """
    with plt.style.context(STYLE):
        fig = figure_difference(pairs, args)
        save(fig, args.out / "figure3_difference")
        plt.close(fig)


def draw_figures(runs: list[Run], args: Args) -> list[str]:
    """Write figures 1 and 2 to `args.out`. Figure 2 needs HellaSwag scores.

    Returns:
        The file names without suffixes.

    Raises:
        UserError: if a file cannot be written.
    """
    set_colors(runs)
    with plt.style.context(STYLE):
        figures = {"figure1_loss": figure_loss(runs, args)}
        if any(run.measured(f"hellaswag_{args.metric}").any() for run in runs):
            figures["figure2_hellaswag"] = figure_hellaswag(runs, args)
        for name, fig in figures.items():
            save(fig, args.out / name)
            plt.close(fig)
    return list(figures)


def set_colors(runs: list[Run]) -> None:
    for run, color in zip(runs, COLORS * len(runs)):
        run.color = color


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model on which its cost depends."""

    n_embd: int
    vocab_size: int


def draw_schedules(args: Args) -> None:
    """Write a picture of each schedule in `args.schedule`, named after its last config file.

    Raises:
        UserError: if the options are invalid, or a file cannot be written.
    """
    used: set[str] = set()
    for text in args.schedule:
        words = shlex.split(text)
        config = load_config(words, Config())
        # Without a corpus, the vocabulary is GPT-2's, as in a dry run.
        meta = load_meta(config.data_dir) if Path(config.data_dir, "meta.json").exists() else None
        sizes = ModelSizes(config.n_embd, padded_vocab_size(meta))
        schedule, baseline = make_schedules(config, sizes)
        stems = [Path(word).stem for word in words if word.endswith(".py")]
        name = stems[-1] if stems else "schedule"
        while name in used:
            name += "_"
        used.add(name)
        costs = []
        for metric in COST_METRICS[1:]:
            both = (schedule, baseline)
            spent, total = (cumulative_cost(s, s.n_steps, metric, sizes) for s in both)
            costs.append(f"{spent / total:.0%} of the baseline's {NAMES[metric]}")
        title = args.title or f"{name}: {', '.join(costs)}"
        with plt.style.context(STYLE):
            fig = figure_schedule(schedule, title)
            save(fig, args.out / f"schedule_{name}")
            plt.close(fig)


def figure_schedule(schedule: Schedule, title: str):
    """Return a picture of a schedule: the state of every block over the training tokens.

    A color between that of a trained block and white means that the block is often skipped.
    """
    n_bins, n_samples = 480, 8
    n_layer = max(p.n_blocks for p in schedule.phases)
    colors = {name: np.array(matplotlib.colors.to_rgb(c)) for name, c in STATES.items()}
    picture = np.ones((n_layer + 2, n_bins, 3))
    total = schedule.tokens(schedule.n_steps)
    for column in range(n_bins):
        cells = np.zeros((n_layer + 2, 3))
        for sample in range(n_samples):
            at = schedule.at(_step_at(schedule, (column + sample / n_samples) / n_bins * total))
            cells[0] += colors["trained" if at.phase.train_embeddings else "frozen"]
            cells[-1] += colors["trained" if at.phase.train_head else "frozen"]
            for i in range(n_layer):
                state = "trained" if i in at.phase.trained_blocks else "frozen"
                cells[i + 1] += colors[state] if i in at.running_blocks else 1
        picture[:, column] = cells / n_samples
    fig, ax = plt.subplots(figsize=(6.4, 2.3), layout="constrained")
    extent = (0, total, -0.5, n_layer + 1.5)
    ax.imshow(picture, aspect="auto", origin="lower", interpolation="none", extent=extent)
    ax.set_yticks([0, *range(1, n_layer + 1), n_layer + 1])
    shown = {1, n_layer} if n_layer > 16 else range(1, n_layer + 1)
    labels = [str(i) if i in shown else "" for i in range(1, n_layer + 1)]
    ax.set_yticklabels(["embeddings", *labels, "head"], fontsize=7)
    for edge in np.arange(0.5, n_layer + 1):
        ax.axhline(edge, color="white", linewidth=0.6)
    ax.grid(False)
    ax.tick_params(length=0)
    former: dict[str, int] = {}
    for p in schedule.phases:
        x = schedule.tokens(p.start)
        if p.start:
            ax.axvline(x, color="white", linewidth=0.8)
        for field in ("context_length", "tokens_per_step"):
            value = getattr(p, field)
            if len({getattr(q, field) for q in schedule.phases}) > 1 and former.get(field) != value:
                ax.annotate(f"{value:,}", (x, n_layer + 1.6), fontsize=6, annotation_clip=False)
            former[field] = value
    ax.set_xlabel(X_LABELS["tokens"], fontsize=8)
    ax.xaxis.set_major_formatter(lambda x, _: short_number(round(x)))
    ax.xaxis.set_tick_params(labelsize=8)
    ax.set_title(_plain(title), fontsize=8, loc="left", color="#444444", pad=10)
    phases = schedule.phases
    frozen = any(
        len(p.trained_blocks) < p.n_blocks or not (p.train_embeddings and p.train_head)
        for p in phases
    )
    legend = {name: color for name, color in STATES.items() if name == "trained" or frozen}
    if any(p.skip for p in schedule.phases):
        legend["often skipped"] = "#99C7E0"
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in legend.items()]
    fig.legend(handles=handles, loc="outside right upper", fontsize=7)
    return fig


def _step_at(schedule, tokens):
    for p in schedule.phases:
        start = schedule.tokens(p.start)
        if tokens < start + p.n_steps * p.tokens_per_step:
            return p.start + int((tokens - start) // p.tokens_per_step)
    return schedule.n_steps - 1


def save(fig, path: Path) -> None:
    """Write a figure to path.png and path.svg, atomically. The same runs give the same bytes.

    Raises:
        UserError: if a file cannot be written.
    """
    for suffix, metadata in (("png", None), ("svg", {"Date": None})):
        file = path.with_name(f"{path.name}.{suffix}")
        with file_errors(file, "free disk space, or use another folder"), atomic_file(file) as f:
            fig.savefig(f, format=suffix, metadata=metadata)
    print(f"{path}.png and .svg")


def table(runs: list[Run], args: Args) -> str:
    """Return a table of final results and compute-matched validation losses."""
    header, rows = results(runs, args)
    align = ("left", *("right",) * (len(header) - 1))
    return tabulate(rows, header, "simple", colalign=align, disable_numparse=True)


def results(runs: list[Run], args: Args) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of `table`."""
    header = ["run", "steps", "tokens", "paper cost", "FLOPs", "minutes", "val loss"]
    header += [f"compute-matched ({NAMES[args.match]})", args.metric]
    rows = []
    for run in runs:
        loss = run.last("val_loss")
        point = run.compute_matched_point("val_loss", "steps", args.match)
        accuracy = run.last(f"hellaswag_{args.metric}")
        error = run.last(f"hellaswag_{args.metric}_stderr") or 0
        rows.append(
            [
                run.name,
                f"{run.columns['step'][-1]:,.0f}",
                f"{run.columns['tokens'][-1]:,.0f}",
                f"{100 * run.relative_cost['paper_cost'][-1]:.1f}%",
                f"{100 * run.relative_cost['flops'][-1]:.1f}%",
                f"{run.columns['seconds'][-1] / 60:.1f}",
                show(loss, ".4f"),
                show(point and point[1], ".4f"),
                show(accuracy and 100 * accuracy, ".1f", f" ± {error:.1%}"),
            ]
        )
    return header, rows


def show(value: float | None, form: str, suffix: str = "") -> str:
    """Format a result; "-" if there is none, "diverged" if it is not finite."""
    if value is None:
        return "-"
    return format(value, form) + suffix if math.isfinite(value) else "diverged"


# --------------------------------------------------------------------------------------------------
# page

# Keys of config.json that differ between any two runs.
OF_EACH_RUN = ("out_dir", "command", "starts", "date", "init_from")
MAX_SAMPLES = 20_000  # characters per run


def write_html(runs: list[Run], args: Args) -> None:
    """Write a self-contained page with the results of runs to `args.html`.

    Raises:
        UserError: if plotly is not installed, or the file cannot be written.
    """
    assert args.html
    set_colors(runs)
    write_page(args.html, page_data(runs, args))


def page_data(runs: list[Run], args: Args) -> dict[str, Any]:
    """Return what stagewise/page.html shows."""
    accuracy = f"hellaswag_{args.metric}"
    limits = loss_range(runs)
    marks = "Ticks mark stage boundaries, circles compute-matched points, diamonds baselines."
    figures: list[dict[str, Any]] = [
        dict(
            id="loss", title="Loss", ylabel=LOSS_LABEL, column="val_loss", training="loss",
            level=None, range=limits, note=f"Validation (bold) and training (faint). {marks}",
        )
    ]  # fmt: skip
    if any(run.measured(accuracy).any() for run in runs):
        label = accuracy_label(runs, args)
        figures.append(
            dict(
                id="accuracy", title=label, ylabel=label, column=accuracy,
                error=f"{accuracy}_stderr", level=0.25, percent=True,
                note=f"Bars are standard errors, and the dotted line is the chance level. {marks}",
            )
        )  # fmt: skip
    header, rows = results(runs, args)
    tables = [dict(id="results", title="Results", header=header, rows=rows)]
    tables.append(phase_table(runs))
    if len(runs) > 1:
        tables.append(differences(runs))
    return {
        "title": args.title or "Runs: " + ", ".join(run.name for run in runs),
        "notes": " ".join(run_notes(runs)),
        "axes": X_LABELS,
        "axis": args.x,
        "match": NAMES[args.match],
        "figures": figures,
        "tables": tables,
        "runs": [page_run(run, figures, args) for run in runs],
        "samples": [dict(name=run.name, text=text) for run in runs if (text := samples(run))],
    }


def page_run(run: Run, figures: list[dict[str, Any]], args: Args) -> dict[str, Any]:
    """Return the curves, the marks and the schedule of a run, over every x axis."""
    columns = [f.get(key) for f in figures for key in ("column", "training", "error")]
    steps = run.columns["step"]
    edges = np.array([run.schedule.phases[0].start, *(p.stop for p in run.schedule.phases)])
    phase_edges = {"steps": edges, "hours": np.interp(edges, steps, run.x("hours"))}
    for m in COST_METRICS:
        initial = run.columns[m][0] if steps[0] == 0 else 0  # of the initial weights
        total = initial + np.cumsum([0, *(getattr(p, m) for p in run.schedule.phases)])
        phase_edges[m] = total if m == "tokens" else total / getattr(run.schedule.baseline, m)
    return {
        "name": run.name,
        "label": run.name + (" (diverged)" if run.last("val_loss") == math.inf else ""),
        "color": run.color,
        "baseline": run.is_baseline,
        "blocks": run.schedule.phases[-1].n_blocks,
        "x": {axis: _rounded(run.x(axis)) for axis in X_LABELS},
        "curves": {
            column: dict(
                rows=np.flatnonzero(run.measured(column)).tolist(),
                y=_rounded(run.columns[column][run.measured(column)]),
            )
            for column in columns
            if column
        },
        "marks": {
            f["id"]: _marks(run, f["column"], args)
            for f in figures
            if run.measured(f["column"]).any()
        },
        "phases": [
            {
                "x": {axis: _rounded(edges[i : i + 2]) for axis, edges in phase_edges.items()},
                "states": block_states(p),
                "text": describe_phase(p),
            }
            for i, p in enumerate(run.schedule.phases)
        ],
    }


def _marks(run, column, args):
    starts, matched = {}, {}
    boundaries = np.array(run.stage_starts(), dtype=float)
    for axis in X_LABELS:
        x, y = run.curve(column, axis)
        steps, _ = run.curve(column, "steps")
        passed = boundaries[boundaries <= steps[-1]]
        starts[axis] = {
            key: _rounded(np.interp(passed, steps, v)) for key, v in dict(x=x, y=y).items()
        }
        point = run.compute_matched_point(column, axis, args.match)
        matched[axis] = _rounded(point) if point and math.isfinite(point[1]) else None
    return {"starts": starts, "matched": matched}


def _rounded(values):
    """Return numbers with 7 digits. A number that is not finite is None."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values]


def block_states(phase: Phase) -> list[tuple[str, int, int]]:
    """Return the state, the first block and the number of blocks of every range of blocks."""
    trained = [i in phase.trained_blocks for i in range(phase.n_blocks)]
    edges = [i for i in range(phase.n_blocks) if i == 0 or trained[i] != trained[i - 1]]
    return [
        ("trained" if trained[first] else "frozen", first, stop - first)
        for first, stop in zip(edges, [*edges[1:], phase.n_blocks])
    ]


def describe_phase(phase: PhaseSummary) -> list[str]:
    """Describe a phase in a few lines."""
    others = [n for n in ("embeddings", "head") if getattr(phase, f"train_{n}")]
    lines = [
        f"{phase.name}: steps {phase.start:,} to {phase.stop:,}",
        f"{len(phase.trained_blocks)} of {phase.n_blocks} blocks train"
        + (f", with {' and '.join(others)}" if others else ""),
        f"context {phase.context_length:,}, {phase.tokens_per_step:,} tokens per step",
    ]
    return lines + ["blocks are skipped"] * bool(phase.skip)


def phase_table(runs: list[Run]) -> dict[str, Any]:
    """Return a table of the page with speed and memory of every phase."""
    rows = []
    for run in runs:
        for p in run.schedule.phases:
            mfu = in_phase(run, p, "mfu")[1:]
            peak = in_phase(run, p, "peak_memory")[:1]  # later values include evaluations
            tokens_per_second = speed(run, p)
            rows.append(
                [
                    run.name,
                    p.name,
                    f"{p.start:,} to {p.stop:,}",
                    f"{len(p.trained_blocks)} of {p.n_blocks}",
                    "-" if math.isnan(tokens_per_second) else f"{tokens_per_second:,.0f}",
                    f"{100 * np.median(mfu):.1f}%" if len(mfu) else "-",
                    f"{peak[0] / 2**30:.2f} GiB" if len(peak) else "-",
                    f"{p.flops / run.schedule.baseline.flops:.1%}",
                ]
            )
    header = [
        "run",
        "phase",
        "steps",
        "blocks that train",
        "tokens/s",
        "MFU",
        "peak memory",
        "FLOPs",
    ]
    note = "Tokens per second and MFU are medians without the first row of each phase."
    return dict(id="phases", title="Phases", note=note, header=header, rows=rows)


def differences(runs: list[Run]) -> dict[str, Any]:
    """Return a table of the page with the keys of config.json in which runs differ."""
    rows = []
    for field in dataclasses.fields(RunConfig):
        values = [str(getattr(run.config, field.name)) for run in runs]
        if field.name not in OF_EACH_RUN and len(set(values)) > 1:
            rows.append([field.name, *values])
    note = f"All other keys of config.json are equal, except {', '.join(OF_EACH_RUN)}."
    header = ["option", *(run.name for run in runs)]
    title = "Differences in configuration"
    return dict(id="differences", title=title, note=note, header=header, rows=rows, text=True)


def samples(run: Run) -> str:
    """Return samples.txt of the run folder, or "" if there is none."""
    path = run.folder / "samples.txt"
    if not path.exists():
        return ""
    with file_errors(path, "remove it, or make it readable"):
        return read_bytes(path).decode("utf-8", "replace")[:MAX_SAMPLES]


def run_notes(runs: list[Run], baselines: bool = True) -> list[str]:
    """Return what to know before comparing these runs, with or without their baselines."""
    notes = []
    if baselines and len({run.schedule.baseline for run in runs}) > 1:
        notes.append(
            "These runs have different baselines: paper cost and FLOPs are relative to the "
            "baseline of each run."
        )
    if len({run.config.corpus for run in runs} - {""}) > 1:
        notes.append("These runs were trained on different data: their losses are not comparable.")
    return notes


def main(args: Args) -> None:
    if args.schedule:
        if args.runs:
            raise UserError("--schedule draws configurations, not runs: remove the run folders")
        for name in ("html", "against"):
            if getattr(args, name):
                raise UserError(f"--{name} cannot be used with --schedule: remove one of them")
        with file_errors(f"--out={args.out}", "use another folder"):
            args.out.mkdir(parents=True, exist_ok=True)
        draw_schedules(args)
        return
    if args.html:
        check_plotly()
    folders = args.runs or sorted(p.parent for p in Path("out").rglob("metrics.jsonl"))
    if not math.isfinite(args.tolerance):
        raise UserError(f"--tolerance={args.tolerance} must be a finite number")
    if not folders:
        raise UserError("no runs in out/: train one with train.py, or specify run folders")
    runs = []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except NoRows as error:
            if len(folders) == 1:
                raise
            print(f"note: left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("none of these runs has logged a row yet: wait until one does")
    if len({run.name for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, name=str(run.folder)) for run in runs]
    with file_errors(f"--out={args.out}", "use another folder"):
        args.out.mkdir(parents=True, exist_ok=True)
    print(table(runs, args))
    for note in run_notes(runs):
        print(f"note: {note[0].lower()}{note[1:-1]}")
    references = [load_run(folder) for folder in args.against]
    pairs = [(run, reference_of(run, references)) for run in runs] if references else []
    if pairs:
        draw_difference(pairs, args)
    draw_figures(runs, args)
    if pairs:
        header, rows = difference_rows(pairs, args.tolerance)
        align = ("left", *("right",) * (len(header) - 1))
        print(tabulate(rows, header, "simple", colalign=align, disable_numparse=True))
    if args.html:
        write_html(runs, args)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
