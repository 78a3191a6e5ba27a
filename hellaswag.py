"""Score a model on HellaSwag (Zellers et al. 2019): which of four endings continues a context?

    python hellaswag.py CHECKPOINT [--data FILE]

The metrics are those of build-nanogpt, completion style: context and " " + ending are tokenized apart, each ending's loss is
the cross entropy of its own tokens given all before.

    acc       share of examples whose true ending has the lowest summed loss
    acc_norm  the same with the lowest mean loss per token

Any file of HellaSwag's form works: JSON lines with `ctx`, `endings` (two or more) and `label`. The official validation set
is downloaded once where no file is named.
"""

import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from checkpoint import load_checkpoint, model_from
from data import get_tokenizer
from device import autocast, pick_device
from errors import UserError, first_line, report_user_errors
from files import sha256
from model import token_losses

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 examples
PAUSES = (1, 2, 4, 8)  # seconds before each further attempt
INSTEAD = "try again, or name a file of its form with --hellaswag_data (train.py; none goes without) or --data (hellaswag.py)"
DEFAULT_PATH = Path(__file__).parent / "data" / "hellaswag_val.jsonl"
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # positions in a forward pass; measured on a CPU, a choice for GPUs


def task_file(option: str, data_dir: str) -> Path | None:
    """The file that train.py's option hellaswag_data means: DEFAULT_PATH, which `download` fills, where the corpus has none."""
    if option == "none":
        return None
    own = Path(data_dir) / "hellaswag.jsonl"
    return Path(option) if option != "auto" else own if own.exists() else DEFAULT_PATH


