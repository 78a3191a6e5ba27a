"""Corpora of many files: several machines, shuffling, and datasets on the Hub."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED_DATA
from test_fineweb import read_corpus, stream, write

import fineweb
from stagewise import bpe
from stagewise.data import load_meta, open_shard, write_shard
from stagewise.errors import UserError
from stagewise.sources import TextFiles, document_order, local_source, prepare, source_files

N_FILES = 5


def documents(number):
    """Documents of a file; those of file 3 are long, and file 4 has none."""
    if number == 4:
        return []
    repeat = 40 if number == 3 else 1
    return [f"file {number}, document {i} " * (1 + i % 5) * repeat for i in range(70 + number)]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(N_FILES):
        write(folder / f"{number}.jsonl", documents(number))
    return folder


def tokenize(source, out, **options):
    """Run fineweb.py's main; the shards are small, so that documents cross their boundaries."""
    options = dict(tokenizer="bytes", shard_tokens=5000, processes=2) | options
    fineweb.main(fineweb.Args(str(source), out, **options))
    return out


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def in_ranks(source, out, world_size, **options):
    for rank in reversed(range(world_size)):
        tokenize(source, out, rank=rank, world_size=world_size, **options)
    fineweb.main(fineweb.Args(str(source), out, merge=True))
    return out


# --------------------------------------------------------------------------------------------------
# several machines


@pytest.mark.parametrize("options", [{}, {"shuffle_seed": 7}, {"tokenizer": "bpe:400"}])
def test_ranks_and_workers_do_not_change_a_bit(source, tmp_path, options):
    """Not even where the shards are cut, although documents cross the boundaries."""
    whole = contents(tokenize(source, tmp_path / "one", processes=1, **options))
    assert len(whole) > 10
    assert contents(tokenize(source, tmp_path / "three", processes=3, **options)) == whole
    for world_size in (2, 7):
        out = in_ranks(source, tmp_path / f"ranks{world_size}", world_size, **options)
        assert contents(out) == whole, world_size


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".txt"])
def test_ranks_of_every_format(monkeypatch, tmp_path, suffix):
    folder = tmp_path / "source"
    folder.mkdir()
    monkeypatch.setattr("stagewise.sources.TEXT_FILES", 3)
    for number in range(3 if suffix != ".txt" else 10):
        if suffix == ".jsonl.gz":
            lines = write(tmp_path / "x.jsonl", documents(number)).read_bytes()
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
        else:
            write(folder / f"{number:02d}{suffix}", documents(number % 4))
    whole = contents(tokenize(folder, tmp_path / "one", shuffle_seed=1, shard_tokens=1000))
    out = in_ranks(folder, tmp_path / "two", 2, shuffle_seed=1, shard_tokens=1000)
    assert contents(out) == whole


