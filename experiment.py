"""Train the runs of an experiment, one after the other, and keep what they measured.

    python experiment.py results/NAME [--minutes 9] [--processes 8]

results/NAME/experiment.toml says which runs, in the order of their importance. The same command goes on where it was stopped:
finished runs are passed over, an interrupted one is resumed. Runs train in out/NAME/RUN; their config.json, plan.json and
metrics.jsonl are copied to results/NAME/RUN when they end, for report.py.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from errors import UserError, report_user_errors
from guard import EXIT_STOPPED

KEPT = ("config.json", "plan.json", "metrics.jsonl")  # of a run folder
ROOT = Path(__file__).resolve().parent


@dataclass
class Args:
    """Train the runs of an experiment that are not there yet."""

    experiment: tyro.conf.Positional[Path]
    """Folder with an experiment.toml."""
    processes: int = 1
    """Processes of a run; more than one are started by torchrun."""
    minutes: float | None = None
    """Stop after so long, with all saved; the same command goes on."""
    only: tuple[str, ...] = ()
    """Runs to train, by name or with their seed; default: all."""
    options: tuple[str, ...] = ()
    """Options for every run, after all others, for example --options device=cpu."""
    out: Path | None = None
    """Folder of the run folders; default: out/NAME."""
    discard_checkpoints: bool = False
    """Remove the checkpoints of a run when it has ended: GPT-2 124M leaves 1.5 GB for every stage."""


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    label: str  # as the experiment names it
    seed: int
    options: tuple[str, ...] = field(repr=False)  # of train.py
    against: str  # the label of the run that it is compared with

    @property
    def name(self) -> str:
        return f"{self.label}_seed{self.seed}"


def load_experiment(folder: Path) -> tuple[dict, list[Run]]:
    """experiment.toml, and its runs: each one's first seed in the order of the file, then the second seeds, and so on.

        title = "..."                        what the page is called
        options = ["configs/A.py", ...]      of every run
        [runs.LABEL]
        options = ["--stages=4"]             after those of every run
        seeds = [1, 2]                       default [1]
        against = "baseline"                 the run to compare with, by label; default "baseline"

    Raises UserError where the file is no experiment.
    """
    path = folder / "experiment.toml"
    try:
        experiment = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name a folder that has an experiment.toml, results/ has some") from None
    except ValueError as error:
        raise UserError(f"{path}: is no TOML: {error}") from None
    _check(path, experiment, {"title": str, "about": str, "options": list, "runs": dict})
    if missing := {"title", "runs"} - experiment.keys():
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}")
    if not experiment["runs"]:
        raise UserError(f"{path}: has no runs: describe one as [runs.baseline]")
    described = []
    for label, run in experiment["runs"].items():
        where = f"{path}, runs.{label}"
        if not re.fullmatch(r"\w[\w.-]*", label):
            raise UserError(f"{path}: {label!r} is no name for a run: use letters, digits, _, - and .")
        _check(where, run, {"options": list, "seeds": list, "against": str})
        seeds, against = run.get("seeds", [1]), run.get("against", "baseline")
        if not seeds or any(type(seed) is not int for seed in seeds):
            raise UserError(f"{where}: seeds must be whole numbers, one at least")
        if against not in experiment["runs"]:
            raise UserError(f"{where}: against = {against!r} is none of the runs: {', '.join(experiment['runs'])}")
        options = (*experiment.get("options", []), *run.get("options", []))
        if any(type(option) is not str for option in options):
            raise UserError(f"{where}: options must be strings, as on train.py's command line")
        described.append([Run(label, seed, (*options, f"--seed={seed}"), against) for seed in seeds])
    most = max(map(len, described))
    return experiment, [seeds[i] for i in range(most) for seeds in described if i < len(seeds)]


def _check(where, table, known):
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table")
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: {key} is none of {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"{where}: {key} must be a {known[key].__name__}")


def main(args: Args) -> None:
    _, runs = load_experiment(args.experiment)
    chosen = [r for r in runs if not args.only or {r.label, r.name} & set(args.only)]
    if unknown := set(args.only) - {n for r in runs for n in (r.label, r.name)}:
        raise UserError(f"--only {' '.join(unknown)}: the runs are {', '.join(r.name for r in runs)}")
    out = args.out or Path("out") / args.experiment.resolve().name
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    launcher = [sys.executable]
    if args.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]

    for i, run in enumerate(chosen, start=1):
        kept = args.experiment / run.name
        if (kept / "metrics.jsonl").exists():
            continue
        print(f"{run.name}, {i} of {len(chosen)}", flush=True)
        options = [*run.options, *(f"--{option}" for option in args.options), f"--out_dir={out / run.name}", "--init_from=auto"]
        training = subprocess.Popen([*launcher, str(ROOT / "train.py"), *options])
        previous = signal.signal(signal.SIGTERM, lambda number, frame: training.send_signal(number))
        status, late = wait(training, deadline)
        signal.signal(signal.SIGTERM, previous)
        if late or status == EXIT_STOPPED:
            print(f"stopped; {len(chosen) - i + 1} of {len(chosen)} runs are to come, the same command goes on")
            sys.exit(EXIT_STOPPED)
        if status:
            raise UserError(f"{run.name} ended with status {status}: mend what it says above, the same command goes on")
        keep(out / run.name, kept)
        if args.discard_checkpoints:
            shutil.rmtree(out / run.name / "checkpoints")
    print(f"all {len(chosen)} runs are there: python report.py {args.experiment}")


def wait(training: subprocess.Popen, deadline: float | None) -> tuple[int, bool]:
    """The status of a run that has ended, and whether the deadline did that."""
    late = False
    while True:
        try:
            return training.wait(max(0.0, deadline - time.monotonic()) if deadline and not late else None), late
        except subprocess.TimeoutExpired:
            late = True
            training.send_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # the terminal has sent it to the run too, which saves and ends
            continue


def keep(run_dir: Path, folder: Path) -> None:
    """Copy what a finished run measured; metrics.jsonl, by which it counts as finished, comes last and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        partial = folder / f".{name}.partial"
        shutil.copyfile(run_dir / name, partial)
        partial.replace(folder / name)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
