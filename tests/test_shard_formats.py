"""Shards of other projects, and other projects' readers on ours."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import script
from test_fineweb import TEXTS, read_corpus, stream, write

import fineweb
from stagewise import bpe
from stagewise.builtin import stdlib_documents
from stagewise.data import Shards, get_tokenizer, load_meta, verify_shards, write_shard
from stagewise.errors import UserError

needs_datatrove = pytest.mark.skipif(
    not importlib.util.find_spec("datatrove"), reason="needs the package datatrove"
)
TOKENS = (np.arange(3000) * 7919 % 256).astype(np.uint16)
TOKENS[::100] = 256  # <|endoftext|> of the tokenizer "bytes"


def import_shards(source, out, **options):
    fineweb.main(fineweb.Args(str(source), out, **({"tokenizer": "bytes"} | options)))
    return out


def assert_windows(folder, train, val):
    """Training reads these tokens, window by window."""
    meta = load_meta(folder)
    for split, parts in (("train", train), ("val", val)):
        shards = Shards(folder, split, 16, meta)
        x, y = shards.read(np.arange(len(shards)))
        expected = [part[: (len(part) - 1) // 16 * 16 + 1] for part in parts]
        assert np.array_equal(x.ravel(), np.concatenate([part[:-1] for part in expected]))
        assert np.array_equal(y.ravel(), np.concatenate([part[1:] for part in expected]))
    verify_shards(folder, meta)


# --------------------------------------------------------------------------------------------------
# shards that others read


class LlmcLoader:
    """The reading rule of llm.c, line by line.

    `dataloader_load_shard_` and `dataloader_load_batch` in llmc/dataloader.h, without shuffling,
    at commit f1e2ace651495b74ae22d45d1723443fd00ecd3a.
    """

    def __init__(self, path, B, T, process_rank=0, num_processes=1):
        self.B, self.T = B, T
        self.file = open(path, "rb")  # noqa: SIM115
        header = struct.unpack("256i", self.file.read(256 * 4))
        assert header[0] == 20240520, "Bad magic in the data file"
        assert header[1] == 1, "Bad version in data file"
        ntok = header[2]
        assert ntok > 0
        self.file.seek(0, 2)
        assert self.file.tell() == 256 * 4 + ntok * 2, "file size is not as expected"
        self.total_batch_size_bytes = num_processes * B * T * 2
        self.local_batch_offset_bytes = process_rank * B * T * 2
        self.shard_num_samples = (ntok * 2 - 2) // self.total_batch_size_bytes
        assert ntok >= num_processes * B * T + 1
        self.ntok = ntok

    def load_batch(self, idx):
        offset = 256 * 4 + idx * self.total_batch_size_bytes + self.local_batch_offset_bytes
        self.file.seek(offset)
        n = self.B * self.T + 1
        buffer = struct.unpack(f"{n}H", self.file.read(2 * n))
        return list(buffer[:-1]), list(buffer[1:])


def llmc_load_data_shard(filename):
    """`_load_data_shard` in llm.c's train_gpt2.py at the same commit."""
    with open(filename, "rb") as f:
        header = np.frombuffer(f.read(256 * 4), dtype=np.int32)
        assert header[0] == 20240520, "magic number mismatch in the data .bin file"
        assert header[1] == 1, "unsupported version"
        ntok = header[2]
        tokens = np.frombuffer(f.read(), dtype=np.uint16)
    assert len(tokens) == ntok, "number of tokens read does not match header?"
    return tokens


def test_llmc_reads_our_shards(tmp_path):
    """Its two loaders read the same inputs and targets as train.py, in the order of the shard."""
    source = write(tmp_path / "x.jsonl", [text for _, text in stdlib_documents()[:3]] + TEXTS)
    out = tmp_path / "out"
    fineweb.main(fineweb.Args(str(source), out, tokenizer="bytes", shard_tokens=5000, processes=1))
    meta = load_meta(out)
    n_read = 0
    for entry in meta["shards"]:
        tokens = llmc_load_data_shard(out / entry["file"])
        assert len(tokens) == entry["tokens"]
        if len(tokens) < 2 * 2 * 64 + 1:
            continue  # its loaders need one batch per shard
        ours = Shards(out, "train", 64, meta | {"shards": [entry | {"split": "train"}]})
        for rank in range(2):
            loader = LlmcLoader(out / entry["file"], 2, 64, rank, 2)
            for idx in range(loader.shard_num_samples):
                inputs, targets = loader.load_batch(idx)
                x, y = ours.read(4 * idx + 2 * rank + np.arange(2))
                assert inputs == x.ravel().tolist() and targets == y.ravel().tolist()
                n_read += 1
    assert n_read > 20