@pytest.mark.skipif(
    not (SHARED_DATA / "edu_text").exists(), reason="needs the texts in shared/data/edu_text"
)
def test_ranks_of_prose_with_the_bpe_of_gpt2(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    from pyarrow import parquet

    folder = tmp_path / "source"
    folder.mkdir()
    for path in sorted((SHARED_DATA / "edu_text").glob("*.parquet"))[:3]:
        table = parquet.read_table(path).slice(0, 60)
        parquet.write_table(table, folder / path.name, row_group_size=25)
    options = dict(tokenizer="gpt2", shard_tokens=20_000, shuffle_seed=0)
    whole = contents(tokenize(folder, tmp_path / "one", processes=1, **options))
    assert contents(tokenize(folder, tmp_path / "two", processes=3, **options)) == whole
    assert contents(in_ranks(folder, tmp_path / "ranks", 2, **options)) == whole


# Runs fineweb.py with the options in argv; it kills itself when it writes shard number KILL.
KILLED = """
import os, signal, sys
import fineweb, tyro
from stagewise import writer
original = writer.write_shard
written = 0
def write_shard(path, tokens):
    global written
    written += 1
    if written == int(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, tokens)
writer.write_shard = write_shard
fineweb.main(tyro.cli(fineweb.Args, config=(tyro.conf.FlagCreatePairsOff,), use_underscores=True))
"""


def start(kill, source, out, *options):
    command = [sys.executable, "-c", KILLED, f"--source={source}", f"--out={out}", *options]
    command += ["--tokenizer=bytes", "--shard_tokens=5000", "--processes=2", "--shuffle_seed=3"]
    environment = os.environ | {"KILL": str(kill)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.slow
def test_kills_change_nothing(source, tmp_path):
    """In the middle of a file, of a part, and of the merge."""
    whole = contents(tokenize(source, tmp_path / "whole", shuffle_seed=3))
    n_shards = sum(path.suffix == ".bin" for path in whole)
    assert n_shards > 10
    out = tmp_path / "killed"
    for kill in (4, 5):
        process = start(kill, source, out)
        assert process.wait(60) == -signal.SIGKILL
    process = start(1000, source, out)
    assert b"continuing after 7 shards" in process.communicate(timeout=60)[1]
    assert contents(out) == whole and not out.with_name("killed.partial").exists()

    out = tmp_path / "ranks"
    for kill in (3, 4, 1000):
        ranks = [start(kill, source, out, f"--rank={r}", "--world_size=2") for r in range(2)]
        codes = {process.wait(60) for process in ranks}
        assert codes <= {0, -signal.SIGKILL} and (kill < 1000 or codes == {0})
    for kill in (3, 1000):
        assert start(kill, source, out, "--merge").wait(60) == (-9 if kill == 3 else 0)
    assert contents(out) == whole


def test_missing_changed_and_foreign_parts_are_errors(source, tmp_path):
    out, parts = tmp_path / "out", tmp_path / "out.parts"
    merge = fineweb.Args(str(source), out, merge=True)
    with pytest.raises(UserError, match="job.json: No such file.*--rank and --world_size first"):
        fineweb.main(merge)
    tokenize(source, out, rank=1, world_size=2)
    with pytest.raises(UserError, match="3 of 5 parts are missing, for example part 0: wait"):
        fineweb.main(merge)
    with pytest.raises(UserError, match="parts of another source or version, or with other"):
        tokenize(source, out, rank=0, world_size=2, shard_tokens=6000)
    tokenize(source, out, rank=0, world_size=2)
    for options in (dict(source="other"), dict(tokenizer="gpt2"), dict(shard_tokens=9)):
        name, value = options.popitem()
        with pytest.raises(UserError, match=f"--{name}={value}: the parts in .* written with"):
            fineweb.main(fineweb.replace(merge, **{name: value}))
    path = parts / "000002" / "part_train_000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match="000002/part_train_000000.bin: its sha256 does not match"):
        fineweb.main(merge)
    path.write_bytes(content)
    meta = json.loads((parts / "000000/meta.json").read_text())
    (parts / "000000/meta.json").write_text(json.dumps(meta | {"identity": "x"}))
    with pytest.raises(UserError, match="000000/meta.json: is a part of another source"):
        fineweb.main(merge)
    (parts / "000000/meta.json").write_text(json.dumps(meta))
    fineweb.main(merge)
    assert contents(out) == contents(tokenize(source, tmp_path / "one"))


def test_a_rank_that_is_running_is_not_started_again(source, tmp_path):
    import filelock

    tokenize(source, tmp_path / "out", rank=0, world_size=2)
    with (
        filelock.FileLock(tmp_path / "out.parts/.rank_1.lock"),
        pytest.raises(UserError, match="out.parts: rank 1 is already running"),
    ):
        tokenize(source, tmp_path / "out", rank=1, world_size=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=1), "--rank and --world_size: use both"),
        (dict(rank=2, world_size=2), "--rank=2 must be between 0 and world_size - 1 = 1"),
        (dict(rank=0, world_size=1, merge=True), "--merge: remove --rank"),
        (dict(shuffle_seed=-1), "--shuffle_seed=-1 must be between"),
        (dict(tokenizer="bpe:100"), "--tokenizer=bpe:100: the size must be between 258 and 65,536"),
        (dict(column="body"), "missing required field `body`"),
    ],
)
def test_bad_options(source, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tokenize(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_cannot_be_split(tmp_path):
    write_shard(tmp_path / "a_train_1.bin", np.zeros(10, np.uint16))
    with pytest.raises(UserError, match="contains shards: import them without --rank"):
        tokenize(tmp_path, tmp_path / "out", rank=0, world_size=2)


def test_the_task_of_the_standard_library_is_held_out_after_shuffling(monkeypatch, tmp_path):
    named = fineweb.stdlib_documents()[:60]
    monkeypatch.setattr(fineweb, "stdlib_documents", lambda: named)
    out = tokenize("stdlib", tmp_path / "out", shuffle_seed=1, shard_tokens=100_000)
    val, *train = (
        bytes(t for t in open_shard(p) if t != 256)
        for p in sorted(out.glob("*.bin"), key=lambda path: "train" in path.name)
    )
    examples = [json.loads(line) for line in (out / "hellaswag.jsonl").read_text().splitlines()]
    assert len(examples) > 20
    for example in examples:
        passage = f"{example['ctx']} {example['endings'][example['label']]}".encode()
        assert passage in val and passage not in b"".join(train)


def test_the_standard_library_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="--source=stdlib: is a single input"):
        tokenize("stdlib", tmp_path / "out", rank=0, world_size=2)


# --------------------------------------------------------------------------------------------------
# order, columns, disk space, progress


def test_files_and_documents_are_shuffled(source, tmp_path):
    def lines(out):
        text = bytes(t if t != 256 else 10 for t in read_corpus(out, True)).decode()
        return text.strip("\n").split("\n")

    every = sorted(text for number in range(N_FILES) for text in documents(number))
    orders = []
    for seed in (None, 0, 1):
        out = tokenize(source, tmp_path / f"out{seed}", shuffle_seed=seed, shard_tokens=10**6)
        meta = load_meta(out)
        assert meta.get("shuffle_seed") == seed and ("shuffle_seed" in meta) == (seed is not None)
        orders.append(lines(out))
        assert sorted(orders[-1]) == every
        if seed is not None:
            files = [line.split(",")[0] for line in orders[-1]]
            changes = sum(a != b for a, b in zip(files, files[1:]))
            assert changes == 3  # files are read one after the other, to bound the memory
            assert [line for line in orders[-1] if "file 0," in line] != documents(0)
    assert orders[0] == [text for number in range(N_FILES) for text in documents(number)]
    assert orders[1] != orders[2]


def test_the_order_does_not_depend_on_the_version():
    """The same seed must always give the same corpus."""
    assert document_order(8, 1337, 5).tolist() == [0, 5, 3, 7, 6, 2, 4, 1]
    assert document_order(3, None, 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_column(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    rows = [{"n": i, "body": f"document {i}"} for i in range(9)]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    out = tokenize(path, tmp_path / "out", column="body")
    assert read_corpus(out).tolist() == stream(row["body"] for row in rows)
    with pytest.raises(UserError, match="x.*needs a `n` column|n: expected `str`, got `int`"):
        tokenize(path, tmp_path / "other", column="n")


def test_too_little_disk_space_is_an_error_before_the_start(monkeypatch, source, tmp_path):
    class Usage:
        free = 1000

    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(
        UserError, match="out: needs about .* GB for shards and .* --ignore_disk_space"
    ):
        tokenize(source, tmp_path / "out")
    with pytest.raises(UserError, match="1e-06 GB are free: free disk space"):
        tokenize(source, tmp_path / "out", rank=0, world_size=2)
    assert not (tmp_path / "out.partial").exists()
    tokenize(source, tmp_path / "out", ignore_disk_space=True)


def test_the_estimate_of_the_disk_space_is_not_too_low(source, tmp_path):
    from stagewise.data import get_tokenizer

    needs = []

    def require(out, shards, temporary, otherwise=""):
        needs.append((shards, temporary))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "require_disk", require)
        files = local_source(*source_files(str(source)), "text")
        numbers = list(range(N_FILES))
        fineweb.check_disk(tmp_path, files, get_tokenizer("bytes"), numbers)
        whole = load_meta(tokenize(source, tmp_path / "out"))["tokens"]
        # All inputs but the last are complete, and most of the last one.
        last = get_tokenizer("bytes"), numbers[-1:]
        fineweb.check_disk(tmp_path, files, *last, written=whole - 10)
        fineweb.check_disk(tmp_path, files, *last, written=10)
        # Inputs that have not been read count fully, however many tokens the others had.
        fineweb.check_disk(tmp_path, files, last[0], numbers[-2:], written=10 * whole)
        files.inputs = files.inputs[-1:]
        fineweb.check_disk(tmp_path, files, get_tokenizer("bytes"), [0])
    shards = 2 * whole
    assert shards <= needs[0][0] <= 1.2 * shards and needs[0][1] == 0
    *_, nearly, one, unread, alone = (shards for shards, _ in needs)
    assert nearly < 0.2 * shards and one == unread == alone


def test_progress_in_tokens_has_an_estimated_total(monkeypatch, source, tmp_path):
    totals = []
    update = fineweb.TokenBar.update

    def record(self, chunk):
        update(self, chunk)
        totals.append((self._bar.n, self._bar.total))

    monkeypatch.setattr(fineweb.TokenBar, "update", record)
    n_tokens = load_meta(tokenize(source, tmp_path / "out"))["tokens"]
    assert totals[-1][0] == n_tokens and totals[-1][1] == pytest.approx(n_tokens, rel=0.01)
    for n, total in totals[1:]:
        assert n <= total and total == pytest.approx(n_tokens, rel=0.3)


def test_temporary_files_are_those_of_two_inputs(monkeypatch, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(6):
        write(folder / f"{number}.parquet", documents(number % 4))
    work = tmp_path / "out.partial/.source"
    seen = []
    tokenize_input = fineweb.Workers.tokenize

    def watch(self, *args):
        for chunk in tokenize_input(self, *args):
            time.sleep(0.05)
            seen.append(len(list(work.iterdir())))
            yield chunk

    monkeypatch.setattr(fineweb.Workers, "tokenize", watch)
    tokenize(folder, tmp_path / "out", processes=1)
    assert max(seen) <= 4  # pending results refer to earlier ones
    assert not list((tmp_path / "out").glob(".*"))


def test_text_files_of_an_input(monkeypatch, tmp_path):
    monkeypatch.setattr("stagewise.sources.TEXT_FILES", 4)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    source = local_source(*source_files(str(tmp_path)), "text")
    assert [len(entry.files) for entry in source.inputs] == [4, 2]
    prepared = prepare(source, 1, tmp_path / "work")
    assert isinstance(prepared, TextFiles) and prepared.read([1, 0]) == ["text 5", "text 4"]


# --------------------------------------------------------------------------------------------------
# trained tokenizers


def test_an_interrupted_run_keeps_its_tokenizer(monkeypatch, source, tmp_path):
    """Training it again could give another one, if the library has changed."""
    monkeypatch.setattr("stagewise.tokenizing.SAMPLE_BYTES", 5000)
    bad = source / "9.jsonl"
    bad.write_text('{"text": null}\n')
    with pytest.raises(UserError, match="document 0 is not valid text .9.jsonl"):
        tokenize(source, tmp_path / "out", tokenizer="bpe:300", shard_tokens=500)
    trained = (tmp_path / "out.partial" / bpe.FILE).read_bytes()

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(fineweb, "train_tokenizer", fail)
    options = dict(tokenizer="bpe:300", shard_tokens=500, on_error="skip")
    out = tokenize(source, tmp_path / "out", **options)
    assert (out / bpe.FILE).read_bytes() == trained
    meta = load_meta(out)
    assert meta["skipped_documents"] == 1 and meta["vocab_size"] == 300


def test_the_sample_is_bounded(monkeypatch, source, tmp_path):
    monkeypatch.setattr("stagewise.tokenizing.SAMPLE_BYTES", 5000)
    seen = []
    train = bpe.train_bpe

    def record(texts, *args):
        texts = list(texts)
        seen.append(sum(len(text) for text in texts))
        train(texts, *args)

    monkeypatch.setattr(bpe, "train_bpe", record)
    tokenize(source, tmp_path / "out", tokenizer="bpe:300")
    assert 5000 <= seen[0] < 5200
    assert np.concatenate([read_corpus(tmp_path / "out")]).max() == 299


def test_paths_of_the_command_line_are_local(tmp_path):
    with pytest.raises(UserError, match="--source=/no/such/folder: no such file or folder"):
        tokenize(Path("/no/such/folder"), tmp_path / "out")


def fail_at(monkeypatch, n):
    """Let the n-th shard find a full disk."""
    written = []

    def write(path, tokens):
        written.append(path)
        if len(written) == n:
            raise OSError(28, "No space left on device")
        write_shard(path, tokens)

    monkeypatch.setattr("stagewise.writer.write_shard", write)


def test_a_merge_does_not_continue_a_single_process(source, tmp_path, monkeypatch):
    fail_at(monkeypatch, 4)
    with pytest.raises(UserError, match="No space left"):
        tokenize(source, tmp_path / "x")
    monkeypatch.undo()
    tokenize(source, tmp_path / "x", rank=0, world_size=1)
    with pytest.raises(UserError, match="other options"):
        fineweb.main(fineweb.Args(str(source), tmp_path / "x", merge=True))
    assert not (tmp_path / "x").exists()


def test_the_size_of_a_trained_tokenizer_cannot_change(source, tmp_path, monkeypatch):
    fail_at(monkeypatch, 3)
    with pytest.raises(UserError, match="No space left"):
        tokenize(source, tmp_path / "x", tokenizer="bpe:400", shard_tokens=500)
    monkeypatch.undo()
    with pytest.raises(UserError, match="other options"):
        tokenize(source, tmp_path / "x", tokenizer="bpe:300", shard_tokens=500)
    tokenize(source, tmp_path / "y", tokenizer="bpe:400", rank=0, world_size=2)
    with pytest.raises(UserError, match="with other options"):
        tokenize(source, tmp_path / "y", tokenizer="bpe:300", rank=1, world_size=2)


@pytest.mark.parametrize("moment", ["no space", "killed"])
def test_the_last_step_can_be_repeated(source, tmp_path, monkeypatch, moment):
    """Fewer than ten shards: at the end, the validation set is shortened to a tenth."""
    expected = contents(tokenize(source, tmp_path / "expected", shard_tokens=40_000))
    n = len(expected) - 1  # all shards; the last one is written when the corpus is complete
    out = tmp_path / "x"
    if moment == "no space":
        fail_at(monkeypatch, n + 1)
        with pytest.raises(UserError, match="No space left"):
            tokenize(source, out, shard_tokens=40_000)
        monkeypatch.undo()
    else:
        script = (
            "import os, fineweb, stagewise.writer; from pathlib import Path\n"
            "stagewise.writer.fsync = lambda path: os._exit(9)\n"
            f"fineweb.main(fineweb.Args({str(source)!r}, Path({str(out)!r}), tokenizer='bytes', "
            "shard_tokens=40_000, processes=1))"
        )
        assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 9
        assert (tmp_path / "x.partial/progress.json").exists()
    assert contents(tokenize(source, out, shard_tokens=40_000)) == expected
