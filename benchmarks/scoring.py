"""HellaSwag: hellaswag.py against one example at a time, by turns, on the same examples.

    python benchmarks/scoring.py --data FILE [--checkpoint RUN] [--limit 60]

One at a time is build-nanogpt's evaluation loop: an example's endings are one padded batch, each with its context, and logits are
made at every position.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import machine, synchronize, write_report
from checkpoint import load_checkpoint, model_from
from data import get_tokenizer
from device import autocast, pick_device
from errors import report_user_errors
from hellaswag import Example, ending_losses, load_examples
from model import GPT, GPTConfig


@dataclass
class Args:
    """Time and compare two ways to score HellaSwag."""

    data: Path
    """File of HellaSwag's JSON lines."""
    checkpoint: Path | None = None
    """A run folder; default: GPT-2 124M with random weights."""
    limit: int = 60
    """Examples, drawn evenly from the whole file; 0 is all."""
    rounds: int = 3
    """Parts that the examples are cut into; each part is scored both ways."""
    batch_tokens: int = 8192
    """Padded positions in a forward pass of hellaswag.py."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path = Path("out/bench/scoring.json")
    """File of the results."""


@torch.no_grad()
def one_by_one(model, example: Example) -> torch.Tensor:
    """Summed loss in nats of every ending of an example (endings,)."""
    device = model.lm_head.weight.device
    rows = [(example.context + ending)[-model.config.block_size - 1 :] for ending in example.endings]
    masks = [[0] * (len(row) - len(ending)) + [1] * len(ending) for row, ending in zip(rows, example.endings)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([m + [0] * (longest - len(m)) for m in masks], device=device)[:, 1:]
    logits = model(tokens[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(mask.shape)
    return (losses * mask).sum(1)


def main(args: Args) -> None:
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    model = model_from(checkpoint, device) if checkpoint else GPT(GPTConfig(), device=device)
    model.eval()
    examples = load_examples(args.data, get_tokenizer(checkpoint["tokenizer"] if checkpoint else "gpt2"), model.config.block_size)
    examples = examples[:: max(1, len(examples) // args.limit)][: args.limit] if args.limit else examples
    seconds, differ, largest = {"one by one": [], "hellaswag.py": []}, {"acc": 0, "acc_norm": 0}, 0.0
    with autocast(device, "auto"):
        one_by_one(model, examples[0]), ending_losses(model, examples[:4])  # warm up
        for part in tqdm([examples[r :: args.rounds] for r in range(args.rounds)], desc="rounds"):
            synchronize(device)
            start = time.perf_counter()
            plain = [one_by_one(model, e).double().cpu().numpy() for e in part]
            middle = time.perf_counter()
            sums, counts = ending_losses(model, part, batch_tokens=args.batch_tokens)
            seconds["one by one"].append((middle - start) / len(part))
            seconds["hellaswag.py"].append((time.perf_counter() - middle) / len(part))
            for e, a, b, n in zip(part, plain, sums, counts):
                b, n = b[: len(e.endings)], n[: len(e.endings)]
                differ["acc"] += int(a.argmin() != b.argmin())
                differ["acc_norm"] += int((a / n).argmin() != (b / n).argmin())
                largest = max(largest, float(np.abs(a / b - 1).max()))
    ratio = statistics.median(a / b for a, b in zip(*seconds.values()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:14s} {value:.4f} s an example")
    print(f"ratio {ratio:.2f}; {len(examples)} examples: predictions that differ {differ}, largest relative difference of a loss {largest:.1e}")
    results = {"seconds_an_example": medians, "ratio": ratio, "examples": len(examples), "differ": differ, "largest_difference": largest}
    write_report(args.json, {"machine": machine(device)} | results)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
