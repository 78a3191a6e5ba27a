"""Train the runs of a study, and report the results.

    python study.py run results/NAME [--jobs 8] [--processes 1] [--minutes 60]
    python study.py report results/NAME [--html FILE]
    python study.py time results/NAME

results/NAME/study.toml lists the runs, with the most important ones first. `run` trains the
unfinished runs, --jobs of them at a time: runs with fewer steps first, then the first seed of every
run in the order of the file, then the second seeds. If it is stopped, the same command continues.
Runs are trained in out/NAME/RUN; their output is in out/NAME/RUN.log. When a run has finished, its
config.json, schedule.json and metrics.jsonl are copied to results/NAME/RUN.

`report` writes results/NAME/README.md with both figures. It computes all numbers except those in
the `about` text of the study. Every run is compared with the run that its `against` names, of the
same seed, in three metrics: paper cost, FLOPs and seconds. Seconds are the number of steps times
the median step time of each phase, so they do not include compilation and evaluation.

`time` measures the step times again, one run at a time, and writes results/NAME/step_seconds.json.
Use it if several runs or other work shared the machine during training. `report` and frontier.py
use the medians of these times if the file exists.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import tyro
from msgspec import Meta, Struct
from tabulate import tabulate
from tqdm import tqdm

import plot
from cost import NAMES, cumulative_cost, make_schedules
from forecast import duration
from runs import Run, in_phase, load_run, read_config, speed
from schedule import begun, decay_start, learning_rate
from stagewise.checkpoint import FOLDER, checkpoints
from stagewise.config import INPUTS, Config, grad_accum_steps, load_config, padded_vocab_size
from stagewise.data import fingerprint, load_meta
from stagewise.device import machine_name
from stagewise.errors import UserError, did_you_mean, file_errors, report_user_errors
from stagewise.fileio import atomic_write, convert, decode_json, open_file, read_bytes
from stagewise.metrics import last_row, read_metrics
from stagewise.monitor import EXIT_STOPPED
from stagewise.page import check_plotly
from train import make_model_config

ROOT = Path(__file__).resolve().parent
TIMES = "step_seconds.json"
BASELINE = "baseline"  # label of the run that the others are compared with by default
KEPT = ("config.json", "schedule.json", "metrics.jsonl")  # files of a run folder
# Options that study.py sets itself.
OWN_OPTIONS = ("seed", "out_dir", "init_from", "dry_run")
METRICS = ("paper_cost", "flops", "seconds")
LABELS = NAMES | {"seconds": "seconds"}
PAPER_TOKENS = 10_000 * 524_288  # of the paper's baseline
# A run with a decaying learning rate is compute-matched if its total cost is this close to the
# baseline's.
CLOSE = 0.02
BAR = "{percentage:3.0f}%|{bar:20}| {desc}"
POLL_SECONDS = 0.2
STATUS_SECONDS = 300  # between lines of progress where there is no terminal
# For the output of a failed run: number of bytes in which to search for errors, and number of lines
# to print if there are none.
LOG_TAIL, LAST_LINES = 65_536, 10

# Options that may change when a run is resumed, because the result does not depend on them. The
# corpus in data_dir is compared by its fingerprint.
CHANGEABLE = {
    "data_dir", "log_interval",
    "out_dir", "init_from", "dry_run", "device", "timeout", "verify_data", "checkpoint_interval",
    "keep_checkpoints", "max_skipped_steps", "wandb", "tensorboard",
}  # fmt: skip
# Keys of config.json that may differ between a run and its baseline: the method, and options that
# affect neither loss nor speed.
METHOD = CHANGEABLE | {
    "stages", "stage_blocks", "phase_fractions", "stage_alpha", "freezing", "phase1", "growth",
    "shrink", "perturb", "fade_in_steps", "continual_steps", "optimizer_state",
    "continual_optimizer_state", "rewarmup_steps", "rewarmup", "lr_setback", "context_ramp",
    "tokens_per_step_ramp", "skip_policy", "skip_rate", "freezeout", "eval_interval", "command",
    "date", "starts",
}  # fmt: skip
# Additional keys that may differ between runs with different recipes.
RECIPE = {
    "learning_rate", "lr_schedule", "warmup_steps", "min_lr", "decay_fraction", "weight_decay",
    "beta1", "beta2", "grad_clip", "dropout", "seed", "base_depth",
}  # fmt: skip
# Keys that do not change what a step of a phase computes.
NOT_WORK = {
    "learning_rate", "lr_schedule", "warmup_steps", "min_lr", "decay_fraction", "rewarmup_steps",
    "lr_setback", "seed", "steps",
}  # fmt: skip
# Keys that have no effect, by lr_schedule.
UNUSED = {"constant": {"min_lr", "decay_fraction"}, "cosine": {"decay_fraction"}}


@dataclass
class RunArgs:
    """Train the unfinished runs of a study."""

    folder: tyro.conf.Positional[Path]
    """Folder with a study.toml."""
    jobs: int = 1
    """Number of runs to train at a time. Each has its own GPUs, or a share of the CPU cores."""
    processes: int = 1
    """Number of processes per run. If there is more than one, torchrun starts them."""
    minutes: float | None = None
    """Stop after this time and save checkpoints. The same command continues."""
    only: tuple[str, ...] = ()
    """Runs to train, for example s4 or s4_seed1. Default: all."""
    options: tuple[str, ...] = ()
    """Additional options for all runs, for example --options data_dir=data/mine.
    Use the same options every time."""
    out: Path | None = None
    """Folder for the run folders. Default: out/NAME."""
    discard_checkpoints: bool = False
    """Remove the checkpoints of finished runs. GPT-2 124M needs 1.5 GB per stage."""


@dataclass
class ReportArgs:
    """Write the report of a study."""

    folder: tyro.conf.Positional[Path]
    """Folder with a study.toml and finished runs."""
    html: Path | None = None
    """Also write all runs to this file, as a self-contained page. Needs the package plotly."""


@dataclass
class TimeArgs:
    """Measure the step time of every phase again. Nothing else should run on the machine."""

    folder: tyro.conf.Positional[Path]
    """Folder with a study.toml."""
    rounds: int = 3
    """How often every entry is measured. The median is used."""
    options: tuple[str, ...] = ()
    """Additional options for all runs, for example --options data_dir=data/mine."""


# --------------------------------------------------------------------------------------------------
# study.toml


class RunEntry(Struct, forbid_unknown_fields=True):
    """A table [runs.LABEL] in study.toml."""

    options: tuple[str, ...] = ()  # for train.py, applied after the options of all runs
    seeds: Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**32)], ...], Meta(min_length=1)] = (1,)
    # Numbers of steps, for a run LABEL_STEPS each; default: one run LABEL, as the options say. A
    # table gives additional options for every number, for example the learning rate.
    steps: (
        tuple[Annotated[int, Meta(ge=1)], ...]
        | dict[Annotated[str, Meta(pattern=r"^[1-9]\d*\Z")], tuple[str, ...]]
    ) = ()
    more_seeds: dict[str, tuple[Annotated[int, Meta(ge=0, lt=2**32)], ...]] = {}  # by steps
    # Label of the run to compare with, of the same number of steps. If the baseline lacks one of
    # the seeds, the first variant of the baseline that has all of them is used.
    against: str = BASELINE
    # For frontier.py: method of which this is a variant, for example with another learning rate. It
    # can be the label of another entry.
    variant_of: str = ""
    group: str = ""  # entries with the same group share a panel in the figure of frontier.py
    about: str = ""  # what it is, for the page of frontier.py
    # For frontier.py: not one of the methods, and n_layer may differ from that of the other runs
    control: bool = False


class Study(Struct, forbid_unknown_fields=True):
    """study.toml."""

    title: str  # title of the report
    # by label; read with `load_study`, the values are RunEntry
    runs: Annotated[dict[Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")], Any], Meta(min_length=1)]
    about: str = ""  # Markdown for the report
    options: tuple[str, ...] = ()  # options of all runs
    # For the report: the loss after growth, compared with that of the run of `against`
    loss_after_growth: bool = False
    # (question, label, other label): the loss of the first run minus that of the other one, for the
    # page of frontier.py. With four labels: this difference minus that of the last two.
    contrasts: tuple[tuple[str, ...], ...] = ()

    def method(self, label: str) -> str:
        """Return the method of an entry: the one of which it is a variant, or its own label."""
        return self.runs[label].variant_of or label

    def controls(self) -> set[str]:
        """Return the methods of which an entry has `control = true`."""
        return {self.method(label) for label, entry in self.runs.items() if entry.control}


class MeasuredEntry(Struct):
    work: str  # identifies what a step computes
    # by the name of the phase: what each round has measured
    seconds: dict[str, Annotated[list[Annotated[float, Meta(gt=0)]], Meta(min_length=1)]]

    def rounds(self) -> int:
        """Return how often all phases were measured."""
        return min(map(len, self.seconds.values()), default=0)


class StepTimes(Struct):
    """step_seconds.json: the step times that `time` has measured."""

    machine: str = ""
    entries: dict[str, MeasuredEntry] = {}

    def medians(self, entry: str) -> dict[str, float]:
        """Return the step time by the name of the phase. Empty if the entry was not measured."""
        measured = self.entries.get(entry)
        times = measured.seconds if measured else {}
        return {phase: statistics.median(seconds) for phase, seconds in times.items()}


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study."""

    label: str  # with the number of steps, if the entry lists several
    seed: int
    options: tuple[str, ...] = field(repr=False)  # for train.py
    against: str  # label of the run to compare with
    entry: str = ""  # label of the entry in study.toml

    @property
    def name(self) -> str:
        return f"{self.label}_seed{self.seed}"


