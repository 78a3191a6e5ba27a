"""Checkpoints: written whole or not at all, read without running code.

A checkpoint is one file, RUN_DIR/ckpt.pt: the model, the optimizer, the position, and what is needed to rebuild both.
"""

import os
from pathlib import Path

import torch

from errors import UserError, first_line
from model import GPT, GPTConfig

NAME = "ckpt.pt"
FIELDS = ("model_args", "n_blocks", "model", "optimizer", "step", "seconds", "config", "phases", "n_windows", "tokenizer")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write `checkpoint` (FIELDS) to `path`; a crash in the middle leaves the former file."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict:
    """The checkpoint in a file, or in a run folder, mapped into CPU memory: what is not used is not read.

    Raises UserError where there is none or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint there; name a run folder that has one, or a checkpoint file") from None
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise UserError(f"{path}: is no readable checkpoint ({first_line(error)})") from None
    missing = [f for f in FIELDS if not isinstance(checkpoint, dict) or f not in checkpoint]
    if missing:
        raise UserError(f"{path}: is no checkpoint of this train.py: it lacks {', '.join(missing)}")
    return checkpoint


def model_from(checkpoint: dict, device="cpu") -> GPT:
    """The model of a checkpoint, with the blocks that it had grown. Raises UserError where the weights do not fit."""
    model = GPT(GPTConfig(**checkpoint["model_args"]), n_blocks=0, device="meta")
    model.grow(checkpoint["n_blocks"], seed=0)
    model.to_empty(device=device)
    model.transformer.wte.weight = model.lm_head.weight  # to_empty unties them
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its own model_args: {str(error).splitlines()[1].strip()}") from None
    return model
