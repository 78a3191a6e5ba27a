"""Tokenize a corpus into shards for train.py.

    python fineweb.py                              FineWeb-Edu's 10B-token sample, with GPT-2's BPE
    python fineweb.py --source PATH --out DIR      local parquet, jsonl or txt, a file or a folder
    python fineweb.py --source stdlib --out DIR    the built-in corpus: Python's standard library

Every document starts with <|endoftext|>. The beginning of the corpus is the validation set: one
shard, but at most a tenth of all tokens. DIR contains the shards (see stagewise/data.py for the
format) and meta.json. The built-in corpus also has hellaswag.jsonl, a task in HellaSwag's format
that is created from the validation documents.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from stagewise.data import get_tokenizer, open_shard, write_shard
from stagewise.errors import UserError, first_line, report_user_errors
from stagewise.fileio import fsync, sha256

FINEWEB = "HuggingFaceFW/fineweb-edu"
DOCUMENTS_AT_A_TIME = 64
# In DIR.partial. Identifies folders created by this script. Locked while the folder is written.
LOCK = ".fineweb.lock"


@dataclass
class Args:
    """Tokenize a corpus into shards for train.py."""

    source: str = FINEWEB
    """The FineWeb-Edu dataset; "stdlib" for Python's standard library; or a local file or folder
    (parquet or jsonl with a `text` column, or txt)."""
    out: Path | None = None
    """Folder to create. Default: data/NAME, named after the source.
    The folder appears only when the corpus is complete.
    An interrupted run cannot be resumed: start it again."""
    subset: str = "sample-10BT"
    """Subset of FineWeb-Edu."""
    tokenizer: str | None = None
    """A tiktoken encoding, or "bytes". Default: gpt2, or bytes for the standard library."""
    shard_tokens: int = 100_000_000
    """Tokens per shard. The validation set is one shard, but at most a tenth of the corpus."""
    processes: int = os.cpu_count() or 1
    """Number of tokenizer processes."""


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


def load_source(source: str, subset: str):
    """Return a Hugging Face dataset with a `text` column, from the Hub or from local files.

    Raises:
        UserError: if the files cannot be read, have different or unknown formats, or do not have
            the column.
    """
    import datasets  # slow to import, and not needed for the built-in corpus

    if source == FINEWEB:
        try:
            return datasets.load_dataset(FINEWEB, name=subset, split="train").select_columns("text")
        except Exception as error:  # raised by the Hub, its HTTP library or the disk
            raise UserError(
                f"{FINEWEB} ({subset}) could not be loaded ({first_line(error)}): check the "
                "connection and --subset, or use a local --source"
            ) from None
    datasets.disable_progress_bars()
    path = Path(source)
    builders = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
    files = sorted(p for p in path.rglob("*") if p.suffix in builders) if path.is_dir() else [path]
    suffixes = {p.suffix for p in files}
    if len(suffixes) != 1 or not suffixes <= builders.keys():
        raise UserError(
            f"--source={source}: found {', '.join(sorted(suffixes)) or 'no'} files: use files of "
            f"one format out of {', '.join(builders)}"
        )
    builder = builders[suffixes.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        loaded = datasets.load_dataset(
            builder, data_files=[str(p) for p in files], split="train", **options
        )
    except Exception as error:  # the readers raise many kinds of errors for corrupted files
        raise UserError(
            f"--source={source}: cannot be read as {builder} "
            f"({first_line(error.__cause__ or error)}): fix or remove the corrupted file"
        ) from None
    text = loaded.features.get("text")
    if getattr(text, "dtype", None) not in ("string", "large_string"):
        raise UserError(
            f"--source={source}: needs a `text` column of strings; found {loaded.column_names}"
        )
    return loaded.select_columns("text")


# --------------------------------------------------------------------------------------------------
# tokenizing


def tokenize_documents(
    read: Callable[[int, int], list[str]], total: int, encoding: tiktoken.Encoding, processes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of documents, their tokens as uint16), in document order.

    The worker processes read the documents, so only tokens are sent between processes. The number
    of pending results is bounded.

    Args:
        read: a function of (start, stop) that returns the documents in this range. It runs in the
            workers.
        total: number of documents.

    Raises:
        UserError: if a document is not valid text, or a worker is killed.
    """
    # Fork, so that the workers share the tokenizer and the memory map of the documents.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        processes, fork, initializer=_init_worker, initargs=(read, encoding)
    ) as pool:
        futures: deque[tuple[int, Future[np.ndarray]]] = deque()
        try:
            for start in range(0, total, DOCUMENTS_AT_A_TIME):
                stop = min(start + DOCUMENTS_AT_A_TIME, total)
                futures.append((stop - start, pool.submit(_tokenize, start, stop)))
                if len(futures) > 4 * processes:
                    n, future = futures.popleft()
                    yield n, future.result()
            for n, future in futures:
                yield n, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizer process was killed, possibly because of insufficient memory: use "
                "fewer --processes"
            ) from None


_shared: tuple  # in a worker process: read, encoding


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


def _tokenize(start, stop):
    read, encoding = _shared
    try:
        texts = read(start, stop)
    except UnicodeDecodeError as error:
        raise UserError(
            f"one of the documents {start:,} to {stop - 1:,} is not UTF-8 ({error}): convert the "
            "source"
        ) from None
    if None in texts:
        raise UserError(
            f"document {start + texts.index(None):,}: `text` is null: remove it from the source"
        )
    parts, end_of_text = [], np.array([encoding.eot_token])
    for text in texts:
        parts += [end_of_text, encoding.encode_to_numpy(text, disallowed_special=())]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


