"""Do train.py's losses match those of plain PyTorch and of nanoGPT's own code?

    python benchmarks/losses.py configs/gpt2_124m.py --nanogpt DIR --variant fp8_head

Trains the same initial weights on the same batches several times: with plain PyTorch in fp32 (the
reference: no compilation, no chunks, all logits, unfused AdamW), with `train.train_step` as the
options say, with each variant, and with nanoGPT's model and optimizer, set up as in its train.py.
The report contains the loss of every step, and its difference from the reference.

Rounding differs from the first step on. At a high learning rate, training amplifies this
difference, also between two correct implementations in fp32. nanoGPT uses the exact GELU: compare
it with the variant `erf`, which does, too.
"""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro
from tabulate import tabulate
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from benchmarks.common import load_definitions, machine, write_report
from benchmarks.variants import COMPILE, apply_variant, check_variants
from cost import make_schedules
from model import GPT, GPTConfig
from schedule import Schedule, learning_rate
from stagewise.config import Config, grad_accum_steps, load_config, padded_vocab_size
from stagewise.data import Shards, TrainOrder, load_meta
from stagewise.device import autocast, pick_device
from stagewise.distributed import Ranks
from stagewise.errors import UserError, report_user_errors

LAST = 20  # steps at the end over which losses are averaged


@dataclass(frozen=True)
class LossConfig(Config):
    """Train the baseline in several implementations, and compare their losses.

    python benchmarks/losses.py [configs/A.py ...] [--key=value ...]: train.py's options, and
    those of the comparison.
    """

    prog: ClassVar[str] = "benchmarks/losses.py"
    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Changes of the baseline, as for benchmarks/step.py."""
    json: Path = Path("out/bench/losses.json")
    """File of the results."""


@dataclass
class Comparison:
    """What all candidates have in common."""

    config: LossConfig
    model_config: GPTConfig
    schedule: Schedule
    data: Shards
    device: torch.device

    def model(self) -> GPT:
        """Return the initial model."""
        return GPT(self.model_config, seed=self.config.seed, device=self.device)

    def batches(self) -> Iterator[list[torch.Tensor]]:
        order = TrainOrder(len(self.data), self.config.seed)
        return train.train_batches(
            self.data, order, self.schedule, 0, self.config, Ranks(), self.device
        )

    def losses(self, name: str, optimizer, step: Callable) -> list[float]:
        """Train, and return the loss of every step.

        Args:
            step: makes a step on the next of `batches`, and returns its loss.
        """
        batches, losses = self.batches(), []
        for i in tqdm(range(self.schedule.n_steps), desc=name, unit="step"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(i, self.schedule, self.config)
            losses.append(step(batches))
        return torch.stack(losses).tolist()


def plain(c: Comparison, name: str, params, optimizer, loss_of: Callable) -> list[float]:
    """Return the losses of a loop like that of nanoGPT's train.py.

    Args:
        loss_of: returns the mean loss of inputs and targets, with a gradient.
    """
    accum_steps = grad_accum_steps(c.config, c.config.tokens_per_step, world_size=1)

    def step(batches):
        total = 0
        for _ in range(accum_steps):
            x, y = (t.to(c.device) for t in next(batches))
            loss = loss_of(x, y) / accum_steps
            loss.backward()
            total += loss.detach()
        if c.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(params, c.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return c.losses(name, optimizer, step)


def reference(c: Comparison) -> list[float]:
    """Return the losses of plain PyTorch in fp32."""
    model = c.model()
    groups, betas = model.param_groups(c.config.weight_decay), (c.config.beta1, c.config.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, foreach=False, fused=False)

    def loss_of(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return plain(c, "reference", [*model.parameters()], optimizer, loss_of)


def ours(c: Comparison, variant: str = "") -> list[float]:
    """Return the losses of `train.train_step`."""
    config, (phase,) = c.config, c.schedule.phases
    compile = variant if variant in COMPILE else config.compile
    model = c.model()
    if compile != "none":
        model.compile_regions(whole=compile == "model")
    apply_variant(model, variant)
    optimizer = train.enter_phase(model, {}, phase, config)
    accum_steps = grad_accum_steps(config, phase.tokens_per_step, world_size=1)
    precision = autocast(c.device, config.dtype, config.n_embd)

    def step(batches):
        return train.train_step(
            model, optimizer, batches, accum_steps, precision, config.grad_clip
        )[0]

    return c.losses(variant or "train.py", optimizer, step)


def nanogpt(c: Comparison, folder: Path) -> list[float]:
    """Return the losses of nanoGPT's model and optimizer."""
    config = c.config
    module = load_definitions(folder / "model.py")
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")
    with contextlib.redirect_stdout(None):
        model = module.GPT(module.GPTConfig(**{s: getattr(c.model_config, s) for s in sizes}))
        model.load_state_dict(c.model().state_dict())
        model.to(c.device)
        betas = (config.beta1, config.beta2)
        optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, betas, c.device.type
        )
    compiled: Any = torch.compile(model) if config.compile != "none" else model

    def loss_of(x, y):
        with autocast(c.device, config.dtype, config.n_embd):
            return compiled(x, y)[1]

    return plain(c, "nanoGPT", [*model.parameters()], optimizer, loss_of)


