"""HellaSwag: hellaswag.py and one example at a time, in turn, on the same examples.

    python benchmarks/scoring.py --data FILE [--peer DIR] [--checkpoint RUN] [--limit 240]

One at a time: the endings of an example are one padded batch, each with its context, and logits
are computed at every position. With --peer, a checkout of build-nanogpt, its own code does the same
with the same weights: the loop of its hellaswag.py, which uses transformers' model, and the one of
its train_gpt2.py, which uses its own.
"""

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    load_definitions,
    machine,
    synchronize,
    transformers_gpt2,
    write_report,
)
from hellaswag import Example, ending_losses, load_examples
from model import GPT, GPTConfig
from stagewise.checkpoint import load_checkpoint, tokenizer_folders
from stagewise.data import get_tokenizer
from stagewise.device import autocast, pick_device
from stagewise.errors import UserError, report_user_errors
from stagewise.hf import to_hf


@dataclass
class Args:
    """Time and compare ways to score HellaSwag."""

    data: Path
    """File in HellaSwag's format."""
    checkpoint: Path | None = None
    """A run folder; default: GPT-2 124M with random weights."""
    peer: Path | None = None
    """A checkout of build-nanogpt, to time its model and loops as well. It needs GPT-2's tokenizer,
    examples with four endings, and a model with biases."""
    limit: int = 240
    """Examples, taken evenly from the whole file; 0 scores all."""
    rounds: int = 12
    """Parts that the examples are divided into, by length. Each part is scored in every way."""
    batch_tokens: int | None = None
    """Positions in a forward pass of hellaswag.py."""
    alone: bool = False
    """Time hellaswag.py only, without comparing it with anything."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path = Path("out/bench/scoring.json")
    """File of the results."""


@torch.no_grad()
def one_by_one(model: GPT, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed and the mean loss in nats of every ending of an example, each (endings,).

    By the definition, without any optimization.
    """
    device, context = model.lm_head.weight.device, example.context
    rows = [(context + ending)[-model.config.block_size - 1 :] for ending in example.endings]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    mask = torch.zeros(len(rows), longest, device=device)
    for i, (row, ending) in enumerate(zip(rows, example.endings)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, len(row) - len(ending) : len(row)] = 1
    logits, mask = model(tokens[:, :-1]), mask[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none") * mask
    return losses.sum(1), losses.sum(1) / mask.sum(1)


def build_nanogpt(
    folder: Path, model: GPT
) -> tuple[Callable[[list[dict]], None], Callable[[list[dict]], list[int]]]:
    """Return its two ways to score lines of a file: one prints, the other returns choices."""
    scorer = load_definitions(folder / "hellaswag.py")
    trainer = load_definitions(folder / "train_gpt2.py")
    scorer.enc = tiktoken.get_encoding("gpt2")  # type: ignore[attr-defined]
    c, device = model.config, model.lm_head.weight.device
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    own_config = trainer.GPTConfig(**{size: getattr(c, size) for size in sizes})
    own = trainer.GPT(own_config).to(device).eval()
    own.load_state_dict(model.state_dict())
    transformers = transformers_gpt2(c).to(device).eval()
    transformers.load_state_dict(to_hf(model.state_dict()))
    scorer.GPT2LMHeadModel = SimpleNamespace(  # type: ignore[attr-defined]
        from_pretrained=lambda name: transformers
    )

    def run_script(examples: list[dict]) -> None:
        scorer.iterate_examples = lambda split: examples  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.evaluate("gpt2", device)

    @torch.no_grad()
    def choices(examples: list[dict]) -> list[int]:
        result = []
        for example in examples:
            _, tokens, mask, _ = scorer.render_example(example)
            tokens, mask = tokens.to(device), mask.to(device)
            logits, _ = own(tokens)
            result.append(trainer.get_most_likely_row(tokens, mask, logits))
        return result

    return run_script, choices


@dataclass
class Way:
    """A way to score, compared with hellaswag.py."""

    seconds: list[float] = field(default_factory=list)  # one entry per round
    # Number of predictions that differ from hellaswag.py's, by metric, and for each of them by how
    # many nats hellaswag.py preferred its own.
    differ: dict[str, int] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)

    def compare(self, metric: str, choice: int, losses: np.ndarray) -> None:
        """Compare a prediction with the losses that hellaswag.py computed."""
        if choice != losses.argmin():
            self.differ[metric] += 1
            self.margins.append(float(losses[choice] - losses.min()))


