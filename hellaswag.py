"""Evaluate a model on HellaSwag (Zellers et al. 2019): which of four endings continues a context?

    python hellaswag.py CHECKPOINT [--data FILE] [--protocol lm_eval]

The loss of an ending is the cross-entropy of its tokens given all previous tokens.

    acc       fraction of examples whose correct ending has the lowest total loss
    acc_norm  fraction of examples whose correct ending has the lowest mean loss per token, or, with
              the protocol lm_eval, per character

The protocol determines the text. `build_nanogpt` (default; completion style) tokenizes the context
and " " + ending separately. `lm_eval` is the task `hellaswag` of EleutherAI's lm-evaluation-harness
(0.4.13): see `lm_eval_texts`.

Any file in HellaSwag's format works: JSON lines with `ctx`, `endings` (two or more) and `label`. If
no file is specified, the official validation set is downloaded once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import math
import os
import re
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import tyro
from msgspec import Meta
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from model import ATTENTION_OF_ANY_SHAPE, GPT
from stagewise.checkpoint import load_checkpoint, tokenizer_folders
from stagewise.data import Prefetch, check_tokenizer, encode, get_tokenizer
from stagewise.device import autocast, pick_device
from stagewise.errors import UserError, file_errors, first_line, report_user_errors
from stagewise.fileio import atomic_file, decode_json, read_bytes, sha256

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 examples
PAUSES = (1, 2, 4, 8)  # seconds to wait before each retry
ALTERNATIVE = (
    "try again, or specify a file in HellaSwag's format with --hellaswag_data (train.py; none "
    "skips HellaSwag) or --data (hellaswag.py)"
)
DEFAULT_PATH = Path(__file__).parent / "data" / "hellaswag_val.jsonl"
# Positions per forward pass. The value for CPUs is based on measurements, the one for GPUs is not.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
# Rows are padded to a multiple of this length. GPU kernels need aligned rows of the mask.
LENGTH_MULTIPLE = {"cpu": 1, "cuda": 32}


# --------------------------------------------------------------------------------------------------
# files


def task_file(option: str, data_dir: str) -> Path | None:
    """Return the file selected by train.py's option hellaswag_data, or None for "none".

    "auto" selects the corpus's own file if it exists, otherwise DEFAULT_PATH (see `download`).
    """
    if option == "none":
        return None
    if option != "auto":
        return Path(option)
    own = Path(data_dir) / "hellaswag.jsonl"
    return own if own.exists() else DEFAULT_PATH


def download(path: Path = DEFAULT_PATH) -> Path:
    """Download the official validation set to `path` unless the file exists, and return `path`.

    The file appears at `path` only after its sha256 has been verified.

    Raises:
        UserError: if all attempts fail, the file cannot be written, or an existing file is not the
            official one.
    """
    with file_errors(path, ALTERNATIVE):
        if path.exists():
            if sha256(path) != SHA256:
                raise UserError(
                    f"{path}: is not the official validation set (its sha256 is not "
                    f"{SHA256[:12]}...): move it away, or specify it with --hellaswag_data "
                    "(train.py) or --data (hellaswag.py)"
                )
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nodes that share data/ may download at the same time: each writes a file of its own.
        with atomic_file(path) as f:
            _download_verified(f)
    return path


def _download_verified(f):
    """Download URL to an open file and verify its sha256.

    huggingface_hub resumes a connection that breaks or stalls, and gives up after 5 attempts
    without data. Errors that it does not retry, and a wrong sha256, are retried here after PAUSES.
    """
    # Slow to import, and not needed by most runs.
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    # The default is 10 MiB, most of this file. Data of an incomplete chunk is lost on an error.
    constants.DOWNLOAD_CHUNK_SIZE = 2**16
    given_up = (httpx2.ConnectError, httpx2.TimeoutException, httpx2.RemoteProtocolError)
    # No compression, because a range would refer to the compressed bytes.
    headers = {"Accept-Encoding": "identity"}
    for pause in (*PAUSES, None):
        size = f.seek(0, os.SEEK_END)
        try:
            http_get(URL, f, resume_size=size, headers=headers, displayed_filename="HellaSwag")
            f.flush()
            digest = sha256(Path(f.name))
            if digest == SHA256:
                return
            wrong = f"its sha256 is {digest[:12]}..., expected {SHA256[:12]}..."
            f.truncate(0)
        except httpx2.HTTPError as error:
            wrong = f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, given_up):
                break
        except OSError as error:
            if error.errno is not None:  # a disk error
                raise
            wrong = f"{type(error).__name__}: {first_line(error)}"
            f.truncate(0)
        if pause is not None:
            print(f"HellaSwag: {wrong}; retrying", file=sys.stderr)
            time.sleep(pause)
    raise UserError(f"HellaSwag could not be downloaded from {URL} ({wrong}): {ALTERNATIVE}")


NonEmpty = Annotated[str, Meta(min_length=1)]


@dataclass
class _Line:
    """A line of the file. Other fields are ignored."""

    ctx: NonEmpty
    endings: Annotated[list[NonEmpty], Meta(min_length=2, max_length=64)]  # a batch grows with it
    label: int | Annotated[str, Meta(pattern="^[0-9]{1,9}$")]  # a string in the Hub's copy
    # Used by lm_eval. In the official file, ctx is ctx_a and ctx_b, joined by a space.
    activity_label: str | None = None
    ctx_a: str | None = None
    ctx_b: str | None = None


@dataclass(frozen=True)
class Example:
    """A tokenized example."""

    context: list[int]
    endings: list[list[int]]
    label: int  # index of the correct ending
    lengths: list[int] | None = None  # of the endings, for acc_norm; None: numbers of tokens


def build_nanogpt_example(line: _Line, encoding: tiktoken.Encoding) -> Example:
    """Tokenize an example as build-nanogpt does."""
    endings = [encode(encoding, " " + ending).tolist() for ending in line.endings]
    return Example(encode(encoding, line.ctx).tolist(), endings, int(line.label))


def lm_eval_texts(line: _Line) -> tuple[str, list[str]]:
    """Return the query and the choices of an example in lm-evaluation-harness.

    The query is "activity: context". The second part of the context starts with a capital letter,
    and its other letters are lowercase. In a file without ctx_a and ctx_b, the context stays as it
    is. WikiHow's markers in brackets are removed. The source is lm_eval/tasks/hellaswag/utils.py.

    Raises:
        ValueError: if the line has no activity_label.
    """

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    if not line.activity_label:
        raise ValueError("activity_label: missing or empty, but the protocol lm_eval needs it")
    context = line.ctx
    if line.ctx_a is not None and line.ctx_b is not None:
        context = line.ctx_a + " " + line.ctx_b.capitalize()
    return clean(f"{line.activity_label}: {context}"), [clean(ending) for ending in line.endings]


def lm_eval_example(line: _Line, encoding: tiktoken.Encoding) -> Example:
    """Tokenize an example as lm-evaluation-harness does.

    The query and " " + choice are tokenized together. The tokens of a choice are those after
    the first n, where n is the number of tokens of the query alone. White space at the end of the
    query belongs to the choice. acc_norm uses the number of characters of a choice.
    """
    query, choices = lm_eval_texts(line)
    context = encode(encoding, query.rstrip()).tolist()
    whole = [encode(encoding, f"{query} {choice}").tolist() for choice in choices]
    endings = [tokens[len(context) :] for tokens in whole]
    if not context or not all(endings):
        raise ValueError("has no text other than markers in brackets")
    return Example(context, endings, int(line.label), list(map(len, choices)))


Protocol = Literal["build_nanogpt", "lm_eval"]
PROTOCOLS = {"build_nanogpt": build_nanogpt_example, "lm_eval": lm_eval_example}


def load_examples(
    path: str | Path,
    encoding: tiktoken.Encoding,
    block_size: int,
    limit: int = 0,
    protocol: Protocol = "build_nanogpt",
) -> list[Example]:
    """Return the tokenized examples of a file in HellaSwag's format.

    Args:
        limit: if not 0, return only the first `limit` examples.

    Raises:
        UserError: if the file cannot be read, has no examples, has a line that is not in this
            format, lacks what the protocol needs, or has an ending of more than `block_size`
            tokens. The message names the line.
    """
    examples: list[Example] = []
    with file_errors(path, "specify a readable file in HellaSwag's format"):
        lines = read_bytes(Path(path)).split(b"\n")
    for number, text in enumerate(lines, start=1):
        if limit and len(examples) == limit:
            break
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = decode_json(text, _Line)
            example = PROTOCOLS[protocol](line, encoding)
        except ValueError as error:
            raise UserError(f"{where}: {error}: fix the line") from None
        label = int(line.label)
        if not 0 <= label < len(line.endings):
            raise UserError(
                f"{where}: label: expected the index of an ending, 0 to {len(line.endings) - 1}, "
                f"got {label}: fix the line"
            )
        longest = max(map(len, example.endings))
        if longest > block_size:
            raise UserError(
                f"{where}: an ending has {longest} tokens, more than block_size={block_size}: "
                "use a model with a longer context"
                + (
                    f", or only the examples before it: --limit={len(examples)} (in train.py, "
                    f"--hellaswag_limit={len(examples)})"
                    if examples
                    else ""
                )
            )
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: has no examples: specify a file in HellaSwag's format")
    return examples


# --------------------------------------------------------------------------------------------------
# scoring


def pack(
    rows: list[tuple[list[int], list[list[int]], int]], T: int, width: int
) -> tuple[np.ndarray, ...]:
    """Return a batch of packed rows: a context, its endings without their last tokens, padding.

    Args:
        rows: (context, endings, id of the first ending) for each row. Endings are numbered
            consecutively within a row.
        T: length of the batch, at least that of the longest row.
        width: maximum number of endings in a row.

    Returns:
        int64 arrays, where M is the number of positions with a prediction and N the number of
        tokens in all endings:

        - idx (B, T): tokens.
        - positions (B, T): position of each token in its own text.
        - visible_until (B, T): each token is visible to later positions before this one.
        - predict_at (M,): positions with a prediction, in the flattened batch.
        - targets (M, width): predicted tokens. At the end of a context, these are the first tokens
          of all endings.
        - target_rows, target_columns, ending_ids (N,): for every token of an ending, its index in
          `targets` and the id of its ending.
    """
    idx, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    # A context is visible to its entire row, an ending only to itself. Padding comes last.
    visible_until = np.full((len(rows), T), T)
    predict_at: list[int] = []
    tokens: list[int] = []
    target_columns: list[int] = []
    ending_ids: list[int] = []
    for b, (context, endings, first_id) in enumerate(rows):
        n = start = len(context)
        idx[b, :n], positions[b, :n] = context, range(n)
        for column, ending in enumerate(endings):
            end = start + len(ending) - 1
            idx[b, start:end], positions[b, start:end] = ending[:-1], range(n, n + end - start)
            visible_until[b, start:end] = end
            predict_at += [b * T + n - 1, *range(b * T + start, b * T + end)]
            tokens += ending
            target_columns += [column] * len(ending)
            ending_ids += [first_id + column] * len(ending)
            start = end
    unique, target_rows = np.unique(predict_at, return_inverse=True)
    targets = np.zeros((len(unique), width), dtype=np.int64)
    targets[target_rows, target_columns] = tokens
    columns, ids = np.array(target_columns), np.array(ending_ids)
    return idx, positions, visible_until, unique, targets, target_rows, columns, ids


@torch.no_grad()
@sdpa_kernel(ATTENTION_OF_ANY_SHAPE)
def ending_losses(
    model: GPT,
    examples: list[Example],
    batch_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    n_vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the total loss in nats of every ending, and its length for acc_norm.

    Each row of a batch contains one example: the context once, followed by its endings. Each ending
    attends to the context and to itself. The head runs only at the scored positions. If a context
    is too long for the model, its beginning is removed.

    Args:
        batch_tokens: positions per forward pass. Default: BATCH_TOKENS.
        rank, world_size: every rank scores a part of the rows, and all ranks get all results.
        progress: whether to show a progress bar.
        n_vocab: size of the tokenizer's vocabulary, so that padding ids have no probability, as in
            a model that is exported without them. Default: the padding is included in the softmax.

    Returns:
        Two float64 arrays (number of examples, maximum number of endings). For missing endings, the
        loss is inf and the length is 1.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    batch_tokens = batch_tokens or BATCH_TOKENS[device.type]
    width = max(len(e.endings) for e in examples)
    norms = np.ones((len(examples), width))
    rows = []
    for i, e in enumerate(examples):
        lengths = [len(ending) for ending in e.endings]
        norms[i, : len(lengths)] = lengths if e.lengths is None else e.lengths
        if len(e.context) + max(lengths) <= block_size + 1:  # the last token is not an input
            rows.append((e.context, e.endings, i * width))
        else:  # the context is truncated differently for each ending
            for j, ending in enumerate(e.endings):
                rows.append((e.context[len(ending) - block_size - 1 :], [ending], i * width + j))

    def length(row):
        context, endings, _ = row
        return len(context) + sum(map(len, endings)) - len(endings)

    def row_length(row):
        multiple = LENGTH_MULTIPLE[device.type]
        return -(-length(row) // multiple) * multiple

    def split(rows):
        result, start = [], 0
        while start < len(rows):
            stop = start + max(1, batch_tokens // row_length(rows[start]))
            result.append(rows[start:stop])
            start = stop
        return result

    rows = sorted(rows, key=length, reverse=True)
    # With sharded parameters, every rank must run the same number of forward passes.
    n_batches = max(len(split(rows[r::world_size])) for r in range(world_size))
    own = split(rows[rank::world_size])
    own += [[]] * (n_batches - len(own))

    def batches():
        for batch in own:
            run = batch or rows[-1:]
            tensors = map(torch.from_numpy, pack(run, row_length(run[0]), width))
            yield len(batch), [t.pin_memory() if device.type == "cuda" else t for t in tensors]

    sums = torch.zeros(len(examples) * width, dtype=torch.float64, device=device)
    with tqdm(total=sum(map(len, own)), unit="row", desc="HellaSwag", disable=not progress) as bar:
        for n, batch in Prefetch(batches()):
            tensors = (t.to(device, non_blocking=True) for t in batch)
            idx, positions, visible_until, predict_at, targets, *places, ending_ids = tensors
            t = torch.arange(idx.shape[1], device=device)
            mask = (t[:, None] >= t) & (t[:, None] < visible_until[:, None, None])  # (B, 1, T, T)
            losses = model(
                idx, targets,
                positions=positions, mask=mask, predict_at=predict_at, n_vocab=n_vocab,
            )  # fmt: skip
            if n:
                sums.index_add_(0, ending_ids, losses[*places].double())
            bar.update(n)
    if world_size > 1:
        dist.all_reduce(sums)
    result = sums.view(len(examples), width).cpu().numpy()
    for i, example in enumerate(examples):
        result[i, len(example.endings) :] = math.inf
    return result, norms


def evaluate(model: GPT, examples: list[Example], **options: Any) -> dict[str, float]:
    """Return the scores of a model in eval mode: n, acc, acc_norm, acc_stderr, acc_norm_stderr.

    The standard errors of the mean use the sample variance. If a loss is not finite, which a
    diverged model can cause, all scores are NaN. See `ending_losses` for the options.
    """
    sums, lengths = ending_losses(model, examples, **options)
    # Missing endings are inf, but -inf and NaN have no order.
    valid = sum(len(e.endings) for e in examples) == np.isfinite(sums).sum()
    labels = np.array([e.label for e in examples])
    result: dict[str, float] = {"n": len(examples)}
    with np.errstate(divide="ignore"):  # a choice without brackets may be empty
        means = sums / lengths
    for name, losses in (("acc", sums), ("acc_norm", means)):
        accuracy = float((losses.argmin(1) == labels).mean()) if valid else math.nan
        result[name] = accuracy
        result[f"{name}_stderr"] = math.sqrt(accuracy * (1 - accuracy) / max(1, len(examples) - 1))
    return result


@dataclass
class Args:
    """Evaluate a checkpoint on HellaSwag."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, one of its checkpoints, a ckpt.pt of nanoGPT, or a model from the Hugging Face
    Hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    data: Path | None = None
    """File in HellaSwag's format.
    Default: the file that the run used, else the official validation set (downloaded once)."""
    protocol: Protocol = "build_nanogpt"
    """Tokenize and score as build-nanogpt (completion style) or lm-evaluation-harness does."""
    limit: int = 0
    """Number of examples to evaluate, from the start of the file. 0 evaluates all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products. auto: bfloat16 on GPUs that support it, else float32."""


