"""Shared by the tests: a small corpus of the standard library, small runs of train.py as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data, where the machine has it
TINY = dict(n_layer=4, n_head=2, n_embd=32, block_size=32, vocab_size=320)

# Small enough for a second of training, with everything that a run does in it.
TINY_RUN = {
    "device": "cpu",
    "compile": "False",
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "tokens_per_step": 512,
    "batch_size": 8,
    "steps": 16,
    "eval_tokens": 2048,
    "eval_interval": 4,
    "log_interval": 1,
    "checkpoint_interval": 1000,
    "hellaswag_limit": 20,
    "learning_rate": 1e-3,
}


def options(**overrides) -> list[str]:
    return [f"--{key}={value}" for key, value in (TINY_RUN | overrides).items()]


def run_script(*command, check=True, env=None, timeout=300) -> subprocess.CompletedProcess:
    """Run a script of the project, or `-m module ...`, with this interpreter, from the project's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def train(*args, processes=1, check=True, **overrides) -> subprocess.CompletedProcess:
    """Run train.py with the tiny options; with torchrun's launcher where `processes` > 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return run_script(*launcher, "train.py", *args, *options(**overrides), check=check)


def metrics(out_dir) -> list[dict]:
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The embedded corpus, written by fineweb.py."""
    out = tmp_path_factory.mktemp("corpus") / "stdlib"
    run_script("fineweb.py", "--source=stdlib", f"--out={out}")
    return out