def load_study(folder: Path) -> tuple[Study, list[PlannedRun]]:
    """Return the contents of study.toml and the runs of the study.

    Runs are ordered by the numbers of steps that entries list; runs of entries without such a list
    come first. Among runs with the same number, the first seed of every run comes first, in the
    order of the file, then the second seed of every run, and so on.

    Raises:
        UserError: if the file is missing or is not a valid study.
    """
    path = folder / "study.toml"
    with file_errors(path, "specify a folder with a study.toml, such as those in results/"):
        text = read_bytes(path)
    try:
        study = convert(tomllib.loads(text.decode()), Study)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid study: {error}") from None
    for row in study.contrasts:
        if len(row) not in (3, 5):
            raise UserError(
                f"{path}: contrasts: {list(row)} is not a question followed by 2 or 4 labels: "
                "correct it"
            )
        if unknown := set(row[1:]) - study.runs.keys():
            raise UserError(f"{path}: contrasts: {unknown.pop()!r} is not a run")
    for label, table in study.runs.items():
        try:
            study.runs[label] = convert(table, RunEntry)
        except ValueError as error:
            raise UserError(f"{path}, runs.{label}: {error}") from None
    planned = []
    for label, entry in study.runs.items():
        where = f"{path}, runs.{label}"
        if entry.against not in study.runs:
            raise UserError(
                f"{where}: against = {entry.against!r} is not a run: use one of "
                f"{', '.join(study.runs)}"
            )
        others = [study.method(other) for other in study.runs if other != label]
        if (method := entry.variant_of) and method not in others:
            raise UserError(
                f"{where}: variant_of = {method!r} is neither the label of another run without "
                "variant_of nor the variant_of of another run: correct it"
            )
        listed = entry.steps if isinstance(entry.steps, dict) else dict.fromkeys(entry.steps, ())
        lengths: dict[Any, tuple[str, ...]] = listed or {None: ()}
        seeds = {n: (*entry.seeds, *entry.more_seeds.get(str(n), ())) for n in lengths}
        if unknown := entry.more_seeds.keys() - set(map(str, listed)):
            raise UserError(f"{where}: more_seeds: {unknown.pop()} is not in steps: correct it")
        for key, values in [("steps", entry.steps), *(("seeds", s) for s in seeds.values())]:
            if len(set(values)) < len(values):
                raise UserError(f"{where}: {key}: a value is listed more than once")
        for option in (*study.options, *entry.options, *itertools.chain(*lengths.values())):
            if option.removeprefix("--").split("=")[0] in (*OWN_OPTIONS, "help", "-h"):
                raise UserError(f"{where}: options: the study sets {option} itself")
        for steps, own in lengths.items():
            words, suffix = (*study.options, *entry.options, *own), ""
            if steps is not None:
                words, suffix = (*words, f"--steps={steps}"), f"_{steps}"
            against = entry.against + suffix
            planned += [
                (
                    (int(steps or 0), i),
                    PlannedRun(label + suffix, seed, (*words, f"--seed={seed}"), against, label),
                )
                for i, seed in enumerate(seeds[steps])
            ]
    runs = [run for _, run in sorted(planned, key=lambda item: item[0])]
    entries: dict[str, str] = {}
    for run in runs:
        if entries.setdefault(run.label, run.entry) != run.entry:
            raise UserError(
                f"{path}: runs.{run.entry} and runs.{entries[run.label]} both have a run "
                f"{run.label}: rename one of them"
            )
    seeds_of: dict[str, set[int]] = {}
    for run in runs:
        seeds_of.setdefault(run.label, set()).add(run.seed)
    for i, run in enumerate(runs):
        if seeds_of[run.label] <= seeds_of.get(run.against, set()):
            continue
        against, suffix = study.runs[run.entry].against, run.label.removeprefix(run.entry)
        others = [v for v in study.runs if study.runs[v].variant_of == BASELINE and v != run.entry]
        others = [v for v in others if seeds_of[run.label] <= seeds_of.get(v + suffix, set())]
        if against == BASELINE and others:
            runs[i] = dataclasses.replace(run, against=others[0] + suffix)
        elif run.seed not in seeds_of.get(run.against, set()):
            if study.runs[against].steps and run.against == against:
                raise UserError(
                    f"{path}, runs.{run.entry}: runs.{against} lists several numbers of steps, so "
                    "this run must list them too: add steps = [...] with numbers from that list; "
                    "each run is compared with the one of the same length"
                )
            raise UserError(
                f"{path}, runs.{run.entry}: {run.against} has no run with seed {run.seed} to "
                f"compare with: add it to runs.{against}"
            )
    return study, runs


