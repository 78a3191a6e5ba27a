"""An experiment from its TOML to its page and README's results, from real runs."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config as cfg
import experiment
import report
from checkpoint import load_checkpoint
from errors import UserError

from conftest import ROOT, arguments, metrics, script

TOML = """
title = "Tiny"
about = "What it is for."
options = {options}
[runs.baseline]
seeds = [1, 2]
[runs.s4]
options = ["--stages=4", "--continual_steps=16"]
seeds = [1, 2]
[runs.decays]
options = ["--lr_schedule=wsd"]
against = "decays"
[runs.decays_s2]
options = ["--lr_schedule=wsd", "--stages=2", "--continual_steps=equal_flops"]
against = "decays"
[runs.later]
"""
ALL = ["baseline_seed1", "baseline_seed2", "decays_s2_seed1", "decays_seed1", "s4_seed1", "s4_seed2"]


def write_experiment(folder, text=TOML, **options):
    folder.mkdir(exist_ok=True)
    options = [a for a in arguments(folder, **options) if not a.startswith("--out_dir")]
    (folder / "experiment.toml").write_text(text.replace("{options}", json.dumps(options)))
    return folder


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """An experiment of which all runs but `later` are there."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_experiment(folder, data_dir=corpus, steps=16, eval_interval=4, log_interval=1, hellaswag_limit=10)
    names = ("baseline", "s4", "decays", "decays_s2")
    assert "all 6 runs are there" in script("experiment.py", folder, "--out", folder / "out", "--only", *names).stdout
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def value(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", cell)]


def rows_of(page: str, heading: str) -> dict[tuple, list[str]]:
    """The rows of the table below a heading, by their first cell."""
    lines = page.split(heading)[1].split("\n## ")[0].splitlines()
    cells = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_runs_are_kept_and_not_trained_twice(tiny):
    assert sorted(p.parent.name for p in tiny.glob("*/metrics.jsonl")) == ALL
    for run in ALL:
        assert sorted(p.name for p in (tiny / run).iterdir()) == ["config.json", "metrics.jsonl", "plan.json"]
        assert metrics(tiny / run) == metrics(tiny / "out" / run)
        assert [r["step"] for r in metrics(tiny / run)] == list(range(json.loads((tiny / run / "plan.json").read_text())["steps"] + 1))
    assert json.loads((tiny / "s4_seed2" / "config.json").read_text())["seed"] == 2
    again = script("experiment.py", tiny, "--out", tiny / "out", "--only", "s4_seed1")
    assert again.stdout.splitlines() == [f"all 1 runs are there: python report.py {tiny}"]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "minutes", "torchrun"])
def test_an_experiment_that_is_stopped_saves_and_goes_on(corpus, tmp_path, how):
    folder = write_experiment(tmp_path / "x", data_dir=corpus, steps=4000, eval_interval=4000, log_interval=1)
    out = tmp_path / "out" / "baseline_seed1"
    command = [sys.executable, "experiment.py", str(folder), "--out", str(tmp_path / "out"), "--only", "baseline"]
    command += {"minutes": ["--minutes", "0.15"], "torchrun": ["--processes", "2"]}.get(how, [])
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if how != "minutes":
        deadline = time.monotonic() + 100
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM if how == "torchrun" else signal.Signals[how])
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 75 and "2 of 2 runs are to come, the same command goes on" in said
    assert not (folder / "baseline_seed1").exists()
    if how == "SIGTERM":  # on from where it stopped, a little
        step = load_checkpoint(out)["step"]
        config = json.loads((out / "config.json").read_text())
        for changed, named in ((5, "was trained with tokens_per_step=1024, but now tokens_per_step=2048"), (0, None)):
            options = ["tokens_per_step=2048"] if changed else []
            result = script(*command[1:], "--minutes=0.2", *(["--options", *options] if options else []), check=False)
            assert (named in result.stderr and result.returncode == 1) if named else result.returncode == 75
        assert load_checkpoint(out)["step"] > step and config["steps"] == 4000


def test_checkpoints_may_be_discarded(corpus, tmp_path):
    folder = write_experiment(tmp_path / "one", data_dir=corpus, steps=2)
    script("experiment.py", folder, "--out", tmp_path / "out", "--only", "baseline_seed1", "--discard_checkpoints=True")
    assert (folder / "baseline_seed1" / "metrics.jsonl").exists() and not list(tmp_path.rglob("checkpoints"))


