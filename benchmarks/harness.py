"""Does `hellaswag.py --protocol lm_eval` agree with lm-evaluation-harness?

    python benchmarks/harness.py RUN FILE [--limit N]

Exports the run, scores the HellaSwag examples in FILE (JSON Lines) with this repository and with
the task `hellaswag` of the harness, and compares every example. Needs lm_eval: pip install
lm_eval[hf]. Nothing is downloaded. Examples without `ctx_a` and `ctx_b` are compared with `ctx` as
the undivided context.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
import hellaswag
from benchmarks.common import machine, write_report
from model import GPT
from runs import read_config
from stagewise.checkpoint import load_checkpoint
from stagewise.data import get_tokenizer, load_meta
from stagewise.errors import UserError, report_user_errors
from stagewise.fileio import decode_json


@dataclass
class Args:
    """Compare the HellaSwag scores of a run with those of lm-evaluation-harness."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    file: tyro.conf.Positional[Path]
    """HellaSwag examples, as JSON Lines."""
    limit: int = 0
    """Compare only the first examples. 0: all."""
    json: Path = Path("out/bench/harness.json")
    """File of the results."""


def harness_samples(folder: Path, lines: list[dict]) -> list[dict]:
    """Return what the harness records of every example, with an exported model."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm_eval is not installed ({error}): pip install lm_eval[hf]") from None
    split = datasets.Dataset.from_list(lines)
    data = datasets.DatasetDict({"train": split.select([0]), "validation": split})
    datasets.load_dataset = lambda *args, **options: data  # the task downloads its data with it
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)
    result = simple_evaluate(
        model, tasks=["hellaswag"], task_manager=TaskManager(), log_samples=True, bootstrap_iters=0
    )
    return sorted(result["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])


def main(args: Args) -> None:
    checkpoint = load_checkpoint(args.run)
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    meta = load_meta(read_config(args.run).data_dir)
    encoding = get_tokenizer(meta["tokenizer"], [args.run])
    examples = hellaswag.load_examples(
        args.file, encoding, model.config.block_size, args.limit, "lm_eval"
    )
    sums, lengths = hellaswag.ending_losses(model, examples, n_vocab=encoding.n_vocab)
    lines = [
        decode_json(line.encode(), dict)
        for line in args.file.read_text("utf-8").splitlines()[: len(examples)]
    ]
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    whole = [{"ctx_a": line["ctx"], "ctx_b": ""} | line for line in lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "export"
        export.main(export.Args(args.run, folder))
        samples = harness_samples(
            folder, [{f: int(d[f]) if f == "label" else d[f] for f in fields} for d in whole]
        )
    equal, worst = {"acc": 0, "acc_norm": 0}, 0.0
    for sample, example, loss, length in zip(samples, examples, sums, lengths, strict=True):
        theirs = np.array([response[0] for (response,) in sample["resps"]])
        worst = max(worst, float(np.max(np.abs(theirs + loss) / np.abs(theirs))))
        equal["acc"] += (loss.argmin() == example.label) == sample["acc"]
        equal["acc_norm"] += ((loss / length).argmin() == example.label) == sample["acc_norm"]
    report = {"examples": len(examples)} | {f"equal_{k}": int(v) for k, v in equal.items()}
    report["relative_difference"] = worst
    print(report)
    write_report(args.json, {"machine": machine(torch.device("cpu")), **report})


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, use_underscores=True))
