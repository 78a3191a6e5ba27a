"""Token shards, tokenizers and the data order.

A corpus is a folder of shards in llm.c's .bin format (a header of 256 int32, which begins with the
magic number 20240520, the version 1 and the token count, then uint16 tokens), and a meta.json that
lists them. fineweb.py writes it. The shards that it imports may also be .npy files, like those of
build-nanogpt, or files without a header, like those of nanoGPT.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tiktoken
from msgspec import Meta
from tqdm import tqdm

from stagewise.bpe import find_bpe
from stagewise.errors import UserError, file_errors, first_line
from stagewise.fileio import atomic_file, decode_json, open_file, read_bytes, sha256

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 2**16  # tokens are stored as uint16
# Per shard; enough to detect a different tokenizer. The other tokens are checked when read.
TOKENS_CHECKED_AT_START = 2**20


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return the tokens of a text without special tokens.

    Equal to `encoding.encode_ordinary`, which fails for a long run of white space in front of a
    word: the stack of its regular expression `\\s+(?!\\S)` overflows. There, the text is split
    before the run and before its last character. All supported encodings split there as well: no
    other part of the expression extends into white space, and the last character belongs to what
    follows. The run is at the end of its part, where `\\s++$` matches without a stack.
    """
    runs = [m.span() for m in _LONG_SPACE.finditer(text) if m.end() < len(text)]
    cuts = [cut for start, stop in runs for cut in (start, stop - 1)]
    parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)])]
    encoded = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts if part]
    return np.concatenate(encoded) if encoded else np.empty(0, np.uint32)


# As Unicode and the regular expressions of tiktoken define white space; Python's \s has more.
_LONG_SPACE = re.compile(
    "[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}"
)


def get_tokenizer(name: str, folders: Iterable[str | Path] = ()) -> tiktoken.Encoding:
    """Return a tokenizer.

    tiktoken downloads the vocabulary once. Set TIKTOKEN_CACHE_DIR to a folder that already contains
    it to avoid the download.

    Args:
        name: "bytes" (256 byte tokens and <|endoftext|>), a tiktoken encoding, or the name of a
            trained tokenizer (see `bpe.load_bpe`).
        folders: where to look for the tokenizer.json of a trained tokenizer: its corpus or a run.

    Raises:
        UserError: if the name is unknown, its tokens do not fit into shards, the vocabulary cannot
            be downloaded, or tokenizer.json is not found.
    """
    if re.fullmatch(r"bpe-\d+-[0-9a-f]{12}", name):
        return find_bpe(name, map(Path, folders))
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern only splits the text into short pieces. Without merges, every byte is a token.
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,16}",
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 256},
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (ValueError, UnicodeError) as error:
        raise UserError(f"tokenizer {name!r} is unknown: {first_line(error)}") from None
    except OSError as error:  # the base class of all exceptions of requests
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): check the "
            "connection, or set TIKTOKEN_CACHE_DIR to a folder that contains its files"
        ) from None
    if encoding.n_vocab > MAX_VOCAB:
        raise UserError(
            f"tokenizer {name!r} has {encoding.n_vocab:,} tokens, but shards store ids below "
            f"{MAX_VOCAB:,}: use another one, for example gpt2"
        )
    return encoding


# --------------------------------------------------------------------------------------------------
# files


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (uint16) to a .bin shard, atomically."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_file(path) as f:
        f.write(header.tobytes())
        f.write(tokens.astype("<u2").tobytes())


Format = Literal["llm.c", "npy", "raw"]


