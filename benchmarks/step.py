"""How long does a training step take, in every phase and in other implementations?

    python benchmarks/step.py [configs/A.py configs/B.py ...] [--key=value ...]
    python benchmarks/step.py configs/gpt2_124m.py --peer nanogpt=DIR --peer hf

The options are train.py's and a few more. Phases are entered by `train.enter_phase` and steps made
by `train.train_step`, on batches of `train.train_batches` with random tokens. A first pass grows
the model through the schedule, as a run does, and records memory and compilation. Then all
candidates are timed in turn, round after round. A ratio is the median of the ratios within each
round, so that a drift of the machine's speed affects both sides alike.
"""

import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro
from msgspec import Meta
from tabulate import tabulate
from torch._dynamo.utils import compilation_time_metrics, counters
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from benchmarks.common import (
    load_definitions,
    machine,
    synchronize,
    transformers_gpt2,
    write_report,
)
from benchmarks.variants import COMPILE, apply_variant, check_variants
from cost import cost_per_token, make_schedules
from model import GPT, GPTConfig
from schedule import Phase, Schedule, Step
from stagewise.config import (
    Config,
    Positive,
    Real,
    grad_accum_steps,
    load_config,
    padded_vocab_size,
)
from stagewise.data import Prefetch, Shards, TrainOrder, write_shard
from stagewise.device import (
    autocast,
    peak_flops,
    peak_memory,
    pick_device,
    reset_peak_memory,
)
from stagewise.distributed import Ranks
from stagewise.errors import UserError, did_you_mean, report_user_errors

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product is timed
PROFILED = 50  # kernels, those that take the longest
MIN_SKIPPING_STEPS = 8  # in a trial of a phase that skips blocks, whose steps differ
PEERS = {"nanogpt": "model.py", "build_nanogpt": "train_gpt2.py", "hf": ""}  # the model's file


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """Time a step of every phase of a schedule, and of other implementations.

    python benchmarks/step.py [configs/A.py configs/B.py ...] [--key=value ...]: train.py's options,
    and those of the benchmark. The default is GPT-2 124M in 4 stages on a GPU, a small model on a
    CPU.
    """

    prog: ClassVar[str] = "benchmarks/step.py"
    rounds: Positive = 7
    """Rounds; each candidate has one trial per round."""
    min_seconds: Real = 0.5
    """A trial makes as many steps as take this long, at least one."""
    n_vocab: Annotated[int, Meta(ge=1, le=2**16)] = 50257
    """Vocabulary of the random tokens; padded to a multiple of 64."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Other implementations, which train all of the model: nanogpt=DIR or build_nanogpt=DIR, a
    checkout of it, or hf, transformers' GPT-2."""
    peer_batch_size: tuple[int, ...] = ()
    """Micro-batches with which peers are timed; default: batch_size."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Changes of the baseline: none, blocks or model, as for compile; erf, nanoGPT's GELU;
    bf16_residual, a residual stream in bfloat16 as in llm.c; fp8_head, the head's matrix products
    in fp8; liger_loss, the loss of the package liger-kernel; flash, cudnn or efficient, the backend
    of attention."""
    profile: bool = False
    """Also profile a step of the baseline, and list its operators and kernels by time."""
    json: Path = Path("out/bench/step.json")
    """File of the results."""


