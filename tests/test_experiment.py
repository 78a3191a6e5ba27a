"""An experiment from its TOML to its page and README's results, from real runs."""

import json
import re
import statistics

import pytest

import experiment
import report
from errors import UserError

from conftest import arguments, metrics, script

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
options = ["--lr_schedule=wsd", "--continual_steps=32"]
"""


def write_experiment(folder, text=TOML, **options):
    folder.mkdir(exist_ok=True)
    options = [a for a in arguments(folder, **options) if not a.startswith("--out_dir")]
    (folder / "experiment.toml").write_text(text.replace("{options}", json.dumps(options)))
    return folder


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """An experiment of which all runs but `decays` are there; trained with an interruption."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_experiment(folder, data_dir=corpus, steps=16, eval_interval=4, log_interval=1, hellaswag_limit=10)
    command = ("experiment.py", folder, "--out", folder / "out", "--only", "s4", "baseline")
    stopped = script(*command, "--minutes=0.05", check=False)
    assert stopped.returncode == 75 and "runs are to come, the same command goes on" in stopped.stdout
    assert "all 4 runs are there" in script(*command).stdout
    return folder


def value(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", cell)]


def rows_of(page: str, heading: str) -> dict[tuple, list[str]]:
    """The rows of the table below a heading, by their first cell."""
    lines = page.split(heading)[1].split("\n## ")[0].splitlines()
    cells = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_runs_are_kept_and_not_trained_twice(tiny):
    kept = sorted(p.name for p in tiny.iterdir() if p.is_dir())
    assert kept == ["baseline_seed1", "baseline_seed2", "out", "s4_seed1", "s4_seed2"]
    for run in set(kept) - {"out"}:
        assert sorted(p.name for p in (tiny / run).iterdir()) == ["config.json", "metrics.jsonl", "plan.json"]
        assert [r["step"] for r in metrics(tiny / run)] == list(range(33 if "s4" in run else 17))
        assert metrics(tiny / run) == metrics(tiny / "out" / run)
    assert json.loads((tiny / "s4_seed2" / "config.json").read_text())["seed"] == 2
    again = script("experiment.py", tiny, "--out", tiny / "out", "--only", "s4_seed1")
    assert again.stdout.splitlines() == [f"all 1 runs are there: python report.py {tiny}"]


def test_checkpoints_may_be_discarded(corpus, tmp_path):
    folder = write_experiment(tmp_path / "one", data_dir=corpus, steps=2)
    script("experiment.py", folder, "--out", tmp_path / "out", "--only", "baseline_seed1", "--discard_checkpoints=True")
    assert (folder / "baseline_seed1" / "metrics.jsonl").exists() and not list(tmp_path.rglob("checkpoints"))


def test_the_page_says_what_the_runs_measured(tiny):
    """Against the definitions, computed plainly from metrics.jsonl: seeds apart, straight lines between evaluations."""
    script("report.py", tiny)
    page = (tiny / "README.md").read_text()
    assert "**Not run yet:** decays_seed1." in page and "0.03M tokens" not in page
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
    assert rows_of(page, "## Losses at equal cost")["baseline"][2:5] == ["0", "0", "0"]
    stages = rows_of(page, "## What the stages cost")["s4"]
    plan = json.loads((tiny / "s4_seed1" / "plan.json").read_text())
    for cell, currency in ((stages[1], "cost"), (stages[2], "flops")):
        assert value(cell)[0] == pytest.approx(plan["phases"][-2]["cumulative"][currency], abs=6e-4)


def test_seconds_are_steps_times_the_median_of_their_phase(tiny):
    _, measured, _ = report.load(tiny)
    one = next(m for m in measured if m.run.name == "s4_seed1")
    rows, base = metrics(tiny / "s4_seed1"), metrics(tiny / "baseline_seed1")
    total = 0.0
    for phase in one.plot.plan["phases"]:
        inside = [r["tokens_per_second"] for r in rows if phase["start"] < r["step"] <= phase["stop"]]
        total += len(inside) * one.plot.plan["tokens_per_step"] / statistics.median(inside)
    whole = 16 * one.plot.plan["tokens_per_step"] / statistics.median(r["tokens_per_second"] for r in base[1:])
    assert one.plot.columns["seconds"][-1] == pytest.approx(total)
    assert one.plot.plan["baseline"]["seconds"] == pytest.approx(whole)


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
    _, measured, _ = report.load(tiny)
    one = next(m for m in measured if m.run.name == "s4_seed1")
    assert one.at_equal("cost") is not None
    one.config["lr_schedule"] = "wsd"
    assert one.at_equal("cost") is None and one.at_equal("tokens") is None


def test_readme_is_written_between_its_markers_only(tiny, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    script("report.py", tiny, "--readme", readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n\n") and text.endswith("\n\n<!-- end of results -->\nafter\n")
    assert "old" not in text and "![figure1_loss](results/tiny/figure1_loss.png)" in text and "| s4 | 1, 2 |" in text
    script("report.py", tiny, "--readme", readme)
    assert readme.read_text() == text
    readme.write_text("nothing\n")
    refused = script("report.py", tiny, "--readme", readme, check=False)
    assert refused.returncode == 1 and "has no <!-- results --> ... <!-- end of results -->" in refused.stderr
    assert readme.read_text() == "nothing\n"


def test_runs_under_other_conditions_are_not_compared(tiny, tmp_path):
    for name in ("baseline_seed1", "s4_seed1"):
        (tmp_path / name).mkdir()
        for file in (tiny / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "experiment.toml").write_bytes((tiny / "experiment.toml").read_bytes())
    assert [m.run.name for m in report.load(tmp_path)[1]] == ["baseline_seed1", "s4_seed1"]
    config = tmp_path / "s4_seed1" / "config.json"
    config.write_text(config.read_text().replace('"tokens_per_step": ', '"tokens_per_step": 1'))
    with pytest.raises(UserError, match="s4_seed1: tokens_per_step is 1.* in baseline_seed1, its baseline"):
        report.load(tmp_path)


def test_the_order_is_that_of_importance(tmp_path):
    write_experiment(tmp_path / "x")
    _, runs = experiment.load_experiment(tmp_path / "x")
    assert [r.name for r in runs] == ["baseline_seed1", "s4_seed1", "decays_seed1", "baseline_seed2", "s4_seed2"]
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
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, text, named):
    if text is not None:
        (tmp_path / "experiment.toml").write_text(text)
    with pytest.raises(UserError, match=re.escape(named)):
        experiment.load_experiment(tmp_path)


def test_a_mistake_in_the_options_ends_the_experiment(corpus, tmp_path):
    folder = write_experiment(tmp_path / "bad", data_dir=corpus, n_head=3)
    result = script("experiment.py", folder, "--out", tmp_path / "out", check=False)
    assert result.returncode == 1 and "n_head=3" in result.stderr and "baseline_seed1 ended with status 1" in result.stderr
    assert "Traceback" not in result.stderr
    unknown = script("experiment.py", folder, "--only", "s5", check=False)
    assert unknown.returncode == 1 and "--only s5: the runs are baseline_seed1, s4_seed1" in unknown.stderr
    empty = script("report.py", folder, check=False)
    assert empty.returncode == 1 and "no run is finished beside its baseline" in empty.stderr


@pytest.mark.parametrize("name", ["small_cpu", "gpt2_124m"])
def test_the_experiments_of_this_repository_make_plans(name, monkeypatch, capsys, tmp_path):
    import config as cfg

    for run in experiment.load_experiment(experiment.ROOT / "results" / name)[1]:
        options = cfg.load_config([o if not o.endswith(".py") else str(experiment.ROOT / o) for o in run.options])
        plan, baseline = cfg.make_plans(options, options.model(50304))
        assert baseline.n_steps == options.steps and cfg.micro_steps(options, 1) >= 1 and options.seed == run.seed
