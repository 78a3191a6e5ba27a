"""Byte-level BPE tokenizers that are trained on a sample and stored as tokenizer.json.

The file has the format of the `tokenizers` library. Text is encoded and decoded by tiktoken, as
with the published encodings, and split with GPT-2's regular expression.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from stagewise.errors import UserError, file_errors
from stagewise.fileio import atomic_write, decode_json, read_bytes, sha256

FILE, END_OF_TEXT = "tokenizer.json", "<|endoftext|>"
SMALLEST = 257  # all bytes and END_OF_TEXT


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a tokenizer with `vocab_size` tokens, including <|endoftext|>, and write it to `path`.

    It has fewer tokens if the texts do not contain enough different pairs.
    """
    # Slow to import, and not needed to encode.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    atomic_write(path, tokenizer.to_str(pretty=True) + "\n")


@dataclass
class _AddedToken:
    id: int
    content: str


@dataclass
class _Model:
    type: str
    vocab: dict[str, int]
    merges: list[tuple[str, str] | str]


@dataclass
class _PreTokenizer:
    type: str
    add_prefix_space: bool = True
    use_regex: bool = True


@dataclass
class _File:
    added_tokens: list[_AddedToken]
    model: _Model
    pre_tokenizer: _PreTokenizer
    normalizer: dict[str, Any] | None = None


def load_bpe(path: Path) -> tiktoken.Encoding:
    """Return the tokenizer of a tokenizer.json as a tiktoken encoding.

    Its name, bpe-SIZE-DIGEST, identifies the file: the digest is the start of its sha256.

    Raises:
        UserError: if the file cannot be read, or is not a byte-level BPE like GPT-2's.
    """
    with file_errors(path, "use a byte-level BPE with GPT-2's regular expression, such as the file "
                     "that fineweb.py --tokenizer=bpe:SIZE writes"):  # fmt: skip
        file = decode_json(read_bytes(path), _File)
        ranks, special = _ranks(file)
        n = len(ranks) + len(special)
        return tiktoken.Encoding(
            f"bpe-{n}-{sha256(path)[:12]}",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens=special,
            explicit_n_vocab=n,
        )


def _ranks(file: _File) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return the id of every token, and those of special tokens."""
    pre = file.pre_tokenizer
    if file.model.type != "BPE" or (pre.type, pre.add_prefix_space, pre.use_regex) != (
        "ByteLevel",
        False,
        True,
    ):
        raise ValueError("is not a byte-level BPE without a prefix space")
    if file.normalizer:
        raise ValueError("has a normalizer")
    special = {token.content: token.id for token in file.added_tokens}
    if END_OF_TEXT not in special:
        raise ValueError(f"has no token {END_OF_TEXT}")
    byte_of = byte_of_character()
    vocab = {token: i for token, i in file.model.vocab.items() if token not in special}
    if set(byte_of) - set(vocab):
        raise ValueError("lacks tokens for some single bytes")
    # tiktoken merges the pair with the lowest id, `tokenizers` the pair listed first.
    pairs = [m.split(" ") if isinstance(m, str) else m for m in file.model.merges]
    merged = ["".join(pair) for pair in pairs]
    order = [vocab.get(token, -1) for token in dict.fromkeys(merged)]
    n = len(vocab) + len(special)
    if order != sorted(order) or len(order) + len(byte_of) != len(vocab):
        raise ValueError("the ids of its tokens are not in the order of its merges")
    if sorted([*vocab.values(), *special.values()]) != list(range(n)):
        raise ValueError("its ids are not consecutive")
    try:
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}
    except KeyError as error:
        raise ValueError(f"the character {error} does not stand for a byte") from None
    return ranks, special


def byte_of_character() -> dict[str, int]:
    """Return the byte for which each character stands in GPT-2's vocabulary.

    Printable characters of Latin-1 stand for themselves, those from U+0100 on for the other bytes.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def find_bpe(name: str, folders: Iterable[Path]) -> tiktoken.Encoding:
    """Return the trained tokenizer with this name from the first folder that contains it.

    Raises:
        UserError: if no folder contains it.
    """
    looked = []
    for path in (Path(folder) / FILE for folder in folders):
        looked.append(str(path))
        if path.is_file():
            encoding = load_bpe(path)
            if encoding.name == name:
                return encoding
    raise UserError(
        f"tokenizer {name!r} was trained on a corpus, but its file is not at "
        f"{' or '.join(looked) or 'a known place'}: copy the {FILE} of that corpus there"
    )