def main(args: Args) -> None:
    if args.limit < 0:
        raise UserError(f"--limit={args.limit} must not be negative")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"], device).eval()
    folders = tokenizer_folders(args.checkpoint, checkpoint)
    encoding = get_tokenizer(checkpoint["tokenizer"], folders)
    check_tokenizer(encoding, model.config.vocab_size, args.checkpoint)
    config = checkpoint["config"]
    path = args.data or task_file(config["hellaswag_data"], config["data_dir"]) or DEFAULT_PATH
    if path == DEFAULT_PATH:
        download()
    examples = load_examples(path, encoding, model.config.block_size, args.limit, args.protocol)
    with autocast(device, args.dtype, model.config.n_embd):
        n_vocab = encoding.n_vocab if args.protocol == "lm_eval" else None
        scores = evaluate(model, examples, progress=True, n_vocab=n_vocab)
    if math.isnan(scores["acc"]):
        raise UserError(f"{args.checkpoint}: the losses are not finite: the model has diverged")
    model_name = f"step {checkpoint['step']}, {checkpoint['n_blocks']} blocks"
    protocol = ", protocol lm_eval" if args.protocol == "lm_eval" else ""
    print(f"{model_name}, {len(examples)} examples of {path}{protocol}")
    for name in ("acc", "acc_norm"):
        print(f"{name:8s} {scores[name]:.4f} +- {scores[name + '_stderr']:.4f}")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
