"""Files that are whole whatever happens: small ones replaced at once, metrics.jsonl row by row."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from errors import UserError, first_line


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Return when a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file: whoever reads it, whenever, finds the former text or all of the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    fsync(partial)
    partial.replace(path)


def lock_folder(folder: Path):
    """Keep other runs out of a folder while the result is held, or this process lives. Raises UserError where one is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run writes there: end it, or name another --out_dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written, or not locked ({error.strerror}): name another --out_dir") from None
    return lock


class Metrics:
    """RUN_DIR/metrics.jsonl, one JSON object a row. What cannot be written, on a full disk, is kept and tried again.

    Opening it at `step` drops the rows beyond, which the run will write again, and a torn end. step None begins anew: what stands
    there, of a run that left no checkpoint, becomes metrics.jsonl.former. Raises UserError where the file is damaged or
    cannot be written.
    """

    def __init__(self, path: Path, step: int | None):
        try:
            if step is None and path.exists():
                path.replace(path.with_name(path.name + ".former"))
            rows = read_metrics(path) if path.exists() else []
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
            self._file = os.open(path, os.O_WRONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}): make room, or name another --out_dir") from None
        self.path, self._pending = path, b""
        self._size = os.fstat(self._file).st_size  # of what is whole

    def write(self, row: dict) -> None:
        self._pending += json.dumps(row).encode() + b"\n"
        self._flush()

    def _flush(self):
        if not self._pending:
            return
        try:
            written = os.pwrite(self._file, self._pending, self._size)
            if written < len(self._pending):
                raise OSError("the disk is full")
        except OSError as error:
            tqdm.write(f"warning: {self.path}: cannot be written ({first_line(error)}); tried again at the next row", file=sys.stderr)
        else:
            self._size += written
            self._pending = b""

    def sync(self) -> None:
        """Return when all rows are on the disk: a checkpoint is never ahead of its metrics, if the disk lets it."""
        self._flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        self._flush()
        os.close(self._file)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, but for a torn end. Raises UserError where a line before a good one is no row."""
    rows, damaged = [], None
    lines = path.read_text("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            damaged = damaged or number
            continue
        if damaged:
            raise UserError(f"{path}, line {damaged}: is damaged, no row of metrics: mend or remove the line")
        rows.append(row)
    return rows
