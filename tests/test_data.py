"""Shards, tokenizers, and which tokens step t reads."""

import shutil

import numpy as np
import pytest

import data
from data import Prefetch, Shards, TrainOrder, get_tokenizer, load_meta, open_shard, verify_shards, write_shard
from errors import UserError

from conftest import SHARED_DATA


@pytest.fixture
def folder(tmp_path):
    """Two training shards of consecutive numbers and a validation shard."""
    write_shard(tmp_path / "x_val_000000.bin", np.arange(50, dtype=np.uint16))
    write_shard(tmp_path / "x_train_000001.bin", np.arange(1000, 1101, dtype=np.uint16))
    write_shard(tmp_path / "x_train_000002.bin", np.arange(2000, 2055, dtype=np.uint16))
    return tmp_path


SHARDS = [("val", 0, 50), ("train", 1, 101), ("train", 2, 55)]
META = {
    "tokenizer": "gpt2",
    "vocab_size": 65536,
    "shards": [{"file": f"x_{split}_{i:06d}.bin", "split": split, "tokens": n} for split, i, n in SHARDS],
}


def test_shards_are_llmc_files(folder):
    raw = (folder / "x_val_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype=np.int32)
    assert list(header[:3]) == [20240520, 1, 50] and not header[3:].any()
    assert list(np.frombuffer(raw[1024:], dtype=np.uint16)) == list(range(50)) == list(open_shard(folder / "x_val_000000.bin"))


def test_windows_are_inputs_and_their_next_tokens(folder):
    shards = Shards(folder, "train", 10, META)
    assert len(shards) == 10 + 5  # 101 tokens are ten windows and the last target; 55 are five and a rest
    x, y = shards.read(np.array([0, 9, 10, 14]))
    assert x.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x[:, 0].tolist() == [1000, 1090, 2000, 2040] and (y == x + 1).all() and y[1, -1] == 1100


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_a_step_reads_the_same_windows_however_it_is_split(world_size, batch_size):
    def step(t):
        order = TrainOrder(37, seed=3, windows_per_step=8)  # a resumed run makes a new one
        return [
            window
            for micro_step in range(8 // (world_size * batch_size))
            for rank in range(world_size)
            for start in [(micro_step * world_size + rank) * batch_size]
            for window in order.windows(t, start, start + batch_size)
        ]

    whole = TrainOrder(37, seed=3, windows_per_step=8)
    for t in (0, 1, 4, 9, 4):  # also across the end of an epoch, and back
        assert step(t) == whole.windows(t, 0, 8).tolist()


def test_every_window_is_read_once_an_epoch_in_an_order_of_its_own():
    order = TrainOrder(37, seed=3, windows_per_step=8)
    read = np.concatenate([order.windows(t, 0, 8) for t in range(37)])  # 8 epochs
    epochs = read.reshape(8, 37)
    assert (np.sort(epochs, axis=1) == np.arange(37)).all()
    assert len({tuple(e) for e in epochs}) == 8
    assert not np.array_equal(TrainOrder(37, 4, 8).windows(0, 0, 8), order.windows(0, 0, 8))


def test_a_step_larger_than_the_corpus_reads_it_several_times():
    assert np.bincount(TrainOrder(5, seed=0, windows_per_step=20).windows(0, 0, 20)).tolist() == [4] * 5


def test_the_order_is_the_one_of_earlier_versions():
    """A run must resume with the order that it began with, whatever NumPy is installed by then."""
    assert TrainOrder(20, seed=1337, windows_per_step=8).windows(1, 0, 8).tolist() == [13, 11, 1, 5, 16, 9, 19, 6]


def test_prefetch_yields_everything_in_order_and_passes_errors_on():
    assert list(Prefetch(iter(range(1, 6)))) == [1, 2, 3, 4, 5] and list(Prefetch(iter(()))) == []

    def failing():
        yield 1
        raise UserError("shard gone")

    with pytest.raises(UserError, match="shard gone"):
        list(Prefetch(failing()))


# --- tokenizers


def test_bytes_are_the_bytes():
    encoding = get_tokenizer("bytes")
    text = "Grüße,\n\tworld €   <|endoftext|>\r\n"
    assert encoding.encode_ordinary(text) == list(text.encode()) and encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode_ordinary("é" * 20) == list(("é" * 20).encode())  # longer than the pieces it is cut into


@pytest.mark.skipif(not (SHARED_DATA / "tiktoken_cache").exists(), reason="needs GPT-2's vocabulary in shared/data/tiktoken_cache")
def test_gpt2_bpe(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]


def test_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer 'gpt5' is unknown"):
        get_tokenizer("gpt5")


# --- bad input


def header(magic=20240520, version=1, count=50, tokens=50):
    ints = np.zeros(256, dtype=np.int32)
    ints[:3] = magic, version, count
    return ints.tobytes() + np.zeros(tokens, dtype=np.uint16).tobytes()


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "no token shard"),
        (header()[:700], "no token shard"),
        (header(magic=20240801), "no token shard"),
        (header(version=7), "version 7"),
        (header(tokens=49), "header says 50 tokens, the file holds 49: it is truncated"),
        (header()[:-1], "truncated"),
        (header(tokens=51), "header says 50 tokens, the file holds 51"),
        (header(count=-1), "damaged"),
    ],
)
def test_damaged_shards_are_refused_by_name(folder, content, named):
    (folder / "x_train_000002.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"x_train_000002.bin: .*{named}"):
        Shards(folder, "train", 10, META)


def test_missing_shards_short_shards_and_foreign_tokens_are_refused(folder, monkeypatch):
    with pytest.raises(UserError, match="lower block_size"):
        Shards(folder, "val", 50, META)
    with pytest.raises(UserError, match="x_train_000002.bin: token id 2054 .* vocabulary of 2054"):
        Shards(folder, "train", 54, META | {"vocab_size": 2054})
    monkeypatch.setattr(data, "TOKENS_CHECKED_AT_START", 10)
    shards = Shards(folder, "train", 54, META | {"vocab_size": 2054})
    shards.read(np.array([0]))
    with pytest.raises(UserError, match="x_train_000002.bin: token id 2054 .* vocabulary of 2054"):
        shards.read(np.array([1]))
    (folder / "x_train_000001.bin").unlink()
    with pytest.raises(UserError, match="x_train_000001.bin: cannot be read"):
        Shards(folder, "train", 10, META)
    write_shard(folder / "x_train_000001.bin", np.arange(70, dtype=np.uint16))
    with pytest.raises(UserError, match="x_train_000001.bin: has 70 tokens, meta.json says 101"):
        Shards(folder, "train", 10, META)
    with pytest.raises(UserError, match="names no val shards"):
        Shards(folder, "val", 10, META | {"shards": META["shards"][1:]})


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"tokenizer": "gpt2"}', '{"tokenizer": 3, "vocab_size": 5}', '{"tokenizer": "x", "vocab_size": 5}', '{"tokenizer": "x", "vocab_size": 5, "shards": [1]}', "\xff"])
def test_damaged_meta_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="meta.json: .* write the corpus again"):
        load_meta(tmp_path)


