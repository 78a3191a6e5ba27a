"""Tokenize the documents of a source in several processes."""

import contextlib
import multiprocessing
import os
import pickle
import re
import secrets
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from stagewise import bpe
from stagewise.data import MAX_VOCAB, encode, get_tokenizer
from stagewise.errors import UserError, file_errors, first_line
from stagewise.sources import Documents, Source, document_order, prepare

DOCUMENTS_AT_A_TIME = 64
DOCUMENTS = "documents.pickle"  # in the folder of a prepared input
SAMPLE_BYTES = 100_000_000  # of text on which a tokenizer is trained


class Chunk(NamedTuple):
    """The tokens of consecutive documents of an input."""

    number: int  # of the input
    document: int  # the first one
    n_documents: int
    total: int  # number of documents of the input
    skipped: int  # how many of these documents were skipped
    tokens: np.ndarray  # uint16


KILLED = (
    "a tokenizer process was killed, possibly because of insufficient memory: use fewer --processes"
)


class Workers:
    """Processes that prepare inputs and tokenize their documents.

    While an input is tokenized, the next one is prepared. The number of pending results is bounded.

    Documents and tokens pass through files in `work`. A message between processes is shorter than
    PIPE_BUF, so the pipe transfers it as a whole: a process that is killed during a longer one
    leaves its receiver waiting for the rest forever.

    Args:
        work: folder for temporary files; it is created, and removed at the end.
        seed: shuffle the documents of every input. None: as stored.
        on_error: "skip" leaves out documents that are not valid text.
    """

    def __init__(
        self,
        source: Source,
        encoding: tiktoken.Encoding,
        work: Path,
        processes: int,
        on_error: str,
        seed: int | None,
    ):
        self.source, self.work, self.processes, self.seed = source, work, processes, seed
        # Fork, so that the workers share the tokenizer and the list of inputs.
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(
            processes, fork, initializer=_init_worker, initargs=(source, encoding, on_error)
        )
        self._prepared: dict[int, tuple[Path, Future[int]]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        if error[0]:  # do not wait for a download or a large file
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self, number: int) -> "tuple[Path, Future[int]]":
        """Start preparing an input, unless this has already been done.

        Returns:
            its folder, and the number of its documents
        """
        if number not in self._prepared:
            # A name that has not been used before, because processes keep files open.
            folder = self.work / f"{number:06d}_{secrets.token_hex(4)}"
            try:
                self._prepared[number] = folder, self._pool.submit(_prepare, number, folder)
            except BrokenProcessPool:
                raise UserError(KILLED) from None
        return self._prepared[number]

    def tokenize(self, numbers: list[int], document: int = 0) -> Iterator[Chunk]:
        """Yield the tokens of the inputs with these numbers, in order.

        Args:
            document: the first document of the first input.

        Raises:
            UserError: if a document is not valid text, or a worker is killed.
        """
        pending: deque[tuple[int, int, int, int, Path, Future[int]]] = deque()
        try:
            for number, following in zip(numbers, [*numbers[1:], None]):
                folder, prepared = self.prepare(number)
                # Before an error, the tokens of earlier inputs are not lost.
                while pending and (not prepared.done() or prepared.exception()):
                    yield self._next(pending)
                total = prepared.result()
                if following is not None:
                    self.prepare(following)
                if total == 0:
                    shutil.rmtree(self._prepared.pop(number)[0], ignore_errors=True)
                order = document_order(total, self.seed, number)
                for first in range(document, total, DOCUMENTS_AT_A_TIME):
                    indices = order[first : first + DOCUMENTS_AT_A_TIME]
                    file = folder / f"tokens_{first}"
                    future = self._pool.submit(_tokenize, folder, indices, file)
                    pending.append((number, first, len(indices), total, file, future))
                    if len(pending) > 4 * self.processes:
                        yield self._next(pending)
                document = 0
            while pending:
                yield self._next(pending)
        except BrokenProcessPool:
            raise UserError(KILLED) from None

    def _next(self, pending):
        number, document, n, total, file, future = pending.popleft()
        skipped = future.result()
        chunk = Chunk(number, document, n, total, skipped, np.fromfile(file, np.uint16))
        file.unlink()
        if chunk.document + chunk.n_documents == chunk.total:
            shutil.rmtree(self._prepared.pop(chunk.number)[0], ignore_errors=True)
        return chunk


