"""OpenAI's GPT-2 from the Hugging Face hub, in place of a checkpoint: python sample.py gpt2, python hellaswag.py gpt2-xl."""

import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from errors import UserError, first_line
from files import sha256
from model import GPTConfig, from_hf

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
ENDPOINT = None  # the hub
PAUSES = (1, 2, 4, 8)  # seconds before each further attempt


def load_pretrained(name: str) -> dict:
    """A checkpoint (checkpoint.FIELDS and "model") of one of SIZES. Raises UserError where it cannot be downloaded."""
    path = download(f"openai-community/{name}", "model.safetensors")
    shape = GPTConfig(**SIZES[name], vocab_size=50257)
    weights = {f"transformer.{key}": tensor for key, tensor in load_file(path).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    about = dict(step=0, seconds=0.0, health={}, phases=[], n_windows=0, tokenizer="gpt2")
    config = {"hellaswag_data": "auto", "data_dir": "data/fineweb_edu"}
    return about | {"model_args": asdict(shape), "n_blocks": shape.n_layer, "config": config, "model": from_hf(weights)}


def download(repo: str, file: str) -> Path:
    """A large file of a repository, from the hub's cache on this machine where it is there.

    huggingface_hub takes a broken connection up where it broke; what else goes wrong is tried again after PAUSES. The
    hub names large files by their sha256: one that does not have its own is removed.
    """
    from huggingface_hub import hf_hub_download  # slow to import, and most runs do without

    for pause in (*PAUSES, None):
        try:
            path = Path(hf_hub_download(repo, file, endpoint=ENDPOINT)).resolve()
            if not re.fullmatch("[0-9a-f]{64}", path.name) or sha256(path) == path.name:
                return path
            path.unlink()
            wrong = "it arrived damaged"
        except Exception as error:  # of the hub, of its HTTP library, of the disk
            wrong = f"{type(error).__name__}: {first_line(error)}"
        if pause is not None:
            print(f"{repo}: {wrong}; trying again", file=sys.stderr)
            time.sleep(pause)
    raise UserError(f"{repo} could not be downloaded ({wrong}): connect once, or name a run folder")
