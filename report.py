"""Write the page of an experiment from what its runs measured: tables, both figures, and README's results.

    python report.py results/NAME [--readme README.md]

Reads results/NAME/experiment.toml and the run folders beside it, as experiment.py leaves them; writes README.md and the
figures there. With --readme also the part of that file between <!-- results --> and <!-- end of results -->. Every number is
computed here, but for those in the experiment's own `about`.

Every run is measured against the baseline of its own recipe and seed, in three currencies: the paper's unit, FLOPs, and
seconds. Seconds are the steps of each phase times the median step time of that phase: what a run takes once it is compiled.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

import experiment
import plot
from errors import UserError, first_line, report_user_errors
from files import write_whole
from schedule import NAMES

CURRENCIES = ("cost", "flops", "seconds")
LABELS = NAMES | {"seconds": "seconds"}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
# What may differ in config.json between a run and its baseline, and then between a run and those of another recipe.
SCHEDULE = set("stages stage_blocks phase_shares phase1 freezing continual_steps phase_optimizer continual_optimizer rewarm_iters out_dir "
               "init_from command date log_interval eval_interval checkpoint_interval keep_checkpoints max_bad_steps verify_data timeout "
               "device".split())  # fmt: skip
RECIPE = set("learning_rate lr_schedule warmup_iters min_lr decay_share weight_decay beta1 beta2 grad_clip dropout seed".split())
NEEDED = {
    "config.json": set("lr_schedule train_tokens date threads cpu device_name world_size torch_version command".split()),
    "plan.json": {"tokens_per_step"},
    "metrics.jsonl": {"val_loss", "tokens_per_second", "peak_memory"},
}
CLOSE = 0.02  # a run whose rate decays has spent the baseline's total, if it ends within this of it
PAPER_TOKENS = 10_000 * 524_288  # of the paper's baseline


@dataclass
class Args:
    """Write the page of an experiment, and README's results."""

    experiment: tyro.conf.Positional[Path]
    """Folder with an experiment.toml and finished runs."""
    readme: Path | None = None
    """File whose part between the two markers is written too."""


@dataclass
class Measured:
    """A finished run beside what it is compared with."""

    run: experiment.Run
    config: dict
    plot: plot.Run
    step_seconds: dict[str, float]  # of every phase by name, median
    baseline: "Measured | None" = None  # of the same recipe and seed; itself, where it is one

    @property
    def decays(self) -> bool:
        """Whether its learning rate falls: then no loss is a result but the last."""
        return self.config["lr_schedule"] != "constant"

    def at_equal(self, currency: str) -> float | None:
        """Validation loss where this run has spent what its whole baseline spends; None where it never did."""
        if self.decays:
            spent = self.plot.columns[currency][-1] / self.plot.plan["baseline"][currency]
            return self.last_loss if abs(spent - 1) <= CLOSE else None
        point = self.plot.at_budget("val_loss", "steps", currency)
        return point and point[1]

    def difference(self, currency: str) -> float | None:
        """By how much that loss lies above the baseline's last one."""
        loss = self.at_equal(currency)
        return None if loss is None else loss - self.baseline.last_loss

    @property
    def last_loss(self) -> float:
        return float(self.plot.curve("val_loss", "steps")[1][-1])

    def catches_up(self, currency: str) -> float | None:
        """What the run has spent, in parts of its whole baseline, when its validation loss first is the baseline's last."""
        steps, losses = self.plot.curve("val_loss", "steps")
        spent = np.interp(steps, self.plot.columns["step"], self.plot.columns[currency])
        reached = np.flatnonzero(losses <= self.baseline.last_loss)
        if self.decays or not len(reached):
            return None
        i = reached[0]
        if i:
            share = (losses[i - 1] - self.baseline.last_loss) / (losses[i - 1] - losses[i])
            spent[i] = spent[i - 1] + share * (spent[i] - spent[i - 1])
        return float(spent[i] / self.plot.plan["baseline"][currency])

    def stages(self, currency: str) -> float:
        """What all stages together spend, before continual training, in parts of the baseline."""
        end = max(p["stop"] for p in self.plot.plan["phases"] if p["phase"] != 3)
        at = np.interp(end, self.plot.columns["step"], self.plot.columns[currency])
        return float(at / self.plot.plan["baseline"][currency])


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load(folder: Path) -> tuple[dict, list[Measured], list[experiment.Run]]:
    """The experiment, its finished runs, and those that are to come."""
    described, runs = experiment.load_experiment(folder)
    measured = {(r.label, r.seed): load_one(r, folder / r.name) for r in runs if experiment.is_finished(folder / r.name)}
    for one in measured.values():
        one.baseline = measured.get((one.run.against, one.run.seed))
    complete = [one for one in measured.values() if one.baseline]
    for one in complete:
        compare(one, one.baseline, SCHEDULE, folder)
        compare(one, complete[0], SCHEDULE | RECIPE, folder)
        account_seconds(one)
    return described, complete, [r for r in runs if r not in [one.run for one in complete]]


