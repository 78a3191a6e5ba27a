"""Write a corpus: shards, the state from which an interrupted run continues, an atomic folder."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
from msgspec import Meta

from stagewise.data import ShardEntry, open_shard, write_shard
from stagewise.errors import UserError, first_line
from stagewise.fileio import atomic_write, convert, decode_json, fsync, read_bytes, sha256
from stagewise.tokenizing import Chunk

# In OUT.partial. LOCK identifies folders created by this module; it is locked while the folder is
# written. SOURCE is for temporary files.
LOCK, PROGRESS, SOURCE = ".fineweb.lock", "progress.json", ".source"

Count = Annotated[int, Meta(ge=0, lt=2**53)]


class CannotContinue(UserError):
    """OUT.partial belongs to another command, or its files were changed."""


@dataclass
class Progress:
    """How far a corpus has been written. Saved in OUT.partial after every shard."""

    identity: str  # of the source and the options that determine the tokens
    shards: list[dict[str, Any]]  # as in meta.json
    number: Count = 0  # of the input at which to continue
    document: Count = 0  # its first document whose tokens are not all in these shards
    offset: Count = 0  # number of tokens of the documents from there on that are in these shards
    tokens: Count = 0  # in all shards
    documents: Count = 0  # number of documents before that one, over all inputs
    skipped: Count = 0  # how many of those were skipped
    revision: str = ""  # of a dataset on the Hub


class ShardWriter:
    """Splits a stream of tokens into shards of `shard_tokens` and writes them in a thread.

    The first shard is the validation set. If it has more than a tenth of all tokens, `finish`
    shortens it and writes the rest as the last training shard.

    Args:
        progress: the state from which to continue. It is updated, and saved after every shard.
        validation: False if all shards are for training.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shard_tokens: int,
        progress: Progress,
        validation: bool = True,
    ):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.progress, self.shards = progress, list(progress.shards)
        self.documents, self.skipped = progress.documents, progress.skipped
        self.tokens = progress.tokens - progress.offset
        self._validation = validation
        self._written = progress.offset  # number of the next tokens that are already in shards
        self._buffer, self._used = np.empty(shard_tokens, dtype=np.uint16), 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()

    def add(self, chunk: Chunk) -> None:
        """Append the next tokens."""
        tokens, position = chunk.tokens, (chunk.number, chunk.document)
        done = min(self._written, len(tokens))
        self._written -= done
        while done < len(tokens):
            part = tokens[done : done + self.shard_tokens - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            done += len(part)
            if self._used == self.shard_tokens:
                self._append(self._buffer, (*position, done, self.documents, self.skipped))
                self._buffer, self._used = np.empty_like(self._buffer), 0
        self.documents += chunk.n_documents
        self.skipped += chunk.skipped
        self.tokens += len(tokens)

    def finish(self) -> list[dict[str, Any]]:
        """Write the remaining tokens, wait until all shards are written, and return them."""
        if self._used:
            self._append(self._buffer[: self._used])
        self._wait()
        n_val = sum(shard["tokens"] for shard in self.shards) // 10
        if self._validation and self.shards and n_val < self.shards[0]["tokens"]:
            first = np.array(open_shard(self.folder / self.shards[0]["file"]))
            self._append(first[n_val:])  # first: if the disk is full, nothing has changed
            self._write(self.shards[0], first[:n_val])
            self._wait()
        return self.shards

    def _append(self, tokens, position=None):
        split = "val" if self._validation and not self.shards else "train"
        file = f"{self.name}_{split}_{len(self.shards):06d}.bin"
        self.shards.append({"file": file, "split": split})
        self._write(self.shards[-1], tokens, position)

    def _write(self, shard, tokens, position=None):
        self._wait()
        self._writing = self._thread.submit(self._write_now, shard, tokens, position)

    def _wait(self):
        if self._writing:
            self._writing.result()

    def _write_now(self, shard, tokens, position):
        path = self.folder / shard["file"]
        write_shard(path, tokens)
        shard |= {"tokens": len(tokens), "sha256": sha256(path)}
        if position:
            p = self.progress
            p.shards.append(dict(shard))
            p.number, p.document, p.offset, p.documents, p.skipped = position
            p.tokens += len(tokens)
            atomic_write(self.folder / PROGRESS, json.dumps(asdict(p)))


def load_progress(partial: Path, identity: str) -> Progress:
    """Return the state of an interrupted run in OUT.partial, or that of a new one.

    Files of an interrupted run that finished no shard are removed.

    Raises:
        UserError: if the shards come from another source or other options, or are incomplete.
    """
    if not (partial / PROGRESS).exists():
        for path in _contents(partial):
            path.unlink()
        return Progress(identity, [])
    try:
        progress = decode_json(read_bytes(partial / PROGRESS), Progress)
        entries = [convert(shard, ShardEntry) for shard in progress.shards]
        if progress.tokens != sum(entry.tokens for entry in entries) or not entries:
            raise ValueError("its numbers of tokens contradict each other")
        if progress.identity != identity:
            raise CannotContinue(
                f"{partial}: has {len(entries)} shards of an interrupted run with another source, "
                "another version of it, or other options: repeat the original command, or choose "
                "another --out"
            )
        _lengthen(partial, entries[0])
        for entry in entries:
            if sha256(partial / entry.file) != entry.sha256:
                raise ValueError(f"{entry.file} has changed")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise CannotContinue(
            f"{partial}/{PROGRESS}: the interrupted run cannot be continued "
            f"({first_line(error)}): choose another --out"
        ) from None
    for path in partial.glob(".*.partial"):  # left by a killed process
        path.unlink()
    print(f"{partial}: continuing after {len(entries)} shards", file=sys.stderr)
    return progress


def _lengthen(partial, first):
    """Undo what `ShardWriter.finish` did to the validation shard before the process was killed."""
    path, train = partial / first.file, sorted(partial.glob("*_train_*.bin"))
    if train and first.split == "val" and len(open_shard(path)) < first.tokens:
        tokens = np.concatenate([open_shard(path), open_shard(train[-1])])
        if len(tokens) == first.tokens:
            write_shard(path, tokens)


def former_revision(partial: Path) -> str | None:
    """Return the commit of the dataset that an interrupted run in OUT.partial read, if any."""
    with contextlib.suppress(OSError, ValueError):
        return decode_json(read_bytes(partial / PROGRESS), Progress).revision or None
    return None


def _contents(partial):
    return [path for path in partial.iterdir() if path.name not in (LOCK, SOURCE)]


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Create and yield the folder OUT.partial, and rename it to `out` on success.

    OUT.partial is locked while it is in use. After an error, it is kept if it contains finished
    shards, else removed.

    Raises:
        UserError: if `out` exists; if OUT.partial is in use by another process, or was not created
            by this function; or if either cannot be written.
    """
    partial = partial_folder(out)
    lock = _lock(partial, out)
    try:
        if os.path.lexists(out):
            raise UserError(f"--out={out} already exists: choose another folder, or rename it")
        yield partial
        shutil.rmtree(partial / SOURCE, ignore_errors=True)
        for path in (*partial.iterdir(), partial):
            fsync(path)
        # The lock is released only after renaming, so no other process can lock OUT.partial first.
        partial.rename(out)
        (out / PROGRESS).unlink(missing_ok=True)
        (out / LOCK).unlink()
    except BaseException as error:
        kept = f"{out} was not written: start again"
        with contextlib.suppress(OSError):
            shutil.rmtree(partial / SOURCE, ignore_errors=True)
            left = _contents(partial)
            if (partial / PROGRESS).exists():
                kept = f"finished shards are kept in {partial}: the same command continues"
            else:
                for path in (*left, partial / LOCK):
                    path.unlink(missing_ok=True)
                partial.rmdir()
        if isinstance(error, OSError):
            raise _cannot_be_written(out, error) from None
        stopped = not isinstance(error, UserError) or "kept" in kept
        if stopped and not isinstance(error, CannotContinue):
            print(f"\n{kept}", file=sys.stderr)
        raise
    finally:
        lock.release()


def _lock(partial: Path, out: Path) -> filelock.FileLock:
    lock = filelock.FileLock(partial / LOCK, timeout=0, fallback_to_soft=False)
    try:
        partial.mkdir(parents=True, exist_ok=(partial / LOCK).is_file())
        lock.acquire()
    except FileExistsError:
        raise UserError(
            f"{partial} exists, but was not created by fineweb.py: rename it, or choose another "
            "--out"
        ) from None
    except filelock.Timeout:
        raise UserError(
            f"--out={out}: another fineweb.py is writing it: wait until it ends, or choose another "
            "--out"
        ) from None
    except OSError as error:
        raise _cannot_be_written(out, error) from None
    return lock


def _cannot_be_written(out, error):
    return UserError(
        f"--out={out}: cannot be written ({first_line(error)}): free disk space, or choose another "
        "folder"
    )
