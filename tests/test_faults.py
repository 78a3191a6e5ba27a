"""Complete runs that are killed, stopped, hung and disconnected."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, arguments, metrics, script, torchrun, without_clock

from stagewise.checkpoint import checkpoints, load_checkpoint

pytestmark = pytest.mark.slow

RUN = dict(
    stages=4,
    steps=64,
    continual_steps=16,
    eval_interval=20,
    checkpoint_interval=7,
    keep_checkpoints=3,
    init_from="auto",
)
# Growth that copies blocks and their optimizer state, skipped blocks, and a context and a batch
# that change, also within a phase and not at a step where a checkpoint is written.
EVERYTHING = RUN | dict(
    growth="stack",
    optimizer_state="copy",
    skip_policy="layer_dropout",
    skip_rate=0.5,
    context_ramp="0:16 25%:32 60%:64",
    tokens_per_step_ramp="0:512 40%:1024",
    dropout=0.1,
    batch_size=4,
)
HELLASWAG = dict(hellaswag_limit=100)  # an evaluation takes long enough to be killed
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*command, **environment) -> subprocess.Popen:
    """Start a script of the project in the background."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, command)]
    pipe, output = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=output, text=True)


def step_of(out: Path) -> int:
    """Return the last step in the metrics; -1 before the first."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def inode(out: Path) -> int | None:
    """Return that of the metrics, which a run replaces when it starts or resumes."""
    path = out / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def wait_for(condition, process: subprocess.Popen, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def end(process: subprocess.Popen, seconds=120) -> tuple[int, str]:
    """Wait for a process; return its exit status and what it printed."""
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def assert_same(a: Path, b: Path):
    """The same weights, optimizer state and metrics, bit for bit."""
    one, two = (load_checkpoint(out, optimizer=True) for out in (a, b))
    assert one["step"] == two["step"] and one["loss_history"] == two["loss_history"]
    for kind in ("model", "optimizer"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(t, two[kind][name]) for name, t in one[kind].items())
    assert without_clock(metrics(a)) == without_clock(metrics(b))


def assert_close(a: Path, b: Path):
    """The same steps, with losses that are equal to rounding."""
    for row, other in zip(metrics(a), metrics(b), strict=True):
        assert row["step"] == other["step"]
        for key in ("loss", "val_loss"):
            expected = pytest.approx(other[key], rel=5e-5) if key in other else None
            assert row.get(key) == expected, (row["step"], key)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    script("train.py", *arguments(out, data_dir=corpus, **RUN, **HELLASWAG))
    return out


# --- one process


def test_a_run_killed_ten_times_ends_like_the_uninterrupted_one(corpus, tmp_path, uninterrupted):
    """SIGKILL in both phases, at a boundary, in evaluations, while checkpoints are written, and at
    random; always with the same command."""
    out, rng = tmp_path / "run", random.Random(0)
    partial = out / "checkpoints" / ".partial"
    kills = {
        "before the first checkpoint": lambda: step_of(out) >= 2,
        "in phase 1": lambda: step_of(out) >= 18,
        "in an evaluation": lambda: step_of(out) == 19,
        "in phase 2": lambda: step_of(out) >= 28,
        "while a checkpoint is written": partial.exists,
        "at a boundary": lambda: step_of(out) >= 32,
        "while another is written": lambda: step_of(out) >= 34 and partial.exists(),
        "in another evaluation": lambda: step_of(out) == 39,
        "at random": lambda: step_of(out) >= 45 and rng.random() < 0.01,
        "in the continual phase": lambda: step_of(out) >= 70,
    }
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, **HELLASWAG))
    for name, moment in kills.items():
        shutil.rmtree(partial, ignore_errors=True)
        before = inode(out)
        process = start(*command)
        wait_for(lambda: inode(out) != before and moment(), process)  # noqa: B023
        if "evaluation" in name:
            time.sleep(0.1)
        process.kill()
        end(process)
    script(*command)
    assert_same(out, uninterrupted)


def test_a_killed_run_with_ramps_growth_and_skipped_blocks_ends_like_the_uninterrupted_one(
    corpus, tmp_path
):
    """Killed in each part of its schedule, and stopped by a signal."""
    options = EVERYTHING | dict(data_dir=corpus, hellaswag_data="none")
    expected, out = tmp_path / "uninterrupted", tmp_path / "run"
    script("train.py", *arguments(expected, **options))
    command = ("train.py", *arguments(out, **options))
    for step in (10, 18, 26, 37, 45, 60, 72):
        before = inode(out)
        process = start(*command)
        wait_for(lambda: inode(out) != before and step_of(out) >= step, process)  # noqa: B023
        process.send_signal(signal.SIGTERM if step == 37 else signal.SIGKILL)
        end(process)
    script(*command)
    rows = metrics(out)
    assert rows[-1]["tokens"] == metrics(expected)[-1]["tokens"] == 26 * 512 + 54 * 1024
    assert_same(out, expected)


def test_signals_stop_a_run_and_a_second_interrupt_ends_it_at_once(corpus, tmp_path, uninterrupted):
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, **HELLASWAG))
    for number, step in ((signal.SIGTERM, 4), (signal.SIGUSR1, 12), (signal.SIGINT, 25)):
        process = start(*command)
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        process.send_signal(number)
        code, output = end(process)
        assert code == 75 and "checkpoint saved; continue with the same command" in output, output
    process = start(*command)
    wait_for(lambda: step_of(out) == 39, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)  # in an evaluation, or after the run stopped
    code, output = end(process, seconds=5)
    assert code in (-signal.SIGINT, 75)
    script(*command)
    assert_same(out, uninterrupted)


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_shard_that_is_lost_during_training_is_named(corpus, tmp_path, how):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    process = start("train.py", *arguments(out, data_dir=data, **RUN | {"steps": 4000}))
    wait_for(lambda: checkpoints(out), process)
    path = data / "stdlib_train_000001.bin"
    if how == "deleted":
        path.unlink()
    else:
        os.truncate(path, 5000)
    code, output = end(process)
    assert code == 1 and "Traceback" not in output
    named = "can no longer be read" if how == "deleted" else "truncated since the run started"
    assert f"error: {path}: {named}" in output
    assert load_checkpoint(out)["step"] > 0


# --- several processes


def workers(launcher: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    children = [int(pid) for pid in path.read_text().split()]
    return sorted(p for p in children if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes())


def test_a_run_resumes_with_other_processes_and_micro_batches(corpus, tmp_path, uninterrupted):
    """Two processes, then one, then two; each stopped by a signal to torchrun or the process."""
    out = tmp_path / "run"
    options = RUN | HELLASWAG | dict(data_dir=corpus)
    for launch, batch_size, step in ((LAUNCH, 8, 10), ((), 16, 30)):
        words = arguments(out, **options | {"batch_size": batch_size})
        process = start(*launch, "train.py", *words)
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        code, output = end(process)
        assert code != 0 and "checkpoint saved" in output, output
        assert load_checkpoint(out)["step"] == step_of(out) >= step
    torchrun(2, "train.py", *arguments(out, **options | {"batch_size": 2}))
    assert [row["step"] for row in metrics(out)] == list(range(81))
    assert_close(out, uninterrupted)


def test_two_processes_with_ramps_growth_and_skipped_blocks_train_what_one_does(corpus, tmp_path):
    """Ranks skip the same blocks and never wait for a gradient that does not exist."""
    options = EVERYTHING | dict(data_dir=corpus, hellaswag_data="none", dropout=0.0)
    one, two = tmp_path / "one", tmp_path / "two"
    script("train.py", *arguments(one, **options))
    process = start(*LAUNCH, "train.py", *arguments(two, **options))
    wait_for(lambda: step_of(two) >= 30, process)
    process.send_signal(signal.SIGTERM)
    end(process)
    torchrun(2, "train.py", *arguments(two, **options))
    assert_close(two, one)


def test_a_killed_rank_is_restarted_and_the_run_ends_like_the_uninterrupted_one(corpus, tmp_path):
    options = RUN | dict(data_dir=corpus, batch_size=4, hellaswag_data="none")
    expected, out = tmp_path / "uninterrupted", tmp_path / "run"
    torchrun(2, "train.py", *arguments(expected, **options))
    process = start(*LAUNCH, "--max-restarts=3", "train.py", *arguments(out, **options))
    for step in (20, 50):
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        wait_for(lambda: len(workers(process)) == 2, process)
        os.kill(workers(process)[1], signal.SIGKILL)
        killed_at = step_of(out)
        wait_for(lambda: not killed_at <= step_of(out) <= killed_at + 10, process)  # noqa: B023
    code, output = end(process)
    assert code == 0, output
    assert_same(out, expected)


def test_a_hung_rank_ends_the_run_with_a_message(corpus, tmp_path):
    out = tmp_path / "run"
    options = RUN | dict(data_dir=corpus, batch_size=4, hellaswag_data="none", timeout=5)
    process = start(*LAUNCH, "train.py", *arguments(out, **options | {"steps": 4000}))
    wait_for(lambda: step_of(out) >= 10, process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    begin = time.monotonic()
    code, output = end(process)
    assert code != 0 and "error: another process hung or ended" in output, output
    assert time.monotonic() - begin < 90 and checkpoints(out)


# --- two hosts: network namespaces of this machine, joined by a virtual cable


def namespaces_allowed() -> bool:
    """Return whether this machine lets us make network namespaces."""
    name = "stagewise-try"
    made = (
        shutil.which("ip")
        and subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    )
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return bool(made)


@pytest.fixture
def hosts():
    """Names of two namespaces that reach each other as 10.77.0.1 and 10.77.0.2."""
    if not namespaces_allowed():
        pytest.skip("needs the right to make network namespaces (root, and iproute2)")
    names = [f"stagewise-{os.getpid()}-{i}" for i in (1, 2)]
    ends = [f"sw{os.getpid() % 10**6}{i}" for i in "ab"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, device) in enumerate(zip(names, ends), start=1):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "link", "set", device, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(name: str, i: int, *command, nnodes=2) -> subprocess.Popen:
    """Start host `i` (from 1) of a job of `nnodes`."""
    launch = ["-m", "torch.distributed.run", f"--nnodes={nnodes}", "--nproc_per_node=1"]
    launch += ["--rdzv_backend=c10d", "--rdzv_id=run", "--rdzv_endpoint=10.77.0.1:29500"]
    launch += [f"--rdzv_conf=is_host={int(i == 1)}", f"--local_addr=10.77.0.{i}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    words = ["ip", "netns", "exec", name, sys.executable, *launch, *map(str, command)]
    pipe, output = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=output, text=True)


def test_two_hosts_train_what_one_process_does(hosts, corpus, tmp_path, uninterrupted):
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, **HELLASWAG))
    for process in [start_on(name, i, *command) for i, name in enumerate(hosts, start=1)]:
        code, output = end(process)
        assert code == 0, output
    assert_close(out, uninterrupted)


def test_a_disconnected_host_ends_the_run_and_the_other_resumes_alone(
    hosts, corpus, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    options = RUN | HELLASWAG | dict(data_dir=corpus, timeout=5)
    command = ("train.py", *arguments(out, **options))
    processes = [start_on(name, i, *command) for i, name in enumerate(hosts, start=1)]
    wait_for(lambda: step_of(out) >= 10, processes[0])
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
    code, output = end(processes[0])
    assert code != 0 and "error: another process hung or ended" in output, output
    processes[1].kill()
    end(processes[1])
    code, output = end(start_on(hosts[0], 1, *command, nnodes=1))
    assert code == 0, output
    assert metrics(out)[-1]["loss"] == pytest.approx(metrics(uninterrupted)[-1]["loss"], rel=5e-5)
