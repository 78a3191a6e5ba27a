"""Export a model to a folder that Hugging Face transformers can load.

    python export.py CHECKPOINT_OR_RUN DIR

`AutoModelForCausalLM.from_pretrained(DIR)` and `AutoTokenizer.from_pretrained(DIR)` return a GPT-2
with the same logits and its tokenizer. DIR contains:

    config.json, model.safetensors              the model, without the padding of the vocabulary
    tokenizer.json, tokenizer_config.json       the tokenizer, with the same token ids
    README.md                                   a model card: schedule, cost, data, losses, command
    export.json                                 the contents of the model card
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import datetime
import shutil
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
import tyro
from safetensors.torch import save_file
from tabulate import tabulate

from cost import COST_METRICS, NAMES, cumulative_cost, short_number
from model import GPT, GPTConfig
from schedule import Phase, Schedule
from stagewise.checkpoint import checkpoints, load_checkpoint, tokenizer_folders
from stagewise.data import check_tokenizer, get_tokenizer
from stagewise.errors import UserError, file_errors, report_user_errors
from stagewise.fileio import atomic_write, convert, decode_json, encode_json, fsync, read_bytes
from stagewise.hf import hf_config, hf_tokenizer, to_hf
from stagewise.metrics import read_metrics

RECORD = "export.json"  # marks a folder as an export
SCORES = ("val_loss", "val_bpb", "hellaswag_acc", "hellaswag_acc_norm")


@dataclass
class Args:
    """Export a model to a folder that Hugging Face transformers can load."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, one of its checkpoints, a ckpt.pt of nanoGPT, or a model from the Hugging Face
    Hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    dir: tyro.conf.Positional[Path]
    """Folder to write. It must be new, empty, or an earlier export."""


def main(args: Args) -> None:
    check_folder(args.dir)
    checkpoint = load_checkpoint(args.checkpoint)
    folders = tokenizer_folders(args.checkpoint, checkpoint)
    encoding = get_tokenizer(checkpoint["tokenizer"], folders)
    model_config, n_blocks = checkpoint["model_config"], checkpoint["n_blocks"]
    config = hf_config(model_config, n_blocks, encoding.n_vocab, encoding.eot_token)
    tokenizer = hf_tokenizer(encoding, model_config["block_size"])
    model = GPT.from_weights(model_config, checkpoint["model"])
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{args.checkpoint}: its weights are not finite: use another checkpoint")
    check_tokenizer(encoding, model.config.vocab_size, args.checkpoint)
    scale = model.config.base_depth / max(1, n_blocks) or 1.0
    weights = to_hf(model.state_dict(), encoding.n_vocab, scale)
    del weights["lm_head.weight"]  # tied
    record = describe(args.checkpoint, checkpoint)

    with file_errors(args.dir, "make it writable, free disk space, or use another folder"):
        args.dir.mkdir(parents=True, exist_ok=True)
        atomic_write(args.dir / RECORD, encode_json(record, indent=2) + "\n")
        # Until it is complete, an export has no config.json and cannot be opened.
        (args.dir / "config.json").unlink(missing_ok=True)
        write_weights(args.dir / "model.safetensors", weights, like=args.dir / RECORD)
        for name, content in tokenizer.items():
            atomic_write(args.dir / name, encode_json(content, indent=1) + "\n")
        atomic_write(args.dir / "README.md", model_card(record))
        atomic_write(args.dir / "config.json", encode_json(config, indent=2) + "\n")
    print(
        f"{args.dir}: step {checkpoint['step']}, {n_blocks} blocks, "
        f"{short_number(record['parameters'])} parameters, tokenizer {encoding.name}"
    )


def check_folder(folder: Path) -> None:
    """Raise UserError if the folder exists and is neither empty nor an earlier export."""
    with file_errors(folder, "use another folder"):
        if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
            raise UserError(
                f"{folder}: is not empty and is not an earlier export (it has no {RECORD}): use "
                "another folder"
            )


