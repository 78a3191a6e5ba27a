"""How accurate is forecast.py?

    python benchmarks/forecast.py [configs/A.py configs/B.py ...] [--key=value ...]

Runs forecast.py, then train.py, with the same options, and compares the seconds
of every phase. The wall time of the run is measured from when it writes config.json, because a
forecast does not include the start of the process.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, write_report
from stagewise.errors import UserError, report_user_errors

REPORT = Path("out/bench/forecast.json")


def run(script: str, *options: str) -> None:
    command = [sys.executable, str(ROOT / script), *options]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed: see its error above")


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main(options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("forecast.py", *options, f"--out_dir={folder}")
        forecast = json.loads((folder / "forecast.json").read_text())["phases"]
        run("train.py", *options, f"--out_dir={folder}")
        ended = time.time()
        rows = read_rows(folder)
        started = (folder / "config.json").stat().st_mtime
    steps, seconds = ([row[key] for row in rows] for key in ("step", "seconds"))
    report, step = [], 0
    for phase in forecast:
        start, step = step, step + phase["steps"]
        # A phase may end between two rows.
        before, after = np.interp([start, step], steps, seconds)
        measured = float(after - before)
        expected = phase["training_seconds"] + phase["compile_seconds"]
        report.append({"phase": phase["phase"], "forecast": expected, "run": measured})
    columns = ("training_seconds", "compile_seconds", "evaluation_seconds")
    total = sum(phase[column] for phase in forecast for column in columns)
    report.append({"phase": "all, with evaluations", "forecast": total, "run": ended - started})
    for row in report:
        row["ratio"] = row["forecast"] / row["run"]
    print(tabulate(report, "keys", "simple", floatfmt=".3f"))
    write_report(REPORT, {"machine": machine(torch.device("cpu")), "rows": report})


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
