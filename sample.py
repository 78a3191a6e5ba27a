"""Text from a checkpoint.

    python sample.py CHECKPOINT [--prompt "..."] [--max_new_tokens 200] [--num_samples 3]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from checkpoint import load_checkpoint, model_from
from data import get_tokenizer
from device import autocast, pick_device
from errors import UserError, report_user_errors


@dataclass
class Args:
    """Sample text from a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, one of its checkpoints, or gpt2, gpt2-medium, gpt2-large, gpt2-xl from the Hugging Face hub."""
    prompt: str = ""
    """Text to go on from; empty begins a document."""
    num_samples: int = 3
    """Texts to draw."""
    max_new_tokens: int = 200
    """Tokens to add to each."""
    temperature: float = 0.8
    """Below 1 bolder, above 1 wilder; 0 takes the likeliest token."""
    top_k: int = 200
    """Draw from the k likeliest tokens only."""
    seed: int = 1337
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products; auto is bfloat16 where the GPU has it."""


def main(args: Args) -> None:
    if args.temperature < 0 or min(args.top_k, args.num_samples, args.max_new_tokens) < 1:
        raise UserError("temperature must not be negative; top_k, num_samples and max_new_tokens must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed={args.seed} must lie between 0 and 2**63 - 1")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from(checkpoint, device).eval()
    encoding = get_tokenizer(checkpoint["tokenizer"])
    prompt = [encoding.eot_token] + encoding.encode_ordinary(args.prompt)
    idx = torch.tensor([prompt] * args.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    with autocast(device, args.dtype):
        out = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, encoding.n_vocab, generator)
    for i, tokens in enumerate(out.tolist()):
        print(f"--- sample {i + 1}\n{encoding.decode(tokens[1:])}")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