_shared: tuple  # in a worker process: source, encoding, on_error


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


def read_documents(documents: Documents, indices: np.ndarray, on_error: str) -> list[str]:
    """Return documents, without the invalid ones if on_error is "skip".

    Raises:
        UserError: if on_error is "stop" and a document is invalid.
    """
    with contextlib.suppress(ValueError):
        return documents.read(indices)
    texts = []
    for i in indices:  # find out which is invalid
        try:
            texts += documents.read([i])
        except ValueError as error:
            if on_error == "stop":
                raise UserError(
                    f"document {i:,} is not valid text ({first_line(error)}): fix it, or use "
                    "--on_error=skip"
                ) from None
    return texts


def _prepare(number, folder):
    source, _, _ = _shared
    documents = prepare(source, number, folder)
    (folder / DOCUMENTS).write_bytes(pickle.dumps(documents))
    return len(documents)


@lru_cache(maxsize=1)
def _documents(folder):
    return pickle.loads((folder / DOCUMENTS).read_bytes())


def _tokenize(folder, indices, file):
    _, encoding, on_error = _shared
    try:
        texts = read_documents(_documents(folder), indices, on_error)
    except OSError as error:
        raise UserError(
            f"{error.filename or 'the source'}: can no longer be read ({first_line(error)}): "
            "restore the file, then repeat the command"
        ) from None
    parts, end_of_text = [], np.array([encoding.eot_token])
    for text in texts:
        parts += [end_of_text, encode(encoding, text)]
    tokens = np.empty(0, np.uint16)
    if parts:
        tokens = np.concatenate(parts, dtype=np.uint16, casting="unsafe")
    with file_errors(file, "free some space, then repeat the command"):
        tokens.tofile(file)
    return len(indices) - len(texts)


def choose_tokenizer(name: str) -> tiktoken.Encoding | int:
    """Return the tokenizer that --tokenizer selects, or the vocabulary size of one to train.

    Raises:
        UserError: if it is unknown or cannot be loaded.
    """
    if match := re.fullmatch(r"bpe:(\d{1,6})", name):
        if not bpe.SMALLEST < int(match[1]) <= MAX_VOCAB:
            raise UserError(
                f"--tokenizer={name}: the size must be between {bpe.SMALLEST + 1} and {MAX_VOCAB:,}"
            )
        return int(match[1])
    path = Path(name)
    if path.suffix == ".json" or (path / bpe.FILE).exists():
        return bpe.load_bpe(path if path.suffix == ".json" else path / bpe.FILE)
    return get_tokenizer(name)


def train_tokenizer(
    source: Source, size: int, seed: int | None, on_error: str, work: Path, path: Path
) -> None:
    """Train a tokenizer on the first SAMPLE_BYTES of the corpus, and write it to `path`."""

    def texts():
        n_bytes = 0
        for number in range(len(source.inputs)):
            folder = work / f"sample_{number:06d}_{secrets.token_hex(4)}"
            try:
                documents = prepare(source, number, folder)
                order = document_order(len(documents), seed, number)
                for i in range(0, len(order), DOCUMENTS_AT_A_TIME):
                    part = order[i : i + DOCUMENTS_AT_A_TIME]
                    for text in read_documents(documents, part, on_error):
                        if n_bytes >= SAMPLE_BYTES:
                            return
                        length = len(text.encode())
                        n_bytes += length
                        bar.update(length)
                        yield text
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    estimate = min(SAMPLE_BYTES, sum(entry.text_bytes for entry in source.inputs))
    with tqdm(total=estimate, unit="B", unit_scale=True, desc="sampling for a tokenizer") as bar:
        bpe.train_bpe(texts(), size, path)
