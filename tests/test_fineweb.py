"""Corpora: the embedded one, and local files of every kind."""

import hashlib
import json
import os
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import fineweb
from data import get_tokenizer, load_meta, open_shard
from errors import UserError

from conftest import script

TEXTS = ["First document.\nTwo lines.", "Second — with ünïcode.", "Third " * 40, "", "Last"]


def tokens_of(folder):
    return np.concatenate([open_shard(folder / shard["file"]) for shard in load_meta(folder)["shards"]])


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


def test_the_embedded_corpus_is_the_standard_library(corpus):
    meta = load_meta(corpus)
    assert (meta["source"], meta["tokenizer"], meta["vocab_size"]) == ("stdlib", "bytes", 257)
    tokens = tokens_of(corpus)
    assert len(tokens) == meta["tokens"] > 1_000_000 and (tokens == 256).sum() == meta["documents"]
    text = get_tokenizer("bytes").decode([t for t in tokens if t != 256])
    for name in ("argparse.py", "json/decoder.py"):
        assert Path(sysconfig.get_paths()["stdlib"], name).read_text() in text
    val, train = meta["shards"]
    assert (val["split"], train["split"]) == ("val", "train") and val["tokens"] == meta["tokens"] // 10
    for shard in meta["shards"]:
        assert hashlib.sha256((corpus / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_the_continuation_task_is_true_to_held_out_files(corpus):
    examples = [json.loads(line) for line in (corpus / "hellaswag.jsonl").read_text().splitlines()]
    assert len(examples) > 300
    val = bytes(t for t in open_shard(next(corpus.glob("*_val_*"))).tolist() if t != 256).decode("utf-8", "ignore")
    train = bytes(t for t in open_shard(next(corpus.glob("*_train_*"))).tolist() if t != 256).decode("utf-8", "ignore")
    documents = dict(fineweb.stdlib_documents())
    for example in examples:
        true = example["ctx"] + " " + example["endings"][example["label"]] + "\n"
        assert true in val and true in documents[example["activity_label"]]
        assert true[:-1] not in train
        assert len(example["endings"]) == 4 and all(8 <= len(e) <= 32 and "\n" not in e for e in example["endings"])
    labels = np.bincount([e["label"] for e in examples])
    assert (labels > len(examples) / 6).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_local_files(monkeypatch, tmp_path, suffix):
    source = write(tmp_path / f"corpus{suffix}")
    out = run(monkeypatch, tmp_path, source)
    assert tokens_of(out).tolist() == stream(TEXTS[:1] if suffix == ".txt" else TEXTS)
    assert sorted(p.name for p in out.iterdir()) == ["corpus_train_000001.bin", "corpus_val_000000.bin", "meta.json"]


def test_a_folder_is_read_in_the_order_of_names_and_cut_into_shards(monkeypatch, tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for i, part in enumerate((TEXTS[:2], TEXTS[2:])):
        write(source / f"part{i}.jsonl", part)
    out = run(monkeypatch, tmp_path, source, shard_tokens=100)
    meta = load_meta(out)
    assert [s["tokens"] for s in meta["shards"][:-1]] == [100] * (len(stream(TEXTS)) // 100)
    assert [s["split"] for s in meta["shards"]] == ["val"] + ["train"] * (len(meta["shards"]) - 1)
    assert tokens_of(out).tolist() == stream(TEXTS)


@pytest.mark.parametrize("n, sizes", [(50, [5, 45]), (100, [10, 90]), (199, [19, 180]), (200, [100, 100]), (301, [100, 100, 100, 1])])
def test_less_than_two_shards_give_a_tenth_to_validation(tmp_path, n, sizes):
    writer = fineweb.ShardWriter(tmp_path, "x", shard_tokens=100)
    for part in np.array_split(np.arange(n, dtype=np.uint16), 7):
        writer.add(part)
    writer.close()
    assert [s["tokens"] for s in writer.shards] == sizes and [s["split"] for s in writer.shards[:2]] == ["val", "train"]
    assert np.concatenate([open_shard(tmp_path / s["file"]) for s in writer.shards]).tolist() == list(range(n))


def test_many_documents_keep_their_order(monkeypatch, tmp_path):
    """More than are handed to a process at a time."""
    texts = [f"document {i} " * (i % 7 + 1) for i in range(2500)]
    out = run(monkeypatch, tmp_path, write(tmp_path / "x.jsonl", texts))
    assert tokens_of(out).tolist() == stream(texts)


def test_a_killed_worker_ends_in_a_message_and_not_in_a_wait():
    with pytest.raises(UserError, match="was killed, .* use fewer --processes"):
        list(fineweb.tokenized(lambda start, stop: os.kill(os.getpid(), signal.SIGKILL), 1000, get_tokenizer("bytes"), 2))


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": \n', "cannot be read as json"),
        ("a.jsonl", '{"body": "no text"}\n', r"needs a column `text` of strings; it has \['body'\]"),
        ("a.jsonl", '{"text": 3}\n', "needs a column `text` of strings"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "document 1: its `text` is null"),
        ("a.jsonl", '{"text": "too short"}\n', "only 10 tokens"),
        ("a.jsonl", "", "a.jsonl"),
        ("a.jsonl", b'{"text": "\xff"}\n', "documents 0 to 0 is not UTF-8"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.csv", "text\nx", "needs files of one kind of .parquet, .jsonl, .txt"),
    ],
)
def test_bad_sources_are_refused_by_name(monkeypatch, tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=named):
        run(monkeypatch, tmp_path, tmp_path / name)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_existing_folder_a_missing_source_and_a_large_vocabulary_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        run(monkeypatch, tmp_path, tmp_path / "nothing")
    with pytest.raises(UserError, match="what a shard's header can say"):
        run(monkeypatch, tmp_path, "stdlib", shard_tokens=2**31)
    with pytest.raises(UserError, match="--out=/proc/x: cannot be written"):
        run(monkeypatch, tmp_path, "stdlib", out=Path("/proc/x"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        run(monkeypatch, tmp_path, "stdlib")


def test_a_held_out_part_too_small_for_the_task_gives_an_empty_one():
    assert fineweb.continuation_task([("a", "x" * 100 + " and this is how it ends\n")], "", 10) == []


def test_a_second_try_after_an_interrupted_one_begins_anew(monkeypatch, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "corpus_train_000007.bin").write_text("left over")
    out = run(monkeypatch, tmp_path, write(tmp_path / "corpus.txt"))
    assert not partial.exists() and not list(out.glob("*7.bin"))


def test_from_the_command_line(tmp_path):
    result = script("fineweb.py", "--source", "stdlib", "--out", tmp_path / "x", "--shard_tokens", "3_000_000")
    assert "validation tokens in" in result.stdout
    result = script("fineweb.py", "--source", tmp_path / "none", check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: --source=")