# --------------------------------------------------------------------------------------------------
# run


def check_runs(
    runs: Sequence[PlannedRun], options: Sequence[str], processes: int = 1
) -> tuple[dict[str, Config], dict[str, int]]:
    """Return the configuration and the FLOPs of every run by name.

    Args:
        options: applied to every run after its own options.

    Raises:
        UserError: if train.py would reject a configuration, or runs are compared with a run that is
            not a baseline.
    """
    for option in options:
        if option.split("=")[0] in OWN_OPTIONS:
            raise UserError(f"--options {option}: the study sets this option: remove it")
    configs: dict[str, Config] = {}
    flops: dict[str, int] = {}
    of_label: dict[str, Config] = {}  # the runs of a label differ only in the seed
    for run in runs:
        if run.label not in of_label:
            words = [*run.options, *(f"--{option}" for option in options)]
            of_label[run.label] = load_config(words, Config())
        config = dataclasses.replace(of_label[run.label], seed=run.seed)
        meta = load_meta(config.data_dir)
        model_config = make_model_config(config, padded_vocab_size(meta))
        schedule, baseline = make_schedules(config, model_config)
        for phase in schedule.phases:
            grad_accum_steps(config, phase.tokens_per_step, processes)
        compared = any(other.against == run.label for other in runs)
        cost, total = (
            cumulative_cost(s, s.n_steps, "flops", model_config) for s in (schedule, baseline)
        )
        if compared and not (schedule.is_baseline and cost == total):
            raise _no_baseline(run.label)
        configs[run.name], flops[run.name] = config, cost
    return configs, flops


def _no_baseline(label):
    return UserError(
        f"{label}: runs are compared with this run, so it must train all blocks in every step, "
        "without continual steps or ramps: change its options, or `against` of the other runs"
    )


def check_same(folder: Path, config: Config) -> None:
    """Check that the run in a folder, if there is one, was trained with the options of `config`.

    Raises:
        UserError: if an option differs. The message names it.
    """
    if not (folder / "config.json").exists():
        return
    former = read_config(folder)
    again = f"use the original options, or move {folder} elsewhere to train the run again"
    for option in dataclasses.fields(Config):
        before, now = getattr(former, option.name), getattr(config, option.name)
        if option.name in INPUTS:  # paths in records are absolute, or relative to the repository
            before, now = ((ROOT / value).resolve() if value else "" for value in (before, now))
        if before != now and option.name not in CHANGEABLE:
            raise UserError(
                f"{folder}: was trained with {option.name}={before}, not {option.name}={now}: "
                f"{again}"
            )
    if former.corpus and former.corpus != fingerprint(load_meta(config.data_dir)):
        raise UserError(f"{folder}: was trained on different data than {config.data_dir}: {again}")


def load_times(folder: Path) -> StepTimes:
    """Return the step times that `time` has measured, if any.

    Raises:
        UserError: if the file is corrupted.
    """
    path = folder / TIMES
    if not path.exists():
        return StepTimes()
    with file_errors(path, "remove it"):
        return decode_json(read_bytes(path), StepTimes)


def load_finished(folder: Path) -> Run | None:
    """Return the run in a folder, or None if it has not been evaluated at its last step.

    Raises:
        UserError: if a file is corrupted.
    """
    if not all((folder / name).exists() for name in KEPT):
        return None
    run = load_run(folder)
    steps, _ = run.curve("val_loss", "steps")
    return run if run.schedule.steps in steps else None


def run_study(args: RunArgs) -> None:
    """Train the unfinished runs of a study. Exit with status EXIT_STOPPED if it is stopped."""
    if args.minutes is not None and not 0 < args.minutes <= 10**6:
        raise UserError(f"--minutes={args.minutes} must be above 0 and at most 1,000,000")
    for name, value in (("jobs", args.jobs), ("processes", args.processes)):
        if not 1 <= value <= 1024:
            raise UserError(f"--{name}={value} must be between 1 and 1,024")
    described, runs = load_study(args.folder)
    known = {n for r in runs for n in (r.entry, r.label, r.name)}
    for name in args.only:
        if name not in known:
            raise UserError(f"--only {name}: no such run{did_you_mean(name, described.runs)}")
    configs, flops = check_runs(runs, args.options, args.processes)
    chosen = [r for r in runs if not args.only or {r.entry, r.label, r.name} & set(args.only)]
    out = args.out or Path("out") / args.folder.resolve().name
    for run in chosen:
        check_same(args.folder / run.name, configs[run.name])
        check_same(out / run.name, configs[run.name])
    waiting = [run for run in chosen if not load_finished(args.folder / run.name)]
    training = Training(args, out, runs, chosen, waiting, configs, flops)
    for name in training.finished:
        training.discard_checkpoints(name)
    if waiting:
        print(f"{len(waiting)} runs to train, {args.jobs} at a time; output: {out}/RUN.log")
        training.train(waiting)
    finished, failed = training.finished, training.failed
    if unfinished := len(chosen) - len(finished):
        if unfinished > len(failed):
            print(
                f"stopped with {unfinished} of {len(chosen)} runs unfinished; continue with the "
                "same command"
            )
            sys.exit(EXIT_STOPPED)
        raise UserError(
            f"{len(failed)} of {len(chosen)} runs failed ({', '.join(failed)}): fix the errors "
            f"above, then continue with the same command. Run folders: {out}"
        )
    # frontier.py needs baselines of several lengths.
    lengths = len({run.label for run in runs}) > len({run.entry for run in runs})
    command = "frontier.py" if lengths else "study.py report"
    print(
        f"all {len(chosen)} runs have finished; to write the report: python {command} {args.folder}"
    )


