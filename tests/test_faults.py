"""Whole runs that are killed, stopped, hung and cut off, as machines do it."""

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

from checkpoint import checkpoints, load_checkpoint

from conftest import ROOT, arguments, metrics, script, torchrun, without_clock

RUN = dict(stages=4, steps=64, continual_steps=16, eval_interval=20, checkpoint_interval=7, keep_checkpoints=3, init_from="auto")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*command, **environment) -> subprocess.Popen:
    """A script of the project in the background; its output goes to the end of the test's."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_of(out: Path) -> int:
    """The last step that stands in the metrics; -1 before the first."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def inode(out: Path) -> int | None:
    """Of the metrics, which a run that begins or is taken up again replaces."""
    path = out / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def wait_for(condition, process: subprocess.Popen, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.002)


def end(process: subprocess.Popen, seconds=120) -> tuple[int, str]:
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def assert_same(a: Path, b: Path):
    """The same weights, moments and metrics, bit for bit."""
    one, two = (load_checkpoint(out, optimizer=True) for out in (a, b))
    assert one["step"] == two["step"] and one["health"] == two["health"]
    for kind in ("model", "optimizer"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(t, two[kind][name]) for name, t in one[kind].items())
    assert without_clock(metrics(a)) == without_clock(metrics(b))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    script("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100))
    return out


def test_a_run_killed_at_ten_moments_is_the_uninterrupted_run(corpus, tmp_path, whole):
    """SIGKILL in both phases, at a boundary, in evaluations, while checkpoints are written, and at random; one command throughout."""
    out, moments = tmp_path / "run", random.Random(0)
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
        "anywhere": lambda: step_of(out) >= 45 and moments.random() < 0.01,
        "in the continual phase": lambda: step_of(out) >= 70,
    }
    for name, moment in kills.items():
        shutil.rmtree(partial, ignore_errors=True)
        before = inode(out)
        process = start("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100))
        wait_for(lambda: inode(out) != before and moment(), process)  # noqa: B023
        if "evaluation" in name:
            time.sleep(0.1)
        process.kill()
        end(process)
    script("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100))
    assert_same(out, whole)


def test_signals_stop_a_run_and_a_second_interrupt_ends_it_at_once(corpus, tmp_path, whole):
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100))
    for number, step in ((signal.SIGTERM, 4), (signal.SIGUSR1, 12), (signal.SIGINT, 25)):
        process = start(*command)
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        process.send_signal(number)
        code, said = end(process)
        assert code == 75 and "all saved; the same command with --init_from=auto goes on" in said, said
    process = start(*command)
    wait_for(lambda: step_of(out) == 39, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)  # in an evaluation, or when all is over already
    code, said = end(process, seconds=5)
    assert code in (-signal.SIGINT, 75)
    script(*command)
    assert_same(out, whole)


