"""Shards of other projects: llm.c, modded-nanogpt, build-nanogpt, nanoGPT and datatrove."""

import re
from pathlib import Path

import numpy as np
import tiktoken

from stagewise.data import MAGIC, MAX_VOCAB, Format, open_shard
from stagewise.errors import UserError, file_errors
from stagewise.fileio import open_file, read_bytes

MAGIC_OF_LLAMA = 20240801  # of llm.c's shards with uint32 tokens
CHUNK = 2**24  # tokens that are checked at a time


def shard_format(path: Path) -> Format:
    """Return the format of a shard. Only nanoGPT's train.bin and val.bin have no header."""
    if path.suffix == ".npy":
        return "npy"
    with file_errors(path, "use a readable file"), open_file(path) as f:
        start = f.read(4)
    number = int.from_bytes(start, "little")
    headerless = path.stem in ("train", "val") and number not in (MAGIC, MAGIC_OF_LLAMA)
    return "raw" if headerless else "llm.c"


def check_tokens(
    path: Path, tokens: np.ndarray, encoding: tiktoken.Encoding, option: str | None
) -> int:
    """Return the number of <|endoftext|> tokens in a shard.

    Raises:
        UserError: if the shard has a token that the tokenizer does not have.
    """
    n = 0
    for i in range(0, len(tokens), CHUNK):
        part = tokens[i : i + CHUNK]
        if part.max() >= encoding.n_vocab:
            raise UserError(
                f"{path}: token id {part.max()} is outside the vocabulary of {encoding.name} "
                f"({encoding.n_vocab:,} tokens): use a token shard, and the tokenizer that wrote "
                f"it instead of --tokenizer={option or encoding.name}"
            )
        n += int((part == encoding.eot_token).sum())
    return n


def datatrove_file(path: Path) -> tuple[np.ndarray, int | None, str | None]:
    """Return the tokens of a .ds file, its number of documents, and the name of its tokenizer.

    The latter two come from the files .ds.index (the end of every document as uint64) and
    .ds.metadata (TOKENIZER|BYTES_PER_TOKEN in the first line), which datatrove writes by default.

    Raises:
        UserError: if the file has 4 bytes per token, or is incomplete.
    """
    size, n_documents, tokenizer = 2, None, None
    index, metadata = (path.with_name(path.name + end) for end in (".index", ".metadata"))
    with file_errors(path, "write it with datatrove again"):
        n_bytes = path.stat().st_size
        if metadata.exists():
            line = read_bytes(metadata).decode().splitlines()[:1]
            match = re.match(r"([^|]*)(?:.*)\|([24])$", line[0] if line else "")
            if match:
                tokenizer, size = match[1].removeprefix("openai-community/"), int(match[2])
        if index.exists():
            ends = np.frombuffer(read_bytes(index), "<u8")
            n_documents, last = len(ends), int(ends[-1]) if len(ends) else 0
            if last and n_bytes == 4 * last:
                size = 4
            elif n_bytes != size * last:
                raise ValueError(
                    f"its index ends at token {last:,}, but the file has {n_bytes:,} bytes"
                )
    if size == 4:
        raise UserError(
            f"{path}: has 4 bytes per token, because the vocabulary is larger than {MAX_VOCAB:,}: "
            "use a tokenizer with a smaller vocabulary"
        )
    known = tokenizer if tokenizer and tokenizer != "Unknown Tokenizer" else None
    return open_shard(path, "raw"), n_documents, known
