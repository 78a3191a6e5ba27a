"""Forecasts of the time and memory of a run."""

import json
import re
import sys

import pytest
from conftest import arguments, torchrun

import forecast
import train
from stagewise.errors import UserError


@pytest.fixture
def run_forecast(corpus, tmp_path, monkeypatch):
    def run(**options):
        out = tmp_path / "forecast"
        options = arguments(out, **({"data_dir": corpus} | options))
        monkeypatch.setattr(sys, "argv", ["forecast.py", *options])
        forecast.main()
        return out

    return run


def test_every_phase_has_a_forecast(run_forecast, capsys):
    options = dict(stages=2, steps=40, continual_steps=8, eval_interval=20)
    out = run_forecast(**options, skip_policy="layer_dropout")
    rows = json.loads((out / "forecast.json").read_text())["phases"]
    printed = capsys.readouterr().out
    names = [f"stage {stage} phase {phase}" for stage in (1, 2) for phase in (1, 2)]
    assert [row["phase"] for row in rows] == [*names, "continual"]
    assert [row["steps"] for row in rows] == [10, 10, 10, 10, 8]
    for row in rows:
        assert row["training_seconds"] == pytest.approx(row["steps"] * row["step_seconds"])
        assert row["step_seconds"] > 0 and row["peak_memory"] > 10**8
        assert f"{row['tokens_per_second']:,.0f}" in printed
    assert [row["evaluation_seconds"] > 0 for row in rows] == [True, True, False, True, True]
    assert re.search(r"Forecast: 0:\d\d:\d\d in total, peak memory", printed)
    assert [p.name for p in out.iterdir()] == ["forecast.json"]


def test_a_forecast_extrapolates_from_two_micro_batches(run_forecast, monkeypatch):
    counts = []
    original = train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda *args: (counts.append(args[3]), original(*args))[1]
    )
    monkeypatch.setattr(forecast, "MIN_SECONDS", 0)
    run_forecast(batch_size=1)
    assert counts == [2] * 4 + [1] * 3


def test_a_forecast_is_not_a_dry_run(run_forecast):
    with pytest.raises(UserError, match="dry_run has no effect on a forecast"):
        run_forecast(dry_run=True)


@pytest.mark.slow
def test_a_forecast_for_two_processes(corpus, tmp_path):
    options = arguments(tmp_path, data_dir=corpus, stages=2, steps=40)
    result = torchrun(2, "forecast.py", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Forecast:") == 1
