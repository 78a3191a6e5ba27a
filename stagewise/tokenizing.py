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
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from stagewise import bpe
from stagewise.data import MAX_VOCAB, encode, get_tokenizer
from stagewise.errors import UserError, first_line
from stagewise.sources import Documents, Source, document_order, prepare

DOCUMENTS_AT_A_TIME = 64
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
        self._prepared: dict[int, _Call] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        if error[0]:  # do not wait for a download or a large file
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self, number: int) -> "_Call":
        """Start preparing an input, unless this has already been done."""
        if number not in self._prepared:
            # A name that has not been used before, because processes keep files open.
            folder = self.work / f"{number:06d}_{secrets.token_hex(4)}"
            file = folder / "prepared"
            folder.mkdir(parents=True)
            try:
                self._prepared[number] = _Call(self._pool, file, _prepare, number, folder / "files")
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
        pending: deque[tuple[int, int, int, int, _Call]] = deque()
        try:
            for number, following in zip(numbers, [*numbers[1:], None]):
                prepared = self.prepare(number)
                # Before an error, the tokens of earlier inputs are not lost.
                while pending and (not prepared.future.done() or prepared.failed()):
                    yield self._next(pending)
                _, total = prepared.result()
                if following is not None:
                    self.prepare(following)
                if total == 0:
                    self._remove(number)
                order = document_order(total, self.seed, number)
                for first in range(document, total, DOCUMENTS_AT_A_TIME):
                    indices = order[first : first + DOCUMENTS_AT_A_TIME]
                    file = prepared.file.with_name(f"tokens_{first}")
                    call = _Call(self._pool, file, _tokenize, prepared.file, indices)
                    pending.append((number, first, len(indices), total, call))
                    if len(pending) > 4 * self.processes:
                        yield self._next(pending)
                document = 0
            while pending:
                yield self._next(pending)
        except BrokenProcessPool:
            raise UserError(KILLED) from None

    def _next(self, pending):
        number, document, n, total, call = pending.popleft()
        chunk = Chunk(number, document, n, total, *call.result())
        call.file.unlink()
        if document + n == total:
            self._remove(number)
        return chunk

    def _remove(self, number):
        shutil.rmtree(self._prepared.pop(number).file.parent, ignore_errors=True)


class _Call:
    """A function call in a worker.

    What it returns or raises is passed in a file, so that every message between processes fits into
    PIPE_BUF and is written to the pipe at once. If a worker were killed in the middle of a longer
    message, the main process would wait for the rest forever.
    """

    def __init__(self, pool, file, function, *args):
        self.file, self.future = file, pool.submit(_call, file, function, args)

    def failed(self):
        return self.future.exception() or _read(self.file)[1]

    def result(self):
        self.future.result()
        result, error = _read(self.file)
        if error:
            raise error
        return result


def _call(file, function, args):
    result, error = None, None
    try:
        result = function(*args)
    except Exception as e:
        error = e
        if not isinstance(e, UserError):
            e.add_note(f"In a worker process:\n{traceback.format_exc()}")
    file.write_bytes(pickle.dumps((result, error)))


def _read(file):
    return pickle.loads(file.read_bytes())


_shared: tuple  # in a worker process: source, encoding, on_error


def _init_worker(*shared):
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a handler of the main process
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
    """Return the documents of an input, and their number."""
    source, _, _ = _shared
    documents = prepare(source, number, folder)
    return documents, len(documents)


@lru_cache(maxsize=1)
def _documents(prepared):
    (documents, _), _ = _read(prepared)
    return documents


def _tokenize(prepared, indices):
    """Return how many of these documents were skipped, and the tokens of the others."""
    _, encoding, on_error = _shared
    documents = _documents(prepared)
    try:
        texts = read_documents(documents, indices, on_error)
    except OSError as error:
        raise UserError(
            f"{error.filename or 'the source'}: can no longer be read ({first_line(error)}): "
            "restore the file, then repeat the command"
        ) from None
    parts, end_of_text = [], np.array([encoding.eot_token])
    for text in texts:
        parts += [end_of_text, encode(encoding, text)]
    skipped = len(indices) - len(texts)
    if not parts:
        return skipped, np.empty(0, np.uint16)
    return skipped, np.concatenate(parts, dtype=np.uint16, casting="unsafe")


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
