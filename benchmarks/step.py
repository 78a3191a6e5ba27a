"""How fast is a training step, phase by phase, and beside its peers?

    python bench.py [configs/A.py configs/B.py ...] [--key=value ...]          every phase of a plan; train.py's own options
    python bench.py configs/gpt2_124m.py --peer nanogpt=DIR --peer build_nanogpt=DIR --peer hf

Every update is train.py's own (`train.update`), on random tokens read from a shard on disk. A first pass grows the model
through the plan, as a run does, and notes memory and compilation. Then all contenders take turns, round by round, and
medians are taken over the rounds; a ratio is the median of the ratios within a round, so that a machine whose speed drifts
slows both sides alike.
"""

import ast
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import tyro
from torch._dynamo.utils import compilation_time_metrics, counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config as cfg
import schedule
import train
from data import Prefetch, Shards, TrainOrder, write_shard
from device import autocast, cpu_name, device_name, peak_flops, peak_memory, pick_device, reset_peak_memory
from errors import UserError, report_user_errors
from model import GPT, GPTConfig

MATMUL = {"cuda": 8192, "cpu": 2048}  # side of the square matrix product that a step is held against
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
VARIANTS = ("none", "blocks", "model", "erf", *BACKENDS)


@dataclass(frozen=True)
class BenchConfig(cfg.Config):
    """Time every phase of a plan, and peers, by turns.

    python bench.py [configs/A.py configs/B.py ...] [--key=value ...]: train.py's options, and those of the bench. Where there is
    a GPU, the defaults are GPT-2 124M in 4 stages, else a small model.
    """

    prog: ClassVar[str] = "bench.py"
    rounds: int = 7
    """Rounds in which every contender has its turn."""
    min_seconds: float = 0.5
    """A turn takes as many updates as fill this time, at least one."""
    n_vocab: int = 50257
    """Vocabulary of the random tokens; padded up to a multiple of 64."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """nanogpt=DIR or build_nanogpt=DIR, a checkout of it, or hf, transformers' GPT-2; the same update of the whole model."""
    peer_batch_size: tuple[int, ...] = ()
    """Micro-batches to time peers with; default: batch_size."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Baseline in another way: --compile=none, blocks or model; erf, nanoGPT's GELU; flash, cudnn or efficient attention."""
    json: Path = Path("out/bench/train.json")
    """File of the results."""