def test_the_page_says_what_the_runs_measured(tiny):
    """Against the definitions, computed plainly from metrics.jsonl and plan.json: seeds apart, straight lines between evaluations."""
    script("report.py", tiny)
    page = (tiny / "README.md").read_text()
    assert "**Not run yet:** later_seed1." in page and "Trained on 1 thread of" in page
    row = rows_of(page, "## Losses at equal cost")["s4"]
    baselines = [metrics(tiny / f"baseline_seed{seed}") for seed in (1, 2)]
    runs = [metrics(tiny / f"s4_seed{seed}") for seed in (1, 2)]
    assert value(row[0]) == [1, 2]
    assert value(row[1]) == pytest.approx([statistics.mean(r[-1]["val_loss"] for r in runs), *(r[-1]["val_loss"] for r in runs)], abs=6e-5)
    for cell, currency in ((row[2], "cost"), (row[3], "flops")):
        differences = []
        for run, base in zip(runs, baselines):
            budget, at = base[-1][currency], [r for r in run if "val_loss" in r]
            after = next(i for i, r in enumerate(at) if r[currency] >= budget)
            a, b = at[after - 1], at[after]
            share = (budget - a[currency]) / (b[currency] - a[currency])
            differences.append(a["val_loss"] + share * (b["val_loss"] - a["val_loss"]) - base[-1]["val_loss"])
        assert value(cell) == pytest.approx([statistics.mean(differences), *differences], abs=6e-5)
    losses = rows_of(page, "## Losses at equal cost")
    assert losses["baseline"][2:5] == ["+0.0000 (+0.0000, +0.0000)"] * 3
    ends = [metrics(tiny / f"{name}_seed1")[-1]["val_loss"] for name in ("decays", "decays_s2")]
    assert value(losses["decays_s2"][3]) == pytest.approx([ends[1] - ends[0]], abs=6e-5) and losses["decays_s2"][5] == "-, -, -"
    last = [r[-1] for r in runs]
    assert value(row[6]) == pytest.approx([100 * statistics.mean(r["hellaswag_acc_norm"] for r in last),
                                           100 * last[0]["hellaswag_acc_norm_stderr"]], abs=0.06)  # fmt: skip
    stages = rows_of(page, "## What the stages cost")["s4"]
    plan = json.loads((tiny / "s4_seed1" / "plan.json").read_text())
    for cell, currency in ((stages[1], "cost"), (stages[2], "flops")):
        assert value(cell)[0] == pytest.approx(plan["phases"][-2]["cumulative"][currency], abs=6e-4)
    table = [line.strip("| ").split(" | ") for line in page.split("## Every phase")[1].splitlines() if line.startswith("| s4 ")]
    assert [row[1] for row in table] == [p["name"] for p in plan["phases"]]
    assert [row[2] for row in table[:4]] == ["1 of 1", "1 of 1", "1 of 2", "2 of 2"]
    for row, p in zip(table, plan["phases"]):
        per_step = (p["flops"] / (p["stop"] - p["start"])) / (plan["baseline"]["flops"] / plan["baseline"]["steps"])
        assert float(row[7]) == pytest.approx(per_step, abs=6e-4)
        assert float(row[8]) == pytest.approx(float(row[6]) / per_step, abs=0.01)


