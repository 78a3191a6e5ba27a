"""Bad input, by the thousand: every mutated input ends in success or in one clear error, writes nowhere else, and does not hang.

    python tests/fuzz.py [--inputs 12000] [--seed 0] [--only shards ...]          make fuzz

Each input is a good one with a few changes. What may come of it: a result, UserError, or tyro's exit with status 2 for
options. Anything else, a warning of numpy included, is a finding: it is printed with the seed that makes it again.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config as cfg
import train
from checkpoint import checkpoints, load_checkpoint, load_moments, model_from, newest_checkpoint
from data import Shards, TrainOrder, get_tokenizer, load_meta, verify_shards, write_shard
from errors import UserError
from files import Metrics, read_metrics, sha256
from hellaswag import ending_losses, load_examples
from model import GPT, GPTConfig
from plot import load_run

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=320)
SECONDS = 20  # an input that takes longer hangs
BYTES = get_tokenizer("bytes")
WORDS = ["", "0", "-1", "1e309", "nan", "NaN", "null", "true", "[]", "{}", '"', "\\u0000", "\x00", "é", "9" * 30]
WORDS += ["../..", "None", "=", "--", "\n"]


# --- mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = rng.choice(WORDS).encode("utf-8", "replace")
        elif kind == 4 and len(data) >= 4:
            at = rng.randrange(0, len(data) - 3, 4)
            data[at : at + 4] = np.array(rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 65535)), "<i4").tobytes()
        else:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[min(at, other) : max(at, other)][:64]
    return bytes(data)


def mutate_json(value, rng: random.Random):
    """A JSON value with one thing in it changed, lost, or of another kind."""
    odd = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "../../etc/passwd", "\x00", [], {}, [[]], {"a": 1}, math_nan(), "é" * 50]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.25:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.2:
            return value[:i] + value[i + 1 :]
        return value[:i] + [value[i]] * (2 if kind < 0.3 else 0) + [mutate_json(value[i], rng)] + value[i + 1 :]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, -value, 10**6, -(10**9)))
    return rng.choice(odd)


def math_nan():
    return float("nan")


def mutate_text_of_json(path: Path, rng):
    value = json.loads(path.read_text())
    if rng.random() < 0.7:
        path.write_text(json.dumps(mutate_json(value, rng)))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


# --- targets: each takes a fresh copy of the good files, changes something, and uses it as the scripts do


@dataclass
class Good:
    """Files that are as they should be."""

    corpus: Path
    run: Path


def read_corpus(folder: Path, verify: bool) -> None:
    meta = load_meta(folder)
    for split in ("train", "val"):
        data = Shards(folder, split, 32, meta)
        order = TrainOrder(len(data), 1, 4)
        data.read(order.windows(0, 0, 4))
        data.files(np.arange(len(data)))
    if verify:
        verify_shards(folder, meta)
    cfg.vocab_size(cfg.Config(), meta)
    get_tokenizer(meta["tokenizer"]) if meta["tokenizer"] in ("bytes", "x", "") else None  # others may need the network


def shards(work: Path, rng) -> None:
    path = rng.choice(sorted((work / "corpus").glob("*.bin")))
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    read_corpus(work / "corpus", verify=rng.random() < 0.3)


def meta(work: Path, rng) -> None:
    mutate_text_of_json(work / "corpus" / "meta.json", rng)
    read_corpus(work / "corpus", verify=rng.random() < 0.3)


def hellaswag_lines(work: Path, rng) -> None:
    path = work / "corpus" / "hellaswag.jsonl"
    lines = path.read_bytes().split(b"\n")
    i = rng.randrange(len(lines) - 1)
    if rng.random() < 0.6:
        lines[i] = json.dumps(mutate_json(json.loads(lines[i]), rng)).encode()
    else:
        lines[i] = mutate_bytes(lines[i], rng)
    path.write_bytes(b"\n".join(lines))
    sums, counts = ending_losses(GPT(GPTConfig(**SHAPE | {"block_size": 64})).eval(), load_examples(path, BYTES, 64, limit=8))
    assert (sums.argmin(1) >= 0).all() and (counts >= 1).all()


def dry_run(argv: list[str], work: Path) -> None:
    sys.argv = ["train.py", *argv, "--dry_run", f"--out_dir={work / 'dry'}", f"--data_dir={work / 'corpus'}"]
    train.main()


def config_files(work: Path, rng) -> None:
    text = (ROOT / rng.choice(list(cfg.CONFIGS.values()))).read_bytes()
    path = work / "mutated.py"
    path.write_bytes(mutate_bytes(text, rng))
    dry_run([str(path)], work)


def flags(work: Path, rng) -> None:
    names = [f for f in cfg.Config.__dataclass_fields__ if f not in ("out_dir", "dry_run", "data_dir")]
    argv = []
    for _ in range(rng.choice((1, 2, 4))):
        name = rng.choice(names)
        default = str(cfg.Config.__dataclass_fields__[name].default)
        near = mutate_bytes(default.encode(), rng).decode("utf-8", "replace")
        value = rng.choice([default, near, *WORDS, "4", "12", "0.5", "paper", "carry", str(rng.randrange(-5, 4000))])
        flag = f"--{name}" if rng.random() < 0.9 else "--" + mutate_bytes(name.encode(), rng).decode("utf-8", "replace")
        argv.append(f"{flag}={value}" if rng.random() < 0.9 else rng.choice((flag, value)))
    dry_run(argv, work)


def checkpoint_files(work: Path, rng) -> None:
    folder = rng.choice(checkpoints(work / "run"))
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix == ".json":
        mutate_text_of_json(path, rng)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    if rng.random() < 0.7:  # past the checksums
        names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
        (folder / "SHA256SUMS").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))
    newest = newest_checkpoint(work / "run")
    checkpoint = load_checkpoint(newest if rng.random() < 0.5 else folder, optimizer=True)
    options = cfg.Config(n_layer=2, n_head=2, n_embd=16, block_size=32, steps=4, tokens_per_step=64, batch_size=2)
    plan, _ = cfg.make_plans(options, GPTConfig(**SHAPE))
    train.check_resumable(checkpoint, options, GPTConfig(**SHAPE), plan, 68)
    model = model_from(checkpoint)
    optimizer = train.make_optimizer(model, options)
    load_moments(optimizer, model, checkpoint["optimizer"])
    train.Health(checkpoint["health"]).see(1, 1.0, 1.0)
    batch = torch.zeros(1, 8, dtype=torch.long)
    train.update(model, optimizer, iter([(batch, batch)]), 1, train.autocast(torch.device("cpu"), "float32"))


def run_folders(work: Path, rng) -> None:
    path = work / "run" / rng.choice(("metrics.jsonl", "plan.json", "config.json"))
    if path.suffix == ".json":
        mutate_text_of_json(path, rng)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    read_metrics(work / "run" / "metrics.jsonl")
    load_run(work / "run")
    Metrics(work / "run" / "metrics.jsonl", 2).close()


TARGETS = {t.__name__: t for t in (shards, meta, hellaswag_lines, config_files, flags, checkpoint_files, run_folders)}


# --- the machinery


def make_good(folder: Path) -> Good:
    corpus, run = folder / "corpus", folder / "run"
    corpus.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(257, size=3000).astype(np.uint16)
    listed = []
    for split, part in (("val", tokens[:800]), ("train", tokens[800:2000]), ("train", tokens[2000:])):
        path = corpus / f"x_{split}_{len(listed):06d}.bin"
        write_shard(path, part)
        listed.append({"file": path.name, "split": split, "tokens": len(part), "sha256": sha256(path)})
    about = {"source": "x", "tokenizer": "bytes", "vocab_size": 257, "eot_token": 256, "documents": 3, "tokens": 3000, "shards": listed}
    (corpus / "meta.json").write_text(json.dumps(about))
    example = {"ctx": "The cat sat on", "endings": ["the mat.", "a hot tin roof", "it", "Monday"], "label": 1}
    (corpus / "hellaswag.jsonl").write_text("".join(json.dumps(example | {"ind": i}) + "\n" for i in range(5)))
    options = [f"--{k}={v}" for k, v in SHAPE.items() if k != "vocab_size"]
    options += ["--steps=4", "--tokens_per_step=64", "--batch_size=2", "--checkpoint_interval=2", "--log_interval=1", "--eval_tokens=64"]
    sys.argv = ["train.py", *options, "--compile=none", "--device=cpu", f"--data_dir={corpus}", f"--out_dir={run}"]
    train.main()
    return Good(corpus, run)


class Hang(BaseException):
    pass


def attempt(target, good: Good, work: Path, seed: str) -> str:
    """Run one input; returns what came of it. Raises on a finding."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good.corpus, work / "corpus")
    shutil.copytree(good.run, work / "run")
    rng = random.Random(seed)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            warnings.simplefilter("error", RuntimeWarning)
            target(work, rng)
        return "fine"
    except UserError as error:
        text = str(error)
        if len(text) < 15 or "Traceback" in text or len(text.splitlines()) > 3:
            raise AssertionError(f"no clear error: {text!r}") from error
        return "refused"
    except SystemExit as leaving:
        if leaving.code != 2 or "Traceback" in said.getvalue() or not said.getvalue().strip():
            raise AssertionError(f"exit {leaving.code}: {said.getvalue()[-500:]}") from leaving
        return "refused"
    finally:
        signal.alarm(0)


