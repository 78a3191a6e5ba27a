"""Corpora: the built-in one, local files, how they are cut into shards, interrupted runs."""

import hashlib
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import sysconfig
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script

import fineweb
from stagewise import builtin, sources, tokenizing
from stagewise.data import get_tokenizer, load_meta, open_shard
from stagewise.errors import UserError
from stagewise.tokenizing import DOCUMENTS_AT_A_TIME, Chunk
from stagewise.writer import PROGRESS, Progress, ShardWriter, atomic_folder

TEXTS = ["First document.\nTwo lines.", "Second — with ünïcode.", "Third " * 40, "", "Last"]


def read_corpus(folder, first_shard_was_cut=False):
    """The tokens in the order of the documents."""
    parts = [open_shard(folder / shard["file"]) for shard in load_meta(folder)["shards"]]
    if first_shard_was_cut:  # its rest is listed last
        parts.insert(1, parts.pop())
    return np.concatenate(parts)


def stream(texts):
    return [t for text in texts for t in [256, *text.encode()]]


def write(path, texts=TEXTS):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_text(texts[0])
    return path


def run(monkeypatch, tmp_path, source, **options):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fineweb.tqdm, "monitor_interval", 0)
    args = fineweb.Args(source=str(source), out=tmp_path / "out", tokenizer="bytes", processes=2)
    for key, value in options.items():
        setattr(args, key, value)
    fineweb.main(args)
    return tmp_path / "out"


# --------------------------------------------------------------------------------------------------
# sources


def test_built_in_corpus_is_the_standard_library(corpus):
    meta = load_meta(corpus)
    assert (meta["source"], meta["tokenizer"], meta["vocab_size"]) == ("stdlib", "bytes", 257)
    tokens = read_corpus(corpus)
    assert len(tokens) == meta["tokens"] > 1_000_000
    assert (tokens == 256).sum() == meta["documents"]
    text = get_tokenizer("bytes").decode([t for t in tokens if t != 256])
    for name in ("argparse.py", "json/decoder.py"):
        assert Path(sysconfig.get_paths()["stdlib"], name).read_text() in text
    val, train = meta["shards"]
    assert (val["split"], train["split"]) == ("val", "train")
    assert val["tokens"] == meta["tokens"] // 10
    for shard in meta["shards"]:
        digest = hashlib.sha256((corpus / shard["file"]).read_bytes()).hexdigest()
        assert digest == shard["sha256"]
    assert {p.name for p in corpus.iterdir()} == {
        "hellaswag.jsonl",
        "meta.json",
        "stdlib_train_000001.bin",
        "stdlib_val_000000.bin",
    }


def test_continuation_task_is_made_of_held_out_documents(corpus):
    def text_of(split):
        tokens = open_shard(next(corpus.glob(f"*_{split}_*"))).tolist()
        return bytes(t for t in tokens if t != 256).decode("utf-8", "ignore")

    examples = [json.loads(line) for line in (corpus / "hellaswag.jsonl").read_text().splitlines()]
    assert len(examples) > 300
    val, train = text_of("val"), text_of("train")
    documents = dict(fineweb.stdlib_documents())
    for example in examples[::5]:
        true = example["ctx"] + " " + example["endings"][example["label"]] + "\n"
        assert true in val and true in documents[example["activity_label"]]
        assert true[:-1] not in train
        assert len(example["endings"]) == 4
        assert all(8 <= len(e) <= 32 and "\n" not in e for e in example["endings"])
    labels = np.bincount([e["label"] for e in examples])
    assert (labels > len(examples) / 6).all()


def test_continuation_task_is_empty_if_the_held_out_documents_are_too_short():
    held_out = [("a", "x" * 100 + " and this is how it ends\n")]
    assert builtin.continuation_task(held_out, "", 10) == []


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".JSONL", ".json", ".jsonl.gz", ".json.zst", ".parquet", ".txt", ".txt.gz"]
)
def test_local_files(monkeypatch, tmp_path, suffix):
    import pyarrow

    kind, compression = suffix.lower().removesuffix(".gz").removesuffix(".zst"), Path(suffix).suffix
    kind = ".jsonl" if kind == ".json" else kind
    source = write(tmp_path / f"plain{kind}").rename(tmp_path / f"corpus{suffix}")
    if compression in (".gz", ".zst"):
        text, codec = source.read_bytes(), {".gz": "gzip", ".zst": "zstd"}[compression]
        with pyarrow.CompressedOutputStream(str(source), codec) as f:
            f.write(text)
    out = run(monkeypatch, tmp_path, source)
    assert read_corpus(out).tolist() == stream(TEXTS[:1] if kind == ".txt" else TEXTS)
    assert {p.name for p in out.iterdir()} == {
        "corpus_train_000001.bin",
        "corpus_val_000000.bin",
        "meta.json",
    }