def test_seconds_leave_out_the_first_row_of_a_phase(copy):
    """It may have compilation in it: here, an hour."""
    one = lambda: next(m for m in report.load(copy)[1] if m.run.name == "s4_seed1")  # noqa: E731
    before = one()
    rows = metrics(copy / "s4_seed1")
    for row in rows:
        if row["step"] in {p["start"] + 1 for p in before.plot.plan["phases"]}:
            row["tokens_per_second"] = 1024 / 3600
    (copy / "s4_seed1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = one()
    assert after.step_seconds == before.step_seconds and after.plot.columns["seconds"][-1] < 60
    total = 0.0
    for phase in after.plot.plan["phases"]:
        inside = [r["tokens_per_second"] for r in rows if phase["start"] + 1 < r["step"] <= phase["stop"]]
        total += (phase["stop"] - phase["start"]) * 1024 / statistics.median(inside)
    assert after.plot.columns["seconds"][-1] == pytest.approx(total)
    base = statistics.median(r["tokens_per_second"] for r in metrics(copy / "baseline_seed1")[2:])
    assert after.plot.plan["baseline"]["seconds"] == pytest.approx(16 * 1024 / base)


def test_catching_up_is_the_first_cost_at_the_baselines_loss(tiny):
    _, measured, _ = report.load(tiny)
    one, base = (next(m for m in measured if m.run.name == name) for name in ("s4_seed1", "baseline_seed1"))
    assert base.catches_up("cost") == pytest.approx(1)
    at = [r for r in metrics(tiny / "s4_seed1") if "val_loss" in r]
    target = metrics(tiny / "baseline_seed1")[-1]["val_loss"]
    found = one.catches_up("flops")
    if min(r["val_loss"] for r in at) > target:
        assert found is None
        target = one.baseline.plot.columns["val_loss"][-1] = at[3]["val_loss"] + 1e-9  # give it one to reach
        found = one.catches_up("flops")
    after = next(i for i, r in enumerate(at) if r["val_loss"] <= target)
    share = (at[after - 1]["val_loss"] - target) / (at[after - 1]["val_loss"] - at[after]["val_loss"])
    spent = at[after - 1]["flops"] + share * (at[after]["flops"] - at[after - 1]["flops"])
    assert found == pytest.approx(spent / metrics(tiny / "baseline_seed1")[-1]["flops"])


def test_a_rate_that_decays_is_judged_at_its_end_alone(tiny):
    one = next(m for m in report.load(tiny)[1] if m.run.name == "decays_s2_seed1")
    assert one.at_equal("flops") == one.last_loss == metrics(tiny / "decays_s2_seed1")[-1]["val_loss"]
    budget = one.plot.plan["baseline"]["flops"]
    for spent, comparable in ((0.97, False), (0.985, True), (1.015, True), (1.03, False)):
        one.plot.plan["baseline"]["flops"] = one.plot.columns["flops"][-1] / spent
        assert (one.at_equal("flops") is not None) == comparable
    one.plot.plan["baseline"]["flops"] = budget
    one.config["lr_schedule"] = "constant"
    assert one.at_equal("flops") is not None


def test_readme_is_written_between_its_markers_only(tiny, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nformer text\n<!-- end of results -->\nafter\n")
    script("report.py", tiny, "--readme", readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n\n") and text.endswith("\n\n<!-- end of results -->\nafter\n")
    assert "former text" not in text and f"![training and validation loss]({os.path.relpath(tiny, tmp_path)}/figure1_loss.png)" in text and "| s4 | 1, 2 |" in text
    script("report.py", tiny, "--readme", readme)
    assert readme.read_text() == text
    readme.write_text("nothing\n")
    refused = script("report.py", tiny, "--readme", readme, check=False)
    assert refused.returncode == 1 and "has no <!-- results --> ... <!-- end of results -->" in refused.stderr
    assert readme.read_text() == "nothing\n"


@pytest.mark.parametrize(
    "run, key, other, refused",
    [
        ("s4_seed1", "tokens_per_step", 1, True),
        ("s4_seed1", "learning_rate", 1, True),
        ("s4_seed1", "eval_tokens", 1, True),
        ("s4_seed1", "device_name", "another", True),
        ("baseline_seed2", "device_name", "another", True),
        ("decays_seed1", "n_embd", 1, True),
        ("decays_seed1", "hellaswag_limit", 3, True),
        ("s4_seed1", "phase1", "script", False),
        ("s4_seed1", "date", "2020-01-01", False),
    ],
)
def test_runs_under_other_conditions_are_not_compared(copy, run, key, other, refused):
    path = copy / run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: other}))
    if refused:
        with pytest.raises(UserError, match=f"{key} is .* under the same conditions"):
            report.load(copy)
    else:
        assert len(report.load(copy)[1]) == 6