def main(inputs: int = 12_000, seed: int = 0, only: tuple[str, ...] = ()) -> None:
    def hang(*_):
        raise Hang(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    outcomes, findings, began = Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            good = make_good(folder / "good")
        work = folder / "work"
        os.chdir(folder)
        written = set()

        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], str):
                if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    written.add(os.path.abspath(arguments[0]))
            elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") and arguments[-1] in (-1, None):
                written.update(os.path.abspath(a) for a in arguments[:2] if isinstance(a, str))  # not below an open folder

        sys.addaudithook(watch)
        names = only or tuple(TARGETS)
        for i in tqdm(range(inputs), mininterval=2):
            name = names[i % len(names)]
            try:
                outcomes[name, attempt(TARGETS[name], good, work, f"{seed}:{i}")] += 1
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                findings.append(f"{name}, seed {seed}:{i}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
                outcomes[name, "FINDING"] += 1
        # Python's own caches, /dev/null and standard streams are no files of the user.
        allowed = re.compile(re.escape(str(work)) + r"(/|$)|.*__pycache__|/dev/|/proc/|/tmp/(torchinductor|\.)|.*/matplotlib")
        outside = sorted(p for p in written if not allowed.match(p))
    for (name, outcome), n in sorted(outcomes.items()):
        print(f"{name:18s} {outcome:8s} {n:6d}")
    seconds = time.monotonic() - began
    print(f"{sum(outcomes.values()):,} inputs in {seconds:.0f} s; written outside the working folder: {outside or 'nothing'}")
    kinds = {re.sub(r"seed \S+", "", f)[:150]: f for f in findings}
    for finding in kinds.values():
        print("FINDING", finding)
    sys.exit(bool(findings or outside))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