def test_folder_is_read_in_the_order_of_file_names(monkeypatch, tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for i, part in enumerate((TEXTS[:2], TEXTS[2:])):
        write(source / f"part{i}.jsonl", part)
    out = run(monkeypatch, tmp_path, source, shard_tokens=100)
    shards = load_meta(out)["shards"]
    n = len(stream(TEXTS))
    assert 300 < n < 400
    assert [s["tokens"] for s in shards] == [n // 10, 100, 100, n - 300, 100 - n // 10]
    assert [s["split"] for s in shards] == ["val"] + ["train"] * 4
    assert read_corpus(out, first_shard_was_cut=True).tolist() == stream(TEXTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_file_names_are_no_patterns(monkeypatch, tmp_path, suffix):
    write(tmp_path / f"a1{suffix}", ["a text of another file, long enough for a corpus"])
    out = run(monkeypatch, tmp_path, write(tmp_path / f"a[12]{suffix}"))
    assert read_corpus(out).tolist() == stream(TEXTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_content_that_changed_within_the_same_time_stamp_is_read_again(
    monkeypatch, tmp_path, suffix
):
    first = ["one text that is long enough", "for a corpus"]
    source = write(tmp_path / f"corpus{suffix}", first)
    stamp = source.stat().st_mtime_ns
    assert read_corpus(run(monkeypatch, tmp_path, source)).tolist() == stream(first)
    second = ["two text that is long enough", "for a corpus"]
    write(source, second)
    os.utime(source, ns=(stamp, stamp))
    (tmp_path / "out").rename(tmp_path / "first")
    assert read_corpus(run(monkeypatch, tmp_path, source)).tolist() == stream(second)


def write_with_bad_documents(path):
    """Documents 1 and 70 are null and not UTF-8."""
    texts: list = [f"document {i} is a short text" for i in range(100)]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text}).encode() for text in texts]
        lines[1], lines[70] = b'{"text": null}', b'{"text": "\xff"}'
        path.write_bytes(b"\n".join(lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        texts[1], texts[70] = None, b"\xff"
        column = pa.array([t.encode() if isinstance(t, str) else t for t in texts], pa.binary())
        pa.parquet.write_table(pa.table({"text": column.view(pa.string())}), path)
    return [text for i, text in enumerate(texts) if i not in (1, 70)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_bad_documents_stop_the_run_or_are_skipped(monkeypatch, tmp_path, suffix, capsys):
    source = tmp_path / f"bad{suffix}"
    good = write_with_bad_documents(source)
    with pytest.raises(UserError, match=r"document 1 is not valid text .*--on_error=skip"):
        run(monkeypatch, tmp_path, source)
    assert not list(tmp_path.glob("out*"))
    out = run(monkeypatch, tmp_path, source, on_error="skip")
    assert read_corpus(out).tolist() == stream(good)
    meta = load_meta(out)
    assert (meta["documents"], meta["skipped_documents"]) == (98, 2)
    assert "98 documents, 2 skipped" in capsys.readouterr().out


def test_finished_shards_are_kept_after_a_bad_document(monkeypatch, tmp_path, capsys):
    source = tmp_path / "bad.jsonl"
    good = write_with_bad_documents(source)
    lines = source.read_bytes().split(b"\n")
    lines[1] = lines[0]
    source.write_bytes(b"\n".join(lines))
    good.insert(1, good[0])
    with pytest.raises(UserError, match="document 70 is not valid text"):
        run(monkeypatch, tmp_path, source, shard_tokens=500)
    partial = tmp_path / "out.partial"
    before = inodes(partial)
    assert "finished shards are kept" in capsys.readouterr().err and len(before) == 3
    with pytest.raises(UserError, match="3 shards of an interrupted run with another source"):
        run(monkeypatch, tmp_path, source, shard_tokens=400)
    assert inodes(partial) == before
    out = run(monkeypatch, tmp_path, source, shard_tokens=500, on_error="skip")
    assert "continuing after 3 shards" in capsys.readouterr().err
    assert read_corpus(out, first_shard_was_cut=True).tolist() == stream(good)
    assert set(before.values()) & set(inodes(out).values())
    assert not partial.exists()
    again = tmp_path / "again"
    again.mkdir()
    at_once = run(monkeypatch, again, source, shard_tokens=500, on_error="skip")
    assert load_meta(at_once) == load_meta(out)


def test_many_documents_keep_their_order(monkeypatch, tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(40 * DOCUMENTS_AT_A_TIME - 1)]
    out = run(monkeypatch, tmp_path, write(tmp_path / "x.jsonl", texts))
    assert read_corpus(out).tolist() == stream(texts)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            '{"text": "fine"}\n{"text": \n',
            "document 1 is not valid text .a.jsonl, at byte 17: Input data was truncated",
        ),
        ("a.jsonl", '{"body": "no text"}\n', "missing required field `text`"),
        ("a.jsonl", '{"text": 3}\n', "text: expected `str`, got `int`"),
        ("a.jsonl", '{"text": ["a"]}\n', "text: expected `str`, got `array`"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "document 1 .* expected `str`, got `null`"),
        ("a.jsonl", '{"text": "too short"}\n', "only 10 tokens"),
        ("a.jsonl", "", "only 0 tokens"),
        ("a.jsonl", b'{"text": "\xff"}\n', "document 0 .*codec can't decode"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "document 0 is not valid text"),
        ("a.json", '[{"text": "a"}]', "a.json: a JSON array, not JSON Lines"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz: "),
        ("a.txt", b"\xff", "document 0 is not valid text .a.txt: 'utf-8'"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.csv", "text\nx", r"found 1 \*.csv files: use files of one format"),
    ],
)
def test_bad_source(monkeypatch, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, tmp_path / name)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(source="/nowhere"), "--source=/nowhere: no such file or folder"),
        (dict(shard_tokens=2**31), "the maximum in a shard's header"),
        (dict(shard_tokens=1), "must be between 2 and"),
        (dict(processes=0), "--processes=0 must be between 1 and"),
        (dict(tokenizer="o200k"), "tokenizer 'o200k' is unknown"),
        (dict(out=Path("/proc/x")), "--out=/proc/x: cannot be written"),
        (dict(out=Path("/dev/null/x")), "--out=/dev/null/x: cannot be written"),
    ],
)
def test_bad_options(monkeypatch, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, **{"source": "stdlib"} | options)