def job_environments(
    jobs: int, processes: int, environ: Mapping[str, str], cores: int, gpus: int | None = None
) -> list[dict[str, str]]:
    """Return the environment variables to add for each of the runs that train concurrently.

    Args:
        jobs: number of runs.
        processes: number of processes of each run.
        environ: environment of this process. CUDA_VISIBLE_DEVICES names the visible GPUs, and
            OMP_NUM_THREADS is kept.
        cores: number of usable CPU cores, which runs on the CPU share.
        gpus: number of visible GPUs, or None for runs on the CPU.

    Raises:
        UserError: if there are not enough GPUs.
    """
    if gpus is not None and jobs * processes > gpus:
        raise UserError(
            f"--jobs={jobs} --processes={processes} needs {jobs * processes} GPUs, but {gpus} are "
            "visible: lower --jobs or --processes, or use --options device=cpu"
        )
    if jobs == processes == 1:
        return [{}]
    if gpus is None:
        threads = max(1, cores // (jobs * processes))
        return [{} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(threads)}] * jobs
    visible = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = [name.strip() for name in visible.split(",")]
    parts = [names[i * processes : (i + 1) * processes] for i in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


class StopRequest:
    """Whether the study should stop: after SIGTERM, SIGINT, SIGHUP, SIGUSR1, or a time limit.

    A second Ctrl-C raises KeyboardInterrupt.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, minutes: float | None = None):
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._interrupted = math.inf  # when the first SIGINT was received
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._record)

    @property
    def requested(self) -> bool:
        return time.monotonic() >= self._deadline

    def _record(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            # Two within 0.5 seconds count as one: a launcher may forward the terminal's.
            if now - self._interrupted > 0.5:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, now)
        self._deadline = min(self._deadline, now)


class Job:
    """The process that trains a run. Its output is appended to a file.

    Raises:
        UserError: if the file cannot be opened.
    """

    def __init__(self, run: PlannedRun, command: list[str], env: Mapping[str, str], log: Path):
        self.run, self.log, self.started = run, log, time.monotonic()
        self.stopping = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with file_errors(log, "free disk space, make it writable, or use another --out"):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(log, flags, 0o666), "ab")
        with file:
            self._log_start = os.fstat(file.fileno()).st_size
            # In a new session, the process does not receive the terminal's Ctrl-C, only `stop`.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )

    def stop(self) -> None:
        """Ask the process, once, to save a checkpoint and exit."""
        if not self.stopping:
            self.stopping = True
            # Not SIGUSR1: it would end torchrun and leave its workers running.
            self.process.terminate()

    def error(self) -> str:
        """Return the first error message in the output, or the last lines if there is none."""
        with file_errors(self.log, "see the run folder"), open_file(self.log) as f:
            f.seek(max(self._log_start, os.fstat(f.fileno()).st_size - LOG_TAIL))
            text = f.read().decode("utf-8", "replace")
        if said := re.search(r"^(?:\[rank \d+\] )?error: (.*)", text, re.MULTILINE):
            return said[1]
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return "\n".join(["its last lines:", *lines[-LAST_LINES:]])


_libc = ctypes.CDLL(None)


def _stop_with_parent():
    """Make Linux send SIGTERM to this process when its parent ends, even by SIGKILL."""
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Position(Struct):
    """Progress of a run: columns of metrics.jsonl."""

    flops: int = 0
    loss: float | None = None  # None before the first step, and if it is not finite


def common_steps(shorter: Config, longer: Config) -> int:
    """Return the step at which `shorter` starts to decay, or 0 if the runs differ before it.

    With "wsd", runs of different lengths can be identical until the shorter one starts to decay.
    """
    if dataclasses.replace(shorter, steps=longer.steps) != longer:
        return 0
    schedules = []
    for config in (shorter, longer):
        model_config = make_model_config(config, padded_vocab_size(load_meta(config.data_dir)))
        schedules.append(make_schedules(config, model_config)[0])
    short, long = schedules
    start = decay_start(short, shorter) or 0
    if short.n_steps >= long.n_steps or begun(short.phases, start) != begun(long.phases, start):
        return 0
    same = all(
        learning_rate(step, short, shorter) == learning_rate(step, long, longer)
        for step in range(start)
    )
    return start if same else 0


class Training:
    """Trains runs, several at a time, and shows the progress of all of them.

    Args:
        runs: all runs of the study. A run can continue one that is not in `chosen`.
        chosen: the runs to train and those that have finished before.
        waiting: the runs to train.
        configs: by the name of the run.
        flops: cost of the complete run, by its name.

    Attributes:
        finished: names of the runs that have finished, before or now.
        failed: names of the runs that have failed.

    Raises:
        UserError: if there are not enough GPUs.
    """

    def __init__(
        self,
        args: RunArgs,
        out: Path,
        runs: Sequence[PlannedRun],
        chosen: Sequence[PlannedRun],
        waiting: Sequence[PlannedRun],
        configs: Mapping[str, Config],
        flops: Mapping[str, int],
    ):
        self.args, self.out, self.n_runs = args, out, len(chosen)
        self._runs, self._configs = runs, configs
        self.finished = [run.name for run in chosen if run not in waiting]
        self.failed: list[str] = []
        self._environments = {}
        for run in waiting:
            device, gpus = configs[run.name].device, torch.cuda.device_count()
            on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
            if on_gpu and ":" in device and args.jobs * args.processes > 1:
                raise UserError(
                    f"{run.name}: device={device} is one GPU for {args.jobs} x {args.processes} "
                    "processes: use device=cuda, with CUDA_VISIBLE_DEVICES to select GPUs"
                )
            self._environments[run.name] = job_environments(
                args.jobs,
                args.processes,
                os.environ,
                len(os.sched_getaffinity(0)),
                gpus if on_gpu else None,
            )
        self._flops = {run.name: flops[run.name] for run in waiting}
        self._done = {run.name: self._read(run.name).flops for run in waiting}

    def train(self, waiting: Sequence[PlannedRun]) -> None:
        """Train the runs until all have ended or the study is stopped."""
        queue = list(waiting)
        jobs: dict[int, Job] = {}  # by slot; each slot has its own GPUs
        stop = StopRequest(self.args.minutes)
        self._start_time, self._start_flops = time.monotonic(), sum(self._done.values())
        tqdm.monitor_interval = 0  # no thread: Job forks this process
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            bar_format=BAR, total=0, dynamic_ncols=True, leave=False, disable=not terminal
        )
        next_status = self._start_time + (0 if terminal else STATUS_SECONDS)
        try:
            while jobs or (queue and not stop.requested):
                for slot in range(self.args.jobs):
                    if queue and slot not in jobs and not stop.requested:
                        run = queue.pop(0)
                        try:
                            jobs[slot] = self._start(run, slot)
                        except UserError as error:
                            self._fail(run, error)
                if stop.requested:
                    for job in jobs.values():
                        job.stop()
                for slot, job in list(jobs.items()):
                    if job.process.poll() is not None:
                        del jobs[slot]
                        self._finish(job)
                if jobs and time.monotonic() >= next_status:
                    self._show(jobs.values())
                    next_status = time.monotonic() + (1 if terminal else STATUS_SECONDS)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # a second Ctrl-C. torchrun kills its workers itself, after 30 s.
            if self.args.processes == 1:
                for job in jobs.values():
                    job.process.kill()
            raise
        finally:
            for job in jobs.values():
                job.stop()
            for job in jobs.values():
                job.process.wait()
            self._bar.close()

    def discard_checkpoints(self, name: str) -> None:
        """Remove the checkpoints of a finished run, with --discard_checkpoints."""
        if self.args.discard_checkpoints:
            shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)

    def _start(self, run, slot):
        self._branch(run)
        launcher = [sys.executable]
        if self.args.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={self.args.processes}"]
        options = [*run.options, *(f"--{option}" for option in self.args.options)]
        options += [f"--out_dir={self.out / run.name}", "--init_from=auto"]
        command = [*launcher, str(ROOT / "train.py"), *options]
        # --wandb shows the runs of a study as a group.
        group = os.environ.get("WANDB_RUN_GROUP", self.args.folder.resolve().name)
        env = self._environments[run.name][slot] | {"WANDB_RUN_GROUP": group}
        return Job(run, command, env, self.out / f"{run.name}.log")

    def _branch(self, run):
        """Copy the beginning of a new run from a shorter one, if both begin identically."""
        folder, config = self.out / run.name, self._configs[run.name]
        if checkpoints(folder):
            return
        shorter = [
            (step, other.name)
            for other in self._runs
            if (other.entry, other.seed) == (run.entry, run.seed)
            and (step := common_steps(self._configs[other.name], config))
        ]
        for step, name in sorted(shorter, reverse=True):
            source = self.out / name
            checkpoint = f"step_{step:08d}"
            if not (source / FOLDER / checkpoint).exists():
                continue
            try:
                check_same(source, self._configs[name])
            except UserError:
                continue
            rows = [row for row in read_metrics(source / "metrics.jsonl") if row["step"] <= step]
            partial = folder / FOLDER / ".partial"
            with file_errors(folder, "free disk space, or make it writable"):
                partial.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row) + "\n" for row in rows)
                atomic_write(folder / "metrics.jsonl", text)
                shutil.copytree(source / FOLDER / checkpoint, partial, dirs_exist_ok=True)
                partial.rename(folder / FOLDER / checkpoint)
            self._done[run.name] = self._read(run.name).flops
            self._start_flops += self._done[run.name]  # not trained now
            tqdm.write(f"{run.name}: continues {name} from step {step}")
            return

    def _finish(self, job):
        """Record the result of a process that has ended."""
        run, status = job.run, job.process.returncode
        # While it starts, train.py is terminated by the signal itself. torchrun exits with status 1
        # whenever it is stopped by a signal.
        stopped = {EXIT_STOPPED, -signal.SIGTERM} | ({1} if self.args.processes > 1 else set())
        if job.stopping and status in stopped:
            return
        try:
            trained = None if status else load_finished(self.out / run.name)
            if trained is None:
                raise UserError(f"train.py ended with status {status}: {job.error()}")
            keep(self.out / run.name, self.args.folder / run.name)
        except UserError as error:
            self._fail(run, UserError(f"{error}\nAll output of {run.name}: {job.log}"))
            return
        self.finished.append(run.name)
        self._done[run.name] = self._flops[run.name]
        loss, time_taken = plot.show(_final_loss(trained), ".4f"), duration(_since(job.started))
        tqdm.write(f"{run.name}: finished, val loss {loss}, time {time_taken}")
        self.discard_checkpoints(run.name)

    def _fail(self, run, error):
        """Report that a run has failed, which does not affect the other runs."""
        tqdm.write(f"error: {run.name}: {error}", file=sys.stderr)
        self.failed.append(run.name)
        self._flops[run.name] = self._done[run.name]  # no work is left

    def _read(self, name):
        """Return the position of a run, from the last row of its metrics."""
        try:
            return convert(last_row(self.out / name / "metrics.jsonl") or {}, Position)
        except ValueError:  # train.py reports it
            return Position()

    def _show(self, jobs):
        """Update the bar or, without a terminal, print a line."""
        running = []
        for job in sorted(jobs, key=lambda job: job.started):
            name, now = job.run.name, self._read(job.run.name)
            # At least the former value: a run that was killed repeats the steps since a checkpoint.
            # At most the run's own cost: the cost of its initial weights is counted in its metrics.
            self._done[name] = max(self._done[name], min(now.flops, self._flops[name]))
            running.append(name if now.loss is None else f"{name} (loss {now.loss:.3f})")
        done, total = sum(self._done.values()), sum(self._flops.values())
        parts = [f"{len(self.finished)} of {self.n_runs} runs finished"]
        if done > self._start_flops:
            per_flop = _since(self._start_time) / (done - self._start_flops)
            parts.append(f"{duration((total - done) * per_flop)} left")
        parts.append(f"running: {', '.join(running)}")
        if self._bar.disable:
            parts.insert(1, f"{done / max(1, total):.0%} of the FLOPs")
            print("; ".join(parts), file=sys.stderr)
        else:
            self._bar.total, self._bar.n = total, done
            self._bar.set_description_str("; ".join(parts))


def _since(start):
    return time.monotonic() - start


def keep(run_dir: Path, folder: Path) -> None:
    """Copy the files of a finished run that `report` needs.

    Paths inside the repository become relative to it.

    Raises:
        UserError: if they cannot be written.
    """
    for name in KEPT:
        text = (run_dir / name).read_text("utf-8")
        write(folder / name, text.replace(json.dumps(f"{ROOT}/")[:-1], '"'))


def write(path: Path, text: str) -> None:
    """Write a file atomically. Create its folder if it does not exist.

    Raises:
        UserError: if the file cannot be written.
    """
    with file_errors(path, "free disk space, or make the folder writable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)


# --------------------------------------------------------------------------------------------------
# measurements


@dataclass
class Result:
    """A finished run and its baseline, which has the same recipe and seed."""

    planned: PlannedRun
    run: Run
    baseline: Run  # for a baseline, the run itself

    @property
    def decays(self) -> bool:
        """Whether the learning rate decays. If so, only the final loss is comparable."""
        return self.run.config.lr_schedule != "constant"

    @property
    def final_loss(self) -> float:
        return _final_loss(self.run)

    def compute_matched_loss(self, metric: str) -> float | None:
        """Return the validation loss at the point at which the run is compute-matched.

        Return None if there is no such point.
        """
        if self.decays:
            close = abs(self.run.relative_cost[metric][-1] - 1) <= CLOSE
            return self.final_loss if close else None
        point = self.run.compute_matched_point("val_loss", "steps", metric)
        return point and point[1]

    def loss_difference(self, metric: str) -> float | None:
        """Return the compute-matched loss minus the baseline's final loss."""
        loss = self.compute_matched_loss(metric)
        return None if loss is None else loss - _final_loss(self.baseline)

    def cost_to_baseline_loss(self, metric: str) -> float | None:
        """Return the cost at which the run first reaches the baseline's final loss.

        The cost is a fraction of the baseline's total. Return None if the run never reaches that
        loss, or if the learning rate decays.
        """
        _, losses = self.run.curve("val_loss", "steps")
        cost = self.run.relative_cost[metric][self.run.measured("val_loss")]
        target = _final_loss(self.baseline)
        reached = np.flatnonzero(losses <= target)
        if self.decays or not len(reached):
            return None
        i = reached[0]
        if i == 0 or not math.isfinite(losses[i - 1]):
            return float(cost[i])
        part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
        return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))

    def stages_cost(self, metric: str) -> float:
        """Return the total cost of the stages, as a fraction of the baseline's total."""
        stages = [p for p in self.run.schedule.phases if p.kind != "continual"]
        if metric == "seconds":
            return seconds_at(self.run, stages[-1].stop) / total_seconds(self.baseline)
        totals = self.run.schedule.baseline
        return sum(getattr(p, metric) for p in stages) / getattr(totals, metric)


