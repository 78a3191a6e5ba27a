"""Signals, numbers that go wrong, replicas that drift apart."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import config
import guard
import train
from checkpoint import checkpoints, load_checkpoint
from device import autocast
from errors import UserError
from guard import Health, StopSignals
from model import GPT, GPTConfig

from conftest import ROOT, TINY, arguments, metrics, torchrun

CPU = torch.device("cpu")


# --- numbers


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_an_update_that_is_no_number_changes_nothing(bad):
    """Parameters, moments and the count of updates stay bit for bit; the next good one is as if the bad one had not been."""
    runs = []
    for with_bad in (False, True):
        model = GPT(GPTConfig(**TINY))
        optimizer = train.make_optimizer(model, config.Config(learning_rate=1e-3))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(320, (4, 2, 65), generator=generator)
        for i, t in enumerate(tokens):
            if with_bad and i == 2:
                w = model.transformer.ln_f.weight
                if bad == "loss":
                    kept = w.data.clone()
                    w.data[5] = math.inf
                    read = train.update(model, optimizer, iter([(t[:, :-1], t[:, 1:])]), 1, autocast(CPU, "float32"), 1.0)
                    w.data.copy_(kept)
                else:
                    hook = w.register_hook(lambda g: g * math.nan)
                    read = train.update(model, optimizer, iter([(t[:, :-1], t[:, 1:])]), 1, autocast(CPU, "float32"), 1.0)
                    hook.remove()
                assert not read.isfinite().all()
            train.update(model, optimizer, iter([(t[:, :-1], t[:, 1:])]), 1, autocast(CPU, "float32"), 1.0)
        runs.append((model, optimizer))
    (a, of_a), (b, of_b) = runs
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(of_a.state[p][key], of_b.state[q][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def spoil(monkeypatch, *steps):
    """Make the gradients of these steps (from 1) NaN, in every run from here on."""
    update, step = train.update, 0

    def spoiled(model, *args):
        nonlocal step
        step += 1
        if step not in steps:
            return update(model, *args)
        hook = next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * math.nan)
        try:
            return update(model, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "update", spoiled)


def test_bad_steps_are_counted_and_logged_and_a_few_do_no_harm(run_train, monkeypatch, capsys):
    with monkeypatch.context() as m:
        spoil(m, 3, 4, 9)
        out = run_train("run", steps=16, max_bad_steps=3, log_interval=4, checkpoint_interval=4)
    rows = metrics(out)[1:]
    assert [row["bad_steps"] for row in rows] == [2, 2, 3, 3] and rows[0]["grad_norm"] is None and rows[1]["grad_norm"] > 0
    assert capsys.readouterr().out.count("the update was skipped") == 3
    assert load_checkpoint(out)["health"]["bad_steps"] == 3 and rows[-1]["loss"] < rows[0]["loss"]


def test_too_many_bad_steps_in_a_row_end_the_run(run_train, monkeypatch, corpus, tmp_path):
    """Named: the step, counted over the intervals and a resumption, and the shard; the last checkpoint stays."""
    with monkeypatch.context() as m:
        spoil(m, 7, 8)
        run_train("run", steps=8, checkpoint_interval=4)
    with monkeypatch.context() as m, pytest.raises(UserError, match=r"step 9, which read stdlib_train_000001.bin: .* the last 3 updates"):
        spoil(m, 1)
        run_train("run", steps=8, continual_steps=8, init_from="resume", max_bad_steps=3)
    assert load_checkpoint(tmp_path / "run")["step"] == 8 and metrics(tmp_path / "run")[-1]["step"] == 8


def test_weights_that_explode_end_the_run_with_the_last_good_checkpoint(run_train, tmp_path):
    run_train("run", steps=2)
    with pytest.raises(UserError, match="updates were skipped"):
        run_train("run", steps=2, continual_steps=20, init_from="resume", learning_rate=1e300, checkpoint_interval=1)
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded["step"] == 2 and all(t.isfinite().all() for t in loaded["model"].values())


def test_spikes_are_measured_against_the_window_before():
    health, random = Health(), np.random.RandomState(0)
    losses = [3 + 0.01 * random.randn() for _ in range(guard.WINDOW)]
    assert all(health.see(i, loss, 1.0) is None for i, loss in enumerate(losses))
    z = health.see(200, 3.5, 1.0)
    assert z == pytest.approx((3.5 - np.mean(losses)) / np.std(losses)) and health.state["spikes"] == 1
    assert abs(health.see(201, 3.0, 1.0)) < 1 and len(health.state["losses"]) == guard.WINDOW
    assert health.see(202, math.nan, 1.0) is None and health.state["bad_steps"] == 1 and health.state["spikes"] == 1


def test_spikes_stand_in_the_metrics(run_train, capsys):
    out = run_train("run", steps=guard.WINDOW + 4, tokens_per_step=64, batch_size=1, hellaswag_data="none", eval_interval=1000)
    rows = metrics(out)[1:]
    losses = [row["loss"] for row in rows]
    for i, row in enumerate(rows):
        window = losses[i - guard.WINDOW : i] if i >= guard.WINDOW else None
        assert row["loss_z"] == (None if window is None else pytest.approx((row["loss"] - np.mean(window)) / np.std(window), rel=1e-6))


# --- signals


@pytest.fixture
def signals():
    signals = StopSignals()
    yield signals
    signals.restore()


@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_a_signal_is_noted(signals, number):
    assert not signals.agreed(None)
    os.kill(os.getpid(), number)
    assert signals.caught == number.name and signals.agreed(None)


def test_ctrl_c_that_arrives_twice_at_once_counts_once(signals):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.agreed(None)


def test_a_second_interrupt_ends_the_process_at_once():
    """One that comes half a second after the first, from a process that would else go on for a minute."""
    program = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import guard; guard.StopSignals(); print('up', flush=True)\n"
    program += "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.05)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_a_signal_stops_a_run_after_the_step_with_all_saved(run_train, monkeypatch, tmp_path, capsys):
    whole = run_train("whole", steps=16)
    update, step = train.update, 0

    def interrupted(*args):
        nonlocal step
        step += 1
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as leaving:
        m.setattr(train, "update", interrupted)
        run_train("run", steps=16)
    assert leaving.value.code == guard.EXIT_STOPPED == 75
    assert "stopped at step 6 of 16, all saved" in capsys.readouterr().out
    out = tmp_path / "run"
    assert [p.name for p in checkpoints(out)] == ["step_00000006"] and metrics(out)[-1]["step"] == 6
    run_train("run", steps=16, init_from="auto")
    assert [r["loss"] for r in metrics(out)[1:]] == [r["loss"] for r in metrics(whole)[1:]]
    weights = load_checkpoint(whole)["model"]
    assert all(torch.equal(t, weights[name]) for name, t in load_checkpoint(out)["model"].items())


def test_auto_begins_where_there_is_no_checkpoint(run_train, tmp_path):
    """Also where a run was killed before its first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "stage": 1}\n{"step": 1, "st')
    out = run_train("run", steps=2, init_from="auto")
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    run_train("run", steps=2, init_from="auto")  # nothing is left to do
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


# --- replicas


@pytest.mark.parametrize("when", ["at a phase", "at an evaluation"])
def test_replicas_that_differ_stop_the_run_by_name(corpus, tmp_path, when):
    """One value of one rank, changed by the least that fp32 can tell."""
    program = tmp_path / "flip.py"
    program.write_text(
        f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import errors, torch, train
update, step = train.update, 0
def flip(model, *args):
    global step
    result = update(model, *args)
    step += 1
    if step == 3 and os.environ["RANK"] == "1":
        p = model.module.transformer.h[0].mlp.c_fc.weight
        p.data.view(torch.int32)[7, 9] ^= 1
    return result
train.update = flip
with errors.report_user_errors():
    train.main()
"""
    )
    options = dict(stages=2, steps=16) if when == "at a phase" else dict(steps=16, eval_interval=4)
    result = torchrun(2, program, *arguments(tmp_path / "run", data_dir=corpus, **options), check=False)
    assert result.returncode != 0
    assert "error: step 4: transformer.h.0.mlp.c_fc.weight on rank 1 is not what it is on rank 0" in result.stderr
