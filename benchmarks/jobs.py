"""How much faster is a study on a CPU with `study.py run --jobs`?

    python benchmarks/jobs.py [--jobs 2] [--rounds 3]

Trains a study of short runs of the demo's model, alternately with `--jobs 1` and with more.
One run at a time uses all cores; N at a time use 1/N of them each.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, write_report
from stagewise.errors import UserError, report_user_errors

STUDY = """
title = "short runs"
options = [{options}]

[runs.baseline]
seeds = {seeds}
"""


@dataclass
class Args:
    """Time a study with one run at a time and with several."""

    jobs: int = 2
    """Runs at a time."""
    runs: int = 4
    """Runs of the study."""
    steps: int = 400
    """Steps of each run."""
    rounds: int = 3
    """Times that the study is trained each way."""
    data_dir: Path = ROOT / "data/stdlib"
    """Corpus."""
    json: Path = Path("out/bench/jobs.json")
    """File of the results."""


def seconds(args: Args, jobs: int) -> float:
    """Return the time that the study takes."""
    options = [str(ROOT / "configs/demo.py"), f"--steps={args.steps}", "--hellaswag_data=none"]
    options += [f"--data_dir={args.data_dir.resolve()}", f"--eval_interval={args.steps}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "study"
        folder.mkdir()
        text = STUDY.format(
            options=", ".join(f'"{o}"' for o in options), seeds=list(range(args.runs))
        )
        (folder / "study.toml").write_text(text)
        command = [sys.executable, str(ROOT / "study.py"), "run", str(folder), f"--jobs={jobs}"]
        start = time.perf_counter()
        if subprocess.run([*command, f"--out={name}/out"]).returncode:
            raise UserError(f"{' '.join(command)} failed: see its error above")
        return time.perf_counter() - start


def main(args: Args) -> None:
    if args.rounds < 1 or args.jobs < 2:
        raise UserError("--rounds must be at least 1 and --jobs at least 2")
    rounds = []
    for _ in range(args.rounds):
        one, several = seconds(args, 1), seconds(args, args.jobs)
        rounds.append({"one_at_a_time": one, "several": several, "ratio": one / several})
        print(rounds[-1])
    ratio = statistics.median(r["ratio"] for r in rounds)
    print(f"--jobs {args.jobs} is {ratio:.2f} times as fast (median of {args.rounds} rounds)")
    report = {"machine": machine(torch.device("cpu")), "ratio": ratio, "rounds": rounds}
    write_report(args.json, report)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
