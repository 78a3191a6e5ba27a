"""Shared by the tests: a small corpus of the standard library, small runs of train.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data, where the machine has it
TINY = dict(n_layer=4, n_head=2, n_embd=32, block_size=64, vocab_size=320)

# A second of training with everything in it that a run does.
TINY_RUN: dict[str, object] = {
    "device": "cpu",
    "compile": "none",
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 64,
    "tokens_per_step": 1024,
    "batch_size": 8,
    "steps": 16,
    "eval_tokens": 2048,
    "eval_interval": 8,
    "log_interval": 1,
    "checkpoint_interval": 1000,
    "hellaswag_limit": 10,
    "learning_rate": 1e-3,
}


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"),
    reason="torch.compile needs a C++ compiler on the CPU",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def arguments(out_dir, **options) -> list[str]:
    """Options of a tiny run on the command line; a tuple becomes several words."""
    words = []
    for key, value in (TINY_RUN | {"out_dir": out_dir} | options).items():
        words += (
            [f"--{key}", *map(str, value)] if isinstance(value, tuple) else [f"--{key}={value}"]
        )
    return words


def script(
    *command, check=True, timeout=300, cwd=ROOT, **environment
) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does, from the project's folder."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def torchrun(processes: int, *command, **options) -> subprocess.CompletedProcess:
    """The same under torchrun's launcher."""
    return script(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *command,
        **options,
    )


def copy_repository(to) -> Path:
    """Copy the scripts, stagewise/ and configs/, for a test that changes them. Return `to`."""
    to.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "stagewise", ROOT / "configs"):
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        else:
            shutil.copy(path, to)
    return to


def metrics(out_dir) -> list[dict]:
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what another run of the same would measure differently."""
    clock = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "data_wait", "peak_memory"}
    clock |= {"compile_seconds", "eval_seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def set_trainable(model, phase) -> None:
    """Train what a phase trains."""
    model.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small products gain nothing from threads, and results must not depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_matmul_precision():
    """A test on a GPU does not change the precision of the tests after it."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The built-in corpus, written by fineweb.py."""
    out = tmp_path_factory.mktemp("corpus") / "stdlib"
    script("fineweb.py", "--source=stdlib", f"--out={out}")
    return out


@pytest.fixture
def run_train(monkeypatch, corpus, tmp_path):
    """A function (name, *files, **options) that runs train.py's main and returns the run folder."""
    import train

    def run(name, *files, **options):
        options = {"data_dir": corpus} | options
        monkeypatch.setattr(
            sys, "argv", ["train.py", *files, *arguments(tmp_path / name, **options)]
        )
        handlers = {number: signal.getsignal(number) for number in train.StopSignals.NUMBERS}
        try:
            train.main()
        finally:
            for number, handler in handlers.items():  # where the run ends in an error, its own stay
                signal.signal(number, handler)
            torch.use_deterministic_algorithms(False)
        return tmp_path / name

    return run
