"""Tokenize a corpus into shards for train.py.

    python fineweb.py                                  FineWeb-Edu's 10B-token sample, GPT-2 BPE, to data/fineweb_edu
    python fineweb.py --source PATH --out DIR          local parquet, jsonl or txt (a file or a folder), column `text`
    python fineweb.py --source stdlib --out DIR        the embedded corpus: Python's own standard library, as bytes

Every document begins with <|endoftext|>. The first shard is for validation. DIR gets the shards (format: see data.py) and
meta.json; the embedded corpus also hellaswag.jsonl, a task of HellaSwag's form made of its held-out part.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from data import get_tokenizer, write_shard
from errors import UserError, first_line, report_user_errors
from files import sha256

FINEWEB = "HuggingFaceFW/fineweb-edu"
DOCUMENTS_AT_A_TIME = 64


@dataclass
class Args:
    """Tokenize a corpus into shards for train.py."""

    source: str = FINEWEB
    """The FineWeb-Edu data set, a local file or folder (parquet, jsonl, txt), or "stdlib", Python's own library."""
    out: Path | None = None
    """Folder to write; it must not exist yet. Default: data/NAME after the source."""
    subset: str = "sample-10BT"
    """Subset of FineWeb-Edu."""
    tokenizer: str | None = None
    """tiktoken encoding, or "bytes". Default: gpt2, for the standard library bytes."""
    shard_tokens: int = 100_000_000
    """Tokens a shard. A corpus of less than two shards gives its first tenth to validation."""
    processes: int = os.cpu_count() or 1
    """Processes that tokenize."""


