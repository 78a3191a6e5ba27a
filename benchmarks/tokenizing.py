"""Tokenizing the same documents: fineweb.py, build-nanogpt's, and tiktoken in one thread, in turn.

    python benchmarks/tokenizing.py --source FOLDER --peer DIR [--copies 4] [--processes 2]

Both scripts run unchanged, each in a process of its own; start-up and writing shards are included.
The peer reads the local files instead of the Hub's. Both must write the same tokens. Linux only.
"""

import dataclasses
import hashlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import tiktoken
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, write_report
from stagewise.data import open_shard
from stagewise.errors import UserError, report_user_errors


@dataclass
class Args:
    """Time and compare two tokenizing scripts."""

    source: Path
    """Folder of parquet files with a column `text`."""
    peer: Path
    """A checkout of build-nanogpt."""
    copies: int = 1
    """How many times the files are read, as if there were more of them."""
    processes: int = 2
    """Processes that tokenize, in both."""
    rounds: int = 3
    """Trials of each."""
    json: Path = Path("out/bench/tokenizing.json")
    """File of the results."""


PEER = """
import os, runpy, sys
import datasets
script, processes, *files = sys.argv[1:]
datasets.disable_progress_bars()
local = datasets.load_dataset("parquet", data_files=files, split="train")
datasets.load_dataset = lambda *args, **kwargs: local
os.cpu_count = lambda: 2 * int(processes)  # it uses half of them
runpy.run_path(script, run_name="__main__")
"""


@dataclass
class Trials:
    seconds: list[float] = field(default_factory=list)  # of the whole process, one entry per round
    memory: list[int] = field(default_factory=list)  # peak bytes, likewise
    digest: str = ""  # sha256 of all tokens


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in descendants(int(child)))]


def memory_of(pid: int) -> int:
    """Return the bytes that a process and its descendants use together, without the page cache."""
    total = 0
    for p in descendants(pid):
        try:
            lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        own = [line for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        total += sum(1024 * int(line.split()[1]) for line in own)
    return total


def run(command: list[str], trials: Trials) -> None:
    """Run a command, and record its time and peak memory."""
    peak, start = 0, time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        ended = threading.Event()

        def watch():
            nonlocal peak
            while not ended.wait(0.25):
                peak = max(peak, memory_of(process.pid))

        thread = threading.Thread(target=watch)
        thread.start()
        failed = process.wait()
        trials.seconds.append(time.perf_counter() - start)
        ended.set()
        thread.join()
        trials.memory.append(peak)
        if failed:
            log.seek(0)
            raise UserError(f"{' '.join(command[:2])} failed: {log.read().decode()[-2000:]}")


def digest_of(shards: list[np.ndarray]) -> tuple[str, int]:
    """Return the sha256 of the tokens of all shards, and their number."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(np.ascontiguousarray(shard).data)
    return digest.hexdigest(), sum(map(len, shards))


def single_thread(texts: list[str]) -> float:
    """Return the tokens per second of tiktoken's encode_ordinary."""
    encoding = tiktoken.get_encoding("gpt2")
    encoding.encode_ordinary(texts[0])
    start = time.perf_counter()
    n_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return n_tokens / (time.perf_counter() - start)


def shard_number(path: Path) -> str:
    return path.stem[-6:]


def main(args: Args) -> None:
    files = sorted(args.source.glob("*.parquet"))
    if not files:
        raise UserError(
            f"--source={args.source}: has no parquet files: name a folder that has some"
        )
    if not (args.peer / "fineweb.py").is_file():
        raise UserError(f"--peer={args.peer}: has no fineweb.py: name a checkout of build-nanogpt")
    if min(args.copies, args.processes, args.rounds) < 1:
        raise UserError("--copies, --processes and --rounds must be at least 1")
    ours, peer = Trials(), Trials()
    single: list[float] = []
    first = datasets.load_dataset("parquet", data_files=[str(files[0])], split="train")
    texts = first[:6000]["text"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        for i in range(args.copies):
            for path in files:
                (source / f"{i:03d}_{path.name}").symlink_to(path.resolve())
        linked = sorted(map(str, source.iterdir()))
        # Converted once, for both.
        datasets.load_dataset("parquet", data_files=linked, split="train")
        for r in tqdm(range(args.rounds), desc="rounds"):
            single.append(single_thread(texts))
            out, peer_out = folder / f"ours{r}", folder / f"peer{r}"
            options = ["--source", str(source), "--out", str(out), "--tokenizer", "gpt2"]
            options += ["--processes", str(args.processes)]
            run([sys.executable, str(ROOT / "fineweb.py"), *options], ours)
            peer_out.mkdir()
            script = peer_out / "fineweb.py"  # it writes beside itself
            script.write_bytes((args.peer / "fineweb.py").read_bytes())
            command = [sys.executable, "-c", PEER, str(script), str(args.processes), *linked]
            run(command, peer)
        shards = sorted(out.glob("*.bin"), key=shard_number)
        peer_shards = sorted(peer_out.rglob("*.npy"), key=shard_number)
        ours.digest, n_tokens = digest_of([open_shard(p) for p in shards])
        peer.digest, _ = digest_of([np.load(p, mmap_mode="r") for p in peer_shards])

    ratio = statistics.median(b / a for a, b in zip(ours.seconds, peer.seconds))
    of_single = statistics.median(
        n_tokens / s / (args.processes * rate) for s, rate in zip(ours.seconds, single)
    )
    rows = {
        name: {
            "seconds": statistics.median(trials.seconds),
            "tokens_per_second": n_tokens / statistics.median(trials.seconds),
            "peak_memory": max(trials.memory),
        }
        for name, trials in (("fineweb.py", ours), ("build-nanogpt", peer))
    }
    for name, row in rows.items():
        memory = row["peak_memory"] / 2**30
        print(f"{name:14s} {row['tokens_per_second']:13,.0f} tokens/s, {memory:.2f} GiB")
    print(f"{'tiktoken':14s} {statistics.median(single):13,.0f} tokens/s in one thread")
    same = ours.digest == peer.digest
    print(
        f"{n_tokens:,} tokens, {'the same' if same else 'NOT THE SAME'} in both; fineweb.py is "
        f"{ratio:.2f} times as fast as its peer, at {of_single:.2f} of {args.processes} times the "
        "rate of tiktoken in one thread"
    )
    report: dict = {"machine": machine(torch.device("cpu")), "args": dataclasses.asdict(args)}
    report |= {"tokens": n_tokens, "same_tokens": same, "ways": rows}
    report |= {"tiktoken_single_thread": statistics.median(single)}
    write_report(args.json, report | {"ratio": ratio, "of_n_single_threads": of_single})


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