@pytest.mark.slow
def test_killed_worker_is_an_error(monkeypatch, tmp_path):
    def read(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sources.JsonLines, "read", read)
    with pytest.raises(UserError, match="was killed, .* use fewer --processes"):
        run(monkeypatch, tmp_path, write(tmp_path / "x.jsonl"))


def test_command_line(tmp_path):
    result = script(
        "fineweb.py", "--source=stdlib", f"--out={tmp_path / 'x'}", "--shard_tokens=3_000_000"
    )
    n_train, n_val, n_shards = re.search(
        r"x: ([\d,]+) training and ([\d,]+) validation tokens in (\d+) shards", result.stdout
    ).groups()
    meta = load_meta(tmp_path / "x")
    assert int(n_val.replace(",", "")) == meta["tokens"] // 10 < 3_000_000
    assert int(n_train.replace(",", "")) == meta["tokens"] - meta["tokens"] // 10
    assert int(n_shards) == len(meta["shards"]) > 3
    result = script("fineweb.py", f"--source={tmp_path / 'none'}", check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: --source=")


# --------------------------------------------------------------------------------------------------
# shards


@pytest.mark.parametrize(
    "n, sizes",
    [
        (50, [5, 45]),
        (99, [9, 90]),
        (100, [10, 90]),
        (101, [10, 1, 90]),
        (150, [15, 50, 85]),
        (230, [23, 100, 30, 77]),
        (950, [95] + 8 * [100] + [50, 5]),
        (999, [99] + 8 * [100] + [99, 1]),
        (1000, 10 * [100]),
        (1001, 10 * [100] + [1]),
        (1200, 12 * [100]),
    ],
)
@pytest.mark.parametrize("n_parts", [1, 7])
def test_validation_gets_one_shard_but_at_most_a_tenth(tmp_path, n, sizes, n_parts):
    progress = Progress("x", [])
    with ShardWriter(tmp_path, "x", 100, progress) as writer:
        for i, part in enumerate(np.array_split(np.arange(n, dtype=np.uint16), n_parts)):
            writer.add(Chunk(0, i, 1, n_parts, 0, part))
        writer.finish()
    (tmp_path / PROGRESS).unlink(missing_ok=True)
    assert [s["tokens"] for s in writer.shards] == sizes
    assert writer.shards[0]["tokens"] == min(100, n // 10)
    assert [s["split"] for s in writer.shards] == ["val"] + ["train"] * (len(sizes) - 1)
    assert [s["file"] for s in writer.shards] == [
        f"x_{s['split']}_{i:06d}.bin" for i, s in enumerate(writer.shards)
    ]
    assert {p.name for p in tmp_path.iterdir()} == {s["file"] for s in writer.shards}
    for shard in writer.shards:
        digest = hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()
        assert digest == shard["sha256"]
    parts = [open_shard(tmp_path / s["file"]).tolist() for s in writer.shards]
    if n < 1000:  # the rest of the first shard is listed last
        parts.insert(1, parts.pop())
    assert sum(parts, []) == list(range(n))


# --------------------------------------------------------------------------------------------------
# interrupted and simultaneous runs

# Runs fineweb.py, but stops in the middle of tokenizing until a line arrives on stdin.
PAUSED = """
import sys
import fineweb
original = fineweb.Workers.tokenize
def paused(*args):
    results = original(*args)
    yield next(results)
    print("paused", flush=True)
    sys.stdin.readline()
    yield from results
fineweb.Workers.tokenize = paused
with fineweb.report_user_errors():
    args = fineweb.Args("stdlib", fineweb.Path(sys.argv[1]), processes=2, shard_tokens=100_000)
    fineweb.main(args)
"""


def start_paused(out):
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, out],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "paused\n"
    return process


def inodes(folder):
    return {p.name: p.stat().st_ino for p in folder.glob("*.bin")}


def test_two_processes_with_the_same_out(monkeypatch, tmp_path):
    first = start_paused(tmp_path / "out")
    try:
        partial = tmp_path / "out.partial"
        before = inodes(partial)
        assert len(before) > 3 and not (tmp_path / "out").exists()
        with pytest.raises(UserError, match="another fineweb.py is writing it"):
            run(monkeypatch, tmp_path, "stdlib")
        assert before.items() <= inodes(partial).items()  # a thread may still write the last shard
        first.communicate("continue\n")
        assert first.returncode == 0
    finally:
        first.kill()
    documents = fineweb.stdlib_documents()
    assert read_corpus(tmp_path / "out").tolist() == stream(text for _, text in documents)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_continues(monkeypatch, tmp_path, capsys, number):
    process = start_paused(tmp_path / "out")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)  # waits for the worker processes too
    left = (tmp_path / "out.partial").exists()
    assert left and not (tmp_path / "out").exists()
    assert ("finished shards are kept" in stderr) == (number == signal.SIGINT)
    out = run(monkeypatch, tmp_path, "stdlib", shard_tokens=100_000)
    assert not (tmp_path / "out.partial").exists()
    assert "continuing after" in capsys.readouterr().err
    documents = fineweb.stdlib_documents()
    tokens = read_corpus(out, first_shard_was_cut=load_meta(out)["shards"][0]["tokens"] < 100_000)
    assert tokens.tolist() == stream(text for _, text in documents)


