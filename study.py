"""Train the runs of an experiment, one after the other, and keep what they measured.

    python experiment.py results/NAME [--minutes 9] [--processes 8]

results/NAME/experiment.toml says which runs, in the order of their importance. The same command goes on where it was stopped:
finished runs are passed over, an interrupted one is resumed. Runs train in out/NAME/RUN; their config.json, plan.json and
metrics.jsonl are copied to results/NAME/RUN when they end, for report.py.
"""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import config as cfg
from errors import UserError, report_user_errors
from files import read_metrics, write_whole
from guard import EXIT_STOPPED

KEPT = ("config.json", "plan.json", "metrics.jsonl")  # of a run folder
# Options that a run may be taken up again with, changed: what it learns does not depend on them.
FREE = set("out_dir init_from dry_run device timeout verify_data checkpoint_interval keep_checkpoints max_bad_steps".split())
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
    """Options for every run, after all others, the same each time, for example --options data_dir=data/mine."""
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
    there = {run.name for seeds in described for run in seeds}
    for run in (run for seeds in described for run in seeds):
        if f"{run.against}_seed{run.seed}" not in there:
            raise UserError(f"{path}, runs.{run.label}: seeds: {run.against} has no run with seed {run.seed} to compare with")
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


def check_runs(runs: list[Run], extra: tuple[str, ...]) -> dict[str, cfg.Config]:
    """The configuration of every run, by name. Raises UserError where one has a mistake, or a baseline more than one phase."""
    given = [option for option in extra if option.split("=")[0] in ("seed", "out_dir", "init_from", "dry_run")]
    if given:
        raise UserError(f"--options {given[0]}: is the experiment's own to choose")
    configs = {}
    for run in runs:
        configs[run.name] = config = cfg.load_config([*run.options, *(f"--{option}" for option in extra)])
        plan, _ = cfg.make_plans(config, config.model(cfg.vocab_size(config, cfg.read_meta(config))))
        if len(plan.phases) > 1 and any(other.against == run.label for other in runs):
            raise UserError(f"{run.label}: others are compared with it, so it must be a baseline, but it has {len(plan.phases)} phases")
    return configs


def check_same(run_dir: Path, config: cfg.Config) -> None:
    """Raises UserError where what lies in a run folder was trained with other options."""
    try:
        former = json.loads((run_dir / "config.json").read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise UserError(f"{run_dir}/config.json is damaged ({error}): remove {run_dir} to train the run again") from None
    for key, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        if key not in FREE and former.get(key) != value:
            raise UserError(
                f"{run_dir}: was trained with {key}={former.get(key)}, but now {key}={value} is asked for: give the options of then, or "
                f"remove {run_dir} to train the run again"
            )


def is_finished(run_dir: Path) -> bool:
    """Whether a run was evaluated at the last step of its plan. Raises UserError where its files are damaged."""
    if not all((run_dir / name).exists() for name in KEPT):
        return False
    try:
        steps = json.loads((run_dir / "plan.json").read_text())["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir}/plan.json is damaged ({error}): remove {run_dir} to train the run again") from None
    return any(row["step"] == steps and row.get("val_loss") is not None for row in read_metrics(run_dir / "metrics.jsonl"))


def main(args: Args) -> None:
    _, runs = load_experiment(args.experiment)
    if unknown := set(args.only) - {n for r in runs for n in (r.label, r.name)}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: the runs are {', '.join(r.name for r in runs)}")
    configs = check_runs(runs, args.options)
    chosen = [r for r in runs if not args.only or {r.label, r.name} & set(args.only)]
    out = args.out or Path("out") / args.experiment.resolve().name
    for run in chosen:
        check_same(args.experiment / run.name, configs[run.name])
        check_same(out / run.name, configs[run.name])
    launcher = [sys.executable]
    if args.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]

    # A run that is told to stop while it starts just ends; torchrun's own status is 1 whenever it was told to.
    stopped = {EXIT_STOPPED, -signal.SIGTERM, -signal.SIGINT, 130} | ({1} if args.processes > 1 else set())
    stop = Stop(args.minutes)
    for i, run in enumerate(chosen, start=1):
        if not is_finished(args.experiment / run.name):
            if stop.asked:
                break
            print(f"{run.name}, {i} of {len(chosen)}", flush=True)
            options = [*run.options, *(f"--{option}" for option in args.options), f"--out_dir={out / run.name}", "--init_from=auto"]
            status = stop.run([*launcher, str(ROOT / "train.py"), *options])
            if stop.asked and status in stopped:
                break
            if status or not is_finished(out / run.name):
                raise UserError(f"{run.name} ended with status {status}: mend what it says above, the same command goes on")
            keep(out / run.name, args.experiment / run.name)
        if args.discard_checkpoints:
            shutil.rmtree(out / run.name / "checkpoints", ignore_errors=True)
    else:
        print(f"all {len(chosen)} runs are there: python report.py {args.experiment}")
        return
    print(f"stopped; {len(chosen) - i + 1} of {len(chosen)} runs are to come, the same command goes on")
    sys.exit(EXIT_STOPPED)


class Stop:
    """Passes on to the run that is under way that it is to save and end: after so many minutes, or on a signal."""

    def __init__(self, minutes: float | None):
        self.asked, self._training = False, None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._ask)
        if minutes is not None:
            timer = threading.Timer(60 * minutes, self._ask)
            timer.daemon = True
            timer.start()

    def _ask(self, number=signal.SIGTERM, frame=None):
        self.asked = True
        if self._training:
            # SIGUSR1 would end torchrun and leave its workers.
            self._training.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def run(self, command: list[str]) -> int:
        """The status of a command. It gets no Ctrl-C from the terminal but through here."""
        self._training = subprocess.Popen(command, start_new_session=True)
        if self.asked:  # while it was started
            self._training.send_signal(signal.SIGTERM)
        status = self._training.wait()
        self._training = None
        return status


def keep(run_dir: Path, folder: Path) -> None:
    """Copy what a finished run measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        write_whole(folder / name, (run_dir / name).read_text())


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
