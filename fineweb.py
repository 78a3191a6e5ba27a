"""Tokenize a corpus into shards for train.py.

    python fineweb.py                              FineWeb-Edu's 10B-token sample, with GPT-2's BPE
    python fineweb.py --source PATH --out DIR      local parquet, jsonl or txt, a file or a folder
    python fineweb.py --source stdlib --out DIR    the built-in corpus: Python's standard library

Every document starts with <|endoftext|>. The beginning of the corpus is the validation set: one
shard, but at most a tenth of all tokens. DIR contains the shards (see stagewise/data.py for the
format) and meta.json. The built-in corpus also has hellaswag.jsonl, a task in HellaSwag's format
that is created from the validation documents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import contextlib
import glob
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sysconfig
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import filelock
import numpy as np
import tiktoken
import tyro
from msgspec import Meta
from tqdm import tqdm

from stagewise.data import ShardEntry, encode, get_tokenizer, open_shard, write_shard
from stagewise.errors import UserError, file_errors, first_line, report_user_errors
from stagewise.fileio import (
    atomic_write,
    convert,
    decode_json,
    fsync,
    open_file,
    read_bytes,
    sha256,
)

FINEWEB = "HuggingFaceFW/fineweb-edu"
DOCUMENTS_AT_A_TIME = 64
# In DIR.partial. Identifies folders created by this script. Locked while the folder is written.
LOCK = ".fineweb.lock"
PROGRESS, SOURCE = "progress.json", ".source"  # in DIR.partial: see `Progress`, `load_files`
FORMATS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json"), "txt": (".txt",)}


@dataclass
class Args:
    """Tokenize a corpus into shards for train.py."""

    source: str = FINEWEB
    """The FineWeb-Edu dataset; "stdlib" for Python's standard library; or a local file or folder
    (parquet or jsonl with a `text` column, or txt; the last two may be .gz or .zst)."""
    out: Path | None = None
    """Folder to create. Default: data/NAME, named after the source.
    The folder appears only when the corpus is complete.
    Until then, OUT.partial keeps finished shards, and the same command continues."""
    subset: str = "sample-10BT"
    """Subset of FineWeb-Edu."""
    tokenizer: str | None = None
    """A tiktoken encoding, or "bytes". Default: gpt2, or bytes for the standard library."""
    shard_tokens: int = 100_000_000
    """Tokens per shard. The validation set is one shard, but at most a tenth of the corpus."""
    processes: int = os.cpu_count() or 1
    """Number of tokenizer processes."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a document that is null, not UTF-8, or not valid JSON: stop and name it, or skip it."""


# --------------------------------------------------------------------------------------------------
# sources