@pytest.mark.slow
def test_workers_that_are_killed_while_they_send_results(tmp_path):
    """The main process, which is stopped meanwhile, does not wait for the rest of a result."""
    process = start_paused(tmp_path / "out")
    try:
        process.send_signal(signal.SIGSTOP)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) >= 2
        time.sleep(3)  # enough to tokenize more than fits into a pipe
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate("\n", timeout=20)
    finally:
        process.kill()
    assert process.returncode == 1 and "a tokenizer process was killed" in stderr


def test_workers_do_not_inherit_the_handler_of_sigterm(monkeypatch, tmp_path):
    """They could send its exception while they are terminated."""
    called = multiprocessing.Value("q", 0)

    def handler(*args):
        called.value = 1

    def read_documents(*args):
        raise UserError("an error")

    monkeypatch.setattr(tokenizing, "read_documents", read_documents)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(UserError, match="an error"):
            run(monkeypatch, tmp_path, write(tmp_path / "x.jsonl"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called.value == 0


@pytest.mark.parametrize("error", [UserError, ValueError, None])
def test_messages_of_workers_fit_into_a_pipe_at_once(monkeypatch, tmp_path, error):
    largest, send = multiprocessing.Value("q", 0), Connection._send_bytes

    def record(self, buffer):
        with largest:
            largest.value = max(largest.value, len(buffer))
        send(self, buffer)

    def read_documents(*args):
        raise error("a long message" * 10_000)

    monkeypatch.setattr(Connection, "_send_bytes", record)
    write(tmp_path / "x.jsonl", ["a long document " * 10_000] * 200)
    if error:
        monkeypatch.setattr(tokenizing, "read_documents", read_documents)
        with pytest.raises(error, match="a long message"):
            run(monkeypatch, tmp_path, tmp_path / "x.jsonl")
    else:
        run(monkeypatch, tmp_path, tmp_path / "x.jsonl")
    assert 100 < largest.value < select.PIPE_BUF - 4  # with the length of the message


def test_results_of_workers_that_cannot_be_written(monkeypatch, tmp_path):
    class OnFullDisk(tokenizing._Call):
        def __init__(self, pool, file, function, *args):
            full = function is tokenizing._tokenize
            super().__init__(pool, Path("/dev/full") if full else file, function, *args)

    monkeypatch.setattr(tokenizing, "_Call", OnFullDisk)
    with pytest.raises(UserError, match="out: cannot be written .*No space left on device"):
        run(monkeypatch, tmp_path, write(tmp_path / "x.jsonl"))


def test_existing_out_is_not_touched(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        run(monkeypatch, tmp_path, "stdlib")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["thesis.txt", ".lock", None])
def test_users_own_partial_folder_is_not_touched(monkeypatch, tmp_path, file):
    partial = tmp_path / "out.partial"
    if file:
        partial.mkdir()
        (partial / file).write_text("years of work")
    else:
        partial.write_text("years of work")
    with pytest.raises(UserError, match=r"out.partial exists, but was not created by fineweb.py"):
        run(monkeypatch, tmp_path, "stdlib")
    assert (partial / file if file else partial).read_text() == "years of work"
    assert not (tmp_path / "out").exists()


def test_full_disk(monkeypatch, tmp_path):
    def write_shard(path, tokens):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stagewise.writer.write_shard", write_shard)
    with pytest.raises(UserError, match="cannot be written .*No space left on device"):
        run(monkeypatch, tmp_path, "stdlib")
    assert not list(tmp_path.glob("out*"))


def test_out_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot be written"), atomic_folder(out) as folder:
        (folder / "new").write_text("new")
        out.mkdir()
        (out / "file").write_text("old")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "old"


def test_a_validation_set_too_short_for_a_task_has_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fineweb, "stdlib_documents", lambda: [("a.py", "x = 1\n" * 100)])
    out = run(monkeypatch, tmp_path, "stdlib")
    assert {p.name for p in out.glob("*.jsonl")} == set()
    assert "too short for a HellaSwag-style task" in capsys.readouterr().err


def test_a_source_folder_without_known_files_names_what_it_has(monkeypatch, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.jsonl")
    write(folder / "b.txt")
    for name in ("README.md", ".gitattributes", "c.bin"):
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=r"found 1 \*\.bin, 1 jsonl, 1 txt files"):
        run(monkeypatch, tmp_path, folder)


def test_a_folder_that_cannot_be_listed_is_an_error(monkeypatch, tmp_path):
    """Its files must not be missing without a message."""
    source = tmp_path / "source"
    (source / "denied").mkdir(parents=True)
    write(source / "a.jsonl")
    original = os.scandir

    def scandir(path):
        if str(path).endswith("denied"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="source=.*source: Permission denied"):
        run(monkeypatch, tmp_path, source)


@pytest.mark.parametrize("how", ["shard", "progress", "position"])
def test_an_interrupted_corpus_that_was_changed_is_not_continued(monkeypatch, tmp_path, how):
    source = tmp_path / "bad.jsonl"
    write_with_bad_documents(source)
    with pytest.raises(UserError, match="document 1 "):
        run(monkeypatch, tmp_path, source)
    source.write_text(source.read_text("latin-1").replace("null", '"a text"'), "latin-1")
    with pytest.raises(UserError, match="document 70 "):
        run(monkeypatch, tmp_path, source, shard_tokens=500)
    partial = tmp_path / "out.partial"
    progress = json.loads((partial / PROGRESS).read_text())
    if how == "shard":
        path = partial / progress["shards"][0]["file"]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif how == "progress":
        (partial / PROGRESS).write_text("{")
    else:
        (partial / PROGRESS).write_text(json.dumps(progress | {"document": -5}))
    with pytest.raises(UserError, match="progress.json: the interrupted run cannot be continued"):
        run(monkeypatch, tmp_path, source, shard_tokens=500, on_error="skip")


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_an_out_without_a_name_is_an_error(out):
    with pytest.raises(UserError, match="name a new folder"):
        fineweb.main(fineweb.Args("stdlib", Path(out)))
