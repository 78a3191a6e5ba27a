"""Files: atomic writes, checksums, the lock of a run folder, JSON with a schema."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec

from stagewise.errors import UserError

T = TypeVar("T")


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


def atomic_write(path: Path, text: str) -> None:
    """Write a small file so that a reader finds either the old text or all of the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    fsync(partial)
    partial.replace(path)


def lock_folder(folder: Path) -> filelock.FileLock:
    """Keep other runs out of a folder while the result is held or this process lives.

    Raises:
        UserError: if another run holds the lock, or the folder cannot be written.
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another run writes there: wait for it, or name another --out_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{folder}: cannot be written, or not locked ({getattr(error, 'strerror', error)}): "
            "name another --out_dir"
        ) from None
    return lock


def decode_json(text: str | bytes, schema: type[T]) -> T:
    """Parse JSON that must be of the type `schema`, a dataclass for example.

    Raises:
        ValueError: if it is not; the message names the field.
    """
    try:
        return msgspec.json.decode(text, type=schema)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(_field_first(error)) from None


def convert(value: Any, schema: Any) -> Any:
    """Return parsed JSON or TOML as the type `schema`.

    Raises:
        ValueError: if it is not of that type; the message names the field.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.MsgspecError as error:
        raise ValueError(_field_first(error)) from None


def _field_first(error: Exception) -> str:
    """msgspec's "Expected `int` - at `$.step`" as "step: expected `int`"."""
    match = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", str(error), re.DOTALL)
    if not match:
        return str(error)
    said = match[1][0].lower() + match[1][1:]
    return f"{match[2]}: {said}" if match[2] else said
