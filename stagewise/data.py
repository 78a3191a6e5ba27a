"""Token shards and tokenizers: what the corpus is, and which tokens a step reads.

A corpus is a folder of shards in llm.c's .bin format (256 int32 header: magic 20240520, version 1,
token count; then uint16 tokens), and a meta.json that lists them. fineweb.py writes it.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tiktoken
from msgspec import Meta
from tqdm import tqdm

from stagewise.errors import UserError, first_line
from stagewise.fileio import decode_json, sha256

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
# Of each shard: enough to detect another tokenizer. The rest is checked as it is read.
TOKENS_CHECKED_AT_START = 2**20


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer `name`: "bytes" (256 byte tokens and <|endoftext|>) or one of
    tiktoken's.

    tiktoken downloads GPT-2's vocabulary once; TIKTOKEN_CACHE_DIR names a folder that already has
    it.

    Raises:
        UserError: if the name is unknown or the vocabulary cannot be downloaded.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern only cuts the work into short pieces: without merges every byte is a token.
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,16}",
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 256},
        )
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise UserError(f"tokenizer {name!r} is unknown: {first_line(error)}") from None
    except OSError as error:  # all exceptions of requests are
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): connect once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that has its files"
        ) from None


# --------------------------------------------------------------------------------------------------
# files


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (uint16) as one .bin shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(tokens.astype("<u2").tobytes())


def open_shard(path: Path) -> np.ndarray:
    """Return the tokens of a shard as a read-only memory map (uint16).

    Raises:
        UserError: if the file is not a complete shard.
    """
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise UserError(
            f"{path}: not a token shard (llm.c's .bin begins with {MAGIC}): write shards with "
            "fineweb.py"
        )
    if header[1] != VERSION:
        raise UserError(
            f"{path}: shard version {header[1]}; only version {VERSION} (uint16 tokens) can be read"
        )
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path}: the header says {count:,} tokens, the file has "
            f"{(size - HEADER_BYTES) // 2:,}: it is truncated or corrupted, copy or write it again"
        )
    if not count:
        return np.zeros(0, "<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


@dataclass
class ShardEntry:
    """A shard in meta.json."""

    file: Annotated[str, Meta(pattern=r"^[^\0]*$")]
    split: Literal["train", "val"]
    tokens: int


@dataclass
class CorpusMeta:
    """The fields of meta.json that training needs; there may be more."""

    tokenizer: str
    vocab_size: int
    shards: list[ShardEntry]


def load_meta(data_dir: str | Path) -> dict[str, Any]:
    """Return meta.json of a corpus.

    Raises:
        UserError: if it is missing, or not of the form of `CorpusMeta`.
    """
    path = Path(data_dir) / "meta.json"
    try:
        text = path.read_bytes()
        decode_json(text, CorpusMeta)
        return json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found: data_dir must be a corpus; write one with fineweb.py --out "
            f"{data_dir}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: is not a valid meta.json ({first_line(error)}): write the corpus again with "
            "fineweb.py"
        ) from None


def verify_shards(data_dir: str | Path, meta: dict) -> None:
    """Compare every shard's sha256 with the one in meta.json.

    Raises:
        UserError: naming the first shard that differs.
    """
    total = sum(2 * s["tokens"] for s in meta["shards"])
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying shards") as bar:
        for shard in meta["shards"]:
            path = Path(data_dir) / shard["file"]
            if "sha256" not in shard:
                raise UserError(
                    f"{data_dir}/meta.json: has no sha256 of {shard['file']}: write the corpus "
                    "again, or omit --verify_data"
                )
            try:
                digest = sha256(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            if digest != shard["sha256"]:
                raise UserError(
                    f"{path}: its sha256 differs from meta.json: the shard is corrupted, copy or "
                    "write it again"
                )
            bar.update(2 * shard["tokens"])


# --------------------------------------------------------------------------------------------------
# reading


class Shards:
    """One split of a corpus, cut into windows of `block_size` inputs and their next-token targets.

    Windows do not overlap and do not cross shards: an epoch reads every token once as an input,
    except for each shard's last incomplete window. All shards that meta.json lists must exist,
    because a missing one would silently change the order of the data.

    Raises:
        UserError: if shards are missing or corrupted, or none holds a window.
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int, meta: dict):
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        shards = [s for s in meta["shards"] if s["split"] == split]
        if not shards:
            raise UserError(
                f"{data_dir}/meta.json: lists no {split} shards: write the corpus again with "
                "fineweb.py"
            )
        self.paths = [Path(data_dir) / s["file"] for s in shards]
        counts = []
        for path, shard in zip(self.paths, shards):
            tokens = open_shard(path)
            if len(tokens) != shard["tokens"]:
                raise UserError(
                    f"{path}: has {len(tokens):,} tokens, meta.json says {shard['tokens']:,}: copy "
                    "both again"
                )
            self._check_vocabulary(path, tokens[:TOKENS_CHECKED_AT_START])
            counts.append(len(tokens))
        # The number of the first window of every shard, and of all windows.
        self.first = np.cumsum([0] + [max(0, n - 1) // block_size for n in counts])
        if len(self) == 0:
            raise UserError(
                f"{data_dir}: no {split} shard has the {block_size + 1} tokens of a window: lower "
                "block_size"
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of the numbered windows, each (n, block_size), int64.

        Raises:
            UserError: if a token id is outside the vocabulary, or a shard disappeared or was
                truncated since the start.
        """
        rows = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        for row, window, shard in zip(rows, windows, self._shard_of(windows)):
            start = int(window - self.first[shard]) * self.block_size
            offset = HEADER_BYTES + 2 * start
            # Not a memory map: reading beyond the end of a truncated file kills the process
            # (SIGBUS).
            try:
                tokens = np.fromfile(self.paths[shard], "<u2", self.block_size + 1, offset=offset)
            except OSError as error:
                raise UserError(
                    f"{self.paths[shard]}: can no longer be read ({error.strerror}): restore it, "
                    "then resume"
                ) from None
            if len(tokens) != len(row):
                raise UserError(
                    f"{self.paths[shard]}: was truncated since the start: copy or write it again, "
                    "then resume"
                )
            self._check_vocabulary(self.paths[shard], tokens)
            row[:] = tokens
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def files(self, windows: np.ndarray) -> list[str]:
        """Return the names of the shards that hold these windows."""
        return [self.paths[shard].name for shard in np.unique(self._shard_of(windows))]

    def _shard_of(self, windows):
        return np.searchsorted(self.first, windows, side="right") - 1

    def _check_vocabulary(self, path, tokens):
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{path}: token id {tokens.max()} is outside the vocabulary of {self.vocab_size}: "
                "the shard is corrupted, or from another tokenizer than meta.json says; write the "
                "corpus again with fineweb.py"
            )


class TrainOrder:
    """The order in which windows are read: a pure function of (number of windows, seed).

    Epoch e visits all windows in a permutation drawn from (seed, e). Training reads this endless
    sequence from its start, however many windows a step takes and however it cuts them into
    sequences. World size, micro-batch, schedule and resuming have no influence.
    """

    def __init__(self, n_windows: int, seed: int):
        self.n_windows, self.seed = n_windows, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def windows(self, start: int, stop: int) -> np.ndarray:
        """Return the windows at positions start..stop-1 of the sequence."""
        position = np.arange(start, stop)
        parts = []
        for epoch in range(start // self.n_windows, (stop - 1) // self.n_windows + 1):
            inside = position[position // self.n_windows == epoch]
            parts.append(self._permutation(epoch)[inside % self.n_windows])
        return np.concatenate(parts)

    def _permutation(self, epoch):
        if epoch != self._epoch:
            # RandomState, because numpy promises never to change its stream.
            random = np.random.RandomState([self.seed, epoch])
            self._epoch, self._order = epoch, random.permutation(self.n_windows)
        return self._order


class Prefetch:
    """Iterates over items that a background thread makes, one ahead of the consumer.

    `waited` counts the seconds that the consumer waited for an item.
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
