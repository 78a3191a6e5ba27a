"""Read run folders: config.json, schedule.json and metrics.jsonl, which train.py writes."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from msgspec import UNSET, Meta, UnsetType

from cost import COST_METRICS
from schedule import Phase
from stagewise.config import Config, Positive
from stagewise.errors import UserError, file_errors
from stagewise.fileio import convert, decode_json, read_bytes
from stagewise.metrics import read_metrics

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """config.json. A missing option was added to train.py later and has its default value."""

    vocab_size: int
    hellaswag_file: str | None
    train_tokens: int
    world_size: int
    device_name: str
    torch_version: str
    cpu: str
    threads: int
    command: str
    date: str
    corpus: str = ""  # data.fingerprint
    matmul_dtype: str = ""  # device.matmul_dtype
    starts: tuple[dict[str, Any], ...] = ()  # every start of the run: step, command, ...


@dataclass(frozen=True, kw_only=True)
class PhaseSummary(Phase):
    """A phase in schedule.json, with its total cost in every metric."""

    tokens: int
    paper_cost: int
    flops: int
    trained_parameters: int


@dataclass(frozen=True)
class BaselineSummary:
    """The baseline in schedule.json: its steps, and its total cost in every metric."""

    steps: Positive
    tokens: Positive
    paper_cost: Positive
    flops: Positive


@dataclass(frozen=True)
class ScheduleSummary:
    """The fields of schedule.json that are used here."""

    steps: int
    is_baseline: bool
    phases: Annotated[tuple[PhaseSummary, ...], Meta(min_length=1)]
    baseline: BaselineSummary


Count = Annotated[int, Meta(ge=0)]
Real = Annotated[float, Meta(ge=-1e30, le=1e30)]


@dataclass(frozen=True)
class Row:
    """The columns of metrics.jsonl that are used here.

    None means a value that is not finite, or, for mfu and peak_memory, an unknown one. UNSET means
    a value that was not measured at this step.
    """

    step: Count
    tokens: Count
    paper_cost: Count
    flops: Count
    seconds: Real
    loss: Real | None | UnsetType = UNSET
    tokens_per_second: Annotated[float, Meta(gt=0, le=1e30)] | UnsetType = UNSET
    mfu: Real | None | UnsetType = UNSET
    peak_memory: Real | None | UnsetType = UNSET
    val_loss: Real | None | UnsetType = UNSET
    hellaswag_acc: Real | None | UnsetType = UNSET
    hellaswag_acc_stderr: Real | None | UnsetType = UNSET
    hellaswag_acc_norm: Real | None | UnsetType = UNSET
    hellaswag_acc_norm_stderr: Real | None | UnsetType = UNSET


@dataclass
class Run:
    """The contents of a run folder.

    Attributes:
        columns: the columns of metrics.jsonl by name. Missing values are NaN. Losses and accuracies
            that are not finite are infinite here, so that a diverged run is not taken for one that
            ended earlier.
        relative_cost: the cumulative cost at every row by metric, as a fraction of the baseline's
            total.
        step_seconds: step times of the phases that were measured apart from the run, by name.
    """

    name: str
    folder: Path
    config: RunConfig
    schedule: ScheduleSummary
    columns: dict[str, np.ndarray]
    relative_cost: dict[str, np.ndarray]
    color: str = "#000000"
    step_seconds: dict[str, float] = field(default_factory=dict)

    def x(self, axis: str) -> np.ndarray:
        """Return the x coordinate of every row, for an axis of plot.py's `--x`."""
        if axis == "hours":
            return self.columns["seconds"] / 3600
        if axis == "steps":
            return self.columns["step"]
        return self.columns["tokens"] if axis == "tokens" else self.relative_cost[axis]

    def measured(self, column: str) -> np.ndarray:
        """Return whether each row has a value in `column`."""
        return ~np.isnan(self.columns[column])

    def curve(self, column: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y for the rows with a value in `column`, which may be none."""
        rows = self.measured(column)
        return self.x(axis)[rows], self.columns[column][rows]

    def last(self, column: str) -> float | None:
        """Return the last value in `column`, or None if it has no values."""
        _, y = self.curve(column, "steps")
        return float(y[-1]) if len(y) else None

    def compute_matched_point(
        self, column: str, axis: str, metric: str
    ) -> tuple[float, float] | None:
        """Return the interpolated point of a curve at which the run is compute-matched.

        Return None if the run never costs as much as its baseline.
        """
        x, y = self.curve(column, axis)
        cost = self.relative_cost[metric][self.measured(column)]
        # The end of a compute-matched schedule is rounded, so it may be half a step too early.
        half_step = 0.5 * self.schedule.phases[-1].tokens_per_step / self.schedule.baseline.tokens
        if not len(y) or not cost[-1] >= 1 - half_step:
            return None
        # NaN between a finite and an infinite value.
        value = float(np.interp(1, cost, y))
        return float(np.interp(1, cost, x)), math.inf if math.isnan(value) else value

    @property
    def is_baseline(self) -> bool:
        return self.schedule.is_baseline

    def stage_starts(self) -> list[int]:
        """Return the steps at which a stage or continual training begins, without step 0."""
        if self.is_baseline:
            return []
        # Ramps split phases, so consecutive phases may belong to the same stage.
        parts = [(p.stage, p.kind == "continual") for p in self.schedule.phases]
        phases = zip(parts, parts[1:], self.schedule.phases[1:])
        return [p.start for former, part, p in phases if part != former]

    @property
    def task(self) -> str:
        """The task in figure 2: "HellaSwag", or "HellaSwag-style" for the corpus's own task."""
        own = str(Path(self.config.data_dir) / "hellaswag.jsonl")
        return "HellaSwag-style" if self.config.hellaswag_file == own else "HellaSwag"


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        NoRows: if metrics.jsonl is empty.
        UserError: if files are missing or corrupted.
    """
    config, schedule = read_config(folder), _read(folder / "schedule.json", ScheduleSummary)
    path = folder / "metrics.jsonl"
    rows, names = [], [field.name for field in dataclasses.fields(Row)]
    for number, parsed in enumerate(read_metrics(path), start=1):
        try:
            row = convert(parsed, Row)
            rows.append([_number(name, getattr(row, name)) for name in names])
        except (ValueError, OverflowError) as error:
            raise _corrupted(f"{path}, line {number}", error) from None
    if not rows:
        raise NoRows(f"{path}: is empty: wait until the run logs a row, or train it again")
    columns = dict(zip(names, np.array(rows).T))
    cost: dict[str, np.ndarray] = {
        m: columns[m] / getattr(schedule.baseline, m) for m in COST_METRICS
    }
    return Run(folder.resolve().name, folder, config, schedule, columns, cost)


class NoRows(UserError):
    """A run that has not logged a row yet."""


def _number(column, value):
    if value is None:
        return math.nan if column in ("mfu", "peak_memory") else math.inf
    return math.nan if value is UNSET else float(value)


def read_config(folder: Path) -> RunConfig:
    """Return config.json of a run folder.

    Raises:
        UserError: if it is missing or corrupted.
    """
    path = folder / "config.json"
    raw = _read(path, dict)
    if isinstance(raw.get("freezing"), bool):  # until version 0.2
        raw["freezing"] = "all_but_new" if raw["freezing"] else "none"
    try:
        return convert(raw, RunConfig)
    except ValueError as error:
        raise _corrupted(path, error) from None


def _read(path: Path, schema: type[T]) -> T:
    with file_errors(path, "specify a run folder that train.py wrote and that is readable"):
        text = read_bytes(path)
    try:
        return decode_json(text, schema)
    except ValueError as error:
        raise _corrupted(path, error) from None


def _corrupted(where, error):
    return UserError(
        f"{where}: is corrupted, or was written by another version of train.py ({error}): restore "
        "the file, or train the run again in another folder"
    )


def in_phase(run: Run, phase: PhaseSummary, column: str) -> np.ndarray:
    """Return the values of a column in a phase, ordered by step."""
    steps, values = run.curve(column, "steps")
    return values[(steps > phase.start) & (steps <= phase.stop)]


def speed(run: Run, phase: PhaseSummary) -> float:
    """Return the median of the tokens per second in a phase.

    The first row is excluded, because it may include compilation. If there are no other rows, the
    result is NaN; a smaller log_interval avoids this.
    """
    if phase.name in run.step_seconds:
        return phase.tokens_per_step / run.step_seconds[phase.name]
    rows = in_phase(run, phase, "tokens_per_second")[1:]
    return float(np.median(rows)) if len(rows) else math.nan
