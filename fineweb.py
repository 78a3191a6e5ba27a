"""Tokenize a corpus into shards for train.py.

    python fineweb.py                              FineWeb-Edu's 10B-token sample, with GPT-2's BPE
    python fineweb.py --source ORG/NAME            another dataset of the Hugging Face Hub
    python fineweb.py --source PATH --out DIR      local parquet, jsonl or txt, a file or a folder
    python fineweb.py --source stdlib --out DIR    the built-in corpus: Python's standard library
    python fineweb.py --source SHARDS --out DIR    import shards of llm.c, nanoGPT, datatrove, ...

Every document starts with <|endoftext|>. The beginning of the corpus is the validation set: one
shard, but at most a tenth of all tokens. DIR contains the shards (see stagewise/data.py for the
format) and meta.json. The built-in corpus also has hellaswag.jsonl, a task in HellaSwag's format
that is created from the validation documents.

On several machines, run the command with --rank and --world_size on each, then once with --merge.
A rank tokenizes whole input files, each into a part in OUT.parts. The merge concatenates the parts
and cuts them into shards as a single process does, so the result is bit-identical.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import filelock
import numpy as np
import tiktoken
import tyro
from msgspec import Meta
from tqdm import tqdm

from stagewise import bpe
from stagewise.builtin import stdlib_documents, write_continuation_task
from stagewise.data import ShardEntry, open_shard
from stagewise.errors import UserError, file_errors, report_user_errors
from stagewise.fileio import atomic_write, decode_json, read_bytes, sha256
from stagewise.foreign import check_tokens, datatrove_file, shard_format
from stagewise.sources import (
    HUB_NAME,
    SHARD_NAME,
    Source,
    document_order,
    hub_source,
    local_source,
    source_files,
)
from stagewise.tokenizing import Chunk, Workers, choose_tokenizer, train_tokenizer
from stagewise.writer import (
    PROGRESS,
    SOURCE,
    Count,
    ShardWriter,
    atomic_folder,
    former_revision,
    load_progress,
    partial_folder,
)

FINEWEB = "HuggingFaceFW/fineweb-edu"
JOB = "job.json"  # in DIR.parts: see `Job`
TEXT_BYTES_PER_TOKEN = 4  # of a BPE; only to estimate the disk space


@dataclass
class Args:
    """Tokenize a corpus into shards for train.py."""

    source: str = FINEWEB
    """A dataset on the Hugging Face Hub; "stdlib" for Python's standard library; or a local file or
    folder (parquet, jsonl or txt, the last two possibly .gz or .zst; or shards to import)."""
    out: Path | None = None
    """Folder to create. Default: data/NAME, named after the source.
    The folder appears only when the corpus is complete.
    Until then, OUT.partial keeps finished shards, and the same command continues."""
    subset: str | None = None
    """Subset of a dataset on the Hub. FineWeb-Edu has sample-10BT (its default here), sample-100BT,
    sample-350BT, default (all of it) and one for every crawl."""
    split: str = "train"
    """Split of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the Hub. Default: the latest commit."""
    column: str = "text"
    """Column, or field of a JSON object, that contains the text."""
    tokenizer: str | None = None
    """A tiktoken encoding; "bytes"; bpe:SIZE to train one on the first 100 MB of text; or the
    tokenizer.json of a corpus. Default: gpt2, or bytes for the standard library."""
    shuffle_seed: int | None = None
    """Read the input files, and the documents in each, in a random order. Default: as stored."""
    shard_tokens: int = 100_000_000
    """Tokens per shard. The validation set is one shard, but at most a tenth of the corpus."""
    processes: int = os.cpu_count() or 1
    """Number of tokenizer processes."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a document that is null, not UTF-8, or not valid JSON: stop and name it, or skip it."""
    ignore_disk_space: bool = False
    """Start even if the estimated disk space is not available."""
    rank: int | None = None
    """Tokenize only every world_size-th input file, starting with this one, into OUT.parts."""
    world_size: int | None = None
    """Number of ranks, for example the size of a Slurm array."""
    merge: bool = False
    """Create OUT from OUT.parts, after all ranks have finished."""


