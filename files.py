"""Files that are whole whatever happens: small ones replaced at once, metrics.jsonl row by row."""

import contextlib
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


class Metrics:
    """RUN_DIR/metrics.jsonl, one JSON object a row. What cannot be written, on a full disk, is kept and tried again.

    Opening it at `step` drops the rows beyond, which the run will write again, and a last one that was torn.
    """

    def __init__(self, path: Path, step: int):
        rows = read_metrics(path) if path.exists() else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        self.path, self._pending = path, b""
        self._file = os.open(path, os.O_WRONLY)
        self._size = os.fstat(self._file).st_size  # of what is whole

    def write(self, row: dict) -> None:
        self._pending += json.dumps(row).encode() + b"\n"
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
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, but for a last one that was torn. Raises UserError where another line is no row."""
    rows = []
    lines = path.read_text("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is damaged, no row of metrics: mend or remove the line") from None
        rows.append(row)
    return rows