def write_weights(path: Path, weights: dict[str, torch.Tensor], like: Path) -> None:
    """Write safetensors atomically, with the permissions of the file `like`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        save_file(weights, partial, metadata={"format": "pt"})  # transformers needs the format
        shutil.copymode(like, partial)  # safetensors makes its files private
        fsync(partial)
        partial.replace(path)
    except safetensors.SafetensorError as error:  # for example, the disk is full
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# model card


def describe(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what is known about a checkpoint: its model, schedule, cost, data and results.

    Costs are those up to the checkpoint. Values of the run are missing if the run is not known (for
    example, for weights from the Hub) or if its config.json or metrics.jsonl does not exist.

    Raises:
        UserError: if the schedule in the checkpoint or a file of the run is corrupted.
    """
    step, model_config = checkpoint["step"], checkpoint["model_config"]
    try:
        config = convert(model_config, GPTConfig)
        scheduled = convert(checkpoint["phases"], list[Phase])
    except ValueError as error:
        raise UserError(f"{path}: the schedule of the run is corrupted ({error})") from None
    phases = tuple(p for p in scheduled if p.start < min(step, p.stop))
    schedule = Schedule(phases)
    n = checkpoint["n_blocks"]
    record: dict[str, Any] = {
        "step": step,
        "n_blocks": n,
        "parameters": GPT(config, n, device="meta").num_params(),
        "model_config": model_config,
        "tokenizer": checkpoint["tokenizer"],
        "initial_weights": checkpoint["config"].get("init_weights", ""),
        "initial_cost": checkpoint["initial_cost"],
        "phases": [],
        "exported": {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    for p in phases:
        stop = min(step, p.stop)
        row: dict[str, Any] = {
            "name": p.name,
            "steps": stop - p.start,
            "blocks": p.n_blocks,
            "trained_blocks": len(p.trained_blocks),
            "embeddings_train": p.train_embeddings,
            "head_trains": p.train_head,
            "growth": p.growth if p.start or p.new_blocks else None,
            "context_length": p.context_length,
            "tokens_per_step": p.tokens_per_step,
        }
        for m in COST_METRICS:
            before, after = (cumulative_cost(schedule, s, m, config) for s in (p.start, stop))
            row[m] = after - before
        record["phases"].append(row)
    if not phases:
        return record
    total = {m: cumulative_cost(schedule, step, m, config) for m in COST_METRICS}
    initial = checkpoint["initial_cost"]
    record["cost"] = {m: total[m] + initial.get(m, 0) for m in COST_METRICS}
    record["seconds"] = round(checkpoint["seconds"], 3)
    record["data"] = Path(checkpoint["config"].get("data_dir", "")).name
    record["corpus"] = checkpoint["corpus"]
    record["seed"] = checkpoint["config"].get("seed")
    run = path if checkpoints(path) else path.absolute().parent.parent
    if checkpoints(run):
        record |= describe_run(run, step)
    return record


def describe_run(run: Path, step: int) -> dict[str, Any]:
    """Return how a run folder's checkpoint at `step` was trained, and its losses."""
    found: dict[str, Any] = {}
    if (run / "config.json").exists():
        with file_errors(run / "config.json", "restore the file, or move it away"):
            options = decode_json(read_bytes(run / "config.json"), dict[str, Any])
        starts = options.get("starts") or [options]
        names = ("step", "date", "command", "world_size", "device_name", "torch_version")
        found["starts"] = [
            {name: start.get(name) for name in names}
            for start in starts
            if isinstance(start, dict) and start.get("step", 0) < max(1, step)
        ]
        found |= {k: options[k] for k in ("train_tokens", "matmul_dtype") if k in options}
        if options.get("hellaswag_file"):
            found["hellaswag_file"] = Path(options["hellaswag_file"]).name
    if (run / "metrics.jsonl").exists():
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] <= step]
        for name in ("loss", *SCORES, "hellaswag_n"):
            last = next((row for row in reversed(rows) if name in row), None)
            if last:
                found.setdefault("results", {})[name] = {"step": last["step"], "value": last[name]}
    return found