def load_one(run: experiment.Run, folder: Path) -> Measured:
    """A finished run. Raises UserError where its files lack something."""
    loaded = plot.load_run(folder)
    loaded.name = run.label
    config = json.loads((folder / "config.json").read_text())
    for name, there in (("config.json", config), ("plan.json", loaded.plan), ("metrics.jsonl", loaded.columns)):
        if missing := NEEDED[name] - there.keys():
            raise UserError(f"{folder}/{name}: lacks {', '.join(sorted(missing))}: train the run again")
    return Measured(run, config, loaded, step_seconds(loaded, folder))


def compare(one: Measured, other: Measured, may_differ: set[str], folder: Path) -> None:
    """Raises UserError where two runs were not trained under the same conditions."""
    for key in one.config.keys() | other.config.keys():
        a, b = one.config.get(key), other.config.get(key)
        if a != b and key not in may_differ:
            raise UserError(
                f"{folder / one.run.name}: {key} is {a}, but {b} in {other.run.name}, which it stands beside: remove one of the two and "
                "train it again under the same conditions"
            )


def rows_of_phase(run: plot.Run, phase: dict, column: str) -> np.ndarray:
    """The values of a column in a phase, in the order of steps; none where it was not measured."""
    steps, values = run.curve(column, "steps")
    return values[(steps > phase["start"]) & (steps <= phase["stop"])]


def step_seconds(run: plot.Run, folder: Path) -> dict[str, float]:
    """Median seconds of a step in every phase. The first row of a phase is left out: it may have compilation in it."""
    result = {}
    for p in run.plan["phases"]:
        inside = rows_of_phase(run, p, "tokens_per_second")[1:]
        if not len(inside):
            raise UserError(f"{folder}: {p['name']} has less than two rows in metrics.jsonl: train with a smaller log_interval")
        result[p["name"]] = run.plan["tokens_per_step"] / float(np.median(inside))
    return result


def account_seconds(one: Measured) -> None:
    """Put the steady seconds beside the other currencies: spent at every row, and the baseline's total."""
    steps, total = one.plot.columns["step"], np.zeros(len(one.plot.columns["step"]))
    for p in one.plot.plan["phases"]:
        total += np.clip(steps - p["start"], 0, p["stop"] - p["start"]) * one.step_seconds[p["name"]]
    one.plot.columns["seconds"] = total
    if len(one.baseline.step_seconds) > 1:
        raise UserError(f"{one.run.label} is compared with {one.baseline.run.label}, which is no baseline: it has several phases")
    (whole,) = one.baseline.step_seconds.values()
    one.plot.plan["baseline"]["seconds"] = whole * one.plot.plan["baseline"]["steps"]


# ---------------------------------------------------------------------------------------------------------------------
# writing


def by_label(measured: list[Measured]) -> dict[str, list[Measured]]:
    labels = {}
    for one in measured:
        labels.setdefault(one.run.label, []).append(one)
    return labels


def over_seeds(runs: list[Measured], value: Callable, form: str, each: bool = True) -> str:
    """The mean of a value over the seeds of a run, and, of several, the values; - where a run has none."""
    values = [value(one) for one in runs]
    if any(v is None for v in values):
        return "-"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 or not each else f"{mean} ({', '.join(format(v, form) for v in values)})"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows of text, the first the header, as a table: first column left, others right."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|" + "--:|" * (len(rows[0]) - 1), *rest])