def stdlib_documents() -> list[tuple[str, str]]:
    """Return (name, text) for the modules of Python's standard library, in a fixed random order.

    Tests, installed packages and the generated tables in `encodings` are excluded.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "__pycache__",
    }
    paths = sorted(
        p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts)
    )
    random.Random(0).shuffle(paths)
    return [
        (str(p.relative_to(root)), text) for p in paths if (text := p.read_text("utf-8", "replace"))
    ]


class JsonLines:
    """The documents of JSON Lines files: the string `text` of every line that is not blank."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.offsets = [array("q") for _ in paths]  # of the lines in each file
        for path, offsets in zip(paths, self.offsets):
            with open_file(path) as f:
                position = 0
                for line in f:
                    if not line.isspace():
                        offsets.append(position)
                    position += len(line)
        self.first = np.cumsum([0, *map(len, self.offsets)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, start: int, stop: int) -> list[str]:
        """Return documents.

        Raises:
            ValueError: if one is invalid. The message names the file and the offset of the line.
        """
        texts = []
        for i in range(start, stop):
            number = int(np.searchsorted(self.first, i, side="right")) - 1
            offset = self.offsets[number][i - self.first[number]]
            with open(self.paths[number], "rb") as f:
                f.seek(offset)
                line = f.readline()
            if offset == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            try:
                texts.append(decode_json(line, _Line).text)
            except ValueError as error:
                where = f"{self.paths[number].name}, at byte {offset:,}"
                raise ValueError(f"{where}: {first_line(error)}") from None
        return texts


@dataclass
class _Line:
    """A line of a JSON Lines file. Other fields are ignored."""

    text: str


class TextFiles:
    """The documents of text files: every file is one."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> list[str]:
        """Return documents. Raise ValueError if one is not UTF-8."""
        texts = []
        for path in self.paths[start:stop]:
            try:
                texts.append(read_bytes(path).decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name}: {first_line(error)}") from None
        return texts


class Rows:
    """The documents of a Hugging Face dataset: the strings in its column `text`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> list[str]:
        """Return documents. Raise ValueError if one is null or not UTF-8."""
        texts = self.dataset[start:stop]["text"]
        if None in texts:
            raise ValueError("`text` is null")
        return texts


class Texts:
    """Documents in memory."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, start: int, stop: int) -> list[str]:
        return self.texts[start:stop]


Documents = JsonLines | TextFiles | Rows | Texts


def load_hub(subset: str) -> Rows:
    """Return a subset of FineWeb-Edu.

    Raises:
        UserError: if it cannot be loaded.
    """
    import datasets  # slow to import, and only needed here and for parquet

    try:
        loaded = datasets.load_dataset(FINEWEB, name=subset, split="train")
        return Rows(loaded.select_columns("text"))
    except Exception as error:  # raised by the Hub, its HTTP library or the disk
        raise UserError(
            f"{FINEWEB} ({subset}) could not be loaded ({first_line(error)}): check the "
            "connection and --subset, or use a local --source"
        ) from None


def source_files(source: str) -> tuple[str, list[Path]]:
    """Return the format of a local source, a key of FORMATS, and its files in order of their paths.

    Raises:
        UserError: if there are no files, files of several formats, or files of unknown formats.
    """
    path = Path(source)
    with file_errors(f"--source={source}", "use a readable file or folder"):
        files = sorted(_files_below(path)) if path.is_dir() else [path]
    # Hidden files, such as .gitattributes, and READMEs are not part of a dataset.
    ignored = ("readme", "license")
    files = [p for p in files if not p.name.startswith(".") and p.stem.lower() not in ignored]
    found: dict[str, list[Path]] = {}
    for file in files:
        name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
        suffix = Path(name).suffix
        known = next((key for key, suffixes in FORMATS.items() if suffix in suffixes), None)
        found.setdefault(known or f"*{file.suffix}", []).append(file)
    if len(found) != 1 or not found.keys() <= FORMATS.keys():
        kinds = ", ".join(f"{len(paths)} {key}" for key, paths in sorted(found.items()))
        raise UserError(
            f"--source={source}: found {kinds or 'no'} files: use files of one format, "
            ".parquet, .jsonl, .json (JSON Lines) or .txt; the last three may be compressed "
            "(.gz, .zst)"
        )
    return found.popitem()


def _files_below(folder):
    def stop(error):
        raise error

    for parent, _, names in os.walk(folder, onerror=stop):
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def load_files(kind: str, files: list[Path], folder: Path) -> Documents:
    """Return the documents of local files.

    Args:
        kind: a key of FORMATS.
        folder: for copies: datasets converts parquet, and compressed files are expanded. They are
            not kept, because a cache could return an earlier version of a file.

    Raises:
        UserError: if a file cannot be read, or does not have the format.
    """
    folder.mkdir()
    expanded = []
    for i, path in enumerate(files):
        with file_errors(path, "fix or replace the file, or move it out of the source"):
            if path.suffix.lower() in (".gz", ".zst"):
                import pyarrow  # a dependency of datasets

                expanded.append(folder / f"{i:08d}_{path.stem[:200]}")
                codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
                with open_file(path) as f, open(expanded[-1], "wb") as out:
                    shutil.copyfileobj(pyarrow.CompressedInputStream(f, codec), out, 2**20)
            else:
                expanded.append(path)
                with open_file(path) as f:
                    if kind == "jsonl" and f.read(1024).lstrip()[:1] == b"[":
                        raise ValueError("a JSON array, not JSON Lines (one object per line)")
    if kind == "jsonl":
        return JsonLines(expanded)
    if kind == "txt":
        return TextFiles(expanded)
    import datasets

    datasets.disable_progress_bars()
    try:
        # datasets treats names as patterns.
        names = [glob.escape(str(path.absolute())) for path in files]
        loaded = datasets.load_dataset(
            "parquet", data_files=names, split="train", cache_dir=str(folder)
        )
    except Exception as error:  # the readers raise many kinds of errors for corrupted files
        raise UserError(
            f"{files[0].parent}: cannot be read as parquet "
            f"({first_line(error.__cause__ or error)}): fix or replace the file, or move it out of "
            "the source"
        ) from None
    text = loaded.features.get("text")
    if getattr(text, "dtype", None) not in ("string", "large_string"):
        raise UserError(
            f"{files[0]}: needs a `text` column of strings; found "
            + ", ".join(f"{key}: {getattr(v, 'dtype', v)}" for key, v in loaded.features.items())
        )
    return Rows(loaded.select_columns("text"))


# --------------------------------------------------------------------------------------------------
# tokenizing


def tokenize_documents(
    documents: Documents, start: int, encoding: tiktoken.Encoding, processes: int, on_error: str
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (number of documents, how many were skipped, their tokens as uint16), in order.

    The worker processes read the documents, so only tokens are sent between processes. The number
    of pending results is bounded.

    Args:
        start: the first document.
        on_error: "skip" leaves out documents that are not valid text.

    Raises:
        UserError: if a document is not valid text, or a worker is killed.
    """
    # Fork, so that the workers share the tokenizer and the memory map of the documents.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        processes, fork, initializer=_init_worker, initargs=(documents, encoding, on_error)
    ) as pool:
        futures: deque[tuple[int, Future[tuple[int, np.ndarray]]]] = deque()
        try:
            for first in range(start, len(documents), DOCUMENTS_AT_A_TIME):
                stop = min(first + DOCUMENTS_AT_A_TIME, len(documents))
                futures.append((stop - first, pool.submit(_tokenize, first, stop)))
                if len(futures) > 4 * processes:
                    n, future = futures.popleft()
                    yield n, *future.result()
            for n, future in futures:
                yield n, *future.result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizer process was killed, possibly because of insufficient memory: use "
                "fewer --processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_shared: tuple  # in a worker process: documents, encoding, on_error