def test_our_shards_are_those_of_llmc(tmp_path):
    """`write_datafile` in llm.c's dev/data/data_common.py gives the same bytes."""
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = 20240520, 1, len(TOKENS)
    write_shard(tmp_path / "x.bin", TOKENS)
    expected = header.tobytes() + np.array(TOKENS.tolist(), dtype=np.uint16).tobytes()
    assert (tmp_path / "x.bin").read_bytes() == expected


# --------------------------------------------------------------------------------------------------
# shards of others


def test_build_nanogpt(tmp_path):
    folder = tmp_path / "edufineweb"
    folder.mkdir()
    np.save(folder / "edufineweb_val_000000", TOKENS[:1000])
    np.save(folder / "edufineweb_train_000001", TOKENS[1000:2000])
    np.save(folder / "edufineweb_train_000002", TOKENS[2000:2500])
    out = import_shards(folder, tmp_path / "out")
    assert_windows(out, [TOKENS[1000:2000], TOKENS[2000:2500]], [TOKENS[:1000]])
    meta = load_meta(out)
    assert (meta["tokenizer"], meta["tokens"], meta["documents"]) == ("bytes", 2500, 25)
    assert [s["format"] for s in meta["shards"]] == ["npy"] * 3
    assert (out / "edufineweb_val_000000.npy").is_symlink()


@pytest.mark.parametrize("name", ["fineweb_{}_{:06d}.bin", "edu_fineweb_{}_{:06d}.bin"])
def test_llmc_and_modded_nanogpt(tmp_path, name):
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for i, (split, part) in enumerate([("val", TOKENS[:500]), ("train", TOKENS[500:])]):
        write_shard(folder / name.format(split, i), part)
    out = import_shards(folder, tmp_path / "out")
    assert_windows(out, [TOKENS[500:]], [TOKENS[:500]])
    assert "format" not in load_meta(out)["shards"][0]


def test_nanogpt(tmp_path):
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    (folder / "prepare.py").write_text("# its script lies beside its data")
    TOKENS[:400].tofile(folder / "val.bin")
    TOKENS[400:].tofile(folder / "train.bin")
    out = import_shards(folder, tmp_path / "out")
    assert_windows(out, [TOKENS[400:]], [TOKENS[:400]])
    assert [s["format"] for s in load_meta(out)["shards"]] == ["raw"] * 2


def test_llmcs_small_corpora_have_a_header_and_no_number(tmp_path):
    folder = tmp_path / "tinyshakespeare"
    folder.mkdir()
    write_shard(folder / "tiny_shakespeare_val.bin", TOKENS[:500])
    write_shard(folder / "tiny_shakespeare_train.bin", TOKENS[500:])
    out = import_shards(folder, tmp_path / "out")
    assert_windows(out, [TOKENS[500:]], [TOKENS[:500]])


def test_a_run_on_imported_shards(tmp_path, run_train):
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "edufineweb_val_000000", np.tile(TOKENS, 2))
    np.save(folder / "edufineweb_train_000001", np.tile(TOKENS, 10))
    with pytest.raises(UserError, match="import the shards in this folder with fineweb.py --sour"):
        run_train("not imported", data_dir=folder, hellaswag_data="none")
    out = import_shards(folder, tmp_path / "out")
    run_train("run", data_dir=out, hellaswag_data="none", steps=2, verify_data=True)