@dataclass
class Candidate:
    """Something to time.

    The steps of a trial are spread evenly over the candidate's phase, because each may be different
    work if blocks are skipped. A position in [0, 1) says where in the phase a step is.
    """

    enter: Callable[[], Callable[[float], object]]  # prepare a trial; return what makes a step
    tokens: int  # per step
    flops_per_token: Callable[[float], float]  # of the step at a position
    batches: Prefetch | None = None
    min_steps: int = 1
    n_steps: int = 1  # per trial
    seconds: list[float] = field(default_factory=list)  # per step, one entry per round
    waits: list[float] = field(default_factory=list)  # fraction of the time, likewise

    def positions(self) -> list[float]:
        """Return where the steps of a trial are."""
        return [i / self.n_steps for i in range(self.n_steps)]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mean_flops(self) -> float:
        """FLOPs per token, the mean over the steps of a trial."""
        return statistics.fmean(map(self.flops_per_token, self.positions()))

    def ratio(self, other: "Candidate") -> float:
        """Return the median over the rounds of this candidate's time per token by the other's."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds)]
        return statistics.median(ratios) * other.tokens / self.tokens


def main() -> None:
    config = load_config(sys.argv[1:], defaults(on_gpu=torch.cuda.is_available()))
    device = pick_device(config.device)
    check_options(config, device)
    model_config = train.make_model_config(
        config, padded_vocab_size({"vocab_size": config.n_vocab})
    )
    schedule, baseline = make_schedules(config, model_config)
    phases = {"baseline": baseline.phases[0]}
    if schedule.phases != baseline.phases:
        phases |= {p.name: p for p in schedule.phases}
    for phase in phases.values():
        grad_accum_steps(config, phase.tokens_per_step, world_size=1)

    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmark(config, model_config, device, random_data(Path(folder), config))
        first = first_pass(bench, schedule)
        # Variants compile graphs of their own for the code of a block. Beyond its limit, dynamo
        # would run them uncompiled.
        torch._dynamo.config.recompile_limit = 1000
        candidates = phase_candidates(bench, phases)
        for name in config.variant:
            candidates[name] = variant(bench, name, phases["baseline"])
        for option in config.peer:
            for batch_size in config.peer_batch_size or (config.batch_size,):
                sized = dataclasses.replace(
                    bench, config=dataclasses.replace(config, batch_size=batch_size)
                )
                name = option.partition("=")[0]
                if config.peer_batch_size:
                    name += f", micro-batch {batch_size}"
                candidates[name] = peer(sized, option, phases["baseline"])
        matmul = matrix_product(bench)
        time_candidates([*candidates.values(), matmul], config.rounds, config.min_seconds, device)
        report = summarize(bench, phases, candidates, matmul, first)
        if config.profile:
            report["profile"] = profile_step(candidates["baseline"], device)
    print(table(report))
    write_report(config.json, report)


def defaults(on_gpu: bool) -> BenchmarkConfig:
    """Return the options of the benchmark that a machine can run in minutes."""
    common: dict[str, Any] = dict(stages=4, steps=64, grad_clip=1.0)
    if on_gpu:
        return BenchmarkConfig(batch_size=32, **common)
    # A few million parameters on bytes: matrix products dominate, and a step takes a second.
    small: dict[str, Any] = dict(n_layer=8, n_head=4, n_embd=256, block_size=256, n_vocab=257)
    return BenchmarkConfig(tokens_per_step=4096, batch_size=8, compile="none", **small, **common)


def check_options(config: BenchmarkConfig, device: torch.device) -> None:
    """Raise UserError if something cannot be timed."""
    check_variants(config.variant, config, device)
    for option in config.peer:
        name, _, folder = option.partition("=")
        if name not in PEERS:
            raise UserError(f"--peer={option} is unknown{did_you_mean(name, PEERS)}")
        if PEERS[name] and not (folder and Path(folder, PEERS[name]).is_file()):
            raise UserError(
                f"--peer={option}: {PEERS[name]} is not in {folder or 'DIR'!r}: name a checkout, "
                f"--peer {name}=DIR"
            )
    for batch_size in config.peer_batch_size:
        if batch_size < 1:
            raise UserError(f"--peer_batch_size={batch_size} must be at least 1")
        sized = dataclasses.replace(config, batch_size=batch_size)
        grad_accum_steps(sized, config.tokens_per_step, world_size=1)


def random_data(folder: Path, config: BenchmarkConfig) -> Shards:
    """Return a shard of random tokens."""
    n = config.block_size * max(256, config.batch_size, *config.peer_batch_size) + 1
    tokens = np.random.RandomState(0).randint(config.n_vocab, size=n).astype(np.uint16)
    write_shard(folder / "random.bin", tokens)
    shard = {"file": "random.bin", "split": "train", "tokens": n}
    meta = {"vocab_size": config.n_vocab, "shards": [shard]}
    return Shards(folder, "train", config.block_size, meta)


# --------------------------------------------------------------------------------------------------
# candidates


@dataclass(frozen=True)
class Benchmark:
    """What all candidates have in common."""

    config: BenchmarkConfig
    model_config: GPTConfig
    device: torch.device
    data: Shards

    @property
    def precision(self) -> torch.autocast:
        return autocast(self.device, self.config.dtype, self.config.n_embd)

    def batches(self, phase: Phase) -> Prefetch:
        """Return an endless stream of the micro-batches of a phase, as `train` reads them."""
        endless = Schedule((dataclasses.replace(phase, start=0, stop=2**40),))
        order = TrainOrder(len(self.data), self.config.seed)
        return Prefetch(
            train.train_batches(self.data, order, endless, 0, self.config, Ranks(), self.device)
        )

    def model(self, n_blocks: int | None = None, compile: str | None = None) -> GPT:
        """Return a model with `n_blocks`, compiled as `compile` says; default: the options."""
        model = GPT(self.model_config, n_blocks=n_blocks, seed=self.config.seed, device=self.device)
        how = compile or self.config.compile
        if how != "none":
            model.compile_regions(whole=how == "model")
        return model

    def step(self, model, optimizer, phase: Phase, batches: Prefetch, position: float) -> None:
        """Make one step of `phase`."""
        train.train_step(
            model,
            optimizer,
            batches,
            grad_accum_steps(self.config, phase.tokens_per_step, world_size=1),
            self.precision,
            self.config.grad_clip,
            step_at(phase, position).residual_scales,
        )

    def candidate(self, phase: Phase, enter: Callable[[], tuple[Any, Any]]) -> Candidate:
        """Return a candidate for steps of `phase` with the model and optimizer of `enter`."""
        batches = self.batches(phase)

        def enter_trial():
            model, optimizer = enter()
            return lambda position: self.step(model, optimizer, phase, batches, position)

        def flops(position):
            return cost_per_token(step_at(phase, position), "flops", self.model_config)

        min_steps = MIN_SKIPPING_STEPS if phase.skip else 1
        return Candidate(enter_trial, phase.tokens_per_step, flops, batches, min_steps)


def step_at(phase: Phase, position: float) -> Step:
    """Return what runs and trains in the step at `position` in [0, 1) of a phase."""
    return Schedule((phase,)).at(phase.start + int(position * phase.n_steps))


def first_pass(bench: Benchmark, schedule: Schedule) -> dict[str, dict]:
    """Grow through the schedule as a run does; return peak memory and compilation by phase."""
    torch._dynamo.reset()
    result = {}
    model = bench.model(schedule.phases[0].n_blocks)
    optimizer_state: dict = {}
    for phase in tqdm(schedule.phases, desc="memory and compilation", unit="phase"):
        optimizer = train.enter_phase(model, optimizer_state, phase, bench.config)
        optimizer_state = optimizer.state
        batches = bench.batches(phase)
        counters.clear()
        compilation_time_metrics.clear()
        for position in (0, 1 - 1 / phase.n_steps):
            reset_peak_memory(bench.device)
            bench.step(model, optimizer, phase, batches, position)
            synchronize(bench.device)
        result[phase.name] = {
            "peak_memory": peak_memory(bench.device),
            "compile_seconds": sum(compilation_time_metrics.get("_compile.compile_inner", [])),
            "graphs": counters["stats"]["unique_graphs"],
        }
    return result


def phase_candidates(bench: Benchmark, phases: dict[str, Phase]) -> dict[str, Candidate]:
    """Return a candidate for each phase; phases whose steps are the same work share one.

    All share one model, which is entered with as many of its blocks as a phase has.
    """
    model = bench.model()
    blocks = model.transformer.h
    optimizer_state: dict = {}
    optimizer = None

    def enter(phase):
        nonlocal optimizer
        if optimizer is not None:  # of the trial before
            optimizer_state.update(optimizer.state)
        model.transformer.h = blocks[: phase.n_blocks]
        optimizer = train.enter_phase(model, optimizer_state, phase, bench.config, begins=False)
        return model, optimizer

    distinct: dict[tuple, Candidate] = {}
    result = {}
    for name, phase in phases.items():
        key = phase.work()
        if key not in distinct:
            distinct[key] = bench.candidate(phase, functools.partial(enter, phase))
        result[name] = distinct[key]
    return result


def variant(bench: Benchmark, name: str, phase: Phase) -> Candidate:
    """Return the baseline with a change."""
    model = bench.model(compile=name if name in COMPILE else None)
    apply_variant(model, name)
    optimizer = train.enter_phase(model, {}, phase, bench.config)
    return bench.candidate(phase, lambda: (model, optimizer))


class PeerLoss(torch.nn.Module):
    """The loss of another implementation, called as a GPT is."""

    def __init__(self, model: torch.nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x, y):
        return self.loss(self.model, x, y)


def peer(bench: Benchmark, option: str, phase: Phase) -> Candidate:
    """Return the baseline with another implementation's model and loss, compiled as a whole."""
    name, _, folder = option.partition("=")
    c = bench.model_config
    if name == "hf":
        model = transformers_gpt2(c)

        def loss(model, x, y):
            logits = model(x, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    else:
        module = load_definitions(Path(folder, PEERS[name]))
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        options = {size: getattr(c, size) for size in sizes}
        if name == "nanogpt":
            options |= dict(dropout=0.0, bias=c.bias)
        with contextlib.redirect_stdout(None):
            model = module.GPT(module.GPTConfig(**options))

        def loss(model, x, y):
            return model(x, y)[1]

    peer_loss: Any = PeerLoss(model, loss).to(bench.device).train()
    if bench.config.compile != "none":
        peer_loss = torch.compile(peer_loss, dynamic=False)
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=bench.config.learning_rate,
        betas=(bench.config.beta1, bench.config.beta2),
        weight_decay=bench.config.weight_decay,
        fused=True,
    )
    return bench.candidate(phase, lambda: (peer_loss, optimizer))