def _init_worker(*shared):
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    """Exit when the main process is killed. Otherwise this worker would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def read_documents(documents: Documents, start: int, stop: int, on_error: str) -> list[str]:
    """Return documents, without the invalid ones if on_error is "skip".

    Raises:
        UserError: if on_error is "stop" and a document is invalid.
    """
    with contextlib.suppress(ValueError):
        return documents.read(start, stop)
    texts = []
    for i in range(start, stop):  # find out which is invalid
        try:
            texts += documents.read(i, i + 1)
        except ValueError as error:
            if on_error == "stop":
                raise UserError(
                    f"document {i:,} is not valid text ({first_line(error)}): fix it, or use "
                    "--on_error=skip"
                ) from None
    return texts


def _tokenize(start, stop):
    documents, encoding, on_error = _shared
    try:
        texts = read_documents(documents, start, stop, on_error)
    except OSError as error:
        raise UserError(
            f"{error.filename or 'the source'}: can no longer be read ({first_line(error)}): "
            "restore the file, then repeat the command"
        ) from None
    parts, end_of_text = [], np.array([encoding.eot_token])
    for text in texts:
        parts += [end_of_text, encode(encoding, text)]
    skipped = stop - start - len(texts)
    if not parts:
        return skipped, np.empty(0, np.uint16)
    return skipped, np.concatenate(parts, dtype=np.uint16, casting="unsafe")


# --------------------------------------------------------------------------------------------------
# writing


Count = Annotated[int, Meta(ge=0, lt=2**53)]


class CannotContinue(UserError):
    """OUT.partial belongs to another command, or its files were changed."""


@dataclass
class Progress:
    """How far a corpus has been written. Saved in OUT.partial after every shard."""

    identity: str  # of the source and the options that determine the tokens
    shards: list[dict[str, Any]]  # as in meta.json
    document: Count = 0  # the first document whose tokens are not all in these shards
    offset: Count = 0  # number of tokens of the documents from there on that are in these shards
    tokens: Count = 0  # in all shards
    skipped: Count = 0  # documents before `document` that were skipped


class ShardWriter:
    """Splits a stream of tokens into shards of `shard_tokens` and writes them in a thread.

    The first shard is the validation set. If it has more than a tenth of all tokens, `finish`
    shortens it and writes the rest as the last training shard.

    Args:
        progress: the state from which to continue. It is updated, and saved after every shard.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, progress: Progress):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.progress, self.shards = progress, list(progress.shards)
        self._document, self._skipped = progress.document, progress.skipped
        self._written = progress.offset  # number of the next tokens that are already in shards
        self._buffer, self._used = np.empty(shard_tokens, dtype=np.uint16), 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()

    def add(self, n_documents: int, skipped: int, tokens: np.ndarray) -> None:
        """Append the next tokens.

        Args:
            n_documents: number of documents from which they come.
            skipped: how many of those were skipped.
        """
        done, self._written = self._written, 0
        while done < len(tokens):
            part = tokens[done : done + self.shard_tokens - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            done += len(part)
            if self._used == self.shard_tokens:
                self._append(self._buffer, (self._document, done, self._skipped))
                self._buffer, self._used = np.empty_like(self._buffer), 0
        self._document += n_documents
        self._skipped += skipped

    def finish(self) -> list[dict[str, Any]]:
        """Write the remaining tokens, wait until all shards are written, and return them."""
        if self._used:
            self._append(self._buffer[: self._used])
        self._wait()
        n_val = sum(shard["tokens"] for shard in self.shards) // 10
        if self.shards and n_val < self.shards[0]["tokens"]:
            first = np.array(open_shard(self.folder / self.shards[0]["file"]))
            self._write(self.shards[0], first[:n_val])
            self._append(first[n_val:])
            self._wait()
        return self.shards

    def _append(self, tokens, position=None):
        split = "train" if self.shards else "val"
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
            p.document, p.offset, p.skipped = position
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


def _contents(partial):
    return [path for path in partial.iterdir() if path.name not in (LOCK, SOURCE)]


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Create and yield the folder OUT.partial, and rename it to `out` on success.

    OUT.partial is locked while it is in use. After an error, it is kept if it contains finished
    shards, else removed.

    Raises:
        UserError: if `out` exists; if OUT.partial is in use by another process, or was not created
            by this function; or if either cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    lock = _lock(partial, out)
    try:
        if os.path.lexists(out):
            raise UserError(f"--out={out} already exists: choose another folder, or rename it")
        yield partial
        shutil.rmtree(partial / SOURCE, ignore_errors=True)
        (partial / PROGRESS).unlink(missing_ok=True)
        for path in (*partial.iterdir(), partial):
            fsync(path)
        # The lock is released only after renaming, so no other process can lock OUT.partial first.
        partial.rename(out)
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
    lock = filelock.FileLock(partial / LOCK, timeout=0)
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
    except (OSError, NotImplementedError) as error:
        raise _cannot_be_written(out, error) from None
    return lock


def _cannot_be_written(out, error):
    return UserError(
        f"--out={out}: cannot be written ({first_line(error)}): free disk space, or choose another "
        "folder"
    )


# --------------------------------------------------------------------------------------------------
# task of the built-in corpus


def continuation_task(
    held_out: list[tuple[str, str]], others: str, n_examples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return up to `n_examples` examples in HellaSwag's format that ask how a line ends.

    The wrong endings are line endings from other documents. A context has 100 characters and stops
    before a space, which the evaluation adds before each ending. An ending has 8 to 32 characters.

    Args:
        held_out: (name, text) of the documents from which examples are created.
        others: the text of all other documents. Passages that occur in it are not used.
    """
    rng = random.Random(seed)
    passages = []  # (name, context, ending)
    for name, text in held_out:
        matches = [
            m for m in re.finditer(r"(?<=\S) (\S[^\n]{7,31})(?=\n)", text) if m.start() >= 100
        ]
        for m in rng.sample(matches, min(len(matches), 24)):
            if text[m.start() - 100 : m.end()] not in others:
                passages.append((name, text[m.start() - 100 : m.start()], m[1]))
    rng.shuffle(passages)
    examples = []
    for i, (name, context, ending) in enumerate(passages[:n_examples]):
        wrong = [other for document, _, other in passages if document != name]
        if len(wrong) < 3:
            break
        endings, label = rng.sample(wrong, 3), rng.randrange(4)
        endings.insert(label, ending)
        examples.append(
            {
                "ind": i,
                "activity_label": name,
                "ctx": context,
                "split": "val",
                "label": label,
                "endings": endings,
            }
        )
    return examples


def write_continuation_task(path: Path, documents: list[tuple[str, str]], val_tokens: int) -> None:
    """Write up to 1,000 examples from the documents that end within the first `val_tokens`.

    If these documents are too short for an example, no file is written.
    """
    ends = np.cumsum([1 + len(text.encode()) for _, text in documents])
    n = int(np.searchsorted(ends, val_tokens, side="right"))
    others = "\n".join(text for _, text in documents[n:])
    examples = continuation_task(documents[:n], others, 1000)
    if examples:
        atomic_write(path, "".join(json.dumps(e) + "\n" for e in examples))
    else:
        print("note: the validation set is too short for a HellaSwag-style task", file=sys.stderr)


def main(args: Args) -> None:
    stdlib, hub = args.source == "stdlib", args.source == FINEWEB
    name = "fineweb_edu" if hub else Path(args.source).name.split(".")[0] or "corpus"
    out = args.out or Path("data") / name
    if not out.name or out.name == "..":
        raise UserError(f"--out={out}: name a new folder")
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(
            f"--shard_tokens={args.shard_tokens} must be between 2 and 2**31 - 1, the maximum in a "
            "shard's header"
        )
    if not 1 <= args.processes <= 1024:
        raise UserError(f"--processes={args.processes} must be between 1 and 1,024")
    if not (hub or stdlib or Path(args.source).exists()):
        raise UserError(
            f"--source={args.source}: no such file or folder: use a path, {FINEWEB} or stdlib"
        )
    encoding = get_tokenizer(args.tokenizer or ("bytes" if stdlib else "gpt2"))
    kind, files = ("", []) if hub or stdlib else source_files(args.source)

    with atomic_folder(out) as folder:
        shutil.rmtree(folder / SOURCE, ignore_errors=True)
        named: list[tuple[str, str]] = []
        documents: Documents
        if hub:
            documents = load_hub(args.subset)
            version: Any = [args.subset, documents.dataset._fingerprint]
        elif stdlib:
            named = stdlib_documents()
            documents = Texts([text for _, text in named])
            version = sys.version
        else:
            documents = load_files(kind, files, folder / SOURCE)
            version = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        options = (args.source, name, encoding.name, args.shard_tokens, version)
        progress = load_progress(folder, hashlib.sha256(repr(options).encode()).hexdigest())
        first, total = progress.document, len(documents)
        with (
            ShardWriter(folder, name, args.shard_tokens, progress) as writer,
            tqdm(total=total, initial=first, unit="doc", desc=f"tokenizing {name}") as bar,
        ):
            n_tokens, skipped = progress.tokens - progress.offset, progress.skipped
            for part in tokenize_documents(
                documents, first, encoding, args.processes, args.on_error
            ):
                writer.add(*part)
                n_documents, n_skipped, tokens = part
                n_tokens, skipped = n_tokens + len(tokens), skipped + n_skipped
                bar.set_postfix(tokens=f"{n_tokens:,}", refresh=False)
                bar.update(n_documents)
            if n_tokens < 20:
                raise UserError(
                    f"--source={args.source}: only {n_tokens} tokens, not enough for a training "
                    "and a validation shard"
                )
            shards = writer.finish()
        meta = {
            "source": f"{args.source} {args.subset}" if hub else args.source,
            "tokenizer": encoding.name,
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "documents": total - skipped,
            "skipped_documents": skipped,
            "tokens": n_tokens,
            "shards": shards,
        }
        atomic_write(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
        n_val = shards[0]["tokens"]
        if stdlib:
            write_continuation_task(folder / "hellaswag.jsonl", named, val_tokens=n_val)
    print(
        f"{out}: {n_tokens - n_val:,} training and {n_val:,} validation tokens in "
        f"{len(shards)} shards, {total - skipped:,} documents"
        + (f", {skipped:,} skipped because they are not valid text" if skipped else "")
    )


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
