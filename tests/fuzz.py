"""Bad input, by the thousands: each ends in success or in one clear error, within seconds.

    python tests/fuzz.py [--inputs 12000] [--seed 0] [--only shards ...]          make fuzz

An input is a good one with a few changes. What may come of it is a result, a UserError, or tyro's
exit with status 2 for options. Anything else is a finding, also a RuntimeWarning of numpy or a file
written elsewhere. It is printed with the seed that reproduces it.
"""

import contextlib
import dataclasses
import gzip
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
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plot
import train
from cost import COST_METRICS, cumulative_cost, make_schedules
from growth import OPERATORS
from hellaswag import ending_losses, load_examples
from model import GPT
from runs import load_run
from schedule import SKIP_POLICIES
from stagewise.checkpoint import (
    SUMS,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_state_from,
)
from stagewise.config import CONFIGS, Config, check, load_config, padded_vocab_size
from stagewise.data import (
    Shards,
    TrainOrder,
    encode,
    get_tokenizer,
    load_meta,
    verify_shards,
    write_shard,
)
from stagewise.device import autocast
from stagewise.distributed import ranks_from_environment
from stagewise.errors import UserError
from stagewise.fileio import sha256
from stagewise.metrics import MetricsWriter, read_metrics
from stagewise.monitor import LossMonitor
from stagewise.sources import local_source, prepare, source_files
from stagewise.tokenizing import read_documents
from study import load_study

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # an input that takes longer hangs
BYTES = get_tokenizer("bytes")
PRECISION = autocast(torch.device("cpu"), "float32", 1)

# The good run: it grows, skips blocks, and changes context and batch, so that its schedule and its
# checkpoints have everything in them.
OPTIONS: dict = dict(
    n_layer=4,
    n_head=2,
    n_embd=16,
    block_size=32,
    stages=2,
    steps=6,
    continual_steps=2,
    growth="stack",
    optimizer_state="copy",
    context_ramp="0:16 50%:32",
    tokens_per_step_ramp="0:64 25%:128",
    skip_policy="layer_dropout",
    skip_rate=0.5,
    tokens_per_step=128,
    batch_size=2,
    eval_tokens=64,
    checkpoint_interval=2,
    log_interval=1,
    compile="none",
    device="cpu",
)
MODEL_CONFIG = train.make_model_config(Config(**OPTIONS), 320)
N_WINDOWS = (1200 - 1) // 32 + (1000 - 1) // 32  # of the corpus that `make_good` writes

WORDS = ["", "0", "-1", "1e309", "nan", "NaN", "null", "true", "[]", "{}", '"', "\\u0000", "\x00"]
WORDS += ["é", "9" * 30, "../..", "None", "=", "--", "\n"]
VALUES = ["4", "12", "0.5", "paper", "released_code", "carry", "copy", "reset", "match_flops"]
VALUES += ["match_paper_cost", "True", "False", *OPERATORS, *SKIP_POLICIES]
VALUES += ["0:512 50%:1024", "0:256 1M:512 1B:1024", "50%:512", "0:0", "0:300", "0:512 0:1024"]
VALUES += ["0:1024 100%:512", "0:1_024 2.5K:512", "_:512", "0:5_", "0%:1024 1e3:512"]
FITTING: dict[type, list[str]] = {
    bool: ["True", "False"],
    int: ["0", "1", "2", "3", "4", "8", "12", "64", "1000", "-1", "9" * 18],
    float: ["0", "1e-3", "0.5", "0.999", "1", "3", "-0.1", "1e300", "1e-300"],
}


# --- mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a few bits, bytes or parts changed."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(mutated) + 1), rng.randrange(6)
        if kind == 0 and at < len(mutated):
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del mutated[at:]
        elif kind == 2:
            del mutated[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            mutated[at:at] = rng.choice(WORDS).encode("utf-8", "replace")
        elif kind == 4 and len(mutated) >= 4:
            at = rng.randrange(0, len(mutated) - 3, 4)
            number = rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 65535))
            mutated[at : at + 4] = np.array(number, "<i4").tobytes()
        else:
            other = rng.randrange(len(mutated) + 1)
            mutated[at:at] = mutated[min(at, other) : max(at, other)][:64]
    return bytes(mutated)


ODD_VALUES: list = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "../../etc/passwd",
    "\x00",
    [],
    {},
]
ODD_VALUES += [[[]], {"a": 1}, float("nan"), "é" * 50]


