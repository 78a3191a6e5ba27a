"""Tokenizing: fineweb.py against build-nanogpt's and against tiktoken in one thread, by turns, on the same documents.

    python benchmarks/tokenizing.py --source FOLDER --peer DIR [--copies 4] [--processes 2]

Both scripts run as they are, each as a process of its own, start and shards included; the peer's loads the local files in
place of the hub's. Both must write the same tokens. Linux only.
"""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import machine, write_report
from data import open_shard
from errors import UserError, report_user_errors


@dataclass
class Args:
    """Time and compare two tokenizing scripts."""

    source: Path
    """Folder of parquet files with a column `text`."""
    peer: Path
    """A checkout of build-nanogpt."""
    copies: int = 1
    """Times that the files are read, as if there were so many more."""
    processes: int = 2
    """Processes that tokenize, in both."""
    rounds: int = 3
    """Turns that each gets."""
    json: Path = Path("out/bench/tokenizing.json")
    """File of the results."""


PEER = """
import os, runpy, sys
import datasets
script, processes, *files = sys.argv[1:]
datasets.disable_progress_bars()
local = datasets.load_dataset("parquet", data_files=files, split="train")
datasets.load_dataset = lambda *args, **kwargs: local
os.cpu_count = lambda: 2 * int(processes)  # it takes half of them
runpy.run_path(script, run_name="__main__")
"""


@dataclass
class Tally:
    seconds: list[float] = field(default_factory=list)  # of the whole process, one entry a round
    memory: list[int] = field(default_factory=list)  # bytes, likewise
    digest: str = ""  # sha256 of all tokens


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in descendants(int(child)))]


def memory_of(pid: int) -> int:
    """Bytes that a process and its descendants hold together; the page cache, which the system takes back, is left out."""
    total = 0
    for p in descendants(pid):
        try:
            lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def run(command: list[str], tally: Tally) -> None:
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
        tally.seconds.append(time.perf_counter() - start)
        ended.set()
        thread.join()
        tally.memory.append(peak)
        if failed:
            log.seek(0)
            raise UserError(f"{' '.join(command[:2])} failed: {log.read().decode()[-2000:]}")


def digest_of(shards: list[np.ndarray]) -> tuple[str, int]:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(np.ascontiguousarray(shard))
    return digest.hexdigest(), sum(map(len, shards))


def single_thread(texts: list[str]) -> float:
    """Tokens a second of tiktoken's encode_ordinary."""
    encoding = tiktoken.get_encoding("gpt2")
    encoding.encode_ordinary(texts[0])
    start = time.perf_counter()
    return sum(len(encoding.encode_ordinary(text)) for text in texts) / (time.perf_counter() - start)


def main(args: Args) -> None:
    files = sorted(args.source.glob("*.parquet"))
    if not files:
        raise UserError(f"--source={args.source}: has no parquet files")
    if not (args.peer / "fineweb.py").is_file():
        raise UserError(f"--peer={args.peer}: fineweb.py is not there; name a checkout of build-nanogpt")
    ours, peer, one, n_tokens = Tally(), Tally(), [], 0
    texts = datasets.load_dataset("parquet", data_files=[str(files[0])], split="train")[:6000]["text"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "source"
        source.mkdir()
        for i in range(args.copies):
            for path in files:
                (source / f"{i:03d}_{path.name}").symlink_to(path.resolve())
        linked = sorted(map(str, source.iterdir()))
        datasets.load_dataset("parquet", data_files=linked, split="train")  # converted once, for both
        for r in tqdm(range(args.rounds), desc="rounds"):
            one.append(single_thread(texts))
            out, theirs = folder / f"ours{r}", folder / f"theirs{r}"
            options = ["--source", str(source), "--out", str(out), "--tokenizer", "gpt2", "--processes", str(args.processes)]
            run([sys.executable, str(ROOT / "fineweb.py"), *options], ours)
            theirs.mkdir()
            (theirs / "fineweb.py").write_bytes((args.peer / "fineweb.py").read_bytes())  # it writes beside itself
            run([sys.executable, "-c", PEER, str(theirs / "fineweb.py"), str(args.processes), *linked], peer)
        ours.digest, n_tokens = digest_of([open_shard(p) for p in sorted(out.glob("*.bin"), key=lambda p: p.name[-10:])])
        peer.digest, _ = digest_of([np.load(p, mmap_mode="r") for p in sorted(theirs.rglob("*.npy"), key=lambda p: p.name[-10:])])

    ratio = statistics.median(b / a for a, b in zip(ours.seconds, peer.seconds))
    of_single = statistics.median(n_tokens / s / (args.processes * rate) for s, rate in zip(ours.seconds, one))
    rows = {
        name: {
            "seconds": statistics.median(tally.seconds),
            "tokens_per_second": n_tokens / statistics.median(tally.seconds),
            "peak_memory": max(tally.memory),
        }
        for name, tally in (("fineweb.py", ours), ("build-nanogpt", peer))
    }
    for name, row in rows.items():
        print(f"{name:14s} {row['tokens_per_second']:13,.0f} tokens/s, {row['peak_memory'] / 2**30:.2f} GiB")
    print(f"{'tiktoken':14s} {statistics.median(one):13,.0f} tokens/s in one thread")
    same = ours.digest == peer.digest
    print(f"{n_tokens:,} tokens, {'the same' if same else 'NOT THE SAME'} in both; fineweb.py is {ratio:.2f} times as fast as its peer")
    print(f"and {of_single:.2f} of {args.processes} times tiktoken's single thread")
    results = {"tokens": n_tokens, "same_tokens": same, "ways": rows, "tiktoken_single_thread": statistics.median(one)}
    write_report(args.json, {"machine": machine(torch.device("cpu"))} | results | {"ratio": ratio, "of_n_single_threads": of_single})


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
