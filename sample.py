"""Generate text from a checkpoint.

python sample.py CHECKPOINT [--prompt "..."] [--max_new_tokens 200] [--num_samples 3]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from model import GPT
from stagewise.checkpoint import load_checkpoint, tokenizer_folders
from stagewise.data import check_tokenizer, encode, get_tokenizer
from stagewise.device import autocast, pick_device
from stagewise.errors import UserError, report_user_errors


@dataclass
class Args:
    """Generate text from a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, one of its checkpoints, a ckpt.pt of nanoGPT, or a model from the Hugging Face
    Hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    prompt: str = ""
    """Text to continue. If empty, start a new document."""
    num_samples: int = 3
    """Number of samples to generate."""
    max_new_tokens: int = 200
    """Number of tokens to generate per sample."""
    temperature: float = 0.8
    """Sampling temperature. Lower is less random; 0 always selects the most likely token."""
    top_k: int = 200
    """Sample only from the k most likely tokens."""
    seed: int = 1337
    """Random seed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products. auto: bfloat16 on GPUs that support it, else float32."""


def main(args: Args) -> None:
    largest = {"num_samples": 10_000, "max_new_tokens": 1_000_000, "top_k": 2**31}
    for name, limit in largest.items():
        if not 1 <= getattr(args, name) <= limit:
            raise UserError(f"--{name}={getattr(args, name)} must be between 1 and {limit:,}")
    if args.prompt != args.prompt.encode("utf-8", "ignore").decode():
        raise UserError("--prompt: is not UTF-8 text: set the locale, for example LC_ALL=C.UTF-8")
    # A smaller temperature could overflow the logits. The comparison is written to reject NaN.
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature={args.temperature} must be 0 or between 0.01 and 100")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed={args.seed} must be between 0 and 2**63 - 1")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"], device).eval()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{args.checkpoint}: its weights are not finite: use another checkpoint")
    folders = tokenizer_folders(args.checkpoint, checkpoint)
    encoding = get_tokenizer(checkpoint["tokenizer"], folders)
    check_tokenizer(encoding, model.config.vocab_size, args.checkpoint)
    prompt = [encoding.eot_token, *encode(encoding, args.prompt).tolist()]
    idx = torch.tensor([prompt] * args.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    with autocast(device, args.dtype, model.config.n_embd):
        out = model.generate(
            idx,
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            n_vocab=encoding.n_vocab,
            generator=generator,
        )
    for i, tokens in enumerate(out.tolist(), start=1):
        print(f"--- sample {i}\n{encoding.decode(tokens[1:])}")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
