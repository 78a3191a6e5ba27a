"""Shards, tokenizers, and the order in which windows are read."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA

import train
from schedule import make_schedule, with_ramp
from stagewise import data
from stagewise.config import Config
from stagewise.data import (
    Prefetch,
    Shards,
    TrainOrder,
    check_tokenizer,
    encode,
    fingerprint,
    get_tokenizer,
    load_meta,
    open_shard,
    token_bytes,
    verify_shards,
    write_shard,
)
from stagewise.distributed import Ranks
from stagewise.errors import UserError

CPU = torch.device("cpu")


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
    "shards": [
        {"file": f"x_{split}_{i:06d}.bin", "split": split, "tokens": n} for split, i, n in SHARDS
    ],
}


def test_shards_have_the_format_of_llmc(folder):
    raw = (folder / "x_val_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype=np.int32)
    assert list(header[:3]) == [20240520, 1, 50] and not header[3:].any()
    assert list(np.frombuffer(raw[1024:], dtype=np.uint16)) == list(range(50))
    assert list(open_shard(folder / "x_val_000000.bin")) == list(range(50))


def test_windows_are_inputs_and_their_next_tokens(folder):
    shards = Shards(folder, "train", 10, META)
    assert len(shards) == 10 + 5  # 101 tokens: ten windows and the last target; 55: five and a rest
    x, y = shards.read(np.array([0, 9, 10, 14]))
    assert x.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x[:, 0].tolist() == [1000, 1090, 2000, 2040]
    assert (y == x + 1).all() and y[1, -1] == 1100


# --- the order of windows


def test_an_epoch_reads_every_window_once_in_its_own_order():
    epochs = TrainOrder(37, seed=3).windows(0, 8 * 37).reshape(8, 37)
    assert (np.sort(epochs, axis=1) == np.arange(37)).all()
    assert len({tuple(e) for e in epochs}) == 8
    assert not np.array_equal(TrainOrder(37, seed=4).windows(0, 37), epochs[0])


@pytest.mark.parametrize("size", [1, 5, 8, 37, 100])
def test_windows_do_not_depend_on_how_the_sequence_is_cut(size):
    """Also across the end of an epoch, and back."""
    sequence = TrainOrder(37, seed=3).windows(0, 400)
    order = TrainOrder(37, seed=3)
    starts = [*range(0, 300, size), 74, 0]
    for start in starts:
        assert np.array_equal(order.windows(start, start + size), sequence[start : start + size])


def test_a_step_larger_than_the_corpus_reads_it_several_times():
    assert np.bincount(TrainOrder(5, seed=0).windows(20, 40)).tolist() == [4] * 5


def test_the_order_does_not_depend_on_the_version():
    """A run must resume with the order that it began with, whatever NumPy is installed by then."""
    assert TrainOrder(20, seed=1337).windows(8, 16).tolist() == [13, 11, 1, 5, 16, 9, 19, 6]


# --- the tokens of a step


def batches_of(folder, schedule, first=0, rank=0, world_size=1, batch_size=2):
    """Inputs of every micro-batch that a rank reads from step `first` on, each (B, T)."""
    shards = Shards(folder, "train", 10, META)
    config = Config(block_size=10, batch_size=batch_size)
    ranks = Ranks(rank=rank, world_size=world_size)
    order = TrainOrder(len(shards), seed=3)
    stream = train.train_batches(shards, order, schedule, first, config, ranks, CPU)
    return [(x.numpy(), y.numpy()) for x, y in stream]


def constant(steps=9, windows=8):
    return make_schedule(4, steps, context_length=10, tokens_per_step=10 * windows)


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_a_step_reads_the_same_tokens_with_any_processes_and_micro_batch(
    folder, world_size, batch_size
):
    """Over more than four epochs of 15 windows."""
    whole = [x for x, _ in batches_of(folder, constant(), batch_size=8)]
    of_ranks = [
        [x for x, _ in batches_of(folder, constant(), 0, rank, world_size, batch_size)]
        for rank in range(world_size)
    ]
    micro_steps = 8 // (world_size * batch_size)
    assert len(whole) == 9
    for step, x in enumerate(whole):
        parts = [
            of_ranks[rank][step * micro_steps + m]
            for m in range(micro_steps)
            for rank in range(world_size)
        ]
        assert np.array_equal(np.concatenate(parts), x)


def ramped():
    """Context 5, 5, 10, 2 and batches of 2, 4, 4, 8 windows."""
    schedule = with_ramp(constant(steps=12), "tokens_per_step", "0:20 25%:40 75%:80")
    return with_ramp(schedule, "context_length", "0:5 50%:10 75%:2")


def test_context_and_batch_ramps_read_the_same_tokens_in_the_same_order(folder):
    """No token is skipped or repeated where the context or the batch changes."""
    schedule = ramped()
    assert {(p.context_length, p.tokens_per_step) for p in schedule.phases} == {
        (5, 20),
        (5, 40),
        (10, 40),
        (2, 80),
    }
    batches = batches_of(folder, schedule)
    shards = Shards(folder, "train", 10, META)
    n_windows = schedule.tokens(schedule.n_steps) // 10
    x, y = shards.read(TrainOrder(len(shards), seed=3).windows(0, n_windows))
    assert np.array_equal(np.concatenate([x.ravel() for x, _ in batches]), x.ravel())
    assert np.array_equal(np.concatenate([y.ravel() for _, y in batches]), y.ravel())
    contexts = [x.shape for x, _ in batches]
    assert contexts[0] == (4, 5) and contexts[-1] == (10, 2) and (2, 10) in contexts


@pytest.mark.parametrize("step", range(12))
def test_a_resumed_run_reads_the_rest_in_every_phase(folder, step):
    schedule = ramped()
    whole, rest = batches_of(folder, schedule), batches_of(folder, schedule, first=step)
    assert len(rest) == sum(schedule.phase_at(s).tokens_per_step // 20 for s in range(step, 12))
    for (x, y), (a, b) in zip(rest, whole[len(whole) - len(rest) :], strict=True):
        assert np.array_equal(x, a) and np.array_equal(y, b)


def test_prefetch_yields_everything_in_order_and_passes_errors_on():
    assert list(Prefetch(iter(range(1, 6)))) == [1, 2, 3, 4, 5] and list(Prefetch(iter(()))) == []

    def failing():
        yield 1
        raise UserError("shard gone")

    with pytest.raises(UserError, match="shard gone"):
        list(Prefetch(failing()))


# --- tokenizers


def test_the_bytes_tokenizer_encodes_each_byte():
    encoding = get_tokenizer("bytes")
    text = "Grüße,\n\tworld €   <|endoftext|>\r\n"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    long = "é" * 20  # longer than the pieces that text is cut into
    assert encoding.encode_ordinary(long) == list(long.encode())


@pytest.mark.skipif(
    not (SHARED_DATA / "tiktoken_cache").exists(),
    reason="needs GPT-2's vocabulary in shared/data/tiktoken_cache",
)
def test_gpt2_bpe(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]


def test_bytes_of_tokens():
    assert token_bytes(get_tokenizer("bytes"), 320).tolist() == [1] * 256 + [0] * 64


@pytest.mark.skipif(
    not (SHARED_DATA / "tiktoken_cache").exists(),
    reason="needs GPT-2's vocabulary in shared/data/tiktoken_cache",
)
def test_bytes_of_gpt2_tokens(monkeypatch, tmp_path):
    """The bytes of the targets are those of the decoded text; <|endoftext|> has none."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    lengths = token_bytes(encoding, 50304)
    assert lengths[:50256].min() == 1 and lengths[:50256].max() == 128
    assert not lengths[50256:].any()
    text = "Ein Café \U0001f600 mit 中文,   and spaces\n\n" * 30
    tokens = [*encode(encoding, text), encoding.eot_token, *encode(encoding, text)]
    write_shard(tmp_path / "x.bin", np.array(tokens, dtype=np.uint16))
    shard = {"file": "x.bin", "split": "val", "tokens": len(tokens)}
    meta = {"vocab_size": 50257, "shards": [shard]}
    val = Shards(tmp_path, "val", 8, meta)
    windows = np.arange(len(val))
    targets = val.read(windows)[1].ravel().tolist()
    assert targets.count(encoding.eot_token) == 1
    text_tokens = [token for token in targets if token != encoding.eot_token]
    expected = len(encoding.decode_bytes(text_tokens)) / len(targets)
    assert val.bytes_per_token(windows, encoding) == expected
    few = windows[3:5]
    expected = len(encoding.decode_bytes(val.read(few)[1].ravel().tolist())) / 16
    assert val.bytes_per_token(few, encoding) == expected