def model_card(record: dict[str, Any]) -> str:
    """Return the README.md of an export."""
    c, n = record["model_config"], record["n_blocks"]
    texts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- gpt2\n- stagewise-pretraining\n---",
        f"# GPT-2, {n} blocks, {short_number(record['parameters'])} parameters",
        f"A GPT-2 of width {c['n_embd']} with {c['n_head']} attention heads, context length "
        f"{c['block_size']:,} and tokenizer `{record['tokenizer']}`, after "
        f"{record['step']:,} training steps. The final model of its schedule has {c['n_layer']} "
        "blocks. In training, every document started with `<|endoftext|>`; begin a prompt with it "
        "to start a document.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        'inputs = tokenizer("<|endoftext|>The", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))\n```",
    ]
    if not c["bias"]:
        texts.append("The model was trained without biases. In this export, they are zeros.")
    if c.get("base_depth"):
        texts.append(
            f"The model was trained with residual branches scaled by {c['base_depth']} / {n} "
            "(CompleteP). In this export, the output projections are multiplied by this factor."
        )
    if not record["phases"]:
        unknown = "The weights are not from a run. Their schedule and cost are not known."
        texts += ["## Training", unknown]
        return "\n\n".join(texts) + "\n"

    header = ["phase", "steps", "blocks", "blocks that train", "embeddings, head", "growth"]
    header += ["context", "tokens/step", *(NAMES[m] for m in COST_METRICS)]
    table = []
    for p in record["phases"]:
        parts = ("trained" if p[name] else "frozen" for name in ("embeddings_train", "head_trains"))
        row = [p["name"], f"{p['steps']:,}", p["blocks"], p["trained_blocks"], ", ".join(parts)]
        row += [p["growth"] or "-", f"{p['context_length']:,}", f"{p['tokens_per_step']:,}"]
        table.append(row + [f"{p[m]:.4g}" for m in COST_METRICS])
    align = ("left", *("right",) * 3, "left", "left", *("right",) * 5)
    texts += ["## Schedule", tabulate(table, header, "pipe", colalign=align, disable_numparse=True)]

    cost = ", ".join(f"{record['cost'][m]:.6g} {NAMES[m]}" for m in COST_METRICS)
    texts += [
        "## Cost",
        f"{cost}, {record['seconds']:,.0f} s of training time. The paper cost is the unit c of "
        "arXiv:2411.18700: one block, one token, one pass. FLOPs are those of the matrix products "
        "of forward and backward passes. Both are computed from the schedule.",
    ]
    if record["initial_weights"]:
        known = "included" if record["initial_cost"] else "not known, and not included"
        texts.append(f"Training started from other weights. Their cost is {known}.")

    data = f"Corpus `{record['data']}`"
    data += f", {record['train_tokens']:,} training tokens" if "train_tokens" in record else ""
    data += f", fingerprint `{record['corpus']}`" if record["corpus"] else ""
    texts += ["## Data", data + "."]

    texts.append("## Results")
    results = record.get("results", {})
    rows = [
        [name, "not finite" if r["value"] is None else f"{r['value']:.4f}", f"{r['step']:,}"]
        for name, r in results.items()
        if name != "hellaswag_n"
    ]
    if rows:
        texts.append(tabulate(rows, ["", "value", "step"], "pipe", disable_numparse=True))
        notes = "Losses are in nats per token, `val_bpb` is in bits per byte."
        if "hellaswag_n" in results and "hellaswag_file" in record:
            n_examples = results["hellaswag_n"]["value"]
            notes += f" HellaSwag: {n_examples:,} examples of `{record['hellaswag_file']}`."
        texts.append(notes)
    else:
        texts.append("Not recorded.")

    texts.append("## Commands and versions")
    starts = [
        f"- step {start['step'] or 0:,}, {start['date']}, {start['world_size']} x "
        f"{start['device_name']}, torch {start['torch_version']}: `{start['command']}`"
        for start in record.get("starts", [])
    ]
    exported = record["exported"]
    texts.append("\n".join(starts) or "The command was not recorded.")
    texts.append(
        f"Exported on {exported['date']} with torch {exported['torch']} and safetensors "
        f"{exported['safetensors']}."
    )
    return "\n\n".join(texts) + "\n"


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