def matrix_product(bench: Benchmark) -> Candidate:
    """Return a square matrix product in the precision of a step: the matmul peak.

    Its "tokens" are FLOPs.
    """
    bf16 = bench.precision._enabled
    n = MATMUL_SIZE[bench.device.type]
    if bf16 and bench.device.type == "cpu":
        n = 256  # larger ones take minutes on a CPU without instructions for bfloat16
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    return Candidate(lambda: lambda position: torch.mm(a, b), 2 * n**3, lambda position: 1)


# --------------------------------------------------------------------------------------------------
# timing and report


def time_candidates(
    candidates: list[Candidate], rounds: int, min_seconds: float, device: torch.device
) -> None:
    """Give every distinct candidate one trial per round."""
    distinct = list({id(c): c for c in candidates}.values())
    with tqdm(total=(rounds + 1) * len(distinct), desc="rounds", unit="trial") as bar:
        for c in distinct:  # not timed: compiles everything that the trials will run
            step = c.enter()
            for _ in range(2):
                start = time.perf_counter()
                step(0)
                synchronize(device)
                elapsed = time.perf_counter() - start
            c.n_steps = max(c.min_steps, round(min_seconds / elapsed))
            for position in c.positions():
                step(position)
            bar.update()
        for i in range(rounds):
            # Each round begins with another candidate: the one before leaves its mark on caches and
            # clocks.
            first = i % len(distinct)
            for c in distinct[first:] + distinct[:first]:
                trial(c, device)
                bar.update()