# --------------------------------------------------------------------------------------------------
# one process on one machine


def load_source(args: Args, revision: str | None) -> Source:
    """Return the source of a corpus, in the order in which it is read.

    Raises:
        UserError: if it does not exist or cannot be read.
    """
    if Path(args.source).exists():
        kind, files = source_files(args.source)
        if kind in ("shards", "datatrove"):
            raise UserError(
                f"--source={args.source}: contains shards: import them without --rank and "
                "--world_size"
            )
        source = local_source(kind, files, args.column)
    else:
        subset = args.subset or ("sample-10BT" if args.source == FINEWEB else None)
        source = hub_source(args.source, subset, args.split, revision, args.column)
    return source if args.shuffle_seed is None else source.shuffled(args.shuffle_seed)


def identity_of(args: Args, name: str, source: Source, encoding: tiktoken.Encoding) -> str:
    """Return a hash of everything that determines the shards."""
    trained = args.tokenizer if re.fullmatch(r"bpe:\d+", args.tokenizer or "") else None
    about = (args.source, args.revision, args.column, args.shuffle_seed, args.shard_tokens)
    tokenizer = (encoding.name, trained)
    return hashlib.sha256(repr((name, about, tokenizer, source.version)).encode()).hexdigest()


def check_disk(
    out: Path, source: Source, encoding: tiktoken.Encoding, numbers: list[int], written: int = 0
) -> None:
    """Estimate the disk space for inputs, and compare it with the free space.

    Args:
        numbers: the inputs that are not complete.
        written: tokens of the source that have already been written, also of complete inputs.

    Raises:
        UserError: if there is not enough space.
    """
    inputs = [source.inputs[i] for i in numbers]
    per_token = 1 if encoding.name == "bytes" else TEXT_BYTES_PER_TOKEN
    shards = 2 * sum(entry.text_bytes for entry in inputs) // per_token
    if written:  # a part of the first input may have been written
        total = 2 * sum(entry.text_bytes for entry in source.inputs) // per_token
        unread = 2 * sum(entry.text_bytes for entry in inputs[1:]) // per_token
        shards = max(unread, min(shards, total - 2 * written))
    # Plain local files are read in place. Two inputs are prepared at a time.
    prepared = [
        (entry.size if source.repository else 0)
        + (entry.text_bytes if entry.text_bytes != entry.size or entry.kind == "parquet" else 0)
        for entry in inputs
    ]
    require_disk(
        out, shards, sum(sorted(prepared)[-2:]), "; to start anyway, use --ignore_disk_space"
    )


def require_disk(out: Path, shards: int, temporary: int, otherwise: str = "") -> None:
    """Raise UserError if the file system of `out` has less space than this number of bytes."""
    existing = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    with file_errors(existing, "choose another --out"):
        free = shutil.disk_usage(existing).free
    if shards + temporary > free:
        raise UserError(
            f"--out={out}: needs about {shards / 1e9:.3g} GB for shards and {temporary / 1e9:.3g} "
            f"GB for temporary files, but {free / 1e9:.3g} GB are free: free disk space, or choose "
            f"another folder{otherwise}"
        )


class TokenBar:
    """A progress bar in tokens. Total and ETA are extrapolated from the input read so far."""

    def __init__(self, source: Source, numbers: list[int], n_tokens: int, title: str):
        # At least 1 byte for an empty file.
        sizes = [max(1, source.inputs[number].text_bytes) for number in numbers]
        ends = np.cumsum([0, *sizes])
        self._of_total = {
            number: (ends[i] / ends[-1], size / ends[-1])
            for i, (number, size) in enumerate(zip(numbers, sizes))
        }
        self._bar = tqdm(
            initial=n_tokens, unit="tok", unit_scale=True, desc=title, dynamic_ncols=True
        )

    def __enter__(self) -> "TokenBar":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def skip(self, n_tokens: int) -> None:
        """Count tokens that have already been written."""
        self._bar.update(n_tokens)

    def update(self, chunk: Chunk) -> None:
        before, share = self._of_total[chunk.number]
        fraction = before + share * (chunk.document + chunk.n_documents) / max(1, chunk.total)
        self._bar.total = round((self._bar.n + len(chunk.tokens)) / fraction)
        self._bar.update(len(chunk.tokens))


