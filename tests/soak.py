"""Hours of training that is killed every few minutes: memory stays flat, no descriptor leaks.

    python tests/soak.py [--minutes 120] [--json_file FILE]          make soak

The demo's model, four stages and then continual training, on data/stdlib. SIGKILL and SIGTERM
alternate; the command is always the same.
"""

import contextlib
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, write_report
from stagewise.checkpoint import checkpoints, load_checkpoint
from stagewise.metrics import read_metrics

OUT = ROOT / "out" / "soak"
COMMAND = [
    "train.py",
    "configs/demo.py",
    "--stages=4",
    "--steps=4000",
    "--continual_steps=10000000",
    "--init_from=auto",
    "--checkpoint_interval=50",
    "--eval_interval=500",
    "--data_dir=data/stdlib",
    f"--out_dir={OUT.relative_to(ROOT)}",
]
INTERVAL = 5  # seconds between samples
WARM_UP = 40  # seconds of a run until its first evaluations and checkpoints are done


def sample(pid: int) -> tuple[int, int]:
    """Return the resident bytes and open file descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+)", status)
    if resident is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return 1024 * int(resident[1]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def train_for(seconds: float, number: signal.Signals) -> dict:
    """Start or resume the run, and send it a signal after `seconds`."""
    with open(OUT.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen([sys.executable, *COMMAND], cwd=ROOT, stdout=log, stderr=log)
    began, samples = time.monotonic(), []
    while time.monotonic() - began < seconds:
        time.sleep(INTERVAL)
        if process.poll() is not None:
            sys.exit(
                f"the run ended by itself with status {process.returncode}: see "
                f"{OUT.with_suffix('.log')}"
            )
        with contextlib.suppress(OSError):
            samples.append((time.monotonic() - began, *sample(process.pid)))
    process.send_signal(number)
    status = process.wait(timeout=60)
    rows = read_metrics(OUT / "metrics.jsonl")
    settled = [s for s in samples if s[0] > WARM_UP]
    third = max(1, len(settled) // 3)
    early, late = settled[:third], settled[-third:]
    return {
        "seconds": round(time.monotonic() - began),
        "signal": number.name,
        "status": status,
        "step": rows[-1]["step"],
        "blocks": rows[-1]["blocks"],
        "resident_early": statistics.median(s[1] for s in early),
        "resident_late": statistics.median(s[1] for s in late),
        "descriptors_early": max(s[2] for s in early),
        "descriptors_late": max(s[2] for s in late),
    }


def main(
    minutes: float = 120, json_file: Path = Path("out/bench/soak.json"), seed: int = 0
) -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.parent.mkdir(exist_ok=True)
    rng, began = random.Random(seed), time.monotonic()
    parts: list[dict] = []
    while time.monotonic() - began < 60 * minutes:
        number = signal.SIGTERM if len(parts) % 3 == 2 else signal.SIGKILL
        parts.append(train_for(rng.uniform(90, 240), number))
        print(json.dumps(parts[-1]), flush=True)

    steps = [row["step"] for row in read_metrics(OUT / "metrics.jsonl")]
    # Memory may rise while the model grows.
    final = parts[-1]["blocks"]
    flat = [part for part, before in zip(parts[1:], parts) if before["blocks"] == final]
    if not flat:
        sys.exit("the model was still growing: use more --minutes")
    rise = [part["resident_late"] / part["resident_early"] - 1 for part in flat]
    in_order = steps == sorted(set(steps))
    sigterm = sorted({part["status"] for part in parts if part["signal"] == "SIGTERM"})
    keys = ("descriptors_early", "descriptors_late")
    result = {
        "hours": round((time.monotonic() - began) / 3600, 2),
        "starts": len(parts),
        "steps": steps[-1],
        "every_step_once_in_order": in_order,
        "newest_checkpoint": load_checkpoint(OUT)["step"],
        "checkpoints": [p.name for p in checkpoints(OUT)],
        "status_after_sigterm": sigterm,
        "memory_rise_between_restarts": {"median": statistics.median(rise), "largest": max(rise)},
        "memory_last_by_first": flat[-1]["resident_late"] / flat[0]["resident_late"],
        "descriptors": sorted({part[key] for part in flat for key in keys}),
    }
    good = (
        in_order
        and sigterm in ([], [75])
        and statistics.median(rise) < 0.02
        and all(part["descriptors_late"] <= part["descriptors_early"] for part in flat)
    )
    print(json.dumps(result, indent=2))
    where = {"machine": machine(torch.device("cpu")), "good": good}
    write_report(json_file, where | result | {"each": parts})
    sys.exit(not good)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