def trial(c: Candidate, device: torch.device) -> None:
    """Time the steps of a candidate, after one that is not timed."""
    step = c.enter()
    step(0)
    synchronize(device)
    start, waited = time.perf_counter(), c.batches.waited if c.batches else 0.0
    for position in c.positions():
        step(position)
    synchronize(device)
    elapsed = time.perf_counter() - start
    c.seconds.append(elapsed / c.n_steps)
    c.waits.append((c.batches.waited - waited) / elapsed if c.batches else 0.0)


def profile_step(c: Candidate, device: torch.device) -> list[dict[str, Any]]:
    """Return the kernels of a step, or the operators on a CPU, the longest first."""
    step = c.enter()
    step(0)
    synchronize(device)
    kind = device.type
    with torch.profiler.profile() as profiled:
        step(0)
        synchronize(device)
    rows = []
    for event in profiled.key_averages():
        # Annotations, such as "Optimizer.step", contain kernels that are listed themselves.
        if event.device_type.name.lower() == kind and not event.is_user_annotation:
            time = event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
            rows.append({"name": event.key, "calls": event.count, "seconds": time / 1e6})
    return sorted(rows, key=lambda row: -row["seconds"])[:PROFILED]


def summarize(
    bench: Benchmark,
    phases: dict[str, Phase],
    candidates: dict[str, Candidate],
    matmul: Candidate,
    first: dict[str, dict],
) -> dict:
    """Return the results as data: what ran where, and a row for each candidate."""
    peak, matmul_peak = peak_flops(bench.device), matmul.tokens / matmul.median
    baseline = candidates["baseline"]
    rows = []
    for name, c in candidates.items():
        flops_per_second = c.mean_flops * c.tokens / c.median
        row = {
            "name": name,
            "seconds": c.median,
            "quartiles": statistics.quantiles(c.seconds, n=4)[::2] if len(c.seconds) > 1 else None,
            "steps_per_trial": c.n_steps,
            "tokens_per_second": c.tokens / c.median,
            "flops_per_token": c.mean_flops,
            "mfu": flops_per_second / peak if peak else None,
            "matmul_fraction": flops_per_second / matmul_peak,
            "time_ratio": c.ratio(baseline),
            "flops_ratio": c.mean_flops / baseline.mean_flops,
            "data_wait": statistics.median(c.waits),
        }
        if name in phases:
            p = phases[name]
            row |= {"blocks": p.n_blocks, "trained_blocks": len(p.trained_blocks)}
            row |= {"context_length": p.context_length, "tokens_per_step": p.tokens_per_step}
        rows.append(row | first.get(name, {}))
    return {
        "machine": machine(bench.device),
        "config": dataclasses.asdict(bench.config),
        "matmul_flops_per_second": matmul_peak,
        "rows": rows,
    }


