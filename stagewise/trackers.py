"""Experiment trackers: Weights & Biases and TensorBoard, which show the rows of metrics.jsonl."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stagewise.config import Config
from stagewise.errors import UserError, first_line
from stagewise.fileio import atomic_write, decode_json
from stagewise.metrics import read_metrics

FINISH_SECONDS = 20  # that wandb may take to upload the last rows
ADVICE = {
    "wandb": "the missing rows are sent when the same command is run again",
    "tensorboard": "to write all rows again at the next start, remove the folder tensorboard",
}


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Raise UserError if the package of a requested tracker is not installed."""
    for package, requested in (("wandb", config.wandb), ("tensorboard", config.tensorboard)):
        spec = importlib.util.find_spec(package) if requested else None
        # A folder of that name in the current directory is found, but has no origin.
        if requested and (spec is None or spec.origin is None):
            raise UserError(
                f"{package} is not installed: pip install {package} (its tested version is in "
                f"requirements-extra.txt), or remove --{package}"
            )


class Trackers:
    """Passes rows of metrics.jsonl to the trackers that the options select.

    At the start, they receive the rows of metrics.jsonl that they do not have. A tracker that fails
    is reported and receives no more rows, and the run continues.

    Args:
        out_dir: a run folder with config.json and metrics.jsonl, which ends at the step at which
            the run starts or resumes.
    """

    def __init__(self, config: Config, out_dir: Path):
        self._trackers: dict[str, Tracker] = {}
        if not config.wandb and not config.tensorboard:
            return
        rows = read_metrics(out_dir / "metrics.jsonl")
        if config.wandb:
            self._attempt("wandb", lambda: self._add("wandb", Wandb(config.wandb, out_dir), rows))
        if config.tensorboard:
            self._attempt(
                "tensorboard", lambda: self._add("tensorboard", TensorBoard(out_dir, rows), rows)
            )

    def log(self, row: dict[str, Any]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda: tracker.log(row))  # noqa: B023

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)

    def _add(self, name, tracker, rows):
        self._trackers[name] = tracker
        for row in rows:
            tracker.log(row)

    def _attempt(self, name: str, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # of a library: a connection, a disk, its own bugs
            self._trackers.pop(name, None)
            tqdm.write(
                f"warning: {name} failed and is no longer used ({first_line(error)}); the run "
                f"continues, and metrics.jsonl is complete; {ADVICE[name]}",
                file=sys.stderr,
            )


class Wandb:
    """A run of Weights & Biases, named after the run folder, which keeps its id and its files.

    wandb reads WANDB_MODE, WANDB_ENTITY, WANDB_RUN_GROUP and other variables of the environment. A
    resumed run continues on the server, which has the rows below `starting_step`. In offline mode,
    every start writes a complete run with the same id, which replaces an earlier one when uploaded.
    """

    def __init__(self, project: str, out_dir: Path):
        import wandb

        folder = out_dir / "wandb"
        folder.mkdir(exist_ok=True)  # otherwise wandb may use another one
        id_file = folder / "run_id"
        if not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4))
        offline = wandb.setup().settings.mode == "offline"
        self._run = wandb.init(
            project=project,
            id=id_file.read_text(),
            resume=None if offline else "allow",
            name=os.environ.get("WANDB_NAME", out_dir.resolve().name),
            dir=out_dir,
            config=decode_json((out_dir / "config.json").read_bytes(), dict),
            allow_val_change=True,
            # The streams belong to stagewise.console.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self._run.starting_step:
            self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the folder `tensorboard` of a run folder.

    TensorBoard does not show what earlier starts of the run wrote after the last of `rows`.
    """

    def __init__(self, out_dir: Path, rows: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        folder = out_dir / "tensorboard"
        last = rows[-1]["step"] if rows else -1
        self._first = last + 1 if any(folder.glob("events.*")) else 0
        self._writer = SummaryWriter(folder, purge_step=self._first)

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] < self._first:
            return
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # a run that is killed resumes after rows that must not be lost

    def close(self) -> None:
        self._writer.close()


def _numbers(row):
    """Return the columns with numbers. A value that is not finite or not known is None in a row."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float))}