def bad_shards(folder, what):
    write_shard(folder / "a_val_0.bin", TOKENS[:100])
    path = folder / "a_train_1.bin"
    write_shard(path, TOKENS)
    content = path.read_bytes()
    if what == "truncated":
        path.write_bytes(content[:-3])
    elif what == "llama":
        path.write_bytes(np.array([20240801, 7, 5], np.int32).tobytes() + content[12:])
    elif what == "checkpoint":
        path.write_bytes(b"PK\3\4" * 1000)
    elif what == "raw llama":
        path.rename(folder / "train.bin")
        (folder / "train.bin").write_bytes(np.array([20240801, 7], np.int32).tobytes() * 200)
    elif what == "odd":
        path.unlink()
        (folder / "train.bin").write_bytes(b"x\0y")
    elif what in ("float", "2d", "truncated npy", "pickle"):
        path.unlink()
        array = {"float": TOKENS.astype("f4"), "2d": TOKENS.reshape(2, -1)}.get(what, TOKENS)
        path = folder / "a_train_1.npy"
        np.save(path, array)
        if what == "truncated npy":
            path.write_bytes(path.read_bytes()[:-10])
        if what == "pickle":
            path.write_bytes(b"\x80\4K\1.")
    elif what == "ids":
        write_shard(path, np.full(100, 257, np.uint16))
    elif what == "no val":
        (folder / "a_val_0.bin").unlink()
    return path


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", r"a_train_1.bin: the header gives 3,000 tokens, but the file has 2,998.5"),
        ("llama", "a_train_1.bin: not a token shard .a .bin file of llm.c starts with 20240520"),
        ("raw llama", "train.bin: not a token shard"),
        ("checkpoint", "a_train_1.bin: not a token shard"),
        ("odd", "train.bin: has an odd number of bytes"),
        ("float", "a_train_1.npy: is an array of float32 with 1 dimensions: a shard is"),
        ("2d", "a_train_1.npy: is an array of uint16 with 2 dimensions"),
        ("truncated npy", "a_train_1.npy: the header gives 3,000 tokens, but the file has 2,995"),
        ("pickle", "a_train_1.npy: "),
        ("ids", "a_train_1.bin: token id 257 is outside the vocabulary of bytes .257 tokens"),
        ("no val", "found no shard with val in its name"),
    ],
)
def test_what_is_not_a_shard_is_an_error(tmp_path, what, message):
    folder = tmp_path / "shards"
    folder.mkdir()
    bad_shards(folder, what)
    with pytest.raises(UserError, match=message):
        import_shards(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_tokenizer_must_be_given(tmp_path):
    write_shard(tmp_path / "a_train_1.bin", TOKENS)
    with pytest.raises(UserError, match="the shards do not record their tokenizer: .*=gpt2"):
        import_shards(tmp_path, tmp_path / "out", tokenizer=None)
    with pytest.raises(UserError, match="--tokenizer=bpe:300: the shards are already tokenized"):
        import_shards(tmp_path, tmp_path / "out", tokenizer="bpe:300")
    result = script("fineweb.py", f"--source={tmp_path}", f"--out={tmp_path / 'out'}", check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1


def test_options_without_effect_on_shards_are_errors(tmp_path):
    folder = tmp_path / "shards"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name / "x_train_000001.bin", TOKENS)
    with pytest.raises(UserError, match="a/x_train.*b/x_train.* have the same name"):
        import_shards(folder, tmp_path / "out")
    (folder / "b" / "x_train_000001.bin").rename(folder / "b" / "x_val_000000.bin")
    for options in (dict(shuffle_seed=1), dict(column="body"), dict(shard_tokens=1000)):
        with pytest.raises(UserError, match=f"--{next(iter(options))}: has no effect"):
            import_shards(folder, tmp_path / "out", **options)
    assert load_meta(import_shards(folder, tmp_path / "out"))["tokens"] == 2 * len(TOKENS)


# --------------------------------------------------------------------------------------------------
# datatrove


def write_ds(folder, name, tokens, ends, metadata="gpt2|2", dtype="<u2"):
    folder.mkdir(exist_ok=True)
    tokens.astype(dtype).tofile(folder / name)
    np.array(ends, "<u8").tofile(folder / f"{name}.index")
    (folder / f"{name}.metadata").write_text(f"{metadata}\n{len(tokens)}\n3 kT")


def test_datatrove_files(tmp_path):
    folder = tmp_path / "tokenized"
    write_ds(folder, "00000_shuffled.ds", TOKENS[:1300], [100, 1300])
    write_ds(folder, "00001_shuffled.ds", TOKENS[1300:], [1, 1000, 1700])
    options = dict(tokenizer="bytes", shard_tokens=700)
    out = import_shards(folder, tmp_path / "out", **options)
    meta = load_meta(out)
    assert read_corpus(out, first_shard_was_cut=True).tolist() == TOKENS.tolist()
    assert (meta["documents"], meta["tokens"]) == (5, 3000)
    assert [s["tokens"] for s in meta["shards"]] == [300, 700, 700, 700, 200, 400]
    with pytest.raises(UserError, match="names the tokenizer gpt2: remove this option"):
        import_shards(folder, tmp_path / "other", tokenizer="cl100k_base")
    with pytest.raises(UserError, match="--shuffle_seed: has no effect"):
        import_shards(folder, tmp_path / "other", shuffle_seed=3)


@pytest.mark.parametrize(
    "how, message",
    [
        ("wide", "00000.ds: has 4 bytes per token, because the vocabulary is larger than 65,536"),
        ("cut", "00000.ds: its index ends at token 3,000, but the file has 5,998 bytes"),
        ("unknown", "the shards do not record their tokenizer"),
    ],
)
def test_datatrove_files_that_cannot_be_read(tmp_path, how, message):
    folder = tmp_path / "tokenized"
    names = {"wide": "meta-llama/Llama-3.1|4", "unknown": "Unknown Tokenizer|2|2"}
    dtype = "<u4" if how == "wide" else "<u2"
    write_ds(folder, "00000.ds", TOKENS, [3000], names.get(how, "gpt2|2"), dtype)
    if how == "cut":
        path = folder / "00000.ds"
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=message):
        import_shards(folder, tmp_path / "out", tokenizer=None)


