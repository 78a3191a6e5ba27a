"""The folder of a run: its lock, config.json, and the files next to it."""

import dataclasses
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from stagewise import bpe
from stagewise.checkpoint import FOLDER, checkpoints
from stagewise.config import Config, absolute_paths
from stagewise.data import fingerprint
from stagewise.device import cpu_name, device_name, matmul_dtype
from stagewise.distributed import Ranks
from stagewise.errors import UserError, file_errors
from stagewise.fileio import FolderLock, atomic_write, decode_json, encode_json, read_bytes


def lock_out_dir(out_dir: Path, init_from: str) -> FolderLock:
    """Lock the run folder against other runs.

    Raises:
        UserError: if another run is using it, a new run would use an existing run's folder, or
            there is no checkpoint to resume from.
    """
    if init_from != "resume" or out_dir.exists():
        lock = FolderLock(out_dir)  # before any advice about the folder
    names = ("metrics.jsonl", FOLDER)
    used = next((out_dir / name for name in names if (out_dir / name).exists()), None)
    if init_from == "scratch" and used:
        hint = "resume it with --init_from=resume"
        if not checkpoints(out_dir):
            hint = "the run has no checkpoint yet; start it again with --init_from=auto"
        raise UserError(f"{used} exists: {hint}, or use another --out_dir")
    if init_from == "resume" and not checkpoints(out_dir):
        raise UserError(
            f"{out_dir}: no checkpoint to resume from: use --init_from=auto to start the run, or "
            "another --out_dir"
        )
    return lock


def write_json(out_dir: Path, name: str, value: dict) -> None:
    with file_errors(out_dir / name, "make out_dir writable, free disk space, or use another one"):
        out_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(out_dir / name, encode_json(value, indent=2) + "\n")


def copy_tokenizer(data_dir: str, out_dir: Path) -> None:
    """Copy the tokenizer that was trained on the corpus, if there is one, to the run folder."""
    path = Path(data_dir) / bpe.FILE
    if path.exists():
        with file_errors(path, "make it readable, and out_dir writable"):
            atomic_write(out_dir / bpe.FILE, read_bytes(path).decode())


def describe_run(
    config: Config,
    vocab_size: int,
    task: Path | None,
    meta: dict,
    train_tokens: int,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Any]:
    """Return the contents of config.json: options, derived values, hardware and environment.

    Paths are absolute, so that the record can be used from any directory.

    Args:
        vocab_size: of the model, with padding.
        task: the file in HellaSwag's format, if there is one.
        train_tokens: number of tokens of an epoch.
    """
    described = {
        "vocab_size": vocab_size,
        "hellaswag_file": os.path.abspath(task) if task else None,
        "corpus": fingerprint(meta),
        "train_tokens": train_tokens,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "matmul_dtype": matmul_dtype(device, config.dtype, config.n_embd),
    }
    options = dataclasses.asdict(config) | absolute_paths(config)
    start = describe_start(0, ranks, device)
    return options | described | {key: start[key] for key in start if key != "step"}


def describe_start(step: int, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return an entry of `starts` in config.json: one start of the run, at `step`."""
    return {
        "step": step,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["train.py", *sys.argv[1:]]),
        "world_size": ranks.world_size,
        "device_name": device_name(device),
        "torch_version": torch.__version__,
    }


def former_starts(out_dir: Path) -> list:
    """Return `starts` in config.json, or an empty list if there are none."""
    try:
        starts = decode_json((out_dir / "config.json").read_bytes(), dict).get("starts")
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []
