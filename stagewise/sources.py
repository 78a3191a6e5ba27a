"""Documents to tokenize: local files, and files of a dataset on the Hugging Face Hub.

A source is a list of inputs. An input is one file, or up to TEXT_FILES text files. Just before it
is tokenized, it is prepared: downloaded, decompressed and indexed in a temporary folder. Several
processes can then read its documents in any order, with little memory.
"""

import contextlib
import os
import re
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stagewise.errors import UserError, file_errors, first_line
from stagewise.fileio import decode_json, open_file, read_bytes

FORMATS = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".json"),
    "txt": (".txt",),
    "datatrove": (".ds",),
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
TEXT_FILES = 4096  # text files per input
ROWS_PER_BATCH = 1024
# Estimates, only for the disk space: bytes of text per byte of a file.
EXPANSION = {".parquet": 2.5, ".gz": 3.5, ".zst": 3.5}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Shards of llm.c, modded-nanogpt, build-nanogpt and nanoGPT: the split, then possibly a number.
SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:bin|npy)")


@dataclass(frozen=True)
class Input:
    """A file, or several text files."""

    kind: str  # a key of FORMATS
    files: tuple[str, ...]  # paths; for the Hub, paths in the repository
    size: int  # of the files, in bytes
    text_bytes: int  # an estimate of the size of the documents

    @property
    def name(self) -> str:
        return Path(self.files[0]).name


@dataclass
class Source:
    """The inputs of a corpus, in order.

    Attributes:
        version: identifies the contents of the files.
        repository: the dataset on the Hub, or "" for local files.
        revision: its commit.
    """

    inputs: list[Input]
    version: Any
    column: str = "text"
    repository: str = ""
    revision: str = ""

    def shuffled(self, seed: int) -> "Source":
        """Return the source with its inputs in a random order."""
        order = np.random.RandomState([seed]).permutation(len(self.inputs))
        inputs = [self.inputs[i] for i in order]
        return Source(inputs, self.version, self.column, self.repository, self.revision)


def document_order(n: int, seed: int | None, number: int) -> np.ndarray:
    """Return the order in which the `n` documents of input `number` are read.

    This is the order in the file, or a permutation that depends on `seed` and `number`. RandomState
    is used because NumPy guarantees that its stream never changes.
    """
    if seed is None:
        return np.arange(n)
    return np.random.RandomState([seed, number]).permutation(n)


# --------------------------------------------------------------------------------------------------
# documents of a prepared input


@dataclass(frozen=True)
class JsonLines:
    """The documents of a JSON Lines file: a string in every line that is not blank."""

    name: str
    path: Path
    offsets: Path  # .npy, the position of every such line
    column: str

    def __len__(self) -> int:
        return len(_load(self.offsets))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return documents.

        Raises:
            ValueError: if one is invalid. The message names the file and the offset of the line.
        """
        texts = []
        offsets, schema = _load(self.offsets), _line(self.column)
        with open(self.path, "rb") as f:
            for i in indices:
                offset = int(offsets[i])
                f.seek(offset)
                line = f.readline()
                if offset == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                try:
                    texts.append(decode_json(line, schema).text)
                except ValueError as error:
                    where = f"{self.name}, at byte {offset:,}"
                    raise ValueError(f"{where}: {first_line(error)}") from None
        return texts


@lru_cache(maxsize=1)
def _load(offsets: Path) -> np.ndarray:
    return np.load(offsets, mmap_mode="r") if offsets.stat().st_size > 128 else np.empty(0, "q")


@lru_cache(maxsize=1)
def _line(column: str) -> Any:
    """The schema of a line. Other fields are ignored."""
    return msgspec.defstruct("Line", [("text", str)], rename={"text": column})


@dataclass(frozen=True)
class TextFiles:
    """The documents of text files: every file is one."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return documents. Raise ValueError if one is not UTF-8."""
        texts = []
        for path in (self.paths[i] for i in indices):
            try:
                texts.append(read_bytes(path).decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name}: {first_line(error)}") from None
        return texts


