"""Forecast the time and the memory of a run, by measuring a few steps of each of its phases.

    python forecast.py [configs/A.py configs/B.py ...] [--key=value ...]
    torchrun --standalone --nproc_per_node=8 forecast.py [...]

The options are those of train.py. Writes out_dir/forecast.json, and changes nothing else there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tabulate import tabulate
from tqdm import tqdm

import train
from model import GPT
from schedule import Phase, Schedule
from stagewise.config import Config, grad_accum_steps, load_config
from stagewise.data import Prefetch
from stagewise.device import (
    cpu_name,
    device_name,
    machine_name,
    peak_memory,
    reset_peak_memory,
)
from stagewise.distributed import Ranks, destroy_process_groups, ranks_from_environment
from stagewise.errors import UserError, report_user_errors
from stagewise.run_folder import write_json
from train import Setup

# The steps of each phase are measured until there are this many and they took this long in total.
MIN_STEPS, MIN_SECONDS = 3, 2.0
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are evenly spread


@dataclasses.dataclass(frozen=True)
class ForecastConfig(Config):
    """Forecast the time and the memory of a run. The options are those of train.py."""

    prog: ClassVar[str] = "forecast.py"


def main() -> None:
    ranks = ranks_from_environment()
    config = load_config(sys.argv[1:], ForecastConfig(), quiet=ranks.local_rank != 0)
    if config.dry_run:
        raise UserError("dry_run has no effect on a forecast: remove it, or use train.py")
    s = train.set_up(config, ranks)
    rows = measure_phases(s, config, ranks)
    if ranks.master:
        print(table(rows))
        name, threads = device_name(s.device), torch.get_num_threads()
        machine = machine_name(name, ranks.world_size, cpu_name(), threads)
        forecast = {"machine": machine, "torch_version": torch.__version__, "phases": rows}
        write_json(Path(config.out_dir), "forecast.json", forecast)
    if ranks.launched:
        destroy_process_groups()


def measure_phases(s: Setup, config: Config, ranks: Ranks) -> list[dict[str, Any]]:
    """Measure a few steps of every phase, and return a row with the expected times of each phase.

    The phases are entered as in a run. Phases with the same work are measured only once. The times
    do not include process startup and checkpoints.
    """
    schedule, device = s.schedule, s.device
    model = GPT(s.model_config, schedule.phases[0].n_blocks, config.seed, device, s.mesh)
    if config.compile != "none":
        model.compile_regions(whole=config.compile == "model")
    rows = []
    measured: dict[tuple, dict[str, float]] = {}  # by the work of a phase
    optimizer_state: dict = {}
    for phase in tqdm(schedule.phases, desc="forecast", disable=not ranks.master, leave=False):
        optimizer = train.enter_phase(model, optimizer_state, phase, config)
        optimizer_state = optimizer.state
        work = phase.work()
        new = work not in measured
        if new:
            wrapped = train.wrap(model, phase, config, device, ranks)
            endless = Schedule((dataclasses.replace(phase, start=0, stop=2**40),))
            batches = Prefetch(
                train.train_batches(s.train_data, s.order, endless, 0, config, ranks, device)
            )
            reset_peak_memory(device)
            measured[work] = measure_steps(
                wrapped, optimizer, batches, phase, schedule, config, ranks, s.precision
            )
            measured[work]["peak_memory"] = peak_memory(device)
            unwrapped = train.unwrap(wrapped)
            measured[work]["evaluation"] = measure_evaluation(unwrapped, s, config, ranks)
            del wrapped, unwrapped
        m, every = measured[work], config.eval_interval
        evaluations = phase.stop // every - phase.start // every + (phase.start == 0)
        evaluations += phase.stop == schedule.n_steps and phase.stop % every > 0
        rows.append(
            {
                "phase": phase.name,
                "steps": phase.n_steps,
                "step_seconds": m["step"],
                "tokens_per_second": phase.tokens_per_step / m["step"],
                "peak_memory": m["peak_memory"],
                "training_seconds": phase.n_steps * m["step"],
                "compile_seconds": m["compile"] if new else 0.0,
                "evaluation_seconds": evaluations * m["evaluation"],
            }
        )
    return rows


def measure_steps(
    model,
    optimizer: torch.optim.Optimizer,
    batches: Iterator,
    phase: Phase,
    schedule: Schedule,
    config: Config,
    ranks: Ranks,
    precision: torch.autocast,
) -> dict[str, float]:
    """Return the seconds of a step of a phase, and the additional seconds of the first step.

    The measured steps are spread over the phase. If steps have more than 2 micro-batches, steps
    with 1 and 2 micro-batches are measured, and the time is extrapolated linearly.
    """

    def seconds(position: float, n: int) -> float:
        """Perform a step with n micro-batches, at a position in [0, 1) of the phase."""
        scales = schedule.at(phase.start + int(position * phase.n_steps)).residual_scales
        start = time.perf_counter()
        losses = train.train_step(
            model, optimizer, batches, n, precision, config.grad_clip, scales,
            config.reduce_every_micro_batch,
        )  # fmt: skip
        losses.tolist()  # synchronizes with the device
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        if ranks.world_size > 1:  # all ranks must perform the same number of steps
            elapsed = elapsed.to(losses.device)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return elapsed.item()

    def median_seconds(n: int) -> float:
        times = [seconds(0, n)]
        while len(times) < MIN_STEPS or sum(times) < MIN_SECONDS:
            times.append(seconds(len(times) * GOLDEN_RATIO % 1, n))
        return statistics.median(times) if phase.skip is None else statistics.fmean(times)

    n = grad_accum_steps(config, phase.tokens_per_step, ranks.world_size)
    first, step = seconds(0, min(n, 2)), median_seconds(min(n, 2))
    compile_seconds = max(0.0, first - step)
    if n > 2:
        step += (n - 2) * (step - median_seconds(1))
    return {"step": step, "compile": compile_seconds}


def measure_evaluation(model: GPT, s: Setup, config: Config, ranks: Ranks) -> float:
    """Return the seconds that an evaluation takes, extrapolated from part of the data."""
    few = s.val_windows[: 4 * config.batch_size * ranks.world_size]
    some = s.examples[:: max(1, len(s.examples) // (64 * ranks.world_size))]

    def seconds(examples):
        start = time.perf_counter()
        train.evaluate(model, s.val_data, few, examples, s.precision, config.batch_size, ranks)
        return time.perf_counter() - start

    seconds(some[:1])  # not measured: allocates memory
    loss = min(seconds([]) for _ in range(2))
    total = loss * len(s.val_windows) / len(few)
    if s.examples:
        total += max(0.0, seconds(some) - loss) * len(s.examples) / len(some)
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `measure_phases` as a table."""
    columns = ["training_seconds", "compile_seconds", "evaluation_seconds"]
    total = {c: sum(row[c] for row in rows) for c in columns}
    table = []
    for row in rows:
        line = [row["phase"], f"{row['steps']:,}", f"{row['step_seconds']:.3g}"]
        line += [f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory'] / 2**30:.2f}"]
        table.append(line + [duration(row[c]) for c in columns])
    table.append(["total", "", "", "", "", *(duration(total[c]) for c in columns)])
    header = ["phase", "steps", "s/step", "tokens/s", "GiB", "training", "compile", "evaluation"]
    align = ("left", *("right",) * (len(header) - 1))
    return "\n".join(
        [
            tabulate(table, header, "simple", colalign=align, disable_numparse=True),
            f"Forecast: {duration(sum(total.values()))} in total, peak memory "
            f"{max(row['peak_memory'] for row in rows) / 2**30:.2f} GiB per process, measured on "
            "a few steps of each phase. Not included: process startup and checkpoints.",
        ]
    )


def duration(seconds: float) -> str:
    """Format a duration as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    with report_user_errors():
        main()