def white_space_texts():
    """Texts with long runs of white space of all kinds, at all places."""
    kinds = [" ", "\n", "\t", "\r\n", " \n", "\u00a0", "\u3000 ", "\x1c", " \x1f"]
    ends = ["a", "1", "é", "=", "'s", "", "\x1c"]
    for kind, before, after in itertools.product(kinds, ["", "word", "3", "?"], ends):
        for length in (999, 1000, 1001, 2500):
            run = kind * (length // len(kind))
            yield before + run + after
    yield ("x" + " " * 1500) * 3 + "\n" * 1200 + " y" + "\t" * 1000 + " " * 1000


def test_bytes_with_long_runs_of_white_space():
    encoding = get_tokenizer("bytes")
    for text in white_space_texts():
        assert encode(encoding, text).tolist() == list(text.encode())


@pytest.mark.skipif(
    not (SHARED_DATA / "tiktoken_cache").exists(),
    reason="needs GPT-2's vocabulary in shared/data/tiktoken_cache",
)
def test_long_runs_of_white_space_have_the_same_tokens(monkeypatch):
    """Equal to tiktoken as long as it does not fail; longer runs are tokenized too."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    for text in white_space_texts():
        assert encode(encoding, text).tolist() == encoding.encode_ordinary(text)
    for kind in (" ", "\n"):
        tokens = encode(encoding, "a" + kind * 2_000_000 + "b").tolist()
        assert encoding.decode(tokens) == "a" + kind * 2_000_000 + "b"
        assert tokens[-1] == encoding.encode_ordinary(kind + "b")[-1]


def test_an_unknown_tokenizer_is_an_error():
    with pytest.raises(UserError, match="tokenizer 'gpt5' is unknown"):
        get_tokenizer("gpt5")


# --- bad input


def write_meta(folder, **changes):
    shards = [{"file": "a.bin", "split": "train", "tokens": 3, "sha256": "1"}]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": shards} | changes
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(vocab_size=-1), "vocab_size: expected `int` >= 1"),
        (dict(vocab_size=10**12), "vocab_size: expected `int` <= 65536"),
        (dict(shards=2 * [dict(file="a", split="train", tokens=1)]), "'a' is listed more than"),
        (dict(shards=[dict(file="a", split="train", tokens=-1)]), "tokens: expected `int` >= 0"),
    ],
)
def test_a_corpus_that_is_not_valid_is_an_error(tmp_path, changes, named):
    write_meta(tmp_path, **changes)
    with pytest.raises(UserError, match=f"meta.json: not a valid meta.json .*{named}"):
        load_meta(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error():
    with pytest.raises(UserError, match="x: a vocabulary of 256, but tokenizer bytes has 257"):
        check_tokenizer(get_tokenizer("bytes"), 256, "x")


def test_a_corpus_is_identified_by_its_content(tmp_path):
    write_meta(tmp_path)
    first = fingerprint(load_meta(tmp_path))
    write_meta(tmp_path, source="elsewhere")
    assert fingerprint(load_meta(tmp_path)) == first
    shard = {"file": "a.bin", "split": "train", "tokens": 3, "sha256": "1"}
    for changes in (
        dict(tokenizer="gpt2"),
        dict(vocab_size=258),
        dict(shards=[shard | {"sha256": "2"}]),
        dict(shards=[shard | {"split": "val"}]),
    ):
        write_meta(tmp_path, **changes)
        assert fingerprint(load_meta(tmp_path)) != first


def header(magic=20240520, version=1, count=50, tokens=50):
    ints = np.zeros(256, dtype=np.int32)
    ints[:3] = magic, version, count
    return ints.tobytes() + np.zeros(tokens, dtype=np.uint16).tobytes()


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "not a token shard"),
        (header()[:700], "not a token shard"),
        (header(magic=20240801), "not a token shard"),
        (header(version=7), "version 7"),
        (header(tokens=49), "header gives 50 tokens, but the file has 49: it is truncated"),
        (header()[:-1], "truncated"),
        (header(tokens=51), "header gives 50 tokens, but the file has 51"),
        (header(count=-1), "corrupted"),
    ],
)
def test_a_corrupted_shard_is_named(folder, content, named):
    (folder / "x_train_000002.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"x_train_000002.bin: .*{named}"):
        Shards(folder, "train", 10, META)


def test_missing_shards_short_shards_and_tokens_of_another_vocabulary_are_errors(
    folder, monkeypatch
):
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
    with pytest.raises(UserError, match="x_train_000001.bin: No such file"):
        Shards(folder, "train", 10, META)
    write_shard(folder / "x_train_000001.bin", np.arange(70, dtype=np.uint16))
    with pytest.raises(
        UserError, match="x_train_000001.bin: has 70 tokens, but meta.json lists 101"
    ):
        Shards(folder, "train", 10, META)
    with pytest.raises(UserError, match="no val shards are listed"):
        Shards(folder, "val", 10, META | {"shards": META["shards"][1:]})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"tokenizer": "gpt2"}',
        '{"tokenizer": 3, "vocab_size": 5}',
        '{"tokenizer": "x", "vocab_size": 5}',
        '{"tokenizer": "x", "vocab_size": 5, "shards": [1]}',
        "\xff",
    ],
)
def test_a_corrupted_meta_json_is_an_error(tmp_path, content):
    (tmp_path / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="meta.json: .* write the corpus again"):
        load_meta(tmp_path)


# --- during a run


@pytest.mark.parametrize(
    "how, named",
    [("deleted", "can no longer be read"), ("truncated", "truncated since the run started")],
)
def test_a_shard_that_is_lost_is_named(tmp_path, how, named):
    path = tmp_path / "x.bin"
    write_shard(path, np.arange(1000, dtype=np.uint16))
    listed = [{"file": "x.bin", "split": "train", "tokens": 1000}]
    shards = Shards(tmp_path, "train", 64, {"vocab_size": 1000, "shards": listed})
    assert shards.files(np.arange(3)) == ["x.bin"]
    assert shards.read(np.array([14]))[0][0, -1] == 14 * 64 + 63
    path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"x.bin: {named}"):
        shards.read(np.array([14]))


def test_verify_data_compares_shards_with_their_checksums(corpus, tmp_path, run_train):
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    run_train("good", data_dir=folder, steps=1, verify_data=True)
    path = folder / "stdlib_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    run_train("not verified", data_dir=folder, steps=1)
    with pytest.raises(UserError, match="stdlib_train_000001.bin: the sha256 differs from meta"):
        run_train("verified", data_dir=folder, steps=1, verify_data=True)
    assert not (tmp_path / "verified").exists()
    meta = load_meta(folder)
    del meta["shards"][0]["sha256"]
    with pytest.raises(UserError, match="no sha256 for stdlib_val_000000.bin"):
        verify_shards(folder, meta)