def loss_table(measured: list[Measured]) -> str:
    equal = (f"at equal {LABELS[c]}" for c in CURRENCIES)
    rows = [("run", "seeds", "val loss at the end", *equal, "even with the baseline at", "acc_norm at the end")]
    for label, runs in by_label(measured).items():
        rows.append((
            label,
            ", ".join(str(one.run.seed) for one in runs),
            over_seeds(runs, lambda one: one.last_loss, ".4f"),
            *(over_seeds(runs, lambda one: one.difference(c), "+.4f") for c in CURRENCIES),  # noqa: B023
            ", ".join(over_seeds(runs, lambda one: one.catches_up(c), ".2f", each=False) for c in CURRENCIES),  # noqa: B023
            accuracy(runs),
        ))  # fmt: skip
    return markdown(rows)


def accuracy(runs: list[Measured]) -> str:
    """HellaSwag's acc_norm at the end, and the standard error of one run's."""
    name = "hellaswag_acc_norm"
    if any(name not in one.plot.columns for one in runs):
        return "-"
    value, error = (lambda one, n=n: 100 * float(one.plot.curve(n, "steps")[1][-1]) for n in (name, f"{name}_stderr"))
    return f"{over_seeds(runs, value, '.1f', each=False)} ± {error(runs[0]):.1f} %"


def savings_table(measured: list[Measured]) -> str:
    rows = [("run", "steps", *(LABELS[c] for c in CURRENCIES))]
    for label, runs in by_label(measured).items():
        if runs[0].baseline is not runs[0]:
            steps = max(p["stop"] for p in runs[0].plot.plan["phases"] if p["phase"] != 3)
            rows.append((label, f"{steps:,}", *(over_seeds(runs, lambda one: one.stages(c), ".3f") for c in CURRENCIES)))  # noqa: B023
    return markdown(rows)


def phase_table(measured: list[Measured]) -> str:
    """Every phase of every run of the first seed."""
    rows = [("run", "phase", "blocks that train", "tokens/s", "MFU", "peak memory", "time", "FLOPs", "time / FLOPs")]
    for label, (one, *_) in by_label(measured).items():
        (base,) = one.baseline.step_seconds.values()
        flops = one.plot.plan["baseline"]["flops"] / one.plot.plan["baseline"]["steps"]
        for p in one.plot.plan["phases"]:
            seconds, n = one.step_seconds[p["name"]], p["stop"] - p["start"]
            mfu = rows_of_phase(one.plot, p, "mfu")[1:]
            peak = rows_of_phase(one.plot, p, "peak_memory")[0]  # before an evaluation could come in between
            time, work = seconds / base, p["flops"] / n / flops
            rows.append((
                label,
                p["name"],
                f"{p['n_blocks'] - p['n_frozen']} of {p['n_blocks']}",
                f"{one.plot.plan['tokens_per_step'] / seconds:,.0f}",
                f"{100 * np.median(mfu):.1f} %" if len(mfu) else "-",
                f"{peak / 2**30:.2f} GiB",
                f"{time:.3f}",
                f"{work:.3f}",
                f"{time / work:.2f}",
            ))  # fmt: skip
    return markdown(rows)


def machine(config: dict) -> str:
    if config["device_name"] != "cpu":
        return f"{config['world_size']} x {config['device_name']}"
    threads = config["world_size"] * config["threads"]
    return f"{threads} thread{'s' * (threads > 1)} of {config['cpu']}"


def conditions(described: dict, measured: list[Measured]) -> str:
    """What was run on what, in a sentence or two."""
    c, plan = measured[0].config, measured[0].plot.plan
    epochs = plan["baseline"]["tokens"] / c["train_tokens"]
    dates = sorted({one.config["date"] for one in measured})
    parameters = plan["phases"][-1]["trained_parameters"]
    return (
        f"GPT-2 with {c['n_layer']} blocks of width {c['n_embd']}, {c['n_head']} heads, context {c['block_size']:,}: "
        f"{parameters / 1e6:,.1f}M parameters. A baseline is {plan['baseline']['steps']:,} steps of {plan['tokens_per_step']:,} tokens: "
        f"{plan['baseline']['tokens'] / 1e6:,.1f}M tokens of `{c['data_dir']}`, {epochs:.2f} epochs, "
        f"{100 * plan['baseline']['tokens'] / PAPER_TOKENS:.3g} % of the paper's. Trained on {machine(c)} with torch "
        f"{c['torch_version']}, {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}."
    )