def _final_loss(run):
    return float(run.curve("val_loss", "steps")[1][-1])


def seconds_at(run: Run, steps: Any) -> Any:
    """Return the time of the first `steps` steps (a number or an array).

    The time of a step is computed from the median speed of its phase.
    """
    stops = [p.stop for p in run.schedule.phases]
    seconds = np.cumsum([p.tokens / speed(run, p) for p in run.schedule.phases])
    return np.interp(steps, [0, *stops], [0, *seconds])


def total_seconds(run: Run) -> float:
    return float(seconds_at(run, run.schedule.steps))


def load_results(folder: Path) -> tuple[Study, list[Result], list[PlannedRun]]:
    """Return the study, its finished runs, and its unfinished runs.

    A run counts as finished only if its baseline has finished too.

    Raises:
        UserError: if files are corrupted, or runs were not trained under the same conditions.
    """
    study, planned = load_study(folder)
    finished = {p.name: run for p in planned if (run := load_finished(folder / p.name))}
    times = load_times(folder)
    results, missing = [], []
    for p in planned:
        if p.name in finished:
            finished[p.name].step_seconds = times.medians(p.entry)
    for p in planned:
        run, baseline = finished.get(p.name), finished.get(f"{p.against}_seed{p.seed}")
        if run is None or baseline is None:
            missing.append(p)
            continue
        if not (baseline.is_baseline and baseline.relative_cost["flops"][-1] == 1):
            raise _no_baseline(p.against)
        results.append(Result(p, run, baseline))
        check_comparable(folder, run, baseline, METHOD)
        # Runs of another length are only compared with a baseline of their own length.
        check_comparable(folder, run, results[0].run, METHOD | RECIPE | {"steps"})
        seconds = seconds_at(run, run.columns["step"])
        run.relative_cost["seconds"] = seconds / total_seconds(baseline)
    return study, results, missing


