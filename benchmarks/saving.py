"""How long does training wait for a checkpoint?

    python benchmarks/saving.py [--sequences 1] [--rounds 4]

Alternates training steps and checkpoints of a model with AdamW state. A step is one micro-batch
(forward, backward, update), so no step of a real run is shorter.
"""

import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from benchmarks.common import machine, synchronize, write_report
from cost import make_schedules
from model import GPT
from stagewise.checkpoint import CheckpointWriter
from stagewise.config import Config
from stagewise.device import autocast, pick_device
from stagewise.errors import UserError, report_user_errors


@dataclass
class Args:
    """Time steps of GPT-2 124M, the wait for a checkpoint, and steps while it is being written."""

    sequences: int = 1
    """Sequences per step."""
    block_size: int = 1024
    """Tokens per sequence."""
    rounds: int = 4
    """Checkpoints; the first one also allocates memory for the copy."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path = Path("out/bench/saving.json")
    """File of the results."""


def main(args: Args) -> None:
    device = pick_device(args.device)
    if min(args.sequences, args.block_size, args.rounds) < 1:
        raise UserError("--sequences, --block_size and --rounds must be at least 1")
    config = Config(block_size=args.block_size)
    meta: dict = {"tokenizer": "gpt2", "vocab_size": 50257, "shards": []}
    model_config = train.make_model_config(config, 50304)
    schedule, _ = make_schedules(config, model_config)
    model = GPT(model_config, device=device)
    optimizer = train.enter_phase(model, {}, schedule.phases[0], config)
    tokens = torch.randint(50257, (args.sequences, args.block_size))
    batches = itertools.repeat((tokens, tokens))
    precision = autocast(device, "auto", config.n_embd)
    state = train.run_state(config, model_config, schedule, n_windows=1, meta=meta)
    state |= {"seconds": 0.0, "loss_history": {}, "n_blocks": model.n_blocks}

    def timed(action):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        return time.perf_counter() - start

    def step():
        train.train_step(model, optimizer, batches, 1, precision, 1.0)

    times: dict[str, list[float]] = {
        name: [] for name in ("step", "wait", "step_while_writing", "until_written")
    }
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = CheckpointWriter(Path(folder), 1, set())
        step()
        for i in tqdm(range(args.rounds), desc="rounds"):
            times["step"].append(timed(step))
            save = functools.partial(writer.save, model, optimizer, state | {"step": i})
            start = time.perf_counter()
            times["wait"].append(timed(save))
            times["step_while_writing"].append(timed(step))
            writer.wait()
            times["until_written"].append(time.perf_counter() - start)
        writer.close()
        if writer.failure:
            raise UserError(f"{writer.failure}: free some space in the current folder")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name.replace('_', ' '):20s} median {median:7.2f} s, first {seconds[0]:7.2f} s")
    sizes = {"parameters": model.num_params(), "tokens_per_step": tokens.numel()}
    report = {"machine": machine(device), "args": dataclasses.asdict(args)}
    write_report(args.json, report | sizes | times)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
