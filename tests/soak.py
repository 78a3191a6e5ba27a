"""Hours of training that is killed every few minutes: the run stands it, memory stays flat, no file descriptor is lost.

    python tests/soak.py [--minutes 120] [--json_file FILE]          make soak

The demo's model, four stages and then continual training, on data/stdlib; SIGKILL and SIGTERM by turns, always the same command.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import machine, write_report
from checkpoint import checkpoints, load_checkpoint
from files import read_metrics

OUT = ROOT / "out" / "soak"
COMMAND = ["train.py", "configs/demo.py", "--stages=4", "--steps=4000", "--continual_steps=10000000", "--init_from=auto"]
COMMAND += ["--checkpoint_interval=50", "--eval_interval=500", "--data_dir=data/stdlib", f"--out_dir={OUT.relative_to(ROOT)}"]
EVERY = 5  # seconds between samples


def sample(pid: int) -> tuple[int, int]:
    """Resident bytes and open file descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def life(seconds: float, number: signal.Signals) -> dict:
    """Start the run, or go on with it, and send it a signal after so many seconds."""
    with open(OUT.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen([sys.executable, *COMMAND], cwd=ROOT, stdout=log, stderr=log)
    began, samples = time.monotonic(), []
    while time.monotonic() - began < seconds:
        time.sleep(EVERY)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with status {process.returncode}: {OUT.with_suffix('.log')}")
        with contextlib.suppress(OSError):
            samples.append((time.monotonic() - began, *sample(process.pid)))
    process.send_signal(number)
    status = process.wait(timeout=60)
    rows = read_metrics(OUT / "metrics.jsonl")
    settled = [s for s in samples if s[0] > 40]  # after the first evaluations and checkpoints
    early, late = settled[: len(settled) // 3], settled[-(len(settled) // 3) :]
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


def main(minutes: float = 120, json_file: Path = Path("out/bench/soak.json"), seed: int = 0) -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.parent.mkdir(exist_ok=True)
    rng, lives, began = random.Random(seed), [], time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        number = signal.SIGTERM if len(lives) % 3 == 2 else signal.SIGKILL
        lives.append(life(rng.uniform(90, 240), number))
        print(json.dumps(lives[-1]), flush=True)

    steps = [row["step"] for row in read_metrics(OUT / "metrics.jsonl")]
    whole = lives[-1]["blocks"]
    flat = [one for one, before in zip(lives[1:], lives) if before["blocks"] == whole]  # lives in which nothing grows
    growth = [one["resident_late"] / one["resident_early"] - 1 for one in flat]
    result = {
        "hours": round((time.monotonic() - began) / 3600, 2),
        "lives": len(lives),
        "steps": steps[-1],
        "every_step_once_in_order": steps == sorted(set(steps)),
        "newest_checkpoint": load_checkpoint(OUT)["step"],
        "checkpoints": [p.name for p in checkpoints(OUT)],
        "status_of_sigterm": sorted({one["status"] for one in lives if one["signal"] == "SIGTERM"}),
        "memory_growth_within_a_life": {"median": statistics.median(growth), "largest": max(growth)},
        "memory_last_life_by_first": flat[-1]["resident_late"] / flat[0]["resident_late"],
        "descriptors": sorted({one[key] for one in flat for key in ("descriptors_early", "descriptors_late")}),
    }
    good = result["every_step_once_in_order"] and result["status_of_sigterm"] == [75] and statistics.median(growth) < 0.02
    good = good and all(one["descriptors_late"] <= one["descriptors_early"] for one in flat)
    print(json.dumps(result, indent=2))
    write_report(json_file, {"machine": machine(torch.device("cpu")), "good": bool(good)} | result | {"each": lives})
    sys.exit(not good)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
