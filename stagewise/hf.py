"""Conversion to and from Hugging Face's GPT2LMHeadModel, and OpenAI's GPT-2 from the Hub."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stagewise.errors import UserError, first_line
from stagewise.fileio import sha256

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
ENDPOINT = None  # the Hub
PAUSES = (1, 2, 4, 8)  # seconds before each retry

# transformers' Conv1D layers store their weights transposed.
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in old checkpoints
_EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")


def from_hf(
    state_dict: dict[str, torch.Tensor], vocab_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Convert a state dict of GPT2LMHeadModel to one of `GPT`.

    Args:
        vocab_size: if given, wte is padded with zeros to this number of rows.
    """
    ours = {}
    for name, w in state_dict.items():
        if name.endswith(_MASKS):
            continue
        if name in _EMBEDDINGS and vocab_size is not None:
            w = torch.nn.functional.pad(w, (0, 0, 0, vocab_size - w.size(0)))
        ours[name] = w.t().contiguous() if name.endswith(_CONV1D) else w
    return ours


def to_hf(
    state_dict: dict[str, torch.Tensor], vocab_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Convert a state dict of `GPT` to one of GPT2LMHeadModel.

    Args:
        vocab_size: if given, only this number of rows of wte is kept.
    """
    theirs = {}
    for name, w in state_dict.items():
        if name in _EMBEDDINGS:
            w = w[:vocab_size]
        theirs[name] = w.t().contiguous() if name.endswith(_CONV1D) else w
    return theirs


def load_pretrained(name: str) -> dict[str, Any]:
    """Return one of SIZES in the format of `checkpoint.load_checkpoint`.

    Raises:
        UserError: if it cannot be downloaded.
    """
    path = download(f"openai-community/{name}", "model.safetensors")
    model_config = SIZES[name] | dict(block_size=1024, vocab_size=50257, dropout=0.0, bias=True)
    weights = {f"transformer.{key}": tensor for key, tensor in load_file(path).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {
        "step": 0,
        "n_blocks": SIZES[name]["n_layer"],
        "model_config": model_config,
        "seconds": 0.0,
        "loss_history": {},
        "config": {"hellaswag_data": "auto", "data_dir": "data/fineweb_edu"},
        "phases": [],
        "n_windows": 0,
        "tokenizer": "gpt2",
        "initial_cost": {},
        "model": from_hf(weights),
        "optimizer": None,
    }


def download(repo: str, file: str) -> Path:
    """Return the path of a repository's file in the local Hub cache, downloading it if needed.

    huggingface_hub resumes interrupted downloads; other failures are retried after PAUSES. Large
    files in the cache are named by their SHA-256; a file with the wrong checksum is deleted.

    Raises:
        UserError: if all attempts fail.
    """
    from huggingface_hub import hf_hub_download  # slow to import and rarely needed

    wrong = ""
    for pause in (*PAUSES, None):
        try:
            path = Path(hf_hub_download(repo, file, endpoint=ENDPOINT)).resolve()
            if not re.fullmatch("[0-9a-f]{64}", path.name) or sha256(path) == path.name:
                return path
            path.unlink()
            wrong = "its checksum is wrong"
        except Exception as error:  # from the Hub, its HTTP library or the file system
            wrong = f"{type(error).__name__}: {first_line(error)}"
        if pause is not None:
            print(f"{repo}: {wrong}; retrying", file=sys.stderr)
            time.sleep(pause)
    raise UserError(
        f"{repo} could not be downloaded ({wrong}): check the connection, or name a run folder"
    )
