"""Weights of nanoGPT's checkpoints (ckpt.pt)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta

from stagewise.errors import UserError, first_line
from stagewise.fileio import convert, open_file
from stagewise.hf import not_from_a_run

COMPILED = "_orig_mod."  # torch.compile's prefix of parameter names
GPT2_VOCAB, PADDED_VOCAB = 50257, 50304
EMBEDDING = "transformer.wte.weight"

Size = Annotated[int, Meta(ge=1, le=2**22)]


@dataclass
class ModelArgs:
    """The entry "model_args"."""

    n_layer: Annotated[int, Meta(ge=1, le=1024)]
    n_head: Size
    n_embd: Size
    block_size: Size
    vocab_size: Size
    bias: bool = True  # checkpoints written before the option existed have biases
    dropout: float = 0.0


def load_nanogpt(path: Path) -> dict[str, Any]:
    """Return the weights of a ckpt.pt in the format of `checkpoint.load_checkpoint`.

    No code in the file is executed (``weights_only=True``). The optimizer state is not used. The
    tokenizer, which the file does not name, is assumed to be GPT-2's.

    nanoGPT has used the exact GELU since February 2023; `model.GPT` uses the tanh approximation, as
    GPT-2 does. Activations differ by less than 5e-4.

    Raises:
        UserError: if the file is not such a checkpoint, or its vocabulary is not that of GPT-2.
    """
    try:
        with open_file(path) as f:
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch's unpickler raises many types for corrupted files
        raise UserError(
            f"{path}: is not a checkpoint of nanoGPT, or cannot be loaded without executing code: "
            "name its ckpt.pt, or a run folder"
        ) from None
    try:
        args = asdict(convert(checkpoint["model_args"], ModelArgs))
        step = checkpoint.get("iter_num", 0)
        weights = {
            name.removeprefix(COMPILED): w.float()
            for name, w in checkpoint["model"].items()
            if not name.endswith(".attn.bias")  # the causal mask, saved by versions without flash
        }
        weights["lm_head.weight"] = weights[EMBEDDING]
        step = int(step)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of nanoGPT (it needs model and model_args; "
            f"{type(error).__name__}: {first_line(error)}): name its ckpt.pt, or a run folder"
        ) from None
    if not GPT2_VOCAB <= args["vocab_size"] <= PADDED_VOCAB:
        raise UserError(
            f"{path}: has a vocabulary of {args['vocab_size']:,}, but only checkpoints with "
            f"GPT-2's tokenizer ({GPT2_VOCAB:,}, padded up to {PADDED_VOCAB:,}) can be read"
        )
    return not_from_a_run(args, weights, step)