def compare(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each candidate, relative to the reference, and to nanoGPT if it is there."""
    rows = []
    for name, values in losses.items():
        row: dict[str, Any] = {"name": name, "final_loss": statistics.fmean(values[-LAST:])}
        for other in {"reference", "nanoGPT"} & losses.keys():
            difference = np.array(values) / np.array(losses[other]) - 1
            row[f"largest_difference_{other}"] = float(np.abs(difference).max())
            row[f"final_difference_{other}"] = float(difference[-LAST:].mean())
        rows.append(row | {"losses": values})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    columns = {"name": "", "final_loss": f"loss, last {LAST} steps"}
    for other in ("reference", "nanoGPT"):
        columns[f"largest_difference_{other}"] = f"from {other}: largest"
        columns[f"final_difference_{other}"] = f"last {LAST} steps"
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    cells = [[row[key] for key in columns] for row in rows]
    form = ("", ".4f", ".1e", "+.1e", ".1e", "+.1e")
    return tabulate(cells, [*columns.values()], "simple", floatfmt=form)


def check_options(config: LossConfig, device: torch.device) -> None:
    """Raise UserError if something cannot be trained."""
    check_variants(config.variant, config, device)
    if config.nanogpt and not (config.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt={config.nanogpt} has no model.py: name a checkout of nanoGPT")
    grad_accum_steps(config, config.tokens_per_step, world_size=1)


def main() -> None:
    config = load_config(sys.argv[1:], LossConfig())
    device = pick_device(config.device)
    check_options(config, device)
    meta = load_meta(Path(config.data_dir))
    model_config = train.make_model_config(config, padded_vocab_size(meta))
    _, schedule = make_schedules(config, model_config)
    data = Shards(Path(config.data_dir), "train", config.block_size, meta)
    c = Comparison(config, model_config, schedule, data, device)

    losses = {"reference": reference(c), "train.py": ours(c)}
    losses |= {name: ours(c, name) for name in config.variant}
    if config.nanogpt:
        losses["nanoGPT"] = nanogpt(c, config.nanogpt)
    report: dict[str, Any] = {"machine": machine(device), "config": dataclasses.asdict(config)}
    if config.nanogpt:
        git = ["git", "-C", str(config.nanogpt), "rev-parse", "HEAD"]
        report["nanogpt_commit"] = subprocess.run(
            git, capture_output=True, text=True
        ).stdout.strip()
    report["rows"] = compare(losses)
    print(table(report["rows"]))
    print(f"{schedule.n_steps} steps. Differences are relative, and those at the end are means.")
    write_report(config.json, report)


if __name__ == "__main__":
    with report_user_errors():
        main()
