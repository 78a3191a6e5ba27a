"""Conversion to and from Hugging Face's formats, and OpenAI's GPT-2 from the Hub."""

import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors.torch import load_file

from stagewise.bpe import byte_of_character
from stagewise.errors import UserError, first_line
from stagewise.fileio import sha256

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
# The fields of model.GPTConfig that `to_hf` and `hf_config` express.
EXPRESSED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
EXPRESSED |= {"base_depth"}
ENDPOINT = None  # the Hub
PAUSES = (1, 2, 4, 8)  # seconds before each retry

# transformers' Conv1D layers store their weights transposed.
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in old checkpoints
_EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")
_NO_BIAS = (*_EMBEDDINGS, "transformer.wpe.weight")


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
    state_dict: dict[str, torch.Tensor],
    vocab_size: int | None = None,
    residual_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Convert a state dict of `GPT` to one of GPT2LMHeadModel.

    GPT2LMHeadModel always has biases. Those that the model does not have become zeros.

    Args:
        vocab_size: if given, only this number of rows of wte is kept.
        residual_scale: factor on all residual branches (`GPTConfig.base_depth`). GPT2LMHeadModel
            has none, so the output projections and their biases are multiplied by it.
    """
    theirs = {}
    for name, w in state_dict.items():
        if name in _EMBEDDINGS:
            w = w[:vocab_size]
        if ".c_proj." in name and residual_scale != 1:
            w = w * residual_scale
        theirs[name] = w.t().contiguous() if name.endswith(_CONV1D) else w
        bias = name.removesuffix("weight") + "bias"
        if name not in _NO_BIAS and name.endswith("weight") and bias not in state_dict:
            theirs[bias] = w.new_zeros(w.shape[0])
    return theirs


def hf_config(
    model_config: dict[str, Any], n_blocks: int, vocab_size: int, eos_token_id: int
) -> dict[str, Any]:
    """Return the contents of config.json for a model with `n_blocks` blocks.

    Raises:
        UserError: if `model_config` (of a checkpoint) has a field that GPT2LMHeadModel lacks.
    """
    if unknown := sorted(model_config.keys() - EXPRESSED):
        raise UserError(
            f"the model's option {unknown[0]}={model_config[unknown[0]]} has no counterpart in "
            "transformers' GPT-2: a model with this option cannot be exported"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": model_config["block_size"],
        "n_embd": model_config["n_embd"],
        "n_layer": n_blocks,
        "n_head": model_config["n_head"],
        "activation_function": "gelu_new",  # with the tanh approximation
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model_config["dropout"]),
        "tie_word_embeddings": True,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }


def hf_tokenizer(encoding: tiktoken.Encoding, block_size: int) -> dict[str, dict[str, Any]]:
    """Return the contents of tokenizer.json and tokenizer_config.json, by file name.

    The tokenizer is a byte-level BPE of the `tokenizers` library with the same ids. "bytes" is one
    without merges. `tokenizers` needs the merges, which tiktoken does not have: see `_merge`.

    Raises:
        UserError: for a tokenizer other than "bytes", "gpt2" and trained ones.
    """
    if encoding.name not in ("bytes", "gpt2") and not encoding.name.startswith("bpe-"):
        raise UserError(
            f"tokenizer {encoding.name!r} cannot be exported: only bytes, gpt2 and trained ones can"
        )
    special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    ranks = {
        encoding.decode_single_token_bytes(i): i
        for i in range(encoding.n_vocab)
        if i not in special.values()
    }
    text = {byte: character for character, byte in byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(text[byte] for byte in token)

    merges = [list(map(spell, _merge(ranks, token))) for token in ranks if len(token) > 1]
    added = [
        {"id": i, "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for name, i in special.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = encoding.name != "bytes"  # with GPT-2's regular expression
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": split},
        "post_processor": byte_level | {"trim_offsets": False, "use_regex": split},
        "decoder": byte_level | {"use_regex": split},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(token): i for token, i in ranks.items()} | special,
            "merges": merges,
        },
    }
    eot = encoding.decode([encoding.eot_token])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "bos_token": eot,
        "eos_token": eot,
        "unk_token": eot,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # Without token types, which GPT2LMHeadModel would add to the embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """Return the two tokens that BPE merges into `token`: the result of all earlier merges."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_pretrained(name: str) -> dict[str, Any]:
    """Return one of SIZES in the format of `checkpoint.load_checkpoint`.

    Raises:
        UserError: if it cannot be downloaded.
    """
    path = download(f"openai-community/{name}", "model.safetensors")
    model_config = SIZES[name] | dict(block_size=1024, vocab_size=50257, dropout=0.0, bias=True)
    weights = {f"transformer.{key}": tensor for key, tensor in load_file(path).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return not_from_a_run(model_config, from_hf(weights))


def not_from_a_run(
    model_config: dict[str, Any], weights: dict[str, torch.Tensor], step: int = 0
) -> dict[str, Any]:
    """Return weights in the format of `checkpoint.load_checkpoint`, with GPT-2's tokenizer."""
    return {
        "step": step,
        "n_blocks": model_config["n_layer"],
        "model_config": model_config,
        "seconds": 0.0,
        "loss_history": {},
        "config": {"hellaswag_data": "auto", "data_dir": "data/fineweb_edu"},
        "phases": [],
        "n_windows": 0,
        "tokenizer": "gpt2",
        "initial_cost": {},
        "model": weights,
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