@dataclass(frozen=True)
class Rows:
    """The documents of a parquet file, as an Arrow file with a single column of strings."""

    name: str
    path: Path
    column: str

    def __len__(self) -> int:
        return int(_arrow(self.path)[1][-1])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return documents. Raise ValueError if one is null or not UTF-8."""
        reader, first = _arrow(self.path)
        texts: list[str] = []
        column: Any
        loaded = -1
        for i in indices:
            number = int(np.searchsorted(first, i, side="right")) - 1
            if number != loaded:
                loaded, column = number, reader.get_batch(number).column(0)
            try:
                text = column[int(i - first[number])].as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name}, row {i:,}: {first_line(error)}") from None
            if text is None:
                raise ValueError(f"{self.name}, row {i:,}: `{self.column}` is null")
            texts.append(text)
        return texts


@lru_cache(maxsize=1)
def _arrow(path: Path):
    """Return a reader of record batches, and the index of the first row of each."""
    import pyarrow  # slow to import

    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    return reader, np.cumsum([0, *sizes])


Documents = JsonLines | TextFiles | Rows


def prepare(source: Source, number: int, folder: Path) -> Documents:
    """Return the documents of an input.

    Args:
        folder: for temporary files; it must not exist. A download, a decompressed file, the offsets
            of lines, and the text column of parquet are stored there. They are never used again,
            because a cache could return an earlier version of a file.

    Raises:
        UserError: if a file cannot be downloaded or read, or does not have the format.
    """
    entry = source.inputs[number]
    folder.mkdir(parents=True)
    if source.repository:
        paths = [_download(source, file, folder / "download") for file in entry.files]
    else:
        paths = [Path(file) for file in entry.files]
    expanded = []
    for i, path in enumerate(paths):
        with file_errors(path, "fix or replace the file, or move it out of the source"):
            if codec := COMPRESSED.get(path.suffix.lower()):
                import pyarrow

                expanded.append(folder / f"{i:08d}_{path.stem[:200]}")
                with open_file(path) as f, open(expanded[-1], "wb") as out:
                    shutil.copyfileobj(pyarrow.CompressedInputStream(f, codec), out, 2**20)
                _remove_download(source, path)
            else:
                expanded.append(path)
    if entry.kind == "txt":
        return TextFiles(tuple(expanded))
    path, name = expanded[0], paths[0].name
    if entry.kind == "jsonl":
        offsets = folder / "offsets.npy"
        with file_errors(paths[0], "fix or replace the file, or move it out of the source"):
            np.save(offsets, _line_offsets(path))
        return JsonLines(name, path, offsets, source.column)
    arrow = folder / "text.arrow"
    _extract_column(path, source.column, arrow)
    _remove_download(source, path)
    return Rows(name, arrow, source.column)


def _line_offsets(path):
    offsets, position = array("q"), 0
    with open_file(path) as f:
        if f.peek(1024)[:1024].lstrip()[:1] == b"[":
            raise ValueError("a JSON array, not JSON Lines (one object per line)")
        for line in f:
            if not line.isspace():
                offsets.append(position)
            position += len(line)
    return np.array(offsets, "q")


def _parquet(path):
    """Open a parquet file."""
    from pyarrow import parquet

    try:
        with open_file(path):  # a pipe, or a file that cannot be read
            return parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # the readers raise many kinds of errors for corrupted files
        raise _not_parquet(path, error) from None


def _not_parquet(path, error):
    return UserError(
        f"{path}: cannot be read as parquet ({first_line(error)}): fix or replace the file, or "
        "move it out of the source"
    )


def _check_column(path, schema, column):
    import pyarrow

    types = dict(zip(schema.names, schema.types))
    if types.get(column) not in (pyarrow.string(), pyarrow.large_string()):
        found = ", ".join(f"{key}: {kind}" for key, kind in types.items())
        raise UserError(
            f"{path}: needs a `{column}` column of strings; found {found}: select one with --column"
        )


def _extract_column(path, column, arrow):
    import pyarrow

    file = _parquet(path)
    _check_column(path, file.schema_arrow, column)
    kind = file.schema_arrow.field(column).type
    schema = pyarrow.schema([(column, kind)])
    with open(arrow, "wb") as f, pyarrow.ipc.new_file(f, schema) as out:
        try:
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[column]):
                out.write_batch(pyarrow.record_batch(batch.columns, schema=schema))
        except OSError as error:
            if error.errno is not None:  # a full disk; errors of the format have no number
                raise
            raise _not_parquet(path, error) from None
        except Exception as error:
            raise _not_parquet(path, error) from None


# --------------------------------------------------------------------------------------------------
# local files


def source_files(source: str) -> tuple[str, list[Path]]:
    """Return the format of a local source, and its files in order of their paths.

    The format is a key of FORMATS, or "shards".

    Raises:
        UserError: if there are no files, files of several formats, or files of unknown formats.
    """
    path = Path(source)
    with file_errors(f"--source={source}", "use a readable file or folder"):
        files = sorted(_files_below(path)) if path.is_dir() else [path]
    # A folder with shards may also contain a script, a vocabulary or a benchmark.
    shards = [p for p in files if SHARD_NAME.fullmatch(p.name)]
    if shards:
        by_name: dict[str, Path] = {}
        for shard in shards:
            if (other := by_name.setdefault(shard.name, shard)) != shard:
                raise UserError(
                    f"--source={source}: {other} and {shard} have the same name: use shards of "
                    "a single corpus, with distinct file names"
                )
        return "shards", shards
    if any(p.suffix == ".ds" for p in files):
        return "datatrove", [p for p in files if p.suffix == ".ds"]
    # Hidden files, such as .gitattributes, and READMEs are not part of a dataset.
    ignored = ("readme", "license")
    files = [p for p in files if not p.name.startswith(".") and p.stem.lower() not in ignored]
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_format(file.name) or f"*{file.suffix}", []).append(file)
    if len(found) != 1 or not found.keys() <= FORMATS.keys():
        kinds = ", ".join(f"{len(paths)} {key}" for key, paths in sorted(found.items()))
        raise UserError(
            f"--source={source}: found {kinds or 'no'} files: use files of one format, "
            ".parquet, .jsonl, .json (JSON Lines) or .txt; the last three may be compressed "
            "(.gz, .zst)"
        )
    return found.popitem()


def _format(name):
    suffix = Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    return next((key for key, suffixes in FORMATS.items() if suffix in suffixes), None)


def _files_below(folder):
    def stop(error):
        raise error

    for parent, _, names in os.walk(folder, onerror=stop):
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def local_source(kind: str, files: list[Path], column: str) -> Source:
    """Return a source that reads local files.

    Raises:
        UserError: if a file cannot be read, or a parquet file has no such column of strings.
    """
    inputs, version = [], []
    per_input = TEXT_FILES if kind == "txt" else 1
    for i in range(0, len(files), per_input):
        size = text_bytes = 0
        for path in files[i : i + per_input]:
            advice = "fix or replace the file, or move it out of the source"
            with file_errors(path, advice), open_file(path) as f:  # no pipe
                status = os.fstat(f.fileno())
            version.append((str(path), status.st_size, status.st_mtime_ns))
            size += status.st_size
            text_bytes += _text_bytes(path, kind, status.st_size, column)
        names = tuple(str(path) for path in files[i : i + per_input])
        inputs.append(Input(kind, names, size, text_bytes))
    return Source(inputs, version, column)


def _text_bytes(path, kind, size, column):
    if kind != "parquet":
        return int(size * EXPANSION.get(path.suffix.lower(), 1))
    file = _parquet(path)
    _check_column(path, file.schema_arrow, column)
    index = file.schema_arrow.names.index(column)
    if len(file.schema_arrow.names) != file.metadata.num_columns:  # nested columns
        return int(size * EXPANSION[".parquet"])
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    return sum(group.column(index).total_uncompressed_size for group in groups)


# --------------------------------------------------------------------------------------------------
# Hugging Face Hub


def hub_source(
    repository: str, subset: str | None, split: str, revision: str | None, column: str
) -> Source:
    """Return a source that reads the files of a dataset on the Hub, in the order of `datasets`.

    Nothing is downloaded yet, except for lists of files.

    Raises:
        UserError: if the dataset, subset or split is not found, or its files have another format.
    """
    import datasets  # slow to import
    from huggingface_hub import HfApi

    wanted = " ".join(filter(None, (repository, subset, split, revision)))
    try:
        commit = HfApi().dataset_info(repository, revision=revision).sha
        builder = datasets.load_dataset_builder(repository, name=subset, revision=commit)
        files = dict(builder.config.data_files or {})
    except Exception as error:  # raised by the Hub, its HTTP library or the disk
        raise UserError(
            f"--source={repository}: could not be loaded from the Hub ({first_line(error)}): check "
            "the connection, --subset and --revision, or use a local --source"
        ) from None
    if split not in files:
        raise UserError(
            f"--split={split}: {repository} has no such split: use {', '.join(map(str, files))}"
        )
    prefix = f"hf://datasets/{repository}@{commit}/"
    names = [str(file).removeprefix(prefix) for file in files[split]]
    kinds = {_format(name) for name in names}
    if len(kinds) != 1 or not kinds <= {"parquet", "jsonl", "txt"}:
        found = ", ".join(sorted({Path(name).suffix for name in names}))
        raise UserError(
            f"{wanted}: has {found} files, not parquet, JSON Lines or text: use its parquet "
            "version with --revision=refs/convert/parquet"
        )
    try:
        sizes = _hub_sizes(HfApi(), repository, commit, names)
    except Exception as error:
        raise _not_downloaded(repository, error) from None
    kind = str(kinds.pop())
    inputs = []
    per_input = TEXT_FILES if kind == "txt" else 1
    for i in range(0, len(names), per_input):
        part = names[i : i + per_input]
        size = sum(sizes[name] for name in part)
        expansion = EXPANSION.get(Path(part[0]).suffix.lower(), 1)
        inputs.append(Input(kind, tuple(part), size, int(size * expansion)))
    return Source(inputs, [subset, split, commit], column, repository, str(commit))


def _hub_sizes(api, repository, commit, names):
    sizes: dict[str, int] = {}
    for i in range(0, len(names), 500):
        found = api.get_paths_info(
            repository, names[i : i + 500], revision=commit, repo_type="dataset"
        )
        sizes |= {file.path: file.size for file in found}
    return sizes


def _download(source, file, folder):
    """Download a file of a dataset. huggingface_hub resumes a broken connection."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(
            hf_hub_download(
                source.repository,
                file,
                repo_type="dataset",
                revision=source.revision,
                local_dir=folder,
            )
        )
    except Exception as error:
        raise _not_downloaded(f"{source.repository}/{file}", error) from None


def _not_downloaded(what, error):
    return UserError(
        f"{what}: could not be downloaded ({first_line(error)}): check the connection and the disk "
        "space, then repeat the command; finished shards are kept"
    )


def _remove_download(source, path):
    if source.repository:
        with contextlib.suppress(OSError):
            path.unlink()