# --- while a run reads


@pytest.mark.parametrize("how, named", [("gone", "cannot be read any more"), ("cut", "was cut since the start")])
def test_a_shard_that_is_lost_is_named(tmp_path, how, named):
    tokens = np.arange(1000, dtype=np.uint16)
    write_shard(tmp_path / "x.bin", tokens)
    data = Shards(tmp_path, "train", 64, {"vocab_size": 1000, "shards": [{"file": "x.bin", "split": "train", "tokens": 1000}]})
    assert data.files(np.arange(3)) == ["x.bin"] and data.read(np.array([14]))[0][0, -1] == 14 * 64 + 63
    (tmp_path / "x.bin").unlink() if how == "gone" else (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-100])
    with pytest.raises(UserError, match=f"x.bin: {named}"):
        data.read(np.array([14]))


def test_shards_are_compared_with_their_checksums(corpus, tmp_path, run_train):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    run_train("good", data_dir=data, steps=1, verify_data=True)
    path = data / "stdlib_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    run_train("unseen", data_dir=data, steps=1)
    with pytest.raises(UserError, match="stdlib_train_000001.bin: its sha256 is not the one in meta.json"):
        run_train("seen", data_dir=data, steps=1, verify_data=True)
    assert not (tmp_path / "seen").exists()
    meta = load_meta(data)
    del meta["shards"][0]["sha256"]
    with pytest.raises(UserError, match="has no sha256 of stdlib_val_000000.bin"):
        verify_shards(data, meta)