def open_shard(path: Path, format: Format = "llm.c") -> np.ndarray:
    """Return the tokens of a shard as a read-only memory map (uint16).

    Args:
        format: "llm.c"; "npy", a NumPy array; or "raw", tokens without a header.

    Raises:
        UserError: if the file is not a complete shard.
    """
    offset, count = shard_layout(path, format)
    if not count:
        return np.zeros(0, "<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))


def shard_layout(path: Path, format: Format = "llm.c") -> tuple[int, int]:
    """Return the position of the first token of a shard in bytes, and the number of tokens.

    Raises:
        UserError: if the file is not a complete shard.
    """
    advice = "a shard that meta.json lists must be readable; copy it again"
    with file_errors(path, advice), open_file(path) as f:
        size = os.fstat(f.fileno()).st_size
        if format == "npy":
            offset, count = _npy_layout(path, f)
        elif format == "raw":
            offset, count = 0, size // 2
            if size % 2:
                raise UserError(f"{path}: has an odd number of bytes, so it is not a uint16 array")
        else:
            offset, count = _llmc_layout(path, np.fromfile(f, dtype="<i4", count=HEADER_INTS))
    if size != offset + 2 * count:
        raise UserError(
            f"{path}: the header gives {count:,} tokens, but the file has "
            f"{(size - offset) / 2:,.15g}: it is truncated or corrupted, copy or write it again"
        )
    return offset, count


def _llmc_layout(path, header):
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise UserError(
            f"{path}: not a token shard (a .bin file of llm.c starts with {MAGIC}): write shards "
            "with fineweb.py"
        )
    if header[1] != VERSION:
        raise UserError(
            f"{path}: shard version {header[1]} is not supported: use version {VERSION} (uint16)"
        )
    return HEADER_BYTES, int(header[2])


def _npy_layout(path, f):
    version = np.lib.format.read_magic(f)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if not read_header:
        raise ValueError(f"version {version} of the .npy format is not supported")
    shape, _, dtype = read_header(f)
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise UserError(
            f"{path}: is an array of {dtype} with {len(shape)} dimensions: a shard is "
            "one-dimensional and uint16"
        )
    return f.tell(), shape[0]


@dataclass
class ShardEntry:
    """The entry of a shard in meta.json."""

    file: Annotated[str, Meta(pattern=r"^[^\0]*$")]
    split: Literal["train", "val"]
    tokens: Annotated[int, Meta(ge=0, lt=2**48)]
    sha256: str | None = None
    format: Format = "llm.c"


@dataclass
class CorpusMeta:
    """The required fields of meta.json; others are ignored."""

    tokenizer: str
    vocab_size: Annotated[int, Meta(ge=1, le=MAX_VOCAB)]
    shards: list[ShardEntry]


def load_meta(data_dir: str | Path) -> dict[str, Any]:
    """Return the contents of a corpus's meta.json.

    Raises:
        UserError: if the file is missing, does not match `CorpusMeta`, or lists a shard twice.
    """
    path = Path(data_dir) / "meta.json"
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        source = " --source stdlib" if path.parent.name == "stdlib" else ""
        raise UserError(
            f"{path.absolute()}: not found: data_dir must contain a corpus; write one with "
            f"fineweb.py{source} --out {data_dir}{_import_hint(path.parent)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}): make it readable, or use another "
            "data_dir"
        ) from None
    try:
        files = [shard.file for shard in decode_json(text, CorpusMeta).shards]
        if twice := [file for file, n in Counter(files).items() if n > 1]:
            raise ValueError(f"shard {twice[0]!r} is listed more than once")
        return decode_json(text, dict)
    except ValueError as error:
        raise UserError(
            f"{path}: not a valid meta.json ({first_line(error)}): write the corpus again with "
            "fineweb.py"
        ) from None


def _import_hint(folder):
    names = [*folder.glob("*.bin"), *folder.glob("*.npy"), *folder.glob("*.ds")]
    if not names:
        return ""
    return (
        f", or import the shards in this folder with fineweb.py --source {folder} "
        "--tokenizer gpt2 --out NEW_FOLDER"
    )


def fingerprint(meta: dict) -> str:
    """Return an identifier of a corpus: a SHA-256 of its tokenizer, its vocabulary and its shards.

    Shards are identified by split, length and the checksum in meta.json, not by their names.
    """
    shards = [[s["split"], s["tokens"], s.get("sha256")] for s in meta["shards"]]
    identity = json.dumps([meta["tokenizer"], meta["vocab_size"], shards])
    return hashlib.sha256(identity.encode()).hexdigest()


def check_tokenizer(encoding: tiktoken.Encoding, vocab_size: int, where: object) -> None:
    """Raise UserError if a model or a corpus has fewer tokens than its tokenizer."""
    if encoding.n_vocab > vocab_size:
        raise UserError(
            f"{where}: a vocabulary of {vocab_size:,}, but tokenizer {encoding.name} has "
            f"{encoding.n_vocab:,} tokens: one of them is wrong"
        )


def token_bytes(encoding: tiktoken.Encoding, vocab_size: int) -> np.ndarray:
    """Return the number of bytes of every token, (vocab_size,) int64.

    Special tokens, such as <|endoftext|>, and ids without a token have none.
    """
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for i in range(min(encoding.n_vocab, vocab_size)):
        with contextlib.suppress(KeyError):
            lengths[i] = 0 if i in special else len(encoding.decode_single_token_bytes(i))
    return lengths


def verify_shards(data_dir: str | Path, meta: dict) -> None:
    """Compare the SHA-256 checksum of every shard with meta.json.

    Raises:
        UserError: if a shard differs. The message names the first one.
    """
    total = sum(2 * s["tokens"] for s in meta["shards"])
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying shards") as bar:
        for shard in meta["shards"]:
            path = Path(data_dir) / shard["file"]
            if not shard.get("sha256"):
                raise UserError(
                    f"{data_dir}/meta.json: no sha256 for {shard['file']}: write the corpus again, "
                    "or omit --verify_data"
                )
            with file_errors(path, "copy the shard again"):
                digest = sha256(path)
            if digest != shard["sha256"]:
                raise UserError(
                    f"{path}: the sha256 differs from meta.json: the shard is corrupted, copy or "
                    "write it again"
                )
            bar.update(2 * shard["tokens"])


# --------------------------------------------------------------------------------------------------
# reading


class Shards:
    """One split of a corpus, divided into windows of `block_size` inputs and next-token targets.

    Windows do not overlap and do not cross shard boundaries. An epoch reads every token once as an
    input, except for the last, incomplete window of each shard. All shards listed in meta.json must
    exist, because a missing one would silently change the data order.

    Raises:
        UserError: if shards are missing or corrupted, or too short for a single window.
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int, meta: dict):
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        shards = [s for s in meta["shards"] if s["split"] == split]
        if not shards:
            raise UserError(
                f"{data_dir}/meta.json: no {split} shards are listed: write the corpus again with "
                "fineweb.py"
            )
        self.paths = [Path(data_dir) / s["file"] for s in shards]
        self._offsets, counts = [], []
        for path, shard in zip(self.paths, shards):
            tokens = open_shard(path, shard.get("format", "llm.c"))
            self._offsets.append(getattr(tokens, "offset", 0))  # an empty shard is not a memmap
            if len(tokens) != shard["tokens"]:
                raise UserError(
                    f"{path}: has {len(tokens):,} tokens, but meta.json lists "
                    f"{shard['tokens']:,}: copy both again"
                )
            self._check_vocabulary(path, tokens[:TOKENS_CHECKED_AT_START])
            counts.append(len(tokens))
        # Index of the first window of every shard, then the total number of windows.
        self.first = np.cumsum([0] + [max(0, n - 1) // block_size for n in counts])
        if len(self) == 0:
            raise UserError(
                f"{data_dir}: no {split} shard has the {block_size + 1} tokens needed for a "
                "window: lower block_size"
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, each (n, block_size) int64, of the windows with these indices.

        Raises:
            UserError: if a token id is outside the vocabulary, or a shard has been deleted or
                truncated since the start.
        """
        rows = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        for row, window, shard in zip(rows, windows, self._shard_of(windows)):
            start = int(window - self.first[shard]) * self.block_size
            offset = self._offsets[shard] + 2 * start
            # Not a memory map, because reading past the end of a truncated file raises SIGBUS,
            # which terminates the process.
            try:
                tokens = np.fromfile(self.paths[shard], "<u2", self.block_size + 1, offset=offset)
            except OSError as error:
                raise UserError(
                    f"{self.paths[shard]}: can no longer be read ({first_line(error)}): restore "
                    "the file, then resume"
                ) from None
            if len(tokens) != len(row):
                raise UserError(
                    f"{self.paths[shard]}: truncated since the run started: copy or write it "
                    "again, then resume"
                )
            self._check_vocabulary(self.paths[shard], tokens)
            row[:] = tokens
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def bytes_per_token(self, windows: np.ndarray, encoding: tiktoken.Encoding) -> float:
        """Return the mean number of bytes of the targets in these windows; see `token_bytes`.

        A mean loss of x nats per token is x / (bytes_per_token * ln 2) bits per byte.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for part in np.array_split(windows, -(-len(windows) // 256)):
            counts += np.bincount(self.read(part)[1].ravel(), minlength=self.vocab_size)
        return int(counts @ token_bytes(encoding, self.vocab_size)) / int(counts.sum())

    def files(self, windows: np.ndarray) -> list[str]:
        """Return the names of the shards that contain these windows."""
        return [self.paths[shard].name for shard in np.unique(self._shard_of(windows))]

    def _shard_of(self, windows):
        return np.searchsorted(self.first, windows, side="right") - 1

    def _check_vocabulary(self, path, tokens):
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{path}: token id {tokens.max()} is outside the vocabulary of {self.vocab_size}: "
                "the shard is corrupted, or was written with a different tokenizer than the one in "
                "meta.json; write the corpus again with fineweb.py"
            )


class TrainOrder:
    """The order in which windows are read: a pure function of (number of windows, seed).

    Epoch e reads all windows in a random permutation seeded with (seed, e). Training reads this
    infinite sequence from its start. The world size, the micro-batch size, the schedule and
    resuming do not affect the order.
    """

    def __init__(self, n_windows: int, seed: int):
        self.n_windows, self.seed = n_windows, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def windows(self, start: int, stop: int) -> np.ndarray:
        """Return the windows at positions `start` to `stop` - 1 of the sequence."""
        position = np.arange(start, stop)
        parts = []
        for epoch in range(start // self.n_windows, (stop - 1) // self.n_windows + 1):
            inside = position[position // self.n_windows == epoch]
            parts.append(self._permutation(epoch)[inside % self.n_windows])
        return np.concatenate(parts)

    def _permutation(self, epoch):
        if epoch != self._epoch:
            # RandomState, because NumPy guarantees that its stream never changes.
            random = np.random.RandomState([self.seed, epoch])
            self._epoch, self._order = epoch, random.permutation(self.n_windows)
        return self._order


class Prefetch:
    """Iterates over `items` in a background thread, one item ahead of the consumer.

    `waited` is the time in seconds that the consumer spent waiting for items.
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
