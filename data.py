"""Token shards and tokenizers: what the corpus is, and which tokens step t reads.

A corpus is a folder of shards in llm.c's .bin format (256 int32 header: magic 20240520, version 1, token count; then uint16
tokens), with a meta.json beside them that names them. fineweb.py writes it; train.py reads it window by window.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from errors import UserError, first_line
from files import sha256

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
TOKENS_CHECKED_AT_START = 2**20  # of each shard: enough to see another tokenizer; the rest is checked as it is read


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer that meta.json and checkpoints name: "bytes" (256 byte tokens and <|endoftext|>) or one of tiktoken's.

    tiktoken downloads GPT-2's vocabulary once; TIKTOKEN_CACHE_DIR names a folder that already has it. Raises UserError
    where the name is unknown or the vocabulary cannot be had.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern only cuts the work into short pieces: without merges every byte is a token however it is cut.
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,16}", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise UserError(f"tokenizer {name!r} is unknown: {first_line(error)}") from None
    except OSError as error:  # every failure of requests is one
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): connect once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds its files"
        ) from None


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (uint16) as one .bin shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(np.ascontiguousarray(tokens, dtype="<u2"))


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (uint16). Raises UserError where the file is no whole shard."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise UserError(f"{path}: no token shard (llm.c's .bin begins with {MAGIC}): write shards with fineweb.py")
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, only version {VERSION} (uint16 tokens) can be read")
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path}: the header says {count:,} tokens, the file holds {(size - HEADER_BYTES) // 2:,}: "
            "it is truncated or damaged, copy or write it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)) if count else np.zeros(0, "<u2")


def load_meta(data_dir: str | Path) -> dict:
    """meta.json of a corpus. Raises UserError where it is missing, is no JSON, or lacks a field."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found: data_dir must hold a corpus, write one with fineweb.py --out {data_dir}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): write the corpus again with fineweb.py") from None
    for key, kind in (("tokenizer", str), ("vocab_size", int), ("shards", list)):
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise UserError(f"{path}: {key!r} must be there as {kind.__name__}: write the corpus again with fineweb.py")
    for shard in meta["shards"]:
        kinds = {"file": str, "split": str, "tokens": int}
        good = isinstance(shard, dict) and all(isinstance(shard.get(key), kind) for key, kind in kinds.items())
        if not good or "\0" in shard["file"]:
            raise UserError(f"{path}: every shard needs file, split and tokens (a number): write the corpus again with fineweb.py")
    return meta


def verify_shards(data_dir: str | Path, meta: dict) -> None:
    """Compare every shard's sha256 with the one in meta.json. Raises UserError naming the first that differs."""
    total = sum(2 * s["tokens"] for s in meta["shards"])
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying shards") as bar:
        for shard in meta["shards"]:
            path = Path(data_dir) / shard["file"]
            if "sha256" not in shard:
                raise UserError(f"{data_dir}/meta.json: has no sha256 of {shard['file']}: write the corpus again, or go without")
            try:
                digest = sha256(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            if digest != shard["sha256"]:
                raise UserError(f"{path}: its sha256 is not the one in meta.json: the shard is damaged, copy or write it again")
            bar.update(2 * shard["tokens"])


class Shards:
    """One split of a corpus, cut into windows of `block_size` inputs and their next-token targets.

    meta: the corpus's meta.json, which names the shards; all must be there, for a missing one would change the order of
    the data without a word. Windows do not overlap and do not cross shards: an epoch reads every token once as an input,
    but for each shard's last incomplete window. Raises UserError where shards are missing or damaged, or none holds a
    window.
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int, meta: dict):
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        shards = [s for s in meta["shards"] if s["split"] == split]
        if not shards:
            raise UserError(f"{data_dir}/meta.json: names no {split} shards: write the corpus again with fineweb.py")
        self.paths = [Path(data_dir) / s["file"] for s in shards]
        counts = []
        for path, shard in zip(self.paths, shards):
            tokens = open_shard(path)
            if len(tokens) != shard["tokens"]:
                raise UserError(f"{path}: has {len(tokens):,} tokens, meta.json says {shard['tokens']:,}: copy both again")
            self._check_vocabulary(path, tokens[:TOKENS_CHECKED_AT_START])
            counts.append(len(tokens))
        self.first = np.cumsum([0] + [max(0, n - 1) // block_size for n in counts])  # first window of a shard
        if len(self) == 0:
            raise UserError(f"{data_dir}: no {split} shard holds the {block_size + 1} tokens of a window: lower block_size")

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the numbered windows, each (len(windows), block_size), int64.

        Raises UserError on a token id outside the vocabulary, or where a shard is gone or was cut since the start.
        """
        rows = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        for row, window, shard in zip(rows, windows, self._shard_of(windows)):
            start = int(window - self.first[shard]) * self.block_size
            # A read, not a memory map: a file that was cut would end the process without a word (SIGBUS).
            try:
                tokens = np.fromfile(self.paths[shard], "<u2", self.block_size + 1, offset=HEADER_BYTES + 2 * start)
            except OSError as error:
                raise UserError(f"{self.paths[shard]}: cannot be read any more ({error.strerror}): bring it back, then resume") from None
            if len(tokens) != len(row):
                raise UserError(f"{self.paths[shard]}: was cut since the start: copy or write it again, then resume")
            self._check_vocabulary(self.paths[shard], tokens)
            row[:] = tokens
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def files(self, windows: np.ndarray) -> list[str]:
        """Names of the shards that hold these windows."""
        return [self.paths[shard].name for shard in np.unique(self._shard_of(windows))]

    def _shard_of(self, windows):
        return np.searchsorted(self.first, windows, side="right") - 1

    def _check_vocabulary(self, path, tokens):
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{path}: token id {tokens.max()} is outside the vocabulary of {self.vocab_size}: the shard is damaged, or "
                "from another tokenizer than meta.json says; write the corpus again with fineweb.py"
            )


class TrainOrder:
    """Which windows step t trains on: a pure function of (number of windows, seed, t).

    Epoch e visits all windows in the order of a permutation drawn from (seed, e); step t takes the next
    `windows_per_step` of that endless sequence. World size, micro-batch, schedule and resuming have no part in it.
    """

    def __init__(self, n_windows: int, seed: int, windows_per_step: int):
        self.n_windows, self.seed, self.windows_per_step = n_windows, seed, windows_per_step
        self._epoch, self._order = -1, None

    def windows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Numbers `start` to `stop` (within 0..windows_per_step) of the windows of a step."""
        first = step * self.windows_per_step
        position = np.arange(first + start, first + stop)
        return np.concatenate(
            [self._permutation(e)[position[position // self.n_windows == e] % self.n_windows]
             for e in range(position[0] // self.n_windows, position[-1] // self.n_windows + 1)]
        )  # fmt: skip

    def _permutation(self, epoch):
        if epoch != self._epoch:
            # RandomState, because NumPy promises never to change its stream: a run resumes on any later version.
            self._epoch, self._order = epoch, np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)
        return self._order


class Prefetch:
    """Iterates over the items of an iterator, each made in a background thread while the one before is in use.

    `waited` counts the seconds in which the consumer had to wait for one.
    """

    def __init__(self, items: Iterator):
        self.waited = 0.0
        self._items, self._reader = items, ThreadPoolExecutor(1)
        self._future = self._reader.submit(next, items, None)

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        item = self._future.result()
        self.waited += time.perf_counter() - start
        if item is None:
            self._reader.shutdown()
            raise StopIteration
        self._future = self._reader.submit(next, self._items, None)
        return item