def workers(launcher: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    children = [int(pid) for pid in path.read_text().split()]
    return sorted(pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_a_run_goes_on_with_other_processes_and_micro_batches(corpus, tmp_path, whole):
    """Two processes, then one, then two with another micro-batch; each stopped by a signal to torchrun or the process."""
    out = tmp_path / "run"
    options = RUN | dict(data_dir=corpus, hellaswag_limit=100)
    for launch, batch_size, step in ((LAUNCH, 8, 10), ((), 16, 30)):
        process = start(*launch, "train.py", *arguments(out, **options | {"batch_size": batch_size}))
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        code, said = end(process)
        assert code != 0 and "all saved" in said, said
        assert load_checkpoint(out)["step"] == step_of(out) >= step
    torchrun(2, "train.py", *arguments(out, **options | {"batch_size": 2}))
    a, b = metrics(out), metrics(whole)
    assert [row["step"] for row in a] == list(range(81))
    for row, other in zip(a, b, strict=True):
        for key in ("loss", "val_loss"):
            assert row.get(key) == (pytest.approx(other[key], rel=5e-5) if key in other else None), (row["step"], key)


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_it_had_not_been(corpus, tmp_path):
    options = RUN | dict(data_dir=corpus, batch_size=4, hellaswag_data="none")
    two = tmp_path / "whole"
    torchrun(2, "train.py", *arguments(two, **options))
    out = tmp_path / "run"
    process = start(*LAUNCH, "--max-restarts=3", "train.py", *arguments(out, **options))
    for step in (20, 50):
        wait_for(lambda: step_of(out) >= step, process)  # noqa: B023
        wait_for(lambda: len(workers(process)) == 2, process)
        os.kill(workers(process)[1], signal.SIGKILL)
        killed_at = step_of(out)
        wait_for(lambda: step_of(out) < killed_at or step_of(out) > killed_at + 10, process)  # noqa: B023
    code, said = end(process)
    assert code == 0, said
    assert_same(out, two)


def test_a_hung_rank_ends_the_job_with_a_message(corpus, tmp_path):
    out = tmp_path / "run"
    options = RUN | dict(data_dir=corpus, batch_size=4, hellaswag_data="none", timeout=5, steps=4000)
    process = start(*LAUNCH, "train.py", *arguments(out, **options))
    wait_for(lambda: step_of(out) >= 10, process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    begin = time.monotonic()
    code, said = end(process)
    assert code != 0 and "error: another process hung or ended" in said and time.monotonic() - begin < 60, said
    assert checkpoints(out)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_shard_that_is_lost_while_training_is_named(corpus, tmp_path, how):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    process = start("train.py", *arguments(out, data_dir=data, **RUN | {"steps": 4000}))
    wait_for(lambda: checkpoints(out), process)
    path = data / "stdlib_train_000001.bin"
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, 5000)
    code, said = end(process)
    assert code == 1 and "Traceback" not in said
    assert f"error: {path}: {'cannot be read any more' if how == 'gone' else 'was cut since the start'}" in said
    assert load_checkpoint(out)["step"] > 0


# --- two hosts: network namespaces of this machine, joined by a virtual cable


def namespaces() -> bool:
    """Whether this machine lets us make network namespaces."""
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", "stagewise-try"], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", "stagewise-try"], check=True)
    return bool(made)


@pytest.fixture
def hosts():
    """Names of two namespaces that reach each other as 10.77.0.1 and 10.77.0.2."""
    if not namespaces():
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


def on_host(name: str, i: int, *command, nnodes=2) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", f"--nnodes={nnodes}", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=run"]
    launch += ["--rdzv_endpoint=10.77.0.1:29500", f"--rdzv_conf=is_host={int(i == 1)}", f"--local_addr=10.77.0.{i}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    inside = ["ip", "netns", "exec", name, sys.executable, *launch, *map(str, command)]
    return subprocess.Popen(inside, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_hosts_train_what_one_process_trains(hosts, corpus, tmp_path, whole):
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100))
    for process in [on_host(name, i, *command) for i, name in enumerate(hosts, start=1)]:
        code, said = end(process)
        assert code == 0, said
    for row, other in zip(metrics(out), metrics(whole), strict=True):
        for key in ("loss", "val_loss"):
            assert row.get(key) == (pytest.approx(other[key], rel=5e-5) if key in other else None), (row["step"], key)


def test_a_host_that_is_cut_off_ends_the_job_and_the_other_goes_on_alone(hosts, corpus, tmp_path, whole):
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN, hellaswag_limit=100, timeout=5))
    processes = [on_host(name, i, *command) for i, name in enumerate(hosts, start=1)]
    wait_for(lambda: step_of(out) >= 10, processes[0])
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
    code, said = end(processes[0])
    assert code != 0 and "error: another process hung or ended" in said, said
    processes[1].kill()
    end(processes[1])
    code, said = end(on_host(hosts[0], 1, *command, nnodes=1))
    assert code == 0, said
    assert metrics(out)[-1]["loss"] == pytest.approx(metrics(whole)[-1]["loss"], rel=5e-5)
