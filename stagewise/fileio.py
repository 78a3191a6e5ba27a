"""File I/O: atomic writes, checksums, run folder locks, and JSON with a schema."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import filelock
import msgspec

from stagewise.errors import UserError, file_errors

T = TypeVar("T")


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading. Pipes and devices, which may never end, raise OSError."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # folders raise a better error below
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return open(path, "rb")


def read_bytes(path: Path) -> bytes:
    with open_file(path) as f:
        return f.read()


def sha256(path: Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing in a `with` statement; it replaces `path` at the end.

    Readers see either the old or the new file. If writing fails, the old one remains. A symbolic
    link at `path` is replaced, not followed.
    """
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as f:  # x: an existing file or link is not written to
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    data = text.encode()
    with atomic_file(path) as f:
        f.write(data)


class FolderLock:
    """Locks a folder against other runs until the object is deleted or the process exits.

    Raises:
        UserError: if another run holds the lock, or the folder cannot be written to or locked.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Without flock, a marker file would block the run forever after a kill on another machine.
        self._lock = filelock.FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
        hint = "choose another --out_dir, on a file system with locks, or make it writable"
        with file_errors(folder, hint):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise UserError(
                    f"{folder}: another run is using it: wait for that run, or use another "
                    "--out_dir"
                ) from None
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """Check that the folder is still in its place.

        Raises:
            UserError: if it has been renamed or deleted.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.folder), os.fstat(self._folder)):
                return
        now = os.readlink(f"/proc/self/fd/{self._folder}")
        if now.endswith(" (deleted)"):
            raise UserError(f"{self.folder}: was deleted while the run was writing to it")
        raise UserError(
            f"{self.folder}: was renamed to {now} while the run was writing to it: resume there "
            f"with --out_dir={now} --init_from=resume"
        )

    def __del__(self):
        if hasattr(self, "_folder"):
            os.close(self._folder)
        self._lock.release()


def encode_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON.

    In a string with bytes that are not UTF-8, such as a path, they become U+FFFD; where Python took
    UTF-8 for another encoding, because of the locale, the text is restored.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def decode_json(text: str | bytes, schema: type[T]) -> T:
    """Parse JSON as the type `schema`, for example a dataclass.

    Raises:
        ValueError: if the text does not match; the message names the field.
    """
    try:
        return msgspec.json.decode(text, type=schema)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(_field_first(error)) from None


def convert(value: Any, schema: Any) -> Any:
    """Convert parsed JSON or TOML to the type `schema`.

    Raises:
        ValueError: if the value does not match; the message names the field.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.MsgspecError as error:
        raise ValueError(_field_first(error)) from None


def _field_first(error: Exception) -> str:
    """Rewrite msgspec's "Expected `int` - at `$.step`" as "step: expected `int`"."""
    match = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", str(error), re.DOTALL)
    if not match:
        return str(error)
    said = match[1][0].lower() + match[1][1:]
    return f"{match[2]}: {said}" if match[2] else said
