"""What happens to the loss when the model grows, with every operator and optimizer state?

    python benchmarks/growth.py [configs/A.py ...] [--key=value ...]

Trains a model with half of the blocks, and continues from its last checkpoint with all blocks, once
with every growth operator, and once with every rule for the optimizer state. All runs read the same
data in the same order as a model that had all blocks from the start. Draws the difference of the
training losses to that model, in every step around growth, to docs/growth_step.png. The first value
after growth is measured before the first update of the grown model. The options are train.py's; the
default is the demo's model.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plot
from benchmarks.common import ROOT, machine, write_report
from growth import OPERATORS
from stagewise.errors import UserError, report_user_errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = ROOT / "out" / "bench" / "growth"
GROWTH, STEPS = 400, 600  # the step of growth, and all steps
SHOWN = 30  # steps before growth in the figure
WINDOW = 10  # steps of the moving average in the figure, except in the first steps after growth
STATES = ("copy", "zero", "carry", "reset")
OPTIONS = [
    *("configs/demo.py", "--stage_blocks", "50%", "100%", "--freezing=none", f"--steps={STEPS}"),
    *("--phase_fractions", str(GROWTH), str(STEPS - GROWTH), "--lr_schedule=constant"),
    *("--eval_interval=600", "--hellaswag_data=none", "--compile=none", "--log_interval=1"),
]


def train(folder: Path, *options: str) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *options, f"--out_dir={folder}"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"{' '.join(command)} failed: see its error above")


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by the number of steps since growth."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"] - 1 - GROWTH: row["loss"] for row in rows if "loss" in row}


def difference(curve: dict[int, float], other: dict[int, float]) -> list[tuple[int, float]]:
    """Return (steps since growth, difference), averaged over up to WINDOW earlier steps.

    No average contains steps before and after growth.
    """
    points = []
    for step in range(-SHOWN, STEPS - GROWTH):
        first = max(step - WINDOW + 1, 0 if step >= 0 else -GROWTH)
        values = [curve[s] - other[s] for s in range(first, step + 1)]
        points.append((step, sum(values) / len(values)))
    return points


def main(options: list[str]) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    base = FOLDER / "base"
    train(base, *OPTIONS, *options)
    train(FOLDER / "never_grown", *OPTIONS, *options, "--stage_blocks", "100%", "100%")
    variants: dict[str, list[str]] = {
        **{f"growth={name}": [f"--growth={name}", "--optimizer_state=copy"] for name in OPERATORS},
        **{f"optimizer_state={s}": ["--growth=stack", f"--optimizer_state={s}"] for s in STATES},
    }
    never_grown = losses(FOLDER / "never_grown")
    curves = {}
    checkpoint = f"checkpoints/step_{GROWTH:08d}"
    for name, words in variants.items():
        folder = FOLDER / name.replace("=", "_")
        shutil.copytree(base / checkpoint, folder / checkpoint)
        shutil.copy(base / "metrics.jsonl", folder)
        train(folder, *OPTIONS, *options, *words, "--init_from=resume")
        curves[name] = difference(losses(folder), never_grown)
    draw(curves, ROOT / "docs" / "growth_step")
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "loss_difference": curves}
    write_report(ROOT / "out" / "bench" / "growth.json", report)


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    with plt.style.context(plot.STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
        for ax, prefix in zip(axes, ("growth=", "optimizer_state=")):
            labels: dict[tuple, list[str]] = {}  # operators with the same map have the same curve
            for name in (n for n in curves if n.startswith(prefix)):
                labels.setdefault(tuple(map(tuple, curves[name])), []).append(name)
            for (curve, names), color in zip(labels.items(), plt.get_cmap("tab10").colors):
                label = ", ".join(name.removeprefix(prefix) for name in names)
                ax.plot(*zip(*curve), color=color, label=label)
            ax.axhline(0, color="black", linestyle=":", label="never grown")
            ax.axvline(0, color="#888888", linewidth=0.8)
            ax.set_xlabel("steps since growth")
            ax.legend(fontsize=8)
        axes[0].set_ylabel("training loss, minus that of\na model that was never grown")
        axes[0].set_title("growth operator (optimizer_state=copy)", loc="left")
        axes[1].set_title("optimizer state (growth=stack)", loc="left")
        plot.save(fig, path)
        plt.close(fig)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
