"""How long does training wait for a checkpoint? Steps and saves by turns, of a model with AdamW's moments.

    python benchmarks/saving.py [--sequences 1] [--rounds 4]

A step here is one micro-step, forward, backward and update: what a real step has at the very least.
"""

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

sys.path.insert(0, str(Path(__file__).parent.parent))

import config as cfg
from bench import machine, synchronize, write_report
from checkpoint import CheckpointWriter
from device import autocast, pick_device
from errors import UserError, report_user_errors
from model import GPT, GPTConfig
from train import make_optimizer, update


@dataclass
class Args:
    """Time steps of GPT-2 124M, the waiting for a checkpoint, and steps while it is being written."""

    sequences: int = 1
    """Sequences of a step."""
    block_size: int = 1024
    """Tokens of a sequence."""
    rounds: int = 4
    """Checkpoints; the first also makes room for the copy."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path = Path("out/bench/saving.json")
    """File of the results."""


def main(args: Args) -> None:
    device = pick_device(args.device)
    model = GPT(GPTConfig(block_size=args.block_size), device=device)
    optimizer = make_optimizer(model, cfg.Config())
    tokens = torch.randint(50257, (args.sequences, args.block_size))
    batches = itertools.repeat((tokens, tokens))

    def timed(action):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        return time.perf_counter() - start

    step = lambda: update(model, optimizer, batches, 1, autocast(device, "auto"), 1.0)  # noqa: E731
    quiet, stalls, writing, writes = [], [], [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = CheckpointWriter(Path(folder), 1, set())
        step()
        for i in tqdm(range(args.rounds), desc="rounds"):
            quiet.append(timed(step))
            start = time.perf_counter()
            stalls.append(timed(lambda: writer.save(model, optimizer, {"step": i})))
            writing.append(timed(step))
            writer.wait()
            writes.append(time.perf_counter() - start)
        writer.close()
        if writer.failure:
            raise UserError(f"{writer.failure}: make room")
    result = {"parameters": model.num_params(), "tokens_of_a_step": args.sequences * args.block_size}
    result |= {"step": quiet, "stall": stalls, "step_while_writing": writing, "until_written": writes}
    for name in ("step", "stall", "step_while_writing", "until_written"):
        print(f"{name.replace('_', ' '):20s} median {statistics.median(result[name]):7.2f} s, first {result[name][0]:7.2f} s")
    write_report(args.json, {"machine": machine(device)} | result)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