def stdlib_documents() -> list[tuple[str, str]]:
    """(name, text) of the running interpreter's standard-library sources, in a fixed shuffled order.

    Without tests, installed packages and the generated tables of `encodings`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return [(str(p.relative_to(root)), text) for p in paths if (text := p.read_text("utf-8", "replace"))]


def load_source(source: str, subset: str):
    """A Hugging Face data set with a column `text`, from the hub or from local files.

    Raises UserError where the files are of no known kind, unreadable, or without the column.
    """
    import datasets  # slow to import, and the embedded corpus does without

    if source == FINEWEB:
        try:
            return datasets.load_dataset(FINEWEB, name=subset, split="train").select_columns("text")
        except (OSError, ValueError) as error:
            raise UserError(f"{FINEWEB} ({subset}) could not be loaded: {first_line(error)}") from None
    datasets.disable_progress_bars()
    path = Path(source)
    builders = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
    files = sorted(p for p in path.rglob("*") if p.suffix in builders) if path.is_dir() else [path]
    kinds = {p.suffix for p in files}
    if len(kinds) != 1 or not kinds <= builders.keys():
        raise UserError(f"--source={source}: needs files of one kind of {', '.join(builders)}; found {sorted(kinds) or 'none'}")
    builder = builders[kinds.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        loaded = datasets.load_dataset(builder, data_files=[str(p) for p in files], split="train", **options)
    except Exception as error:  # the readers of three formats fail in many ways on a damaged file
        raise UserError(f"--source={source}: cannot be read as {builder}: {first_line(error.__cause__ or error)}") from None
    if "text" not in loaded.column_names or loaded.features["text"].dtype not in ("string", "large_string"):
        raise UserError(f"--source={source}: needs a column `text` of strings; it has {loaded.column_names}")
    return loaded.select_columns("text")


def tokenized(read: Callable[[int, int], list[str]], total: int, encoding: tiktoken.Encoding, processes: int) -> Iterator[tuple]:
    """(number of documents, their tokens as uint16), in the order of the documents.

    read(start, stop) gives the documents of a range. Workers read for themselves, so that only tokens pass between
    processes; what is in flight is bounded. Raises UserError on a document that is no text, or when a worker is killed.
    """
    # Forked, so that the workers have the tokenizer and the memory map of the documents without a copy.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, initializer=_begin_worker, initargs=(read, encoding)) as pool:
        ranges = ((start, min(start + DOCUMENTS_AT_A_TIME, total)) for start in range(0, total, DOCUMENTS_AT_A_TIME))
        futures = deque()
        try:
            for start, stop in ranges:
                futures.append((stop - start, pool.submit(_tokenize, start, stop)))
                if len(futures) > 4 * processes:
                    n, future = futures.popleft()
                    yield n, future.result()
            for n, future in futures:
                yield n, future.result()
        except BrokenProcessPool:
            raise UserError("a process that tokenizes was killed, for lack of memory perhaps: use fewer --processes") from None


def _begin_worker(*shared):
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process


def _tokenize(start, stop):
    read, encoding = _shared
    try:
        texts = read(start, stop)
    except UnicodeDecodeError as error:
        raise UserError(f"one of the documents {start:,} to {stop - 1:,} is not UTF-8 ({error}): convert the source") from None
    if None in texts:
        raise UserError(f"document {start + texts.index(None):,}: its `text` is null: remove it from the source")
    parts, end_of_text = [], np.array([encoding.eot_token])
    for text in texts:
        parts += [end_of_text, encoding.encode_to_numpy(text, disallowed_special=())]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


class ShardWriter:
    """Cuts a stream of tokens into shards of `shard_tokens`; the first is for validation. A thread writes them."""

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens, self.shards = folder, name, shard_tokens, []
        self.full = None  # a shard that waits: until the one after it is full, it is open how much validation gets
        self.buffer, self.used = np.empty(shard_tokens, dtype=np.uint16), 0
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            part = tokens[: self.shard_tokens - self.used]
            self.buffer[self.used : self.used + len(part)] = part
            self.used += len(part)
            tokens = tokens[len(part) :]
            if self.used == self.shard_tokens:
                if self.full is not None:
                    self._write(self.full)
                self.full, self.buffer, self.used = self.buffer, np.empty_like(self.buffer), 0

    def close(self) -> None:
        """Write what is left. A corpus of less than two shards gives its first tenth to validation."""
        rest = [self.buffer[: self.used]] if self.full is None else [self.full, self.buffer[: self.used]]
        if not self.shards:
            rest = np.concatenate(rest)
            rest = [rest[: len(rest) // 10], rest[len(rest) // 10 :]]
        for tokens in rest:
            if len(tokens):
                self._write(tokens)
        self.wait()

    def wait(self) -> None:
        if self.writing:
            self.writing.result()

    def _write(self, tokens):
        self.wait()
        split = "train" if self.shards else "val"
        path = self.folder / f"{self.name}_{split}_{len(self.shards):06d}.bin"
        self.shards.append({"file": path.name, "split": split, "tokens": len(tokens)})
        self.writing = self.thread.submit(self._to_disk, path, tokens, self.shards[-1])

    @staticmethod
    def _to_disk(path, tokens, shard):
        write_shard(path, tokens)
        shard["sha256"] = sha256(path)


def continuation_task(held_out: list[tuple[str, str]], others: str, n_examples: int, seed: int = 0) -> list[dict]:
    """Examples of HellaSwag's form: how does this line end? The true end of a line of a document, among three of others.

    held_out: (name, text) of documents; `others`, all other text, has none of the passages. A context has 100
    characters and stops at a space, where the scorer puts one; an ending has 8 to 32.
    """
    rng = random.Random(seed)
    cuts = []  # (name, context, ending)
    for name, text in held_out:
        places = [m for m in re.finditer(r"(?<=\S) (\S[^\n]{7,31})(?=\n)", text) if m.start() >= 100]
        for m in rng.sample(places, min(len(places), 24)):
            if text[m.start() - 100 : m.end()] not in others:
                cuts.append((name, text[m.start() - 100 : m.start()], m[1]))
    rng.shuffle(cuts)
    examples = []
    for i, (name, context, ending) in enumerate(cuts[:n_examples]):
        wrong = [other for document, _, other in cuts if document != name]
        if len(wrong) < 3:
            break
        endings, label = rng.sample(wrong, 3), rng.randrange(4)
        endings.insert(label, ending)
        examples.append({"ind": i, "activity_label": name, "ctx": context, "split": "val", "label": label, "endings": endings})
    return examples


def write_continuation_task(path: Path, documents: list[tuple[str, str]], val_tokens: int) -> None:
    """1,000 examples from the documents that lie wholly in the first `val_tokens` bytes of the corpus."""
    ends = np.cumsum([1 + len(text.encode()) for _, text in documents])
    n = int(np.searchsorted(ends, val_tokens, side="right"))
    others = "\n".join(text for _, text in documents[n:])
    path.write_text("".join(json.dumps(e) + "\n" for e in continuation_task(documents[:n], others, 1000)))


def main(args: Args) -> None:
    stdlib = args.source == "stdlib"
    name = "fineweb_edu" if args.source == FINEWEB else "stdlib" if stdlib else Path(args.source).stem
    out = args.out or Path("data") / name
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(f"--shard_tokens={args.shard_tokens} must lie between 2 and 2**31 - 1, what a shard's header can say")
    if args.processes < 1:
        raise UserError(f"--processes={args.processes} must be at least 1")
    if args.source not in (FINEWEB, "stdlib") and not Path(args.source).exists():
        raise UserError(f"--source={args.source}: no such file or folder; give a path, {FINEWEB} or stdlib")
    if out.exists():
        raise UserError(f"--out={out} exists already: choose another folder, or remove it first")
    encoding = get_tokenizer(args.tokenizer or ("bytes" if stdlib else "gpt2"))
    if encoding.n_vocab > 2**16:
        raise UserError(f"--tokenizer={args.tokenizer} has {encoding.n_vocab:,} tokens; the shards hold ids below 65,536")

    documents = stdlib_documents() if stdlib else load_source(args.source, args.subset)
    total = len(documents)

    def read(start, stop):
        return [text for _, text in documents[start:stop]] if stdlib else documents[start:stop]["text"]

    # Written beside the final name and moved when whole: an interrupted run never looks like a corpus.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    writer = ShardWriter(partial, name, args.shard_tokens)
    try:
        partial.mkdir(parents=True)
        n_tokens = 0
        with tqdm(total=total, unit="doc", desc=f"tokenizing {name}") as bar:
            for n_documents, tokens in tokenized(read, total, encoding, args.processes):
                writer.add(tokens)
                n_tokens += len(tokens)
                bar.set_postfix(tokens=f"{n_tokens:,}", refresh=False)
                bar.update(n_documents)
        if n_tokens < 20:
            raise UserError(f"--source={args.source}: only {n_tokens} tokens, too little for a training and a validation shard")
        writer.close()
        meta = {
            "source": f"{args.source} {args.subset}" if args.source == FINEWEB else args.source,
            "tokenizer": encoding.name,
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "documents": total,
            "tokens": n_tokens,
            "shards": writer.shards,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if stdlib:
            write_continuation_task(partial / "hellaswag.jsonl", documents, val_tokens=writer.shards[0]["tokens"])
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}): name another folder") from None
    finally:
        writer.thread.shutdown()
        shutil.rmtree(partial, ignore_errors=True)
    val = sum(s["tokens"] for s in writer.shards if s["split"] == "val")
    print(f"{out}: {n_tokens - val:,} training and {val:,} validation tokens in {len(writer.shards)} shards, {total:,} documents")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