@dataclass
class Contender:
    """Something to time. `enter` prepares it for a turn and returns the function that makes one update."""

    enter: Callable[[], Callable[[], None]]
    tokens: int  # of an update
    seconds: list[float] = dataclasses.field(default_factory=list)  # of an update, one entry a round
    waits: list[float] = dataclasses.field(default_factory=list)  # share of the time spent waiting for data, likewise

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Contender") -> float:
        """Median over the rounds of this one's seconds a token by another's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds)) * other.tokens / self.tokens


def main() -> None:
    config = cfg.load_config(sys.argv[1:], config=defaults(on_gpu=torch.cuda.is_available()))
    check(config)
    device = pick_device(config.device)
    shape = config.model(cfg.vocab_size(config, {"vocab_size": config.n_vocab}))
    plan, baseline = cfg.make_plans(config, shape)
    micro_steps = cfg.micro_steps(config, world_size=1)
    precision = autocast(device, config.dtype)
    phases = [baseline.phases[0], *(p for p in plan.phases if p.name != "baseline")]

    with tempfile.TemporaryDirectory() as folder:
        batches = random_batches(Path(folder), config, device)
        first = first_pass(config, shape, plan, batches, micro_steps, precision, device)
        contenders = phase_contenders(config, shape, phases, batches, micro_steps, precision, device)
        for name in config.variant:
            contenders[name] = variant(name, config, shape, batches, micro_steps, precision, device)
        for option in config.peer:
            for batch_size in config.peer_batch_size or (config.batch_size,):
                sized = dataclasses.replace(config, batch_size=batch_size)
                own = Prefetch(iter(batches)) if batch_size == config.batch_size else random_batches(Path(folder), sized, device)
                name = option.split("=")[0] + (f", micro-batch {batch_size}" if config.peer_batch_size else "")
                contenders[name] = peer(option, sized, shape, own, precision, device)
        product, product_flops = matrix_product(precision, device)
        contenders["matrix product"] = product
        take_turns(contenders, config.rounds, config.min_seconds, device, batches)

    report = summarize(config, shape, phases, contenders, first, product_flops, device)
    print(table(report))
    write_report(config.json, report)


def defaults(on_gpu: bool) -> BenchConfig:
    common = dict(stages=4, steps=64, grad_clip=1.0)
    if on_gpu:
        return BenchConfig(batch_size=32, **common)
    # A few million parameters on bytes: products of matrices dominate, and an update takes a second.
    small = dict(n_layer=8, n_head=4, n_embd=256, block_size=256, n_vocab=257, tokens_per_step=4096, batch_size=8)
    return BenchConfig(compile="none", **small, **common)


def check(config: BenchConfig) -> None:
    for name in config.variant:
        if name not in VARIANTS:
            raise UserError(f"--variant={name} is unknown: use {', '.join(VARIANTS)}")
    for option in config.peer:
        name, _, folder = option.partition("=")
        if name not in PEERS:
            raise UserError(f"--peer={option}: is none of {', '.join(PEERS)}")
        if PEERS[name] and not (folder and Path(folder, PEERS[name]).is_file()):
            raise UserError(f"--peer={option}: {PEERS[name]} is not in {folder or 'DIR'!r}; give a checkout, --peer {name}=DIR")
    if config.rounds < 1:
        raise UserError(f"--rounds={config.rounds} must be at least 1")
    for batch_size in config.peer_batch_size:
        cfg.micro_steps(dataclasses.replace(config, batch_size=batch_size), world_size=1)


def random_batches(folder: Path, config: BenchConfig, device: torch.device) -> Prefetch:
    """Endless (inputs, targets) of random tokens, each (B, T), read as train.py reads them."""
    n = config.block_size * max(256, config.batch_size) + 1
    tokens = np.random.RandomState(0).randint(config.n_vocab, size=n).astype(np.uint16)
    write_shard(folder / "random.bin", tokens)
    meta = {"vocab_size": config.n_vocab, "shards": [{"file": "random.bin", "split": "train", "tokens": n}]}
    data = Shards(folder, "train", config.block_size, meta)
    order = TrainOrder(len(data), config.seed, config.batch_size)

    def batches():
        step = 0
        while True:
            tensors = map(torch.from_numpy, data.read(order.windows(step, 0, config.batch_size)))
            yield [t.pin_memory() if device.type == "cuda" else t for t in tensors]
            step += 1

    return Prefetch(batches())


# ---------------------------------------------------------------------------------------------------------------------
# contenders


def first_pass(config, shape: GPTConfig, plan: schedule.Plan, batches, micro_steps, precision, device) -> dict[str, dict]:
    """Grow through the plan as a run does; for each phase its peak memory, and what it compiled."""
    torch._dynamo.reset()
    result = {}
    model, optimizer = GPT(shape, n_blocks=plan.phases[0].n_blocks, device=device), None
    if config.compile != "none":
        model.compile_regions(whole=config.compile == "model")
    for phase in tqdm(plan.phases, desc="memory and compilation", unit="phase"):
        model.grow(phase.n_blocks, config.seed)
        model.set_phase(phase)
        optimizer = train.make_optimizer(model, config, optimizer)
        counters.clear()
        compilation_time_metrics.clear()
        for _ in range(2):
            reset_peak_memory(device)
            train.update(model, optimizer, batches, micro_steps, precision, config.grad_clip)
            synchronize(device)
        result[phase.name] = {
            "peak_memory": peak_memory(device),
            "compile_seconds": sum(compilation_time_metrics.get("_compile.compile_inner", [])),
            "graphs": counters["stats"]["unique_graphs"],
        }
    return result


def phase_contenders(config, shape, phases, batches, micro_steps, precision, device) -> dict[str, Contender]:
    """A contender for each phase; phases in which the same blocks run and the same ones train share one."""
    model = GPT(shape, device=device)
    if config.compile != "none":
        model.compile_regions(whole=config.compile == "model")
    blocks, moments = model.transformer.h, None

    def contender(phase):
        def enter():
            nonlocal moments
            model.transformer.h = blocks[: phase.n_blocks]
            model.set_phase(phase)
            optimizer = moments = train.make_optimizer(model, config, moments)
            return lambda: train.update(model, optimizer, batches, micro_steps, precision, config.grad_clip)

        return Contender(enter, config.tokens_per_step)

    distinct = {}
    return {p.name: distinct.setdefault(work(p), contender(p)) for p in phases}


def work(phase: schedule.Phase) -> tuple:
    """What of a phase decides how much there is to compute."""
    return phase.n_blocks, phase.n_frozen, phase.train_embeddings, phase.train_head


def variant(name, config, shape, batches, micro_steps, precision, device) -> Contender:
    """The update of the baseline, run in another way."""
    model = GPT(shape, device=device)
    optimizer = train.make_optimizer(model, config)
    context = contextlib.nullcontext
    how = name if name in ("none", "blocks", "model") else config.compile
    if how != "none":
        model.compile_regions(whole=how == "model")
    if name == "erf":
        for block in model.transformer.h:
            block.mlp.forward = types.MethodType(lambda self, x: self.c_proj(F.gelu(self.c_fc(x))), block.mlp)
    if name in BACKENDS:
        context = lambda: sdpa_kernel(BACKENDS[name])  # noqa: E731

    def step():
        with context():
            train.update(model, optimizer, batches, micro_steps, precision, config.grad_clip)

    return Contender(lambda: step, config.tokens_per_step)


PEERS = {"nanogpt": "model.py", "build_nanogpt": "train_gpt2.py", "hf": None}  # and the file that has the model


def peer(option: str, config, shape: GPTConfig, batches, precision, device) -> Contender:
    """The same update with a peer's model: whole logits, its own loss, compiled as a whole."""
    name, _, folder = option.partition("=")
    sizes = dict(block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    if name == "hf":
        model = hugging_face(shape)
        loss_of = lambda x, y: F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())  # noqa: E731
    else:
        module = definitions(Path(folder, PEERS[name]))
        options = dict(dropout=0.0, bias=shape.bias) if name == "nanogpt" else {}
        with contextlib.redirect_stdout(None):
            model = module.GPT(module.GPTConfig(**sizes, **options))
        loss_of = lambda x, y: model(x, y)[1]  # noqa: E731
    model.to(device).train()
    runs = torch.compile(loss_of, dynamic=False) if config.compile != "none" else loss_of
    runs.parameters = model.parameters
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    micro_steps = cfg.micro_steps(config, world_size=1)

    def step():
        train.update(runs, optimizer, batches, micro_steps, precision, config.grad_clip)

    return Contender(lambda: step, config.tokens_per_step)