def time_study(args: TimeArgs) -> None:
    """Measure the step times of every entry, and write them to results/NAME/step_seconds.json.

    A step of a phase does the same work in all runs of an entry, and in entries that differ only in
    the learning rate. Only the run with the most FLOPs is measured. A round measures all of them
    once. Those that have already been measured in `args.rounds` rounds are not measured again.

    Raises:
        UserError: if forecast.py fails, or the number of rounds is not positive.
    """
    if args.rounds < 1:
        raise UserError(f"--rounds={args.rounds} must be at least 1")
    _, runs = load_study(args.folder)
    configs, flops = check_runs(runs, args.options)
    longest: dict[str, PlannedRun] = {}
    for run in sorted(runs, key=lambda run: flops[run.name]):
        longest[run.entry] = run
    same_work: dict[str, list[PlannedRun]] = {}
    for run in longest.values():
        config = dataclasses.asdict(configs[run.name])
        work = str({key: value for key, value in config.items() if key not in NOT_WORK})
        same_work.setdefault(hashlib.sha256(work.encode()).hexdigest(), []).append(run)
    path, times = args.folder / TIMES, load_times(args.folder)
    known = {entry.work: entry for entry in times.entries.values()}
    # All of them in turn, so that a slow period of the machine affects one round.
    todo = [
        work
        for number in range(args.rounds)
        for work in same_work
        if work not in known or known[work].rounds() <= number
    ]
    for work in tqdm(todo, unit="measurement"):
        run = max(same_work[work], key=lambda run: flops[run.name])
        with tempfile.TemporaryDirectory() as folder:
            options = [*run.options, *(f"--{option}" for option in args.options)]
            command = [sys.executable, str(ROOT / "forecast.py"), *options, f"--out_dir={folder}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip() or "no message").splitlines()[-1]
                raise UserError(f"{run.name}: forecast.py failed: {said}")
            forecast = json.loads(Path(folder, "forecast.json").read_text())
        machine = f"{forecast['machine']} with torch {forecast['torch_version']}"
        if times.machine and times.machine != machine:
            raise UserError(
                f"{path}: was measured on {times.machine}, but this machine is {machine}: remove "
                "the file to measure everything again"
            )
        times.machine = machine
        entry = known.setdefault(work, MeasuredEntry(work, {}))
        for row in forecast["phases"]:
            entry.seconds.setdefault(row["phase"], []).append(row["step_seconds"])
        times.entries |= {run.entry: entry for run in same_work[work]}
        save_times(path, times)
    times.entries |= {run.entry: known[work] for work in same_work for run in same_work[work]}
    save_times(path, times)
    print(f"{path}: {len(times.entries)} entries")


def save_times(path: Path, times: StepTimes) -> None:
    write(path, msgspec.json.format(msgspec.json.encode(times), indent=1).decode() + "\n")


def check_comparable(folder: Path, run: Run, other: Run, may_differ: set[str]) -> None:
    """Check that two runs have the same config.json, except for the keys in `may_differ`.

    Keys that the learning-rate schedule does not use are not compared.

    Raises:
        UserError: if another key differs. The message names it.
    """
    if run.config.lr_schedule == other.config.lr_schedule:
        may_differ = may_differ | UNUSED.get(run.config.lr_schedule, set())
    for key in (f.name for f in dataclasses.fields(run.config)):
        a, b = getattr(run.config, key), getattr(other.config, key)
        if key in ("corpus", "matmul_dtype") and not (a and b):  # recorded by an earlier version
            continue
        if a != b and key not in may_differ:
            raise UserError(
                f"{folder / run.name}: {key} is {a}, but {b} in {other.name}, with which the run "
                "is compared: move one of the runs elsewhere and train it again under the same "
                "conditions"
            )


# --------------------------------------------------------------------------------------------------
# report


def by_label(results: list[Result]) -> dict[str, list[Result]]:
    """Group the results of all seeds by the label of the run."""
    labels: dict[str, list[Result]] = {}
    for result in results:
        labels.setdefault(result.planned.label, []).append(result)
    return labels


def over_seeds(values: list[float | None], form: str, each: bool = True) -> str:
    """Format the mean over the seeds and, with `each`, all values.

    Return "-" if one is None or NaN.
    """
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    if len(numbers) < len(values):
        return "-"
    mean = plot.show(sum(numbers) / len(numbers), form)
    if len(numbers) == 1 or not each:
        return mean
    return f"{mean} ({', '.join(plot.show(number, form) for number in numbers)})"


def markdown(header: list[str], rows: list[list[str]], n_left: int = 1) -> str:
    """Return a table whose first `n_left` columns are aligned to the left."""
    align = ("left",) * n_left + ("right",) * (len(header) - n_left)
    return tabulate(rows, header, "pipe", colalign=align, disable_numparse=True)


def loss_table(results: list[Result]) -> str:
    header = ["run", "seeds", "val loss at the end"]
    header += [f"compute-matched, {LABELS[m]}" for m in METRICS]
    header += ["compute to reach the baseline's final loss (fraction of its total)"]
    header += ["acc_norm at the end"]
    rows = []
    for label, runs in by_label(results).items():
        differences = [over_seeds([r.loss_difference(m) for r in runs], "+.4f") for m in METRICS]
        reached = [
            over_seeds([r.cost_to_baseline_loss(m) for r in runs], ".2f", each=False)
            for m in METRICS
        ]
        rows.append(
            [
                label,
                ", ".join(str(r.planned.seed) for r in runs),
                over_seeds([r.final_loss for r in runs], ".4f"),
                *differences,
                ", ".join(reached),
                accuracy(runs),
            ]
        )
    return markdown(header, rows)


def accuracy(results: list[Result]) -> str:
    """Format the final HellaSwag acc_norm, with the standard error of a single run."""
    scores = [r.run.last("hellaswag_acc_norm") for r in results]
    mean = over_seeds([score and 100 * score for score in scores], ".1f", each=False)
    error = results[0].run.last("hellaswag_acc_norm_stderr")
    return mean if error is None or error == math.inf else f"{mean} ± {100 * error:.1f}%"


def stages_table(results: list[Result]) -> str:
    """Return a table with the total cost of the stages, for all runs except baselines, or ""."""
    rows = []
    for label, runs in by_label(results).items():
        run = runs[0].run
        if runs[0].baseline is not run:
            steps = max(p.stop for p in run.schedule.phases if p.kind != "continual")
            costs = [over_seeds([r.stages_cost(m) for r in runs], ".3f") for m in METRICS]
            rows.append([label, f"{steps:,}", *costs])
    return markdown(["run", "steps", *(LABELS[m] for m in METRICS)], rows) if rows else ""


def phase_table(results: list[Result]) -> str:
    """Return a table with speed, memory and cost of every phase, for the first seed of each run."""
    firsts = {label: seeds[0] for label, seeds in by_label(results).items()}
    phases = [p for result in firsts.values() for p in result.run.schedule.phases]
    context = len({p.context_length for p in phases}) > 1
    batch = len({p.tokens_per_step for p in phases}) > 1
    header = ["run", "phase", "blocks that train"]
    header += ["context"] * context + ["tokens/step"] * batch
    header += ["tokens/s", "MFU", "peak memory", "time", "FLOPs", "time / FLOPs"]
    rows = []
    for label, result in firsts.items():
        run, totals = result.run, result.run.schedule.baseline
        for p in run.schedule.phases:
            mfu = in_phase(run, p, "mfu")[1:]
            peak = in_phase(run, p, "peak_memory")[:1]  # later values include evaluations
            seconds_per_token = 1 / speed(run, p)
            time = seconds_per_token / (total_seconds(result.baseline) / totals.tokens)
            flops = (p.flops / p.tokens) / (totals.flops / totals.tokens)
            row = [label, p.name, f"{len(p.trained_blocks)} of {p.n_blocks}"]
            row += [f"{p.context_length:,}"] * context + [f"{p.tokens_per_step:,}"] * batch
            row.append(over_seeds([speed(run, p)], ",.0f"))
            row.append(f"{100 * np.median(mfu):.1f}%" if len(mfu) else "-")
            row.append(f"{peak[0] / 2**30:.2f} GiB" if len(peak) else "-")
            row += [over_seeds([time], ".3f"), f"{flops:.3f}", over_seeds([time / flops], ".2f")]
            rows.append(row)
    return markdown(header, rows)


def after_growth(folder: Path, title: str, results: list[Result]) -> list[str]:
    """Draw figure 3, and return the section of the report on the loss after growth.

    Runs whose model does not grow are left out. So are runs without an evaluation that is after
    their last growth step and within the tokens of their baseline; the section lists them.
    """
    pairs, without = [], []
    for r in results:
        if plot.last_growth(r.run):
            if len(plot.loss_difference(r.run, r.baseline)[0]):
                pairs.append((r.run, r.baseline))
            else:
                without.append(r.planned.name)
    section = ["## The loss after growth"]
    if pairs:
        args = figure_args(folder, title, pairs[0][0])
        plot.draw_difference(pairs, args)
        section += [
            "![validation loss minus the baseline's, after growth](figure3_difference.png)",
            markdown(*plot.difference_rows(pairs, args.tolerance)),
            AFTER_GROWTH.format(args.tolerance),
        ]
    if without:
        section.append(f"Without a suitable evaluation: {', '.join(without)}.")
    return section if pairs or without else []


def figure_args(folder: Path, title: str, run: Run) -> plot.Args:
    return plot.Args(title=f"{title}; {machine(run.config)}, {run.config.date}", out=folder)


def machine(config: plot.RunConfig) -> str:
    return machine_name(config.device_name, config.world_size, config.cpu, config.threads)


def conditions(results: list[Result]) -> str:
    """Describe the model, the data and the hardware in a few sentences."""
    # The longest, if there are several numbers of steps.
    baseline = max((r.baseline for r in results), key=lambda run: run.schedule.steps)
    c, totals = baseline.config, baseline.schedule.baseline
    parameters = baseline.schedule.phases[-1].trained_parameters
    dates = sorted({r.run.config.date for r in results})
    shorter = len({r.baseline.schedule.steps for r in results}) > 1
    return (
        f"GPT-2 with {c.n_layer} blocks of width {c.n_embd}, {c.n_head} heads, context "
        f"{c.block_size:,}: {parameters / 1e6:,.1f}M parameters. "
        f"{'The longest' if shorter else 'A'} baseline has {totals.steps:,} "
        f"steps of {c.tokens_per_step:,} tokens: {totals.tokens / 1e6:,.1f}M tokens of "
        f"`{c.data_dir}`, {totals.tokens / c.train_tokens:.2f} epochs, "
        f"{100 * totals.tokens / PAPER_TOKENS:.3g}% of the paper's tokens. Trained on {machine(c)} "
        f"with torch {c.torch_version}, "
        f"{dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}."
    )


HOW_TO_READ = (
    "*Compute-matched*: the validation loss at the point at which the run has cost as much as its "
    "baseline in total, minus the baseline's final validation loss, in nats per token. If the "
    "difference is positive, the baseline is better. Losses are interpolated between evaluations. "
    "*Compute to reach the baseline's final loss*: the cost of the run when its validation loss "
    "first reaches that value, in paper cost, FLOPs and seconds. The baseline has the same recipe "
    "and seed. A run with a decaying learning rate is compared only at its end, and only in "
    f"metrics in which its total cost is within {CLOSE:.0%} of the baseline's. Seconds are the "
    "number of steps of each phase times its median step time, without compilation and evaluation. "
    "With several seeds, the first number is the mean. A dash means that there is nothing to "
    "compare."
)
ALT = {"figure1_loss": "training and validation loss", "figure2_hellaswag": "HellaSwag accuracy"}
CAPTION = "*First seed of all runs that are compared with the first baseline.*"
STAGES = (
    "Total cost of the stages, without continual training, as a fraction of the baseline's total. "
    "Paper cost is the unit in which the paper states its savings."
)
AFTER_GROWTH = (
    "The validation loss minus that of the baseline with the same seed, after the last growth "
    "step, at evaluations within the baseline's tokens. The baseline's loss is interpolated "
    "linearly to the same number of tokens. In the figure, faint lines are single seeds and bold "
    "lines are means. The table shows the difference at the last of these evaluations (mean over "
    "the seeds), and the number of seeds with which the difference is below {0:g} nats from some "
    "evaluation to the last one. The last column is the number of training tokens from the last "
    "growth step to the first such evaluation (a dash: not all seeds have one)."
)
PHASES = "For the first seed. Time and FLOPs are per token, relative to the baseline's."


def draw_figures(folder: Path, title: str, results: list[Result]) -> list[str]:
    """Draw the first seed of all runs that are compared with the first baseline.

    Returns:
        The file names of the figures without suffixes.
    """
    first = results[0]
    runs = []
    for r in results:
        if (r.planned.seed, r.planned.against) == (first.planned.seed, first.planned.against):
            runs.append(dataclasses.replace(r.run, name=r.planned.label))
    return plot.draw_figures(runs, figure_args(folder, title, first.run))


def report_study(args: ReportArgs) -> None:
    """Write the report of a study and its figures."""
    if args.html:
        check_plotly()
    study, results, missing = load_results(args.folder)
    folder = args.folder.as_posix()
    if not results:
        raise UserError(
            f"{folder}: no run has finished together with its baseline: train the runs with python "
            f"study.py run {folder}"
        )
    names = draw_figures(args.folder, study.title, results)
    figures = "\n\n".join([*(f"![{ALT[n]}]({n}.png)" for n in names), CAPTION])
    head = [conditions(results), study.about.strip()]
    if missing:
        head.append(f"**Not finished yet:** {', '.join(run.name for run in missing)}.")
    stages = stages_table(results)
    page = [
        f"# {study.title}",
        f"*Written by `python study.py report {folder}` from the run folders next to this file, "
        f"which `python study.py run {folder}` wrote. Each config.json contains the command of its "
        "run.*",
        *head,
        figures,
        "## Compute-matched losses",
        loss_table(results),
        HOW_TO_READ,
        *(after_growth(args.folder, study.title, results) if study.loss_after_growth else []),
        *(["## Cost of the stages", STAGES, stages] if stages else []),
        "## Phases",
        PHASES,
        phase_table(results),
    ]
    write(args.folder / "README.md", "\n\n".join(part for part in page if part) + "\n")
    if args.html:
        plot.write_html([r.run for r in results], plot.Args(title=study.title, html=args.html))
    print(f"{args.folder / 'README.md'}: {len(results)} runs, {len(missing)} not finished yet")


def main(args: RunArgs | ReportArgs | TimeArgs) -> None:
    # Paths in a study refer to the repository, whatever the current directory is.
    if args.folder.exists():
        args.folder = args.folder.absolute()
    if isinstance(args, RunArgs) and args.out:
        args.out = args.out.absolute()
    if isinstance(args, ReportArgs) and args.html:
        args.html = args.html.absolute()
    os.chdir(ROOT)
    if args.folder.is_relative_to(ROOT):
        args.folder = args.folder.relative_to(ROOT)
    if isinstance(args, RunArgs):
        run_study(args)
    elif isinstance(args, TimeArgs):
        time_study(args)
    else:
        report_study(args)


Command = (
    Annotated[RunArgs, tyro.conf.subcommand("run")]
    | Annotated[ReportArgs, tyro.conf.subcommand("report")]
    | Annotated[TimeArgs, tyro.conf.subcommand("time")]
)

if __name__ == "__main__":
    with report_user_errors():
        main(
            tyro.cli(
                Command,
                description="Train the runs of a study, and report the results.",
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
        )