def main(args: Args) -> None:
    if args.peer and not (args.peer / "train_gpt2.py").is_file():
        raise UserError(
            f"--peer={args.peer}: has no train_gpt2.py: name a checkout of build-nanogpt"
        )
    if args.alone and args.peer:
        raise UserError("--alone: remove --peer")
    if args.limit < 0 or args.rounds < 1:
        raise UserError("--limit must be at least 0, --rounds at least 1")
    device = pick_device(args.device)
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"], device)
        folders = tokenizer_folders(args.checkpoint, checkpoint)
        encoding = get_tokenizer(checkpoint["tokenizer"], folders)
    else:
        model, encoding = GPT(GPTConfig(), device=device), get_tokenizer("gpt2")
    model.eval()
    examples = load_examples(args.data, encoding, model.config.block_size)
    lines = [line for line in args.data.read_text("utf-8").split("\n") if line.strip()]
    every = max(1, len(examples) // args.limit) if args.limit else 1
    chosen = list(range(0, len(examples), every))[: args.limit or None]
    # Sorted by length, so that hellaswag.py pads the batches of a part as little as those of all.
    chosen.sort(key=lambda i: len(examples[i].context) + sum(map(len, examples[i].endings)))
    parts = np.array_split(chosen, min(args.rounds, len(chosen)))

    ours, plain, largest = Way(), Way(differ={"acc": 0, "acc_norm": 0}), 0.0
    ways = {"hellaswag.py": ours} | ({} if args.alone else {"one by one": plain})
    if args.peer:
        run_script, choices_of = build_nanogpt(args.peer, model)
        script, loop = Way(), Way(differ={"acc_norm": 0})
        ways |= {"build-nanogpt's hellaswag.py": script, "build-nanogpt's train_gpt2.py": loop}

    def timed(way, function, *values):
        synchronize(device)
        start = time.perf_counter()
        result = function(*values)
        synchronize(device)
        way.seconds.append(time.perf_counter() - start)
        return result

    def score_one_by_one(part):
        both = [one_by_one(model, example) for example in part]
        return [[losses.double().cpu().numpy() for losses in pair] for pair in both]

    def score(part):
        return ending_losses(model, part, batch_tokens=args.batch_tokens)

    with autocast(device, "auto", model.config.n_embd):
        for i in chosen[:4]:  # warm up
            score_one_by_one([examples[i]]), score([examples[i]])
        for part in tqdm(parts, desc="rounds"):
            in_part = [examples[i] for i in part]
            losses_of = [] if args.alone else timed(plain, score_one_by_one, in_part)
            sums, counts = timed(ours, score, in_part)
            if args.alone:
                continue
            if args.peer:
                raw = [json.loads(lines[i]) for i in part]
                timed(script, run_script, raw)
                choices = timed(loop, choices_of, raw)
            for k, (example, (summed, mean)) in enumerate(zip(in_part, losses_of)):
                plain.compare("acc", summed.argmin(), sums[k])
                plain.compare("acc_norm", mean.argmin(), sums[k] / counts[k])
                relative = np.abs(sums[k, : len(example.endings)] / summed - 1)
                largest = max(largest, float(relative.max()))
                if args.peer:
                    loop.compare("acc_norm", choices[k], sums[k] / counts[k])

    results = {}
    for name, way in ways.items():
        ratios = [a / b for a, b in zip(way.seconds, ours.seconds)]
        results[name] = {
            "seconds_per_example": sum(way.seconds) / len(chosen),
            "ratio": sum(way.seconds) / sum(ours.seconds),
            "ratios": ratios,
            "predictions_that_differ": way.differ,
            "margins": way.margins,
        }
        print(
            f"{name:30s} {results[name]['seconds_per_example']:.4f} s per example, "
            f"{results[name]['ratio']:.2f} of hellaswag.py's; predictions that differ: "
            f"{way.differ or '-'}"
        )
    if not args.alone:
        print(f"{len(chosen)} examples; losses differ by at most {largest:.1e} (relative)")
    report: dict = {"machine": machine(device), "args": dataclasses.asdict(args)}
    report["examples"] = len(chosen)
    if not args.alone:
        report["largest_relative_loss_difference"] = largest
    write_report(args.json, report | {"ways": results})


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
