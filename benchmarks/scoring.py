"""HellaSwag: hellaswag.py against one example at a time, by turns, on the same examples.

    python benchmarks/scoring.py --data FILE [--peer DIR] [--checkpoint RUN] [--limit 240]

One at a time: an example's endings are one padded batch, each with its context, and logits are made at every position. With
--peer, a checkout of build-nanogpt, its own code does the same, given the same weights: the loop of its hellaswag.py, which has
transformers' model, and the one of its train_gpt2.py, which has its own.
"""

import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import definitions, hugging_face, machine, synchronize, write_report
from checkpoint import load_checkpoint, model_from
from data import get_tokenizer
from device import autocast, pick_device
from errors import UserError, report_user_errors
from hellaswag import Example, ending_losses, load_examples
from model import GPT, GPTConfig, to_hf


@dataclass
class Args:
    """Time and compare ways to score HellaSwag."""

    data: Path
    """File of HellaSwag's JSON lines."""
    checkpoint: Path | None = None
    """A run folder; default: GPT-2 124M with random weights."""
    peer: Path | None = None
    """A checkout of build-nanogpt; its model and loop are timed too (GPT-2's tokenizer, four endings, biases)."""
    limit: int = 240
    """Examples, drawn evenly from the whole file; 0 is all."""
    rounds: int = 12
    """Parts that the examples are cut into, by length; each part is scored in every way."""
    batch_tokens: int | None = None
    """Positions in a forward pass of hellaswag.py."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path = Path("out/bench/scoring.json")
    """File of the results."""


@torch.no_grad()
def one_by_one(model, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed and mean loss in nats of every ending of an example (endings,): the plain way, by the definition."""
    device = model.lm_head.weight.device
    rows = [(example.context + ending)[-model.config.block_size - 1 :] for ending in example.endings]
    masks = [[0] * (len(row) - len(ending)) + [1] * len(ending) for row, ending in zip(rows, example.endings)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([m + [0] * (longest - len(m)) for m in masks], device=device)[:, 1:]
    logits = model(tokens[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none") * mask
    return losses.sum(1), losses.sum(1) / mask.sum(1)


def build_nanogpt(folder: Path, model: GPT):
    """Its two ways to score, each a function of examples as the file has them: the first prints, the second returns choices."""
    scorer, trainer = definitions(folder / "hellaswag.py"), definitions(folder / "train_gpt2.py")
    scorer.enc = tiktoken.get_encoding("gpt2")
    shape, device = model.config, model.lm_head.weight.device
    sizes = dict(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    peer = trainer.GPT(trainer.GPTConfig(block_size=shape.block_size, vocab_size=shape.vocab_size, **sizes)).to(device).eval()
    peer.load_state_dict(model.state_dict())
    transformers = hugging_face(shape).to(device).eval()
    transformers.load_state_dict(to_hf(model.state_dict()))
    scorer.GPT2LMHeadModel = SimpleNamespace(from_pretrained=lambda name: transformers)

    def run_script(examples: list[dict]) -> None:
        scorer.iterate_examples = lambda split: examples
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.evaluate("gpt2", device)

    @torch.no_grad()
    def choices(examples: list[dict]) -> list[int]:
        result = []
        for example in examples:
            _, tokens, mask, _ = scorer.render_example(example)
            tokens, mask = tokens.to(device), mask.to(device)
            logits, _ = peer(tokens)
            result.append(trainer.get_most_likely_row(tokens, mask, logits))
        return result

    return run_script, choices


@dataclass
class Tally:
    """How one way to score went, beside hellaswag.py."""

    seconds: list[float] = field(default_factory=list)  # one entry a round
    differ: dict[str, int] = field(default_factory=dict)  # predictions unlike those of hellaswag.py
    closest: list[float] = field(default_factory=list)  # by how much, in nats, hellaswag.py preferred its own choice, where they differ


def main(args: Args) -> None:
    if args.peer and not (args.peer / "train_gpt2.py").is_file():
        raise UserError(f"--peer={args.peer}: train_gpt2.py is not there; name a checkout of build-nanogpt")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    model = model_from(checkpoint, device) if checkpoint else GPT(GPTConfig(), device=device)
    model.eval()
    examples = load_examples(args.data, get_tokenizer(checkpoint["tokenizer"] if checkpoint else "gpt2"), model.config.block_size)
    lines = [line for line in args.data.read_text("utf-8").split("\n") if line.strip()]
    every = max(1, len(examples) // args.limit) if args.limit else 1
    chosen = list(range(0, len(examples), every))[: args.limit or None]
    # Examples of like length together, so that hellaswag.py's batches have as little padding as among all examples.
    chosen.sort(key=lambda i: len(examples[i].context) + sum(map(len, examples[i].endings)))
    parts = np.array_split(chosen, args.rounds)

    ours, plain, largest = Tally(), Tally(differ={"acc": 0, "acc_norm": 0}), 0.0
    ways = {"hellaswag.py": ours, "one by one": plain}
    if args.peer:
        run_script, choices_of = build_nanogpt(args.peer, model)
        script, loop = Tally(), Tally(differ={"acc_norm": 0})
        ways |= {"build-nanogpt's hellaswag.py": script, "build-nanogpt's train_gpt2.py": loop}

    def timed(way, score):
        synchronize(device)
        start = time.perf_counter()
        result = score()
        synchronize(device)
        way.seconds.append(time.perf_counter() - start)
        return result

    def compare(way, name, choice, losses):
        if choice != losses.argmin():
            way.differ[name] += 1
            way.closest.append(float(losses[choice] - losses.min()))

    with autocast(device, "auto"):
        for i in chosen[:4]:  # warm up
            one_by_one(model, examples[i]), ending_losses(model, [examples[i]])
        for part in tqdm(parts, desc="rounds"):
            in_part = [examples[i] for i in part]
            losses_of = timed(plain, lambda: [[losses.double().cpu().numpy() for losses in one_by_one(model, e)] for e in in_part])
            sums, counts = timed(ours, lambda: ending_losses(model, in_part, batch_tokens=args.batch_tokens))
            if args.peer:
                raw = [json.loads(lines[i]) for i in part]
                timed(script, lambda: run_script(raw))
                choices = timed(loop, lambda: choices_of(raw))
            for k, (example, (summed, mean)) in enumerate(zip(in_part, losses_of)):
                n = len(example.endings)
                compare(plain, "acc", summed.argmin(), sums[k])
                compare(plain, "acc_norm", mean.argmin(), sums[k] / counts[k])
                largest = max(largest, float(np.abs(sums[k, :n] / summed - 1).max()))
                if args.peer:
                    compare(loop, "acc_norm", choices[k], sums[k] / counts[k])

    results = {"examples": len(chosen), "largest_relative_difference_of_a_loss": largest, "ways": {}}
    for name, way in ways.items():
        seconds, ratio = sum(way.seconds) / len(chosen), sum(way.seconds) / sum(ours.seconds)
        ratios = [a / b for a, b in zip(way.seconds, ours.seconds)]
        times = {"seconds_an_example": seconds, "ratio": ratio, "ratios": ratios}
        results["ways"][name] = times | {"predictions_that_differ": way.differ, "by_nats": way.closest}
        print(f"{name:30s} {seconds:.4f} s an example, {ratio:.2f} of hellaswag.py's; predictions that differ: {way.differ or '-'}")
    print(f"{len(chosen)} examples; losses one by one differ by {largest:.1e} at most, relatively")
    write_report(args.json, {"machine": machine(device)} | results)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
