"""Text from a checkpoint.

    python sample.py CHECKPOINT [--prompt "..."] [--max_new_tokens 200] [--num_samples 3]
"""

from dataclasses import dataclass
from pathlib import Path

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
    """A run folder, or a checkpoint file."""
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
    dtype: str = "auto"
    """auto, bfloat16 or float32."""


def main(args: Args) -> None:
    if args.temperature < 0 or min(args.top_k, args.num_samples, args.max_new_tokens) < 1:
        raise UserError("temperature must not be negative; top_k, num_samples and max_new_tokens must be at least 1")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, device)
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
