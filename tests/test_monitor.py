"""Steps that are not finite, spikes of the loss, and signals."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, metrics

import train
from model import GPT, GPTConfig
from stagewise import monitor
from stagewise.checkpoint import checkpoints, load_checkpoint
from stagewise.config import Config
from stagewise.device import autocast
from stagewise.errors import UserError
from stagewise.monitor import LossMonitor, StopSignals

CPU = torch.device("cpu")


def assert_same_weights(a, b):
    one, two = (load_checkpoint(out)["model"] for out in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# --- steps that are not finite


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    """Parameters, optimizer state and its step count stay the same, bit for bit."""

    def step(model, optimizer, tokens):
        batches = iter([(tokens[:, :-1], tokens[:, 1:])])
        return train.train_step(model, optimizer, batches, 1, autocast(CPU, "float32", 1), 1.0)

    runs = []
    for with_bad in (False, True):
        model = GPT(GPTConfig(**TINY))
        optimizer = train.make_optimizer(model, Config(learning_rate=1e-3))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(320, (4, 2, 65), generator=generator)
        for i, t in enumerate(tokens):
            if with_bad and i == 2:
                w = model.transformer.ln_f.weight
                if where == "loss":
                    former = w.data.clone()
                    w.data[5] = math.inf
                    result = step(model, optimizer, t)
                    w.data.copy_(former)
                else:
                    hook = w.register_hook(lambda g: g * math.nan)
                    result = step(model, optimizer, t)
                    hook.remove()
                    assert result[0].isfinite()
                assert not result.isfinite().all()
            step(model, optimizer, t)
        runs.append((model, optimizer))
    (a, optimizer_a), (b, optimizer_b) = runs
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer_a.state[p][key], optimizer_b.state[q][key])


def make_gradients_nan(monkeypatch, *steps):
    """In these steps (from 1) of every run from now on."""
    train_step, step = train.train_step, 0

    def with_nan(model, *args):
        nonlocal step
        step += 1
        if step not in steps:
            return train_step(model, *args)
        trained = next(p for p in model.parameters() if p.requires_grad)
        hook = trained.register_hook(lambda g: g * math.nan)
        try:
            return train_step(model, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "train_step", with_nan)


def test_a_few_skipped_steps_are_counted_and_logged(run_train, monkeypatch, capsys):
    with monkeypatch.context() as m:
        make_gradients_nan(m, 3, 4, 9)
        options = dict(steps=16, log_interval=4, checkpoint_interval=4)
        out = run_train("run", max_skipped_steps=3, **options)
    rows = metrics(out)[1:]
    assert [row["skipped_steps"] for row in rows] == [2, 2, 3, 3]
    assert rows[0]["grad_norm"] is None and rows[1]["grad_norm"] > 0
    assert capsys.readouterr().out.count("update skipped") == 3
    assert load_checkpoint(out)["loss_history"]["skipped_steps"] == 3
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_too_many_skipped_steps_in_a_row_end_the_run(run_train, monkeypatch, tmp_path):
    """They are counted across intervals and a resumption; the last checkpoint stays."""
    with monkeypatch.context() as m:
        make_gradients_nan(m, 7, 8)
        run_train("run", steps=8, checkpoint_interval=4)
    with (
        monkeypatch.context() as m,
        pytest.raises(
            UserError,
            match=r"step 9, which read stdlib_train_000001.bin: .* the last 3 updates were skipped",
        ),
    ):
        make_gradients_nan(m, 1)
        options = dict(steps=8, continual_steps=8, init_from="resume")
        run_train("run", max_skipped_steps=3, **options)
    assert load_checkpoint(tmp_path / "run")["step"] == 8
    assert metrics(tmp_path / "run")[-1]["step"] == 8


def test_weights_that_diverge_end_the_run_with_the_last_good_checkpoint(run_train, tmp_path):
    run_train("run", steps=2)
    options = dict(steps=2, continual_steps=20, init_from="resume", checkpoint_interval=1)
    with pytest.raises(UserError, match="updates were skipped"):
        run_train("run", learning_rate=1e300, **options)
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded["step"] == 2 and all(t.isfinite().all() for t in loaded["model"].values())


# --- spikes


def test_spikes_are_measured_against_the_losses_before(capsys):
    losses = 3 + 0.01 * np.random.RandomState(0).randn(monitor.WINDOW)
    watch = LossMonitor()
    assert all(watch.update(i, loss, 1.0) is None for i, loss in enumerate(losses.tolist()))
    zscore = watch.update(200, 3.5, 1.0)
    assert zscore == pytest.approx((3.5 - np.mean(losses)) / np.std(losses))
    assert watch.history.spikes == 1 and "step 200: loss 3.5000 is" in capsys.readouterr().out
    assert abs(watch.update(201, 3.0, 1.0)) < 1 and len(watch.history.losses) == monitor.WINDOW
    assert watch.update(202, math.nan, 1.0) is None
    assert watch.history.skipped_steps == 1 and watch.history.spikes == 1


def test_a_monitor_continues_from_its_state():
    losses = [*np.random.RandomState(0).rand(monitor.WINDOW + 40).tolist(), math.inf, 9.0, 1.0]
    one, parts = LossMonitor(quiet=True), LossMonitor(quiet=True)
    for step, loss in enumerate(losses):
        parts = LossMonitor(parts.state(), quiet=True)
        assert parts.update(step, loss, 1.0) == one.update(step, loss, 1.0)
    assert parts.state() == one.state()
    assert (one.history.spikes, one.history.skipped_steps, one.history.skipped_in_a_row) == (
        1,
        1,
        0,
    )


@pytest.mark.parametrize("history", [{"spikes": "2"}, {"losses": [None]}, {"losses": 3}])
def test_a_corrupted_history_is_an_error(history):
    with pytest.raises(UserError, match="loss history is corrupted .(spikes|losses).*: expected"):
        LossMonitor(history)


def test_zscores_are_in_the_metrics(run_train):
    options = dict(tokens_per_step=64, batch_size=1, hellaswag_data="none", eval_interval=1000)
    rows = metrics(run_train("run", steps=monitor.WINDOW + 4, **options))[1:]
    losses = [row["loss"] for row in rows]
    for i, row in enumerate(rows):
        expected = None
        if i >= monitor.WINDOW:
            window = losses[i - monitor.WINDOW : i]
            zscore = (row["loss"] - np.mean(window)) / np.std(window)
            expected = pytest.approx(zscore, rel=1e-6)
        assert row["loss_zscore"] == expected


# --- signals


@pytest.fixture
def signals():
    former = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    yield StopSignals()
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_a_signal_is_recorded(signals, number):
    assert signals.caught is None
    os.kill(os.getpid(), number)
    assert signals.caught == number.name


@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_signals_are_ignored_once_everything_is_on_disk(signals, number):
    signals.ignore()
    os.kill(os.getpid(), number)
    assert signals.caught is None


def test_two_interrupts_at_once_count_as_one(signals):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.caught == "SIGINT"


BUSY = """
import sys, time; sys.path.insert(0, sys.argv[1])
from stagewise.monitor import StopSignals
StopSignals()
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.05)
"""


def test_a_second_interrupt_ends_the_process_at_once():
    """One that comes more than half a second after the first."""
    command = [sys.executable, "-c", BUSY, str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_a_signal_stops_a_run_after_the_step_with_everything_saved(
    run_train, monkeypatch, tmp_path, capsys
):
    uninterrupted = run_train("uninterrupted", steps=16)
    train_step, step = train.train_step, 0

    def interrupted(*args):
        nonlocal step
        step += 1
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as exit_:
        m.setattr(train, "train_step", interrupted)
        run_train("run", steps=16)
    assert exit_.value.code == monitor.EXIT_STOPPED == 75
    del exit_  # its traceback keeps the lock of the folder
    assert "stopped at step 6 of 16, checkpoint saved" in capsys.readouterr().out
    out = tmp_path / "run"
    assert [p.name for p in checkpoints(out)] == ["step_00000006"]
    assert metrics(out)[-1]["step"] == 6
    run_train("run", steps=16, init_from="auto")
    assert [r["loss"] for r in metrics(out)[1:]] == [r["loss"] for r in metrics(uninterrupted)[1:]]
    assert_same_weights(out, uninterrupted)


def test_auto_starts_a_run_if_there_is_no_checkpoint(run_train, tmp_path):
    """Also if a run was killed before its first one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "stage": 1}\n{"step": 1, "st')
    out = run_train("run", steps=2, init_from="auto")
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    run_train("run", steps=2, init_from="auto")  # nothing is left to do
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