HOW_TO_READ = f"""Losses at equal cost are differences from the last validation loss of the baseline of the same recipe and seed, in nats per
token, interpolated between evaluations: above zero the baseline is better. *Even with the baseline at*: what a run had spent when it
first reached that loss, in parts of the whole baseline, in the paper's unit, FLOPs and seconds. A run whose rate decays is compared
at its end alone, where it has spent what its baseline has within {100 * CLOSE:.0f} %. - where there is nothing to compare. Seconds
are the steps of each phase times the phase's median step, without compilation and evaluation. Of several seeds the mean, and each."""
ALT = {"figure1_loss": "training and validation loss", "figure2_hellaswag": "HellaSwag accuracy"}
CAPTION = "*The first seed of the runs that are compared with the first baseline.*"
SAVINGS = "All stages together, before continual training, in parts of the baseline: the paper's unit is what the method claims to cost."


def figures(folder: Path, described: dict, measured: list[Measured]) -> list[str]:
    """Draw both figures of the runs compared with the first baseline, first seed each; returns their names."""
    first = measured[0].run
    runs = [one.plot for one in measured if one.run.seed == first.seed and one.run.against == first.against]
    for run, color in zip(runs, plot.COLORS * len(runs)):
        run.color = color
    args = plot.Args(title=f"{described['title']}; {machine(measured[0].config)}, {measured[0].config['date']}", out=folder)
    plt.rcParams.update(plot.STYLE)
    drawn = {"figure1_loss": plot.figure_loss(runs, args)}
    if any("hellaswag_acc_norm" in run.columns for run in runs):
        drawn["figure2_hellaswag"] = plot.figure_hellaswag(runs, args)
    for name, fig in drawn.items():
        plot.save(fig, folder / name)
    return list(drawn)


def main(args: Args) -> None:
    described, measured, missing = load(args.experiment)
    if not measured:
        raise UserError(f"{args.experiment}: no run is finished beside its baseline: python experiment.py {args.experiment}")
    names = figures(args.experiment, described, measured)
    pictures = lambda folder: "\n\n".join([*(f"![{ALT[n]}]({folder}{n}.png)" for n in names), CAPTION])  # noqa: E731
    head = [conditions(described, measured), described.get("about", "").strip()]
    if missing:
        head.append(f"**Not run yet:** {', '.join(run.name for run in missing)}.")
    folder = args.experiment.as_posix()
    page = [
        f"# {described['title']}",
        f"*Written by `python report.py {folder}` from the run folders beside it. They come from `python experiment.py {folder}`; the "
        "command of each stands in its config.json.*",
        *head,
        pictures(""),
        "## Losses at equal cost",
        loss_table(measured),
        HOW_TO_READ,
        "## What the stages cost",
        SAVINGS,
        savings_table(measured),
        "## Every phase",
        "Of the first seed. Time and FLOPs of a step are relative to the baseline's.",
        phase_table(measured),
    ]
    write_whole(args.experiment / "README.md", "\n\n".join(part for part in page if part) + "\n")
    print(f"{args.experiment / 'README.md'}: {len(measured)} runs, {len(missing)} to come")
    if args.readme:
        there = os.path.relpath(args.experiment, args.readme.parent)
        link = f"Every phase, and what each run measured: [{there}]({there}/README.md)."
        insert(args.readme, [*head, pictures(f"{there}/"), loss_table(measured), HOW_TO_READ, SAVINGS, savings_table(measured), link])
        print(f"{args.readme}: results written")


def insert(readme: Path, parts: list[str]) -> None:
    """Replace what stands between the markers of a file. Raises UserError where it has none."""
    try:
        text = readme.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme={readme}: {first_line(error)}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"--readme={readme}: has no {BEGIN} ... {END}: add both lines where the results are to stand")
    write_whole(readme, before + BEGIN + "\n\n" + "\n\n".join(part for part in parts if part) + "\n\n" + END + after)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