def mutate_json(value, rng: random.Random):
    """Return a JSON value with one part of it changed, lost, or of another type."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.25:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.2:
            return value[:i] + value[i + 1 :]
        repeated = [value[i]] * (2 if kind < 0.3 else 0)
        return value[:i] + repeated + [mutate_json(value[i], rng)] + value[i + 1 :]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, -value, 10**6, -(10**9)))
    return rng.choice(ODD_VALUES)


def mutate_json_file(path: Path, rng: random.Random) -> None:
    value = json.loads(path.read_text())
    if rng.random() < 0.7:
        path.write_text(json.dumps(mutate_json(value, rng)))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


# --- targets: each gets a copy of the good files, changes something, and uses it as the scripts do


def read_corpus(folder: Path, verify: bool) -> None:
    meta = load_meta(folder)
    for split in ("train", "val"):
        data = Shards(folder, split, 32, meta)
        data.read(TrainOrder(len(data), seed=1).windows(0, 4))
        data.files(np.arange(len(data)))
    if verify:
        verify_shards(folder, meta)
    padded_vocab_size(meta)
    if meta["tokenizer"] in ("bytes", "x", ""):  # others may need the network
        get_tokenizer(meta["tokenizer"])


def shards(work: Path, rng: random.Random) -> None:
    path = rng.choice(sorted((work / "corpus").glob("*.bin")))
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    read_corpus(work / "corpus", verify=rng.random() < 0.3)


def meta(work: Path, rng: random.Random) -> None:
    mutate_json_file(work / "corpus" / "meta.json", rng)
    read_corpus(work / "corpus", verify=rng.random() < 0.3)


def hellaswag_lines(work: Path, rng: random.Random) -> None:
    path = work / "corpus" / "hellaswag.jsonl"
    lines = path.read_bytes().split(b"\n")
    i = rng.randrange(len(lines) - 1)
    if rng.random() < 0.6:
        lines[i] = json.dumps(mutate_json(json.loads(lines[i]), rng)).encode()
    else:
        lines[i] = mutate_bytes(lines[i], rng)
    path.write_bytes(b"\n".join(lines))
    model = GPT(dataclasses.replace(MODEL_CONFIG, block_size=64, n_layer=2)).eval()
    sums, counts = ending_losses(model, load_examples(path, BYTES, 64, limit=8))
    assert (sums.argmin(1) >= 0).all() and (counts >= 1).all()


def dry_run(argv: list[str], work: Path) -> None:
    folders = [f"--out_dir={work / 'dry'}", f"--data_dir={work / 'corpus'}"]
    sys.argv = ["train.py", *argv, "--dry_run", *folders]
    train.main()


def config_files(work: Path, rng: random.Random) -> None:
    text = (ROOT / rng.choice(list(CONFIGS.values()))).read_bytes()
    path = work / "mutated.py"
    path.write_bytes(mutate_bytes(text, rng))
    dry_run([str(path)], work)


def flags(work: Path, rng: random.Random) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    names = [name for name in defaults if name not in ("out_dir", "dry_run", "data_dir")]
    argv = []
    for _ in range(rng.choice((1, 2, 4))):
        name = rng.choice(names)
        fitting = FITTING.get(type(defaults[name]), VALUES)
        near = mutate_bytes(str(defaults[name]).encode(), rng).decode("utf-8", "replace")
        odd = [near, *WORDS, *VALUES, str(rng.randrange(-5, 4000))]
        value = rng.choice(fitting if rng.random() < 0.7 else odd)
        flag = f"--{name}"
        if rng.random() < 0.1:
            flag = "--" + mutate_bytes(name.encode(), rng).decode("utf-8", "replace")
        argv.append(f"{flag}={value}" if rng.random() < 0.9 else rng.choice((flag, value)))
    dry_run(argv, work)


def random_ramp(values: list[int], rng: random.Random, last: int) -> str:
    """Return a ramp that is often valid. It often ends at the value `last`."""
    unit = rng.choice(("%", "%", "", "K"))
    numbers = [rng.choice((rng.randrange(1, 99), round(rng.uniform(1, 99), 2))) for _ in range(3)]
    starts = ["0", *(f"{number}{unit}" for number in sorted(numbers[: rng.randrange(4)]))]
    if rng.random() < 0.1:
        rng.shuffle(starts)
    chosen = [rng.choice(values) for _ in starts]
    if rng.random() < 0.9:
        chosen[-1] = last
    ramp = " ".join(f"{start}:{value}" for start, value in zip(starts, chosen))
    if rng.random() < 0.1:
        return mutate_bytes(ramp.encode(), rng).decode("utf-8", "replace")
    return ramp


def methods(work: Path, rng: random.Random) -> None:
    """Options of methods, all at once: check their schedule, and make a step in every phase."""
    stages = rng.choice((1, 2, 2, 3, 4))
    options: dict[str, Any] = dict(
        OPTIONS,
        n_layer=rng.choice((4, 4, 5, 6, 3)),
        stages=stages,
        steps=rng.choice((8, 9, 40, 4000, 1)),
        continual_steps=rng.choice((0, 0, 3, "match_flops", "match_paper_cost")),
        freezing=rng.choice(("all_but_new", "preceding", "none", "none")),
        phase1=rng.choice(("paper", "released_code")),
        growth=rng.choice(list(OPERATORS)),
        optimizer_state=rng.choice(("carry", "copy", "zero", "reset")),
        continual_optimizer_state=rng.choice(("carry", "reset")),
        rewarmup_steps=rng.choice((0, 3)),
        skip_policy=rng.choice(["none", *SKIP_POLICIES]),
        skip_rate=rng.choice((0.0, 0.2, 0.9)),
        context_ramp="",
        tokens_per_step_ramp="",
    )
    if stages > 1 or rng.random() < 0.05:
        options |= dict(
            stage_alpha=rng.choice((0, 0, 0, 1, 2.5)),
            shrink=rng.choice((1, 1, 0.4, 0)),
            perturb=rng.choice((0, 0, 0.1, 1)),
            fade_in_steps=rng.choice((0, 0, 0, 1, 3)),
            rewarmup=rng.choice(("all", "all", "new_blocks")),
            lr_setback=rng.choice((0, 0, 0.3, 1)),
        )
    elif rng.random() < 0.5:
        options |= dict(freezeout=rng.choice((0.5, 0.8, 1, 0.01)))
    if rng.random() < 0.01:
        options["growth"] = "stacks"
    if rng.random() < 0.01:
        options["skip_rate"] = rng.choice((1.0, -0.1, float("nan")))
    if rng.random() < 0.2:
        blocks = sorted(rng.sample(range(options["n_layer"]), rng.randrange(3)))
        options["stage_blocks"] = (*blocks, options["n_layer"])
        options["stages"] = rng.choice((1, 1, 1, 2))
    if rng.random() < 0.2:
        n = rng.choice((2, 2, stages, 2 * stages))
        options["phase_fractions"] = tuple(rng.choice((0, 1, 0.3, 1e-9, 1e9)) for _ in range(n))
    if rng.random() < 0.4:
        options["context_ramp"] = random_ramp([1, 4, 8, 16, 32], rng, last=32)
    if rng.random() < 0.4:
        options["tokens_per_step_ramp"] = random_ramp([64, 128, 192, 256], rng, last=256)
    config = Config(**options)
    check(config)
    walk(config)


def walk(config: Config) -> None:
    """Check the schedule of a run, and make one step in every phase."""
    model_config = train.make_model_config(config, 320)
    schedule, baseline = make_schedules(config, model_config)
    for phase in schedule.phases:
        train.grad_accum_steps(config, phase.tokens_per_step, 1)
    summary = train.summarize(schedule, baseline, model_config)
    train.summary_table(summary)
    json.dumps(summary, allow_nan=False)

    phases, n = schedule.phases, schedule.n_steps
    assert [p.start for p in phases] == [0, *(p.stop for p in phases[:-1])]
    assert len({p.name for p in phases}) == len(phases), "names of phases repeat"
    assert all(p.n_steps > 0 and set(p.trained_blocks) <= set(range(p.n_blocks)) for p in phases)
    assert phases[-1].n_blocks == config.n_layer and phases[-1].milestone
    plain = [dataclasses.asdict(p) for p in phases]
    again = train.convert(json.loads(json.dumps(plain)), list[train.Phase])
    assert again == list(phases), "what is in a checkpoint is another schedule"
    for metric in COST_METRICS:
        points = sorted({0, 1, n // 2, n, *(p.start for p in phases)})
        costs = [cumulative_cost(schedule, step, metric, model_config) for step in points]
        assert costs == sorted(costs) and costs[-1] == summary["total"][metric] > 0

    model = GPT(model_config, n_blocks=phases[0].n_blocks, seed=1)
    state: dict = {}
    for phase in phases[:12]:
        optimizer = train.enter_phase(model, state, phase, config)
        state = optimizer.state
        batch = torch.zeros(2, phase.context_length, dtype=torch.long)
        scales = schedule.at(phase.start).residual_scales
        rate = train.learning_rate(phase.start, schedule, config)
        assert model.n_blocks == phase.n_blocks and 0 < rate <= config.learning_rate
        result = train.train_step(model, optimizer, iter([(batch, batch)]), 1, PRECISION, 1, scales)
        assert result.isfinite().all()


def checkpoint_files(work: Path, rng: random.Random) -> None:
    folder = rng.choice(checkpoints(work / "run"))
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix == ".json":
        mutate_json_file(path, rng)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    if rng.random() < 0.7:  # with correct checksums
        names = sorted(p.name for p in folder.iterdir() if p.name != SUMS)
        lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
        (folder / SUMS).write_text("".join(lines))
    config = Config(**OPTIONS)
    schedule, _ = make_schedules(config, MODEL_CONFIG)
    newest = newest_checkpoint(work / "run")
    which = newest if newest and rng.random() < 0.5 else folder
    checkpoint = load_checkpoint(which, optimizer=True)
    train.check_resumable(
        checkpoint, config, MODEL_CONFIG, schedule, N_WINDOWS, load_meta(work / "corpus")
    )
    model = GPT.from_weights(MODEL_CONFIG, checkpoint["model"])
    state = optimizer_state_from(checkpoint["optimizer"], dict(model.named_parameters()))
    LossMonitor(checkpoint["loss_history"], quiet=True).update(1, 1.0, 1.0)
    step = schedule.at(checkpoint["step"])
    optimizer = train.enter_phase(model, state, step.phase, config, begins=False)
    batch = torch.zeros(1, 8, dtype=torch.long)
    train.train_step(
        model, optimizer, iter([(batch, batch)]), 1, PRECISION, 0, step.residual_scales
    )


def init_weights(work: Path, rng: random.Random) -> None:
    """A new run that starts from the weights of a mutated checkpoint."""
    folder = checkpoints(work / "run")[-1]
    path = folder / rng.choice(("state.json", "state.json", "model.safetensors"))
    if path.suffix == ".json":
        mutate_json_file(path, rng)
    elif rng.random() < 0.5:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    lines = [f"{sha256(p)}  {p.name}\n" for p in sorted(folder.iterdir()) if p.name != SUMS]
    (folder / SUMS).write_text("".join(lines))
    options = OPTIONS | dict(
        stages=1,
        n_layer=rng.choice((4, 4, 4, 6, 6, 3)),
        growth=rng.choice(("stack", "random", "zero_output")),
        context_ramp="",
        init_weights=str(rng.choice([folder] * 4 + [work / "run"] * 4 + [work, "no such run"])),
    )
    config = Config(**options)
    model_config = train.make_model_config(config, 320)
    (phase, *_), _ = (s.phases for s in make_schedules(config, model_config))
    device = torch.device("cpu")
    model, _ = train.initial_model(
        config, model_config, phase, "bytes", device, mesh=None, verbose=False
    )
    optimizer = train.enter_phase(model, {}, phase, config)
    batch = torch.zeros(1, 8, dtype=torch.long)
    train.train_step(model, optimizer, iter([(batch, batch)]), 1, PRECISION)
    assert model.n_blocks == phase.n_blocks


def run_folders(work: Path, rng: random.Random) -> None:
    path = work / "run" / rng.choice(("metrics.jsonl", "schedule.json", "config.json"))
    if path.suffix == ".json":
        mutate_json_file(path, rng)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    read_metrics(work / "run" / "metrics.jsonl")
    load_run(work / "run")
    MetricsWriter(work / "run" / "metrics.jsonl", 2).close()


ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(work: Path, rng: random.Random) -> None:
    """Variables that torchrun and schedulers set, in odd states."""
    values = ["0", "1", "2", "-1", "abc", "", "9" * 30, "1e3", "localhost", "29500", " 1", "٣"]
    chosen = {name: rng.choice(values) for name in ENVIRONMENT if rng.random() < 0.7}
    with patched(os.environ, chosen):
        ranks = ranks_from_environment()
    assert 0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.world_size
    assert ranks.launched or chosen.get("WORLD_SIZE", "1") == "1", "trains alone"


@contextlib.contextmanager
def patched(mapping, values: dict[str, str]):
    former = dict(mapping)
    try:
        mapping.update(values)
        yield
    finally:
        mapping.clear()
        mapping.update(former)


def paths(work: Path, rng: random.Random) -> None:
    """Odd names and kinds of files for every option that is a path."""
    odd = ["", ".", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/x", "é" * 200]
    odd += ["x" * 300, "/".join(["d" * 200] * 30), "\udcff", "a\nb", "a[12]", "$x", "~", "*", "\0"]
    name = rng.choice(odd)
    if not name.startswith("/"):
        name = str(work / name)
    linked, folder = work / "linked", work / "folder"
    linked.symlink_to(work / "nowhere")
    folder.mkdir()
    name = rng.choice([name, name, name, str(linked), str(folder), str(work / "corpus/meta.json")])
    kind = rng.randrange(7)
    if kind == 0:
        load_meta(name)
    elif kind == 1:
        load_examples(name, BYTES, 64)
    elif kind == 2:
        load_checkpoint(Path(name))
    elif kind == 3:
        load_run(Path(name))
    elif kind == 4:
        load_study(Path(name))
    elif kind == 5:
        source_files(name)
    else:
        config = Config(**OPTIONS, out_dir=str(work / "dry"), data_dir=name, hellaswag_data=name)
        check(config)


def sources(work: Path, rng: random.Random) -> None:
    """Sources of fineweb.py with bad documents, in every format."""
    documents: list = ["a text", "", "ü" * 20, " " * 3000 + "x", "\n" * 1500, "<|endoftext|>"]
    rows = [{"text": d, "id": i} for i, d in enumerate(documents * rng.choice((1, 20)))]
    suffix = rng.choice((".jsonl", ".jsonl", ".JSON", ".txt", ".parquet", ".jsonl.gz", ".csv"))
    path = work / f"source{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        text = path.read_bytes()
    else:
        lines = [json.dumps(mutate_json(row, rng) if rng.random() < 0.02 else row) for row in rows]
        text = "\n".join(lines).encode()
    if rng.random() < 0.6:
        text = mutate_bytes(text, rng)
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    if suffix.endswith(".gz") and rng.random() < 0.3:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    source = local_source(*source_files(str(path)), "text")
    read = prepare(source, 0, work / f".source_{rng.random()}")
    on_error = rng.choice(("stop", "skip"))
    texts = [
        t
        for i in range(0, len(read), 64)
        for t in read_documents(read, range(i, min(i + 64, len(read))), on_error)
    ]
    assert all(encode(BYTES, t).tolist() == list(t.encode()) for t in texts)


def studies(work: Path, rng: random.Random) -> None:
    path = rng.choice(sorted((ROOT / "results").glob("*/study.toml")))
    (work / "study.toml").write_bytes(mutate_bytes(path.read_bytes(), rng))
    _, runs = load_study(work)
    assert runs and all(run.options for run in runs)


def figures(work: Path, rng: random.Random) -> None:
    """Rows with null, missing and extreme values; the figures and the table are drawn."""
    path = work / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for key in list(row):
            if rng.random() < 0.01 and key not in ("step", "tokens", "paper_cost", "flops"):
                row[key] = rng.choice((None, 0, -1, 1e300, 1e-300, "x"))
            if rng.random() < 0.01:
                del row[key]
    kept = [row for row in rows if rng.random() < 0.9]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    title = rng.choice(WORDS)
    args = plot.Args(runs=(work / "run",), out=work / "plots", title=title, x=rng.choice(AXES))
    run = load_run(work / "run")
    assert "nan" not in plot.table([run], args)
    if rng.random() < 0.1:  # slow
        plot.main(args)


AXES: tuple = ("steps", "tokens", "paper_cost", "flops", "hours")

TARGETS = {
    target.__name__: target
    for target in (
        shards,
        meta,
        hellaswag_lines,
        config_files,
        flags,
        methods,
        checkpoint_files,
        init_weights,
        run_folders,
        environment,
        paths,
        sources,
        studies,
        figures,
    )
}


# --- running them


@dataclass
class Good:
    """Files without errors."""

    corpus: Path
    run: Path


def make_good(folder: Path) -> Good:
    """Write a corpus and a run."""
    corpus, run = folder / "corpus", folder / "run"
    corpus.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(257, size=3000).astype(np.uint16)
    listed: list[dict] = []
    parts = (("val", tokens[:800]), ("train", tokens[800:2000]), ("train", tokens[2000:]))
    for split, part in parts:
        path = corpus / f"x_{split}_{len(listed):06d}.bin"
        write_shard(path, part)
        entry = {"file": path.name, "split": split, "tokens": len(part), "sha256": sha256(path)}
        listed.append(entry)
    about = {"source": "x", "tokenizer": "bytes", "vocab_size": 257, "eot_token": 256}
    about |= {"documents": 3, "tokens": 3000, "shards": listed}
    (corpus / "meta.json").write_text(json.dumps(about))
    endings = ["the mat.", "a hot tin roof", "it", "Monday"]
    examples = [
        {"ctx": "The cat sat on", "endings": endings, "label": 1, "ind": i} for i in range(5)
    ]
    text = "".join(json.dumps(example) + "\n" for example in examples)
    (corpus / "hellaswag.jsonl").write_text(text)
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    sys.argv = ["train.py", *options, f"--data_dir={corpus}", f"--out_dir={run}"]
    assert load_config(sys.argv[1:], Config()) == Config(
        **OPTIONS, data_dir=str(corpus), out_dir=str(run)
    )
    train.main()
    return Good(corpus, run)


class Hang(BaseException):
    pass


def attempt(target, good: Good, work: Path, seed: str) -> str:
    """Run one input, and return what came of it.

    Raises:
        BaseException: if it is a finding.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good.corpus, work / "corpus")
    shutil.copytree(good.run, work / "run")
    rng = random.Random(seed)
    output = io.StringIO()
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("error", RuntimeWarning)
            with contextlib.redirect_stderr(output):
                target(work, rng)
        return "success"
    except UserError as error:
        text = str(error)
        if len(text) < 15 or "Traceback" in text or len(text.splitlines()) > 3:
            raise AssertionError(f"not a clear error: {text!r}") from error
        return "error"
    except SystemExit as error:
        text = output.getvalue().strip()
        if error.code != 2 or "Traceback" in text or not text:
            raise AssertionError(f"exit {error.code}: {text[-500:]}") from error
        return "error"
    finally:
        signal.alarm(0)