def download(path: Path = DEFAULT_PATH) -> Path:
    """Download the official validation set to `path` unless it is there.

    A connection that breaks is taken up again where it broke, after PAUSES. Nothing stands
    under `path` before its sha256 is right. Raises UserError where all fails.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several machines may share the folder.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name) as f:
            wrong = _fetch(f)
            for pause in PAUSES:
                if wrong is None:
                    break
                print(f"HellaSwag: {wrong}; trying again", file=sys.stderr)
                time.sleep(pause)
                wrong = _fetch(f)
            if wrong:
                raise UserError(f"HellaSwag could not be downloaded from {URL} ({wrong}): {INSTEAD}")
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.link(f.name, path)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): {INSTEAD}") from None
    return path


def _fetch(f) -> str | None:
    """Append the rest of the file to `f`; returns what went wrong, None where nothing did."""
    have = f.seek(0, os.SEEK_END)
    try:
        headers = {"Accept-Encoding": "identity"}  # a range of a compressed answer would be of its compressed bytes
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(URL, stream=True, timeout=30, headers=headers) as response:
            if response.status_code != 206:  # not the rest alone
                f.truncate(0)
                have = f.seek(0)
            response.raise_for_status()
            total = have + int(response.headers.get("content-length", 0)) or None
            with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=DEFAULT_PATH.name) as bar:
                for chunk in response.iter_content(1 << 16):
                    bar.update(f.write(chunk))
    except requests.RequestException as error:
        return f"{type(error).__name__}: {first_line(error)}"
    f.flush()
    digest = sha256(f.name)
    if digest != SHA256:
        f.truncate(0)
        return f"it arrived damaged, sha256 {digest[:12]}"


@dataclass(frozen=True)
class Example:
    context: list[int]
    endings: list[list[int]]
    label: int


def load_examples(path: str | Path, encoding: tiktoken.Encoding, block_size: int, limit: int = 0) -> list[Example]:
    """Tokenized examples of a file of HellaSwag's form; the first `limit` where that is not 0.

    Raises UserError naming the line that is not of this form, or has an ending that does not fit into `block_size`.
    """
    examples = []
    try:
        lines = Path(path).read_text("utf-8").split("\n")  # not splitlines(), which also cuts at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a file of HellaSwag's JSON lines") from None
    for number, line in enumerate(lines, start=1):
        if limit and len(examples) == limit:
            break
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            example = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: is no JSON ({error}): mend or remove the line") from None
        if not isinstance(example, dict):
            raise UserError(f"{where}: must be an object with ctx, endings and label")
        context, endings, label = example.get("ctx"), example.get("endings"), example.get("label")
        if not isinstance(context, str) or not context:
            raise UserError(f"{where}: `ctx` must be a non-empty string")
        if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
            raise UserError(f"{where}: `endings` must be two or more non-empty strings")
        if isinstance(label, str) and label.isdecimal():  # as in the copy on the Hugging Face hub
            label = int(label)
        if type(label) is not int or not 0 <= label < len(endings):
            raise UserError(f"{where}: `label` must be the number of an ending, 0 to {len(endings) - 1}")
        tokens = [encoding.encode_ordinary(" " + ending) for ending in endings]
        longest = max(map(len, tokens))
        if longest > block_size:
            raise UserError(f"{where}: an ending of {longest} tokens does not fit into block_size={block_size}")
        examples.append(Example(encoding.encode_ordinary(context), tokens, label))
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def pack(rows, T: int, width: int) -> tuple[np.ndarray, ...]:
    """A batch of packed rows: each a context, its endings but for their last tokens, padding.

    rows: (context, endings, number of the first ending) each. Returns int64 arrays

        idx, positions, seen_until (B, T)   tokens, their places in their texts, and up to where in the row they are seen
        at (M,)                             where, in the flattened batch, something is predicted
        targets (M, width)                  what, for each ending that is predicted there: all begin at the same place
        which, columns, owners (N,)         for every ending token, its place in targets, and the number of its ending
    """
    idx, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    # A context is seen by its whole row, an ending by itself, padding, which comes last, by nobody else.
    seen_until = np.full((len(rows), T), T)
    at, tokens, columns, owners = [], [], [], []
    for b, (context, endings, first) in enumerate(rows):
        n = begin = len(context)
        idx[b, :n], positions[b, :n] = context, range(n)
        for column, ending in enumerate(endings):
            end = begin + len(ending) - 1
            idx[b, begin:end], positions[b, begin:end] = ending[:-1], range(n, n + end - begin)
            seen_until[b, begin:end] = end
            at += [b * T + n - 1, *range(b * T + begin, b * T + end)]
            tokens += ending
            columns += [column] * len(ending)
            owners += [first + column] * len(ending)
            begin = end
    at, which = np.unique(at, return_inverse=True)
    targets = np.zeros((len(at), width), dtype=np.int64)
    targets[which, columns] = tokens
    return idx, positions, seen_until, at, targets, which, np.array(columns), np.array(owners)


@torch.no_grad()
def ending_losses(model, examples: list[Example], batch_tokens: int | None = None, rank=0, world_size=1, progress=False):
    """Summed loss in nats and number of tokens of every ending: two float64 arrays (examples, most endings).

    Ragged rows are filled with inf losses and counts of 1. A row is an example: its context once, then its endings, each of
    which sees the context and itself. Rows are sorted by length and batched up to `batch_tokens` (BATCH_TOKENS) positions; the
    head runs only where an ending is scored. Every rank scores its share of the rows and all get all results. Contexts
    too long for the model lose their beginning.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    batch_tokens = batch_tokens or BATCH_TOKENS[device.type]
    width = max(len(e.endings) for e in examples)
    counts = np.ones((len(examples), width))
    rows = []  # (context, endings, number of the first of them in the flattened results)
    for i, e in enumerate(examples):
        counts[i, : len(e.endings)] = list(map(len, e.endings))
        if len(e.context) + max(map(len, e.endings)) <= block_size + 1:  # the last token is only predicted
            rows.append((e.context, e.endings, i * width))
        else:  # each ending leaves another part of the context
            rows += [(e.context[len(t) - block_size - 1 :], [t], i * width + j) for j, t in enumerate(e.endings)]

    def length(row):
        context, endings, _ = row
        return len(context) + sum(map(len, endings)) - len(endings)

    rows = sorted(rows, key=length, reverse=True)[rank::world_size]
    sums = torch.zeros(len(examples) * width, dtype=torch.float64, device=device)
    start = 0
    with tqdm(total=len(rows), unit="row", desc="HellaSwag", disable=not progress) as bar:
        while start < len(rows):
            T = length(rows[start])
            batch = rows[start : start + max(1, batch_tokens // T)]
            start += len(batch)
            arrays = (torch.from_numpy(array) for array in pack(batch, T, width))
            idx, positions, seen_until, at, targets, which, columns, owners = (t.to(device) for t in arrays)
            i = torch.arange(T, device=device)
            mask = (i[:, None] >= i) & (i[:, None] < seen_until[:, None, None])  # (B, 1, T, T)
            x = model.hidden(idx, positions, mask).flatten(0, 1)[at]
            sums.index_add_(0, owners, token_losses(x, model.lm_head.weight, targets)[which, columns].double())
            bar.update(len(batch))
    if world_size > 1:
        dist.all_reduce(sums)
    sums = sums.view(len(examples), width).cpu().numpy()
    for i, example in enumerate(examples):
        sums[i, len(example.endings) :] = math.inf
    return sums, counts


def evaluate(model, examples: list[Example], **options) -> dict[str, float]:
    """acc and acc_norm of a model in eval mode, with their standard errors (of the mean, sample variance)."""
    sums, counts = ending_losses(model, examples, **options)
    labels = np.array([e.label for e in examples])
    result = {"n": len(examples)}
    for name, losses in (("acc", sums), ("acc_norm", sums / counts)):
        accuracy = float((losses.argmin(1) == labels).mean())
        result[name] = accuracy
        result[f"{name}_stderr"] = math.sqrt(accuracy * (1 - accuracy) / max(1, len(examples) - 1))
    return result


@dataclass
class Args:
    """Score a checkpoint on HellaSwag."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, one of its checkpoints, or gpt2, gpt2-medium, gpt2-large, gpt2-xl from the Hugging Face hub."""
    data: Path | None = None
    """File of HellaSwag's JSON lines; default: the one that the run used, or the official validation set, downloaded once."""
    limit: int = 0
    """Score only the first examples; 0 is all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products; auto is bfloat16 where the GPU has it."""


def main(args: Args) -> None:
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from(checkpoint, device).eval()
    encoding = get_tokenizer(checkpoint["tokenizer"])
    run = checkpoint["config"]
    path = args.data or task_file(run["hellaswag_data"], run["data_dir"]) or DEFAULT_PATH
    if path == DEFAULT_PATH:
        download()
    examples = load_examples(path, encoding, model.config.block_size, args.limit)
    with autocast(device, args.dtype):
        r = evaluate(model, examples, progress=True)
    print(f"step {checkpoint['step']}, {checkpoint['n_blocks']} blocks, {r['n']} examples of {path}")
    for name in ("acc", "acc_norm"):
        print(f"{name:8s} {r[name]:.4f} +- {r[name + '_stderr']:.4f}")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