@needs_datatrove
@pytest.mark.parametrize("merged", [False, True])
def test_a_datatrove_pipeline(tmp_path, merged):
    """The pipeline of docs/data.md gives the tokens of fineweb.py."""
    source = tmp_path / "source"
    source.mkdir()
    texts = [text for _, text in stdlib_documents()[:40] if text.strip()]
    for i in range(2):
        write(source / f"{i}.parquet", texts[20 * i : 20 * i + 20])
    ours = tmp_path / "ours"
    fineweb.main(fineweb.Args(str(source), ours, tokenizer="bpe:600", processes=1))

    docs = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    program = docs[docs.index("from datatrove") :].split("```")[0]
    replaced = {
        "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT": str(source),
        '"gpt2"': repr(str(ours / bpe.FILE)),
        "tasks=14": "tasks=2",
        "workers=14": "workers=1",
        '"data/tokenized"': repr(str(tmp_path / "tokenized")),
        '"data/merged"': repr(str(tmp_path / "merged")),
        "seed=1": "shuffle_documents=False",
        "seed=2": "shuffle=False",
    }
    for old, new in replaced.items():
        assert old in program, old
        program = program.replace(old, new)
    (tmp_path / "pipeline.py").write_text(program)
    script(tmp_path / "pipeline.py", cwd=tmp_path)
    folder = tmp_path / ("merged" if merged else "tokenized")
    out = import_shards(folder, tmp_path / "out", tokenizer=None)
    theirs, expected = read_corpus(out, True), read_corpus(ours, True)
    assert np.array_equal(theirs, np.roll(expected, -1))  # <|endoftext|> after each document
    a, b = load_meta(out), load_meta(ours)
    assert a["tokenizer"] == b["tokenizer"] and a["documents"] == b["documents"] == len(texts)
    assert get_tokenizer(a["tokenizer"], [out]).n_vocab == 600
    assert json.loads((out / bpe.FILE).read_text()) == json.loads((ours / bpe.FILE).read_text())
    assert stream(texts[:1])[0] == 256