def test_an_unfinished_run_is_not_reported(copy):
    path = copy / "s4_seed2" / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    _, measured, missing = report.load(copy)
    assert len(measured) == 5 and [r.name for r in missing] == ["later_seed1", "s4_seed2"]


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("config.json", lambda c: {k: v for k, v in c.items() if k != "threads"}, "config.json: lacks threads"),
        ("plan.json", lambda p: {k: v for k, v in p.items() if k != "tokens_per_step"}, "plan.json: lacks tokens_per_step"),
        ("plan.json", lambda p: {k: v for k, v in p.items() if k != "steps"}, "plan.json is damaged"),
    ],
)
def test_damaged_runs_are_named(copy, file, change, named):
    path = copy / "s4_seed1" / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    result = script("report.py", copy, check=False)
    assert result.returncode == 1 and named in result.stderr and "Traceback" not in result.stderr
    with pytest.raises(UserError, match="less than two rows"):
        rows = [r for r in metrics(copy / "baseline_seed1") if r["step"] in (0, 16)]
        (copy / "baseline_seed1" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        report.load(copy)


def test_the_order_is_that_of_importance(tmp_path):
    write_experiment(tmp_path / "x")
    _, runs = experiment.load_experiment(tmp_path / "x")
    first = ["baseline_seed1", "s4_seed1", "decays_seed1", "decays_s2_seed1", "later_seed1"]
    assert [r.name for r in runs] == first + ["baseline_seed2", "s4_seed2"]
    assert runs[1].options[-3:] == ("--stages=4", "--continual_steps=16", "--seed=1") and runs[1].against == "baseline"


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "experiment.toml: No such file or directory: name a folder that has an experiment.toml"),
        ("title = ", "is no TOML"),
        ('title = "x"', "lacks runs"),
        ('title = "x"\nruns = 3', "runs must be a dict"),
        ('title = "x"\n[runs.s4]\nseed = 1', "runs.s4: seed is none of options, seeds, against"),
        ('title = "x"\n[runs.s4]\nseeds = 1', "runs.s4: seeds must be a list"),
        ('title = "x"\n[runs.s4]\n', "runs.s4: against = 'baseline' is none of the runs: s4"),
        ('title = "x"\n[runs]\n', "has no runs"),
        ('title = "x"\nruns = {s4 = 3}', "runs.s4: must be a table"),
        ('title = "x"\n[runs.baseline]\nseeds = ["a"]', "runs.baseline: seeds must be whole numbers"),
        ('title = "x"\n[runs.baseline]\noptions = [1]', "runs.baseline: options must be strings"),
        ('title = "x"\n[runs."../x"]\n', "'../x' is no name for a run"),
        ('title = "x"\n[runs.baseline]\n[runs.s4]\nseeds = [1, 2]', "runs.s4: seeds: baseline has no run with seed 2 to compare with"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, text, named):
    if text is not None:
        (tmp_path / "experiment.toml").write_text(text)
    with pytest.raises(UserError, match=re.escape(named)):
        experiment.load_experiment(tmp_path)


def test_mistakes_are_found_before_anything_is_trained(corpus, tmp_path):
    folder = write_experiment(tmp_path / "bad", data_dir=corpus, n_head=3)

    def refused(*options, script_name="experiment.py"):
        result = script(script_name, folder, *options, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr and "baseline_seed1, 1 of" not in result.stdout
        return result.stderr

    assert "n_embd=32 must be a multiple of n_head=3" in refused()
    assert "--only s5: the runs are baseline_seed1, s4_seed1" in refused("--only", "s5")
    assert "no run is finished beside its baseline" in refused(script_name="report.py")
    write_experiment(folder, data_dir=corpus)
    assert "--options seed=3: is the experiment's own to choose" in refused("--options", "seed=3")
    assert "baseline: others are compared with it, so it must be a baseline, but it has 4 phases" in refused("--options", "stages=2")


@pytest.mark.parametrize("name", ["small_cpu", "gpt2_124m"])
def test_the_experiments_of_this_repository_make_plans(name, corpus):
    _, runs = experiment.load_experiment(ROOT / "results" / name)
    configs = experiment.check_runs(runs, (f"data_dir={corpus}",))
    assert {r.label for r in runs} >= {"baseline", "s4", "s8", "s12", "s4_script", "baseline_modern", "s4_modern"}
    assert all(cfg.micro_steps(config, 1) >= 1 for config in configs.values())