# --------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Splits a stream of tokens into shards of `shard_tokens` and writes them in a thread.

    The first shard is the validation set. If it has more than a tenth of all tokens, `finish`
    shortens it and writes the rest as the last training shard.

    Attributes:
        shards: the entries of meta.json. Complete after `finish`.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._buffer, self._used = np.empty(shard_tokens, dtype=np.uint16), 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            part = tokens[: self.shard_tokens - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            tokens = tokens[len(part) :]
            if self._used == self.shard_tokens:
                self._append(self._buffer)
                self._buffer, self._used = np.empty_like(self._buffer), 0

    def finish(self) -> None:
        """Write the remaining tokens and wait until all shards are written."""
        if self._used:
            self._append(self._buffer[: self._used])
        self._wait()
        n_val = sum(shard["tokens"] for shard in self.shards) // 10
        if self.shards and n_val < self.shards[0]["tokens"]:
            first = np.array(open_shard(self.folder / self.shards[0]["file"]))
            self._write(self.shards[0], first[:n_val])
            self._append(first[n_val:])
            self._wait()

    def _append(self, tokens):
        split = "train" if self.shards else "val"
        file = f"{self.name}_{split}_{len(self.shards):06d}.bin"
        self.shards.append({"file": file, "split": split})
        self._write(self.shards[-1], tokens)

    def _write(self, shard, tokens):
        self._wait()
        self._writing = self._thread.submit(self._write_now, shard, tokens)

    def _wait(self):
        if self._writing:
            self._writing.result()

    def _write_now(self, shard, tokens):
        path = self.folder / shard["file"]
        write_shard(path, tokens)
        shard |= {"tokens": len(tokens), "sha256": sha256(path)}


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Create and yield the folder OUT.partial. Rename it to `out` on success, else remove it.

    OUT.partial is locked while it is in use. Files left in it by a killed process are removed.

    Raises:
        UserError: if `out` exists; if OUT.partial is in use by another process, or was not created
            by this function; or if either cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    lock = _lock(partial, out)
    try:
        if out.exists():
            raise UserError(f"--out={out} already exists: choose another folder, or remove it")
        left = [path for path in partial.iterdir() if path.name != LOCK]
        if left:
            print(f"{partial}: removing files left by an interrupted run", file=sys.stderr)
        for path in left:
            path.unlink()
        yield partial
        for path in (*partial.iterdir(), partial):
            fsync(path)
        # The lock is released only after renaming, so no other process can lock OUT.partial first.
        partial.rename(out)
        (out / LOCK).unlink()
    except BaseException as error:
        with contextlib.suppress(OSError):
            for path in partial.iterdir():
                path.unlink()
            partial.rmdir()
        if isinstance(error, OSError):
            raise _cannot_be_written(out, error) from None
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{out} was not written: start again", file=sys.stderr)
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
            f"{partial} exists, but was not created by fineweb.py: rename or remove it, or choose "
            "another --out"
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
    return UserError(f"--out={out}: cannot be written ({first_line(error)}): choose another folder")


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
    """Write up to 1,000 examples from the documents that end within the first `val_tokens`."""
    ends = np.cumsum([1 + len(text.encode()) for _, text in documents])
    n = int(np.searchsorted(ends, val_tokens, side="right"))
    others = "\n".join(text for _, text in documents[n:])
    examples = continuation_task(documents[:n], others, 1000)
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))


def main(args: Args) -> None:
    stdlib = args.source == "stdlib"
    name = (
        "fineweb_edu" if args.source == FINEWEB else "stdlib" if stdlib else Path(args.source).stem
    )
    out = args.out or Path("data") / name
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(
            f"--shard_tokens={args.shard_tokens} must be between 2 and 2**31 - 1, the maximum in a "
            "shard's header"
        )
    if args.processes < 1:
        raise UserError(f"--processes={args.processes} must be at least 1")
    if args.source not in (FINEWEB, "stdlib") and not Path(args.source).exists():
        raise UserError(
            f"--source={args.source}: no such file or folder: use a path, {FINEWEB} or stdlib"
        )
    encoding = get_tokenizer(args.tokenizer or ("bytes" if stdlib else "gpt2"))
    if encoding.n_vocab > 2**16:
        raise UserError(
            f"--tokenizer={args.tokenizer} has {encoding.n_vocab:,} tokens, but shards store ids "
            "below 65,536: choose another tokenizer"
        )

    with atomic_folder(out) as folder, ShardWriter(folder, name, args.shard_tokens) as writer:
        documents: Any = stdlib_documents() if stdlib else load_source(args.source, args.subset)
        total = len(documents)

        def read(start, stop):
            if stdlib:
                return [text for _, text in documents[start:stop]]
            return documents[start:stop]["text"]

        n_tokens = 0
        with tqdm(total=total, unit="doc", desc=f"tokenizing {name}") as bar:
            for n_documents, tokens in tokenize_documents(read, total, encoding, args.processes):
                writer.add(tokens)
                n_tokens += len(tokens)
                bar.set_postfix(tokens=f"{n_tokens:,}", refresh=False)
                bar.update(n_documents)
        if n_tokens < 20:
            raise UserError(
                f"--source={args.source}: only {n_tokens} tokens, not enough for a training and a "
                "validation shard"
            )
        writer.finish()
        meta = {
            "source": f"{args.source} {args.subset}" if args.source == FINEWEB else args.source,
            "tokenizer": encoding.name,
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "documents": total,
            "tokens": n_tokens,
            "shards": writer.shards,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        n_val = writer.shards[0]["tokens"]
        if stdlib:
            write_continuation_task(folder / "hellaswag.jsonl", documents, val_tokens=n_val)
    print(
        f"{out}: {n_tokens - n_val:,} training and {n_val:,} validation tokens in "
        f"{len(writer.shards)} shards, {total:,} documents"
    )


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
