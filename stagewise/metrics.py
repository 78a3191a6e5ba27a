"""metrics.jsonl: one JSON object per line, at most one per step."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stagewise.errors import UserError, file_errors, first_line
from stagewise.fileio import atomic_write, decode_json, open_file, read_bytes

TAIL = 16_384  # bytes; several times the length of a row


class MetricsWriter:
    """Appends rows to metrics.jsonl. Rows that cannot be written (full disk) are retried later.

    Args:
        step: the step at which the run resumes. Later rows, which the run will write again, and a
            truncated last row are removed. Prints a warning if there are no earlier rows. None
            starts a new file, and an existing one is renamed to metrics.jsonl.former.

    Raises:
        UserError: if the file is corrupted or cannot be written.
    """

    def __init__(self, path: Path, step: int | None):
        try:
            if step is None and path.exists():
                path.replace(path.with_name(path.name + ".former"))
            rows = read_metrics(path) if path.exists() else []
            kept = [row for row in rows if step is not None and row["step"] <= step]
            if step and not kept:
                print(
                    f"warning: {path}: has no rows before step {step}, at which the run resumes: "
                    "restore the file, or figures will begin there",
                    file=sys.stderr,
                )
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({first_line(error)}): make it writable, free disk "
                "space, or use another --out_dir"
            ) from None
        self.path, self._pending = path, b""
        self._size = os.fstat(self._file).st_size  # bytes of completely written rows

    def write(self, row: dict) -> None:
        self._pending += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self):
        if not self._pending:
            return
        try:
            self._reopen_if_lost()
            written = os.pwrite(self._file, self._pending, self._size)
            if written < len(self._pending):
                raise OSError("the disk is full")
        except OSError as error:
            tqdm.write(
                f"warning: {self.path}: cannot be written ({first_line(error)}); will retry at the "
                "next row",
                file=sys.stderr,
            )
        else:
            self._size += written
            self._pending = b""

    def _reopen_if_lost(self):
        """Continue in a new file if the file was deleted, and at its end if it was truncated."""
        state = os.fstat(self._file)
        if state.st_nlink == 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            new = os.open(self.path, flags, 0o666)
            os.close(self._file)
            self._file, self._size = new, 0
        elif state.st_size < self._size:
            self._size = state.st_size
        else:
            return
        tqdm.write(
            f"warning: {self.path}: rows were deleted by another process; the next rows are "
            "written, the deleted ones are lost",
            file=sys.stderr,
        )

    def sync(self) -> None:
        """Flush all rows to disk, so that no checkpoint is ahead of its metrics."""
        self._flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        self._flush()
        os.close(self._file)


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, without a truncated last row.

    Raises:
        UserError: if the file cannot be read, or an invalid line is followed by a valid row.
    """
    rows: list[dict] = []
    corrupted = None
    with file_errors(path, "specify a run folder that train.py wrote and that is readable"):
        lines = read_bytes(path).split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = decode_json(line, dict[str, Any])
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            corrupted = corrupted or number
            continue
        if corrupted:
            raise UserError(
                f"{path}, line {corrupted}: not a valid row of metrics: restore the file"
            )
        rows.append(row)
    return rows


def last_row(path: Path) -> dict | None:
    """Return the last complete row of a metrics.jsonl that another process may be writing.

    Reads only the end of the file. Returns None if there is no such row.
    """
    with contextlib.suppress(OSError, ValueError, IndexError), open_file(path) as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL))
        return decode_json(f.read().split(b"\n")[-2], dict[str, Any])
    return None