def table(report: dict) -> str:
    """Return the rows as text, and how to read them."""

    def show(row, key, form, scale=1.0):
        return "-" if row.get(key) is None else format(row[key] * scale, form)

    rows = []
    for r in report["rows"]:
        rows.append(
            {
                "": r["name"],
                "blocks": f"{r['trained_blocks']} of {r['blocks']}" if "blocks" in r else "-",
                "context": show(r, "context_length", ",.0f"),
                "tokens": show(r, "tokens_per_step", ",.0f"),
                "ms": show(r, "seconds", ",.1f", 1000),
                "tokens/s": show(r, "tokens_per_second", ",.0f"),
                "MFU": show(r, "mfu", ".1%"),
                "matmul": show(r, "matmul_fraction", ".1%"),
                "GiB": show(r, "peak_memory", ".2f", 2**-30),
                "wait": show(r, "data_wait", ".2%"),
                "compile": show(r, "compile_seconds", ".1f"),
                "graphs": show(r, "graphs", ".0f"),
                "time": show(r, "time_ratio", ".3f"),
                "FLOPs": show(r, "flops_ratio", ".3f"),
                "time/FLOPs": show(r, "time_ratio", ".3f", 1 / r["flops_ratio"]),
            }
        )
    align = ("left", *("right",) * (len(rows[0]) - 1))
    m, matmul_peak = report["machine"], report["matmul_flops_per_second"] / 1e12
    return "\n".join(
        [
            tabulate(rows, "keys", "simple", colalign=align, disable_numparse=True),
            f"{m['device']}, {m['cpu']}, torch {m['torch']}, {m['date']}; medians of "
            f"{report['config']['rounds']} rounds.",
            "blocks: those that train. tokens: per step. MFU: fraction of the device's bf16 peak.",
            f"matmul: fraction of the matmul peak, {matmul_peak:.3g} TFLOP/s of a square product "
            "timed in the same rounds.",
            "wait: for data. compile: seconds. time, FLOPs: per token, relative to the baseline.",
            "time/FLOPs is 1 if a phase saves as much time as FLOPs.",
            *profile_lines(report),
        ]
    )


def profile_lines(report: dict) -> list[str]:
    """Return the longest of the kernels that were profiled, if any, as text."""
    rows = report.get("profile", [])[:15]
    return [f"{r['seconds'] * 1000:10.2f} ms {r['calls']:6d} x  {r['name'][:70]}" for r in rows]


if __name__ == "__main__":
    with report_user_errors():
        main()