def hugging_face(shape: GPTConfig):
    """transformers' GPT-2 of a shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_positions=shape.block_size, vocab_size=shape.vocab_size, n_embd=shape.n_embd, n_layer=shape.n_layer)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = dict(bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, n_head=shape.n_head, **no_dropout, **tokens, attn_implementation="sdpa"))


def definitions(path: Path) -> types.ModuleType:
    """The imports, classes and functions of a script, without what it does when run; imports that are not there are left out."""
    tree = ast.parse(path.read_text())
    body = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if any(importlib.util.find_spec(m.split(".")[0]) is None or (path.parent / f"{m}.py").exists() for m in modules):
                continue
        elif not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        body.append(node)
    module = types.ModuleType(f"peer_{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(ast.Module(body, type_ignores=[]), str(path), "exec"), vars(module))
    return module


def matrix_product(precision, device) -> tuple[Contender, int]:
    """A square product in the precision of the step, and its FLOPs: what the machine gives at best, at the same time."""
    n = MATMUL[device.type]
    dtype = torch.bfloat16 if precision._enabled else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return Contender(lambda: lambda: torch.mm(a, b), tokens=1), 2 * n**3


# ---------------------------------------------------------------------------------------------------------------------
# timing and report


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(contenders: dict[str, Contender], rounds: int, min_seconds: float, device, batches: Prefetch | None = None) -> None:
    """Let every distinct contender have its turn in every round; the first update of a turn is not timed."""
    distinct = list({id(c): c for c in contenders.values()}.values())
    repeats = {}
    bar = tqdm(total=(rounds + 1) * len(distinct), desc="rounds", unit="turn")
    for turn in range(rounds + 1):  # the first warms up: compiles, and tells how long an update takes
        first = turn % len(distinct)  # another one begins each round: whoever comes before leaves caches and clocks its way
        for c in distinct[first:] + distinct[:first]:
            step = c.enter()
            step()
            synchronize(device)
            start, waited = time.perf_counter(), batches.waited if batches else 0.0
            n = repeats.get(id(c), 1)
            for _ in range(n):
                step()
            synchronize(device)
            elapsed = time.perf_counter() - start
            if turn == 0:
                repeats[id(c)] = max(1, round(min_seconds / elapsed))
            else:
                c.seconds.append(elapsed / n)
                c.waits.append((batches.waited - waited) / elapsed if batches else 0.0)
            bar.update()
    bar.close()


def summarize(config, shape, phases, contenders, first, product_flops, device) -> dict:
    """The results as data: what was run where, a row for each contender."""
    base, peak = contenders["baseline"], peak_flops(device)
    product = product_flops / contenders["matrix product"].median
    rows = []

    def row(name, c, flops, ratio_flops):
        per_second = flops * c.tokens / c.median
        rows.append({
            "name": name,
            "seconds": c.median,
            "quartiles": statistics.quantiles(c.seconds, n=4)[::2] if len(c.seconds) > 1 else None,
            "tokens_per_second": c.tokens / c.median,
            "mfu": per_second / peak if peak else None,
            "of_matrix_product": per_second / product,
            "time_ratio": c.ratio(base),
            "flops_ratio": ratio_flops,
            "data_wait": statistics.median(c.waits),
        } | first.get(name, {}))  # fmt: skip

    whole = schedule.price(phases[0], "flops", shape)
    for p in phases:
        flops = schedule.price(p, "flops", shape)
        row(p.name, contenders[p.name], flops, flops / whole)
        rows[-1] |= {"blocks": p.n_blocks, "trained_blocks": p.n_blocks - p.n_frozen}
    for name, c in contenders.items():
        if name not in {p.name for p in phases} | {"matrix product"}:
            row(name, c, whole, 1.0)
    return {"machine": machine(device), "config": dataclasses.asdict(config), "matrix_product_flops": product, "rows": rows}


def machine(device: torch.device) -> dict:
    """Where and when a benchmark ran, and of which commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], Path(__file__).parent), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def table(report: dict) -> str:
    """The rows as text, and how to read them."""
    lines = [("", "blocks", "ms", "tokens/s", "MFU", "of product", "GiB", "wait", "compile", "graphs", "time", "FLOPs", "time/FLOPs")]

    def show(value, form):
        return "-" if value is None else format(value, form)

    for r in report["rows"]:
        lines.append((
            r["name"],
            f"{r['trained_blocks']} of {r['blocks']}" if "blocks" in r else "-",
            f"{1000 * r['seconds']:,.1f}",
            f"{r['tokens_per_second']:,.0f}",
            show(r["mfu"], ".1%"),
            show(r["of_matrix_product"], ".1%"),
            show(r["peak_memory"] / 2**30 if "peak_memory" in r else None, ".2f"),
            show(r["data_wait"], ".2%"),
            show(r.get("compile_seconds"), ".1f"),
            show(r.get("graphs"), "d"),
            show(r["time_ratio"], ".3f"),
            show(r["flops_ratio"], ".3f"),
            show(r["time_ratio"] / r["flops_ratio"], ".3f"),
        ))  # fmt: skip
    m = report["machine"]
    return "\n".join([
        schedule.text_table(lines),
        f"{m['device']}, {m['cpu']}, torch {m['torch']}, {m['date']}; medians of {report['config']['rounds']} rounds.",
        "blocks: those that train. MFU: of the device's bf16 peak. of product: of a square matrix product timed in the same "
        f"rounds, {report['matrix_product_flops'] / 1e12:.3g} TFLOP/s.",
        "time, FLOPs: by the baseline's, seconds a token; time/FLOPs is 1 where a phase is as much cheaper as it should be.",
    ])  # fmt: skip


def write_report(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    with report_user_errors():
        main()