def write_corpus(folder: Path, about: dict[str, Any], writer: ShardWriter) -> dict[str, Any]:
    """Finish the shards, write meta.json and return its contents.

    Raises:
        UserError: if there are not enough tokens.
    """
    if writer.tokens < 20:
        raise UserError(
            f"--source={about['source']}: only {writer.tokens} tokens, not enough for a training "
            "and a validation shard"
        )
    meta = about | {
        "documents": writer.documents - writer.skipped,
        "skipped_documents": writer.skipped,
        "tokens": writer.tokens,
        "shards": writer.finish(),
    }
    atomic_write(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


def about_corpus(args: Args, encoding: tiktoken.Encoding, source: Source) -> dict[str, Any]:
    """Return the first fields of meta.json."""
    about: dict[str, Any] = {"source": args.source}
    if source.repository:
        subset, split, _ = source.version
        about["source"] = " ".join(filter(None, (args.source, subset)))
        about |= {"split": split, "revision": source.revision}
    if args.shuffle_seed is not None:
        about["shuffle_seed"] = args.shuffle_seed
    return about | {
        "tokenizer": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
    }


def tokenizer_file(args: Args, encoding: tiktoken.Encoding) -> Path | None:
    """Return the tokenizer.json that --tokenizer selects, or None for other tokenizers."""
    if not encoding.name.startswith("bpe-"):
        return None
    path = Path(args.tokenizer or "")
    return path if path.is_file() else path / bpe.FILE


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer.json of a trained tokenizer."""
    atomic_write(folder / bpe.FILE, read_bytes(source).decode())


def print_summary(out: Path, meta: dict[str, Any]) -> None:
    n_val = sum(shard["tokens"] for shard in meta["shards"] if shard["split"] == "val")
    skipped = meta.get("skipped_documents", 0)
    print(
        f"{out}: {meta['tokens'] - n_val:,} training and {n_val:,} validation tokens in "
        f"{len(meta['shards'])} shards, {meta['documents']:,} documents"
        + (f", {skipped:,} skipped because they are not valid text" if skipped else "")
    )


def tokenize_corpus(args: Args, name: str, out: Path) -> None:
    """Tokenize a source into the corpus `out`."""
    stdlib = args.source == "stdlib"
    tokenizer = choose_tokenizer(args.tokenizer or ("bytes" if stdlib else "gpt2"))
    # A dataset may change on the Hub before an interrupted run continues.
    revision = former_revision(partial_folder(out)) or args.revision
    source = Source([], sys.version) if stdlib else load_source(args, revision)
    with atomic_folder(out) as folder:
        work = folder / SOURCE
        shutil.rmtree(work, ignore_errors=True)
        named: list[tuple[str, str]] = []
        if stdlib:
            named = stdlib_documents()
            work.mkdir()
            path = work / "stdlib.jsonl"
            path.write_text("".join(json.dumps({args.column: text}) + "\n" for _, text in named))
            source.inputs = local_source("jsonl", [path], args.column).inputs
            source.column = args.column
        encoding, file = tokenizer_of(args, tokenizer, source, folder, work)
        progress = load_progress(folder, identity_of(args, name, source, encoding))
        progress.revision = source.revision
        if file:
            copy_tokenizer(file, folder)
        numbers = list(range(progress.number, len(source.inputs)))
        if not args.ignore_disk_space:
            check_disk(out, source, encoding, numbers, progress.tokens)
        with (
            Workers(
                source, encoding, work, args.processes, args.on_error, args.shuffle_seed
            ) as workers,
            ShardWriter(folder, name, args.shard_tokens, progress) as writer,
            TokenBar(
                source, list(range(len(source.inputs))), writer.tokens, f"tokenizing {name}"
            ) as bar,
        ):
            for chunk in workers.tokenize(numbers, progress.document):
                writer.add(chunk)
                bar.update(chunk)
            meta = write_corpus(folder, about_corpus(args, encoding, source), writer)
        if stdlib:
            n_val = meta["shards"][0]["tokens"]
            in_order = [named[i] for i in document_order(len(named), args.shuffle_seed, 0)]
            write_continuation_task(folder / "hellaswag.jsonl", in_order, val_tokens=n_val)
    print_summary(out, meta)


def tokenizer_of(
    args: Args, tokenizer: tiktoken.Encoding | int, source: Source, folder: Path, work: Path
) -> tuple[tiktoken.Encoding, Path | None]:
    """Return the tokenizer of a corpus, trained if necessary, and its file if it has one.

    An interrupted run continues with the tokenizer that it trained.
    """
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer, tokenizer_file(args, tokenizer)
    file = folder / bpe.FILE
    if not ((folder / PROGRESS).exists() and file.exists()):
        file = work / bpe.FILE
        work.mkdir(exist_ok=True)
        train_tokenizer(source, tokenizer, args.shuffle_seed, args.on_error, work, file)
    return bpe.load_bpe(file), file


# --------------------------------------------------------------------------------------------------
# several machines


@dataclass
class Job:
    """What the ranks have in common. Saved in OUT.parts by the first one."""

    identity: str
    name: str
    about: dict[str, Any]  # the first fields of meta.json
    shard_tokens: Annotated[int, Meta(ge=2, lt=2**31)]
    inputs: Count  # number of inputs, and of parts
    tokenizer_file: bool


@dataclass
class PartMeta:
    """The meta.json of a part: the tokens of one input."""

    identity: str
    documents: Count
    skipped_documents: Count
    shards: list[ShardEntry]


def tokenize_parts(args: Args, name: str, out: Path, rank: int, world_size: int) -> None:
    """Tokenize every world_size-th input of a source, each into a folder in OUT.parts."""
    parts = parts_folder(out)
    with contextlib.ExitStack() as stack:
        with file_errors(parts, "choose another --out"):
            parts.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(parts / f".rank_{rank}.lock", timeout=0))
                # The first rank prepares the job; the others wait.
                with filelock.FileLock(parts / ".job.lock"):
                    job, source, encoding = load_job(args, name, parts)
            except filelock.Timeout:
                raise UserError(
                    f"{parts}: rank {rank} is already running: wait until it ends"
                ) from None
        mine = list(range(rank, job.inputs, world_size))
        todo = [i for i in mine if not _part(parts, i).exists()]
        if not args.ignore_disk_space:
            check_disk(parts, source, encoding, todo)
        work = parts / f"{SOURCE}_{rank}"
        shutil.rmtree(work, ignore_errors=True)
        workers = stack.enter_context(
            Workers(source, encoding, work, args.processes, args.on_error, args.shuffle_seed)
        )
        bar = stack.enter_context(TokenBar(source, todo, 0, f"tokenizing {name}, rank {rank}"))
        for number, following in zip(todo, [*todo[1:], None]):
            with atomic_folder(_part(parts, number)) as folder:
                progress = load_progress(folder, job.identity)
                with ShardWriter(folder, "part", args.shard_tokens, progress, False) as writer:
                    bar.skip(writer.tokens)
                    chunks = workers.tokenize([number], progress.document)
                    for i, chunk in enumerate(chunks):
                        if i == 0 and following is not None:
                            workers.prepare(following)
                        writer.add(chunk)
                        bar.update(chunk)
                    shards = writer.finish()
                part = {
                    "identity": job.identity,
                    "documents": writer.documents,
                    "skipped_documents": writer.skipped,
                    "shards": shards,
                }
                atomic_write(folder / "meta.json", json.dumps(part, indent=2) + "\n")
    missing = _missing(parts, job)
    print(
        f"{parts}: rank {rank} of {world_size} has finished its {len(mine)} of {job.inputs} parts; "
        + (f"{len(missing)} are missing" if missing else "all are complete: use --merge")
    )


def parts_folder(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


def _part(parts, number):
    return parts / f"{number:06d}"


def _missing(parts, job):
    return [i for i in range(job.inputs) if not _part(parts, i).exists()]


def load_job(args: Args, name: str, parts: Path) -> tuple[Job, Source, tiktoken.Encoding]:
    """Return the job of OUT.parts, its source and its tokenizer. Create the job if there is none.

    Raises:
        UserError: if OUT.parts belongs to another command or to another version of the source.
    """
    existing = read_job(parts) if (parts / JOB).exists() else None
    tokenizer = choose_tokenizer(args.tokenizer or "gpt2")
    # A dataset may change on the Hub between the starts of two ranks.
    pinned = existing.about.get("revision") if existing else None
    source = load_source(args, pinned or args.revision)
    work = parts / f"{SOURCE}_job"
    shutil.rmtree(work, ignore_errors=True)
    file: Path | None
    if existing and isinstance(tokenizer, int):
        encoding, file = bpe.load_bpe(parts / bpe.FILE), parts / bpe.FILE
    else:
        encoding, file = tokenizer_of(args, tokenizer, source, parts, work)
    identity = identity_of(args, name, source, encoding)
    if existing:
        if existing.identity != identity:
            raise UserError(
                f"{parts}: has parts of another source or version, or with other options: "
                "use the options of the other ranks, or choose another --out"
            )
        return existing, source, encoding
    if file:
        copy_tokenizer(file, parts)
    shutil.rmtree(work, ignore_errors=True)
    about = about_corpus(args, encoding, source)
    job = Job(identity, name, about, args.shard_tokens, len(source.inputs), bool(file))
    atomic_write(parts / JOB, json.dumps(asdict(job), indent=2) + "\n")
    return job, source, encoding


def read_job(parts: Path) -> Job:
    with file_errors(parts / JOB, "run the command with --rank and --world_size first"):
        return decode_json(read_bytes(parts / JOB), Job)


def check_merge_args(args: Args, parts: Path, job: Job) -> None:
    """Raise UserError if an option contradicts those with which the parts were written."""
    source = str(job.about["source"])  # of a dataset on the Hub, with its subset
    same = source.startswith(f"{args.source} ")
    same |= Path(args.source).exists()  # a folder may have several names
    written = {"source": args.source if same else source, "shard_tokens": job.shard_tokens}
    if args.tokenizer in ("bytes", *tiktoken.list_encoding_names()):
        written["tokenizer"] = job.about["tokenizer"]
    for name, value in written.items():
        given = getattr(args, name)
        if given not in (value, getattr(Args, name)):
            raise UserError(
                f"--{name}={given}: the parts in {parts} were written with --{name}={value}: "
                "use this value, or another --out"
            )


def merge_parts(args: Args, out: Path) -> None:
    """Concatenate the parts in OUT.parts, and cut them into the shards of `out`.

    Raises:
        UserError: if parts are missing or corrupted, or were written with other options.
    """
    parts = parts_folder(out)
    job = read_job(parts)
    check_merge_args(args, parts, job)
    if missing := _missing(parts, job):
        raise UserError(
            f"{parts}: {len(missing)} of {job.inputs} parts are missing, for example part "
            f"{missing[0]}: wait for all ranks, or run them again"
        )
    pieces: list[tuple[Path, ShardEntry | None, PartMeta | None]] = []
    for number in range(job.inputs):
        path = _part(parts, number)
        with file_errors(path / "meta.json", "remove this part, and run its rank again"):
            part = decode_json(read_bytes(path / "meta.json"), PartMeta)
            if part.identity != job.identity:
                raise ValueError("is a part of another source, or was written with other options")
        pieces += [(path / entry.file, entry, None) for entry in part.shards]
        pieces.append((path, None, part))  # after its last token
    total = sum(entry.tokens for _, entry, _ in pieces if entry)
    with atomic_folder(out) as folder:
        # Positions are pieces, not inputs: not those of an interrupted single process.
        progress = load_progress(folder, f"merge of {job.identity}")
        if job.tokenizer_file:
            copy_tokenizer(parts / bpe.FILE, folder)
        if not args.ignore_disk_space:
            require_disk(out, 2 * (total - progress.tokens), 0)
        with (
            ShardWriter(folder, job.name, job.shard_tokens, progress) as writer,
            tqdm(
                total=total, initial=writer.tokens, unit="tok", unit_scale=True, desc="merging"
            ) as bar,
        ):
            for i in range(progress.number, len(pieces)):
                path, entry, part_meta = pieces[i]
                if part_meta:
                    counts = part_meta.documents, 0, part_meta.skipped_documents
                    writer.add(Chunk(i, 0, *counts, np.empty(0, np.uint16)))
                    continue
                assert entry
                tokens = open_shard(path)
                if sha256(path) != entry.sha256:
                    raise UserError(
                        f"{path}: its sha256 does not match meta.json: remove the folder "
                        f"{path.parent}, and run its rank again"
                    )
                writer.add(Chunk(i, 0, 0, 0, 0, tokens))
                bar.update(len(tokens))
            meta = write_corpus(folder, job.about, writer)
    print_summary(out, meta)
    print(f"{parts} is no longer needed")


# --------------------------------------------------------------------------------------------------
# shards of other projects


def import_shards(args: Args, out: Path, files: list[Path]) -> None:
    """Write a meta.json for the shards of llm.c, modded-nanogpt, build-nanogpt or nanoGPT.

    OUT contains links to the files, which stay where they are.

    Raises:
        UserError: if a file is not a shard, or --tokenizer is missing or wrong.
    """
    check_import_args(args, "shards")
    encoding = given_tokenizer(args)
    shards: list[dict[str, Any]] = []
    n_documents = 0
    total = sum(path.stat().st_size for path in files)
    with (
        atomic_folder(out) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="reading shards") as bar,
    ):
        if file := tokenizer_file(args, encoding):
            copy_tokenizer(file, folder)
        for path in files:
            match = SHARD_NAME.fullmatch(path.name)
            assert match
            format = shard_format(path)
            tokens = open_shard(path, format)
            n_documents += check_tokens(path, tokens, encoding, args.tokenizer)
            (folder / path.name).symlink_to(path.absolute())
            entry = {"file": path.name, "split": match[1], "tokens": len(tokens)}
            entry |= {"sha256": sha256(path)} | ({} if format == "llm.c" else {"format": format})
            shards.append(entry)
            bar.update(path.stat().st_size)
        if missing := {"train", "val"} - {shard["split"] for shard in shards}:
            raise UserError(
                f"--source={args.source}: found no shard with {missing.pop()} in its name: a "
                "corpus needs training and validation shards"
            )
        meta = about_corpus(args, encoding, Source([], None)) | {
            "documents": n_documents,
            "tokens": sum(shard["tokens"] for shard in shards),
            "shards": shards,
        }
        atomic_write(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    print_summary(out, meta)


def check_import_args(args: Args, kind: str) -> None:
    """Raise UserError if an option is set that has no effect when shards are imported."""
    unused = ["subset", "split", "revision", "column", "shuffle_seed", "on_error"]
    unused += ["shard_tokens", "ignore_disk_space"] if kind == "shards" else []
    for name in unused:
        if getattr(args, name) != getattr(Args, name):
            raise UserError(
                f"--{name}: has no effect, because --source={args.source} contains token shards, "
                "which are imported as they are: remove it"
            )


def given_tokenizer(args: Args, default: str | None = None) -> tiktoken.Encoding:
    """Return the tokenizer of existing shards."""
    known = set(tiktoken.list_encoding_names())
    if default in known and args.tokenizer in known - {default}:
        raise UserError(
            f"--tokenizer={args.tokenizer}: the metadata of --source={args.source} names the "
            f"tokenizer {default}: remove this option"
        )
    name = args.tokenizer or default
    if not name:
        raise UserError(
            f"--source={args.source}: the shards do not record their tokenizer: specify it, for "
            "example --tokenizer=gpt2 for those of build-nanogpt, llm.c and modded-nanogpt"
        )
    encoding = choose_tokenizer(name)
    if isinstance(encoding, int):
        raise UserError(f"--tokenizer={name}: the shards are already tokenized")
    return encoding


def import_datatrove(args: Args, name: str, out: Path, files: list[Path]) -> None:
    """Copy the tokens of datatrove's .ds files into shards, in the order of the file names.

    Raises:
        UserError: if the files have 4 bytes per token, or --tokenizer is missing or wrong.
    """
    check_import_args(args, "datatrove")
    sources = [datatrove_file(path) for path in files]
    named = {tokenizer for _, _, tokenizer in sources if tokenizer}
    if len(named) > 1:
        raise UserError(f"--source={args.source}: its files have different tokenizers: {named}")
    default = named.pop() if named else None
    encoding = given_tokenizer(args, default)
    args = replace(args, tokenizer=args.tokenizer or default)
    version = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    total = sum(len(tokens) for tokens, _, _ in sources)
    with atomic_folder(out) as folder:
        source = Source([], version)
        progress = load_progress(folder, identity_of(args, name, source, encoding))
        if file := tokenizer_file(args, encoding):
            copy_tokenizer(file, folder)
        if not args.ignore_disk_space:
            require_disk(out, 2 * (total - progress.tokens), 0)
        with (
            ShardWriter(folder, name, args.shard_tokens, progress) as writer,
            tqdm(
                total=total, initial=writer.tokens, unit="tok", unit_scale=True, desc="importing"
            ) as bar,
        ):
            for i in range(progress.number, len(files)):
                tokens, n_documents, _ = sources[i]
                n_ends = check_tokens(files[i], tokens, encoding, args.tokenizer)
                n = n_ends if n_documents is None else n_documents
                writer.add(Chunk(i, 0, n, n, 0, tokens))
                bar.update(len(tokens))
            meta = write_corpus(folder, about_corpus(args, encoding, source), writer)
    print_summary(out, meta)


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    stdlib, hub = args.source == "stdlib", args.source == FINEWEB
    name = "fineweb_edu" if hub else Path(args.source).name.split(".")[0] or "corpus"
    if hub and args.subset not in (None, "sample-10BT"):
        name += "_" + re.sub(r"\W+", "_", args.subset.removeprefix("sample-"))
    out = args.out or Path("data") / name
    check_args(args, out)
    local = not (stdlib or args.merge) and Path(args.source).exists()
    kind, files = source_files(args.source) if local else ("", [])
    if args.merge:
        merge_parts(args, out)
    elif args.rank is not None and args.world_size is not None:
        tokenize_parts(args, name, out, args.rank, args.world_size)
    elif kind == "shards":
        import_shards(args, out, files)
    elif kind == "datatrove":
        import_datatrove(args, name, out, files)
    else:
        tokenize_corpus(args, name, out)


def check_args(args: Args, out: Path) -> None:
    if not out.name or out.name == "..":
        raise UserError(f"--out={out}: name a new folder")
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(
            f"--shard_tokens={args.shard_tokens} must be between 2 and 2**31 - 1, the maximum in a "
            "shard's header"
        )
    if not 1 <= args.processes <= 1024:
        raise UserError(f"--processes={args.processes} must be between 1 and 1,024")
    if args.shuffle_seed is not None and not 0 <= args.shuffle_seed < 2**32:
        raise UserError(f"--shuffle_seed={args.shuffle_seed} must be between 0 and 2**32 - 1")
    if (args.rank is None) != (args.world_size is None):
        raise UserError("--rank and --world_size: use both, or neither")
    if args.rank is not None and args.world_size is not None:
        if not 0 <= args.rank < args.world_size:
            raise UserError(
                f"--rank={args.rank} must be between 0 and world_size - 1 = {args.world_size - 1}"
            )
        if args.merge:
            raise UserError("--merge: remove --rank and --world_size; it runs once, at the end")
        if args.source == "stdlib":
            raise UserError("--source=stdlib: is a single input, which cannot be split over ranks")
    local = args.source == "stdlib" or Path(args.source).exists()
    if not (local or args.merge or HUB_NAME.fullmatch(args.source)):
        raise UserError(
            f"--source={args.source}: no such file or folder: use a path, {FINEWEB} or stdlib"
        )


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,), use_underscores=True))