def main(inputs: int = 12_000, seed: int = 0, only: tuple[str, ...] = ()) -> None:
    def hang(*_):
        raise Hang(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    outcomes: Counter = Counter()
    findings: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            good = make_good(folder / "good")
        work = folder / "work"
        os.chdir(folder)
        written: set[str] = set()

        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], str):
                flags = arguments[2] if isinstance(arguments[2], int) else 0
                if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    written.add(os.path.abspath(arguments[0]))
            changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if event in changes and arguments[-1] in (-1, None):  # not relative to an open folder
                paths = [a for a in arguments[:2] if isinstance(a, str)]
                written.update(map(os.path.abspath, paths))

        sys.addaudithook(watch)
        names = only or tuple(TARGETS)
        for i in tqdm(range(inputs), mininterval=2):
            name = names[i % len(names)]
            try:
                outcomes[name, attempt(TARGETS[name], good, work, f"{seed}:{i}")] += 1
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                findings.append(
                    f"{name}, seed {seed}:{i}: {type(error).__name__}: {error} "
                    f"({Path(where.filename).name}:{where.lineno})"
                )
                outcomes[name, "FINDING"] += 1
        # Python's own caches, /dev/null and standard streams are not files of the user.
        allowed = re.compile(
            re.escape(str(work))
            + r"(/|$)|.*__pycache__|/dev/|/proc/|/tmp/(torchinductor|\.)|.*/matplotlib"
        )
        outside = sorted(p for p in written if not allowed.match(p))
    for (name, outcome), n in sorted(outcomes.items()):
        print(f"{name:18s} {outcome:8s} {n:6d}")
    print(
        f"{sum(outcomes.values()):,} inputs in {time.monotonic() - began:.0f} s; written outside "
        f"the working folder: {outside or 'nothing'}"
    )
    kinds = {re.sub(r"seed \S+", "", finding)[:150]: finding for finding in findings}
    for finding in kinds.values():
        print("FINDING", finding)
    sys.exit(bool(findings or outside))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
