"""A study from its study.toml to its report, from real runs."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT, arguments, metrics, script, without_clock

import plot
import study
import train
from stagewise.checkpoint import load_checkpoint
from stagewise.config import Config, grad_accum_steps, load_config
from stagewise.errors import UserError
from stagewise.fileio import FolderLock

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
options = ["--lr_schedule=wsd", "--stages=2", "--continual_steps=match_flops"]
against = "decays"
[runs.ramp]
options = [
    "--stage_blocks", "2", "4", "--context_ramp=0:32 50%:64",
    "--tokens_per_step_ramp=0:1024 38%:2048", "--skip_policy=layer_dropout",
]
[runs.later]
"""
LABELS = ("baseline", "s4", "decays", "decays_s2", "ramp")
RUNS = ["baseline_seed1", "baseline_seed2", "decays_s2_seed1", "decays_seed1", "ramp_seed1"]
RUNS += ["s4_seed1", "s4_seed2"]


def write_study(folder, text=TOML, **options):
    folder.mkdir(exist_ok=True)
    options = [a for a in arguments(folder, **options) if not a.startswith("--out_dir")]
    (folder / "study.toml").write_text(text.replace("{options}", json.dumps(options)))
    return folder


@pytest.fixture
def restored_signals():
    handlers = {number: signal.getsignal(number) for number in study.StopRequest.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Ended(study.Job):
    """A job whose process has ended with the status that `function` returned for its command."""

    def __init__(self, function, run, command, env, log):
        self.run, self.log, self.started, self.stopping = run, log, time.monotonic(), False
        self.process = subprocess.Popen([sys.executable, "-c", f"exit({function(command)})"])
        self._log_start = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("what it wrote")


def instead_of_training(monkeypatch, function):
    monkeypatch.setattr(study, "Job", functools.partial(Ended, function))


def train_here(command):
    """Train in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:])
        train.main()
    return 0


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """A study of which all runs but `later` have finished."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_study(folder, data_dir=corpus, steps=16, eval_interval=4, hellaswag_limit=10)
    handlers = {number: signal.getsignal(number) for number in study.StopRequest.SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        instead_of_training(patch, train_here)
        study.main(study.RunArgs(folder, only=LABELS, out=folder / "out"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def schedule_of(folder):
    return json.loads((folder / "schedule.json").read_text())


def result(folder, name):
    return next(r for r in study.load_results(folder)[1] if r.planned.name == name)


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", cell)]


def tables(page: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, the header first."""
    lines = page.split(heading)[1].split("\n## ")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for i, row in enumerate(rows) if i != 1]


# --------------------------------------------------------------------------------------------------
# study.toml


def test_the_first_seeds_come_first(tmp_path):
    write_study(tmp_path / "x")
    described, runs = study.load_study(tmp_path / "x")
    first = [f"{label}_seed1" for label in (*LABELS, "later")]
    assert [r.name for r in runs] == [*first, "baseline_seed2", "s4_seed2"]
    assert runs[1].options[-3:] == ("--stages=4", "--continual_steps=16", "--seed=1")
    assert runs[1].against == "baseline"
    assert (described.title, described.about) == ("Tiny", "What it is for.")


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "study.toml: No such file or directory: specify a folder with"),
        ("title = ", "study.toml: not a valid study: Invalid value"),
        ("title = " + "[" * 9999, "study.toml: not a valid study"),
        ('title = "x"', "missing required field `runs`"),
        ('about = "x"\nruns = {a = {}}', "missing required field `title`"),
        ('title = "x"\nruns = 3', "runs: expected `object`, got `int`"),
        ('title = "x"\nabuot = ""\nruns = {a = {}}', "contains unknown field `abuot`"),
        ('title = "x"\n[runs.s4]\nseed = 1', "runs.s4: Object contains unknown field `seed`"),
        ('title = "x"\n[runs.s4]\nseeds = 1', "runs.s4: seeds: expected `array`, got `int`"),
        ('title = "x"\n[runs.s4]\nseeds = []', "runs.s4: seeds: expected `array` of length >= 1"),
        ('title = "x"\n[runs.s4]\n', "runs.s4: against = 'baseline' is not a run: use one of s4"),
        ('title = "x"\n[runs]\n', "runs: expected `object` of length >= 1"),
        ('title = "x"\nruns = {s4 = 3}', "runs.s4: Expected `object`, got `int`"),
        ('title = "x"\n[runs.baseline]\nseeds = ["a"]', "seeds[0]: expected `int`, got `str`"),
        ('title = "x"\n[runs.baseline]\noptions = [1]', "options[0]: expected `str`, got `int`"),
        ('title = "x"\n[runs."../x"]\n', r"matching regex '^\\w[\\w.-]*\\Z'"),
        (
            'title = "x"\n[runs.baseline]\n[runs.s4]\nseeds = [1, 2]',
            "runs.s4: baseline has no run with seed 2 to compare with",
        ),
        (
            'title = "x"\n[runs.baseline]\nsteps = {0 = []}',
            "runs.baseline: Expected `str` matching regex",
        ),
        (
            'title = "x"\n[runs.baseline]\nsteps = {4 = ["--seed=3"]}',
            "runs.baseline: options: the study sets --seed=3 itself",
        ),
        (
            'title = "x"\n[runs.baseline]\nsteps = [4, 8]\n[runs.s4]\n',
            "runs.s4: runs.baseline lists several numbers of steps, so this run must list them",
        ),
        (
            'title = "x"\n[runs.baseline]\nsteps = [4]\n[runs.s4]\nsteps = [8]',
            "runs.s4: baseline_8 has no run with seed 1 to compare with: add it to runs.baseline",
        ),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text, named):
    if text is not None:
        (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError, match=re.escape(named)):
        study.load_study(tmp_path)


def test_a_variant_replaces_a_baseline_that_lacks_a_seed(tmp_path):
    text = (
        'title = "x"\n[runs.baseline]\nsteps = [4, 8]\n[runs.slow]\nvariant_of = "baseline"\n'
        'against = "slow"\nsteps = [8, 16]\nseeds = [1, 2]\n[runs.s4]\nsteps = [4, 8, 16]\n'
        "more_seeds = {8 = [2]}\n"
    )
    (tmp_path / "study.toml").write_text(text)
    _, runs = study.load_study(tmp_path)
    assert {r.name: r.against for r in runs if r.entry == "s4"} == {
        "s4_4_seed1": "baseline_4",
        "s4_8_seed1": "slow_8",  # all seeds are compared with runs of the same entry
        "s4_8_seed2": "slow_8",
        "s4_16_seed1": "slow_16",
    }
    (tmp_path / "study.toml").write_text(text + 'against = "slow"\n')
    with pytest.raises(UserError, match="runs.s4: slow_4 has no run with seed 1 to compare with"):
        study.load_study(tmp_path)


@pytest.mark.parametrize("name", ["small_cpu", "gpt2_124m"])
def test_the_studies_of_this_repository_make_schedules(name, corpus):
    _, runs = study.load_study(ROOT / "results" / name)
    configs, flops = study.check_runs(runs, (f"data_dir={corpus}",))
    expected = {"baseline", "s4", "s8", "s12", "s4_released_code", "baseline_modern", "s4_modern"}
    assert {r.label for r in runs} >= expected
    assert all(grad_accum_steps(c, c.tokens_per_step, 1) >= 1 for c in configs.values())
    assert flops["baseline_seed1"] > flops["s12_seed1"] * 0.5 > 0


# --------------------------------------------------------------------------------------------------
# run


def test_finished_runs_are_kept(tiny):
    assert sorted(p.parent.name for p in tiny.glob("*/metrics.jsonl")) == RUNS
    for run in RUNS:
        files = sorted(p.name for p in (tiny / run).iterdir())
        assert files == ["config.json", "metrics.jsonl", "schedule.json"]
        assert metrics(tiny / run) == metrics(tiny / "out" / run)
        steps = [row["step"] for row in metrics(tiny / run)]
        assert steps == list(range(schedule_of(tiny / run)["steps"] + 1))
    assert json.loads((tiny / "s4_seed2" / "config.json").read_text())["seed"] == 2


def run_only(folder, *names, monkeypatch, **options):
    """Run a study in which no run may be trained."""
    instead_of_training(monkeypatch, lambda command: pytest.fail("was trained"))
    study.main(study.RunArgs(folder, only=names, out=folder / "out", **options))


def test_finished_runs_are_not_trained_again(copy, monkeypatch, capsys, restored_signals):
    run_only(copy, *LABELS, monkeypatch=monkeypatch)
    end = f"all 7 runs have finished; to write the report: python study.py report {copy}"
    assert capsys.readouterr().out.splitlines() == [end]


def test_an_option_newer_than_a_kept_run_has_its_default(copy, monkeypatch, restored_signals):
    """Its config.json lacks the option: the run is finished with the default, and with no other."""
    for folder in (copy, copy / "out"):
        edit(folder / "s4_seed1" / "config.json", growth=None, skip_rate=None, dropout=None)
    run_only(copy, "s4_seed1", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="was trained with growth=random, not growth=stack"):
        run_only(copy, "s4_seed1", monkeypatch=monkeypatch, options=("growth=stack",))
    # All options at once: every one has a default.
    for folder in (copy, copy / "out"):
        path = folder / "baseline_seed1" / "config.json"
        content = json.loads(path.read_text())
        defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
        kept = {k: v for k, v in content.items() if k not in defaults or defaults[k] != v}
        assert len(kept) < len(content)
        path.write_text(json.dumps(kept))
    run_only(copy, "baseline_seed1", monkeypatch=monkeypatch)
    assert len(study.load_results(copy)[1]) == 7


def test_runs_continue_with_their_own_options_only(copy, monkeypatch, restored_signals):
    for option in ("checkpoint_interval=7", "max_skipped_steps=3", "timeout=30"):
        run_only(copy, "s4_seed1", monkeypatch=monkeypatch, options=(option,))
    with pytest.raises(UserError, match="with learning_rate=0.001, not learning_rate=1.0"):
        run_only(copy, "s4_seed1", monkeypatch=monkeypatch, options=("learning_rate=1",))
    shutil.rmtree(copy / "s4_seed1")  # only out/ has it
    with pytest.raises(UserError, match="out/s4_seed1: was trained with learning_rate=0.001"):
        run_only(copy, "s4_seed1", monkeypatch=monkeypatch, options=("learning_rate=1",))


def test_a_run_that_fails_does_not_block_the_others(
    tmp_path, corpus, monkeypatch, restored_signals, capsys
):
    folder = write_study(tmp_path / "x", data_dir=corpus)
    instead_of_training(monkeypatch, lambda command: 0)  # and nothing was trained
    with pytest.raises(UserError, match=r"8 of 8 runs failed \(baseline_seed1, s4_seed1, "):
        study.main(study.RunArgs(folder, out=tmp_path / "out"))
    said = capsys.readouterr().err
    assert "error: baseline_seed1: train.py ended with status 0: its last lines:\nwhat it" in said
    assert f"All output of baseline_seed1: {tmp_path}/out/baseline_seed1.log" in said
    instead_of_training(monkeypatch, lambda command: 75)  # not told to stop by us
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        study.main(study.RunArgs(folder, out=tmp_path / "out", only=("s4_seed2",)))
    assert "error: s4_seed2: train.py ended with status 75" in capsys.readouterr().err


def test_results_that_cannot_be_written_lose_nothing(
    copy, tmp_path, corpus, monkeypatch, restored_signals, capsys
):
    """The trained run stays in the run folder, and the same command continues from there."""
    folder, trained = write_study(tmp_path / "x", data_dir=corpus), []

    def run(command):
        name = next(word for word in command if word.startswith("--out_dir=")).split("/")[-1]
        shutil.copytree(copy / name, tmp_path / "out" / name)
        trained.append(name)
        return 0

    instead_of_training(monkeypatch, run)
    (folder / "s4_seed1").write_text("in the way of the results")
    args = study.RunArgs(folder, out=tmp_path / "out", only=("s4", "baseline"))
    monkeypatch.setattr(study, "check_same", lambda folder, config: None)
    with pytest.raises(UserError, match=r"1 of 4 runs failed \(s4_seed1\)"):
        study.main(args)
    assert "s4_seed1/config.json: File exists" in capsys.readouterr().err
    assert trained == ["baseline_seed1", "s4_seed1", "baseline_seed2", "s4_seed2"]
    (folder / "s4_seed1").unlink()
    instead_of_training(monkeypatch, lambda command: 0)  # finished already
    study.main(args)
    assert study.load_finished(folder / "s4_seed1")


def test_mistakes_are_found_before_anything_is_trained(corpus, tmp_path, monkeypatch):
    folder = write_study(tmp_path / "bad", data_dir=corpus, n_head=3)

    def refused(message, *options, **kwargs):
        with pytest.raises(UserError, match=message):
            run_only(folder, *options, monkeypatch=monkeypatch, **kwargs)

    refused("n_embd=32 must be a multiple of n_head=3")
    refused("--only s5: no such run: use one of baseline, s4", "s5")
    with pytest.raises(UserError, match="no run has finished together with its baseline"):
        study.main(study.ReportArgs(folder))
    write_study(folder, data_dir=corpus)
    refused("--options seed=3: the study sets this option", options=("seed=3",))
    refused("--jobs=0 must be between 1 and 1,024", jobs=0)
    refused("--jobs=999 --processes=1 needs 999 GPUs", jobs=999, options=("device=cuda",))
    refused("device=cuda:0 is one GPU for 2 x 1 processes", jobs=2, options=("device=cuda:0",))
    refused("batch_size=7 does not divide", options=("batch_size=7",))
    refused("must be a multiple of block_size=64 x 3 processes", processes=3)
    ramp = "tokens_per_step_ramp=0:2048"
    for option in ("stages=2", "continual_steps=4", "skip_policy=layer_dropout", ramp):
        refused("^baseline: runs are compared with this run, so it must train", options=(option,))


def test_mistakes_are_one_line_on_the_command_line(tmp_path):
    refused = script("study.py", "run", tmp_path, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_every_run_has_its_own_gpus_or_its_share_of_the_cores():
    environments = study.job_environments
    assert environments(1, 1, {}, cores=8) == environments(1, 1, {}, cores=8, gpus=8) == [{}]
    for jobs, processes, threads in ((2, 1, 4), (1, 2, 4), (3, 1, 2), (2, 2, 2), (4, 4, 1)):
        shared = environments(jobs, processes, {}, cores=8)
        assert shared == [{"OMP_NUM_THREADS": str(threads)}] * jobs
    assert environments(2, 1, {"OMP_NUM_THREADS": "8"}, cores=8) == [{}, {}]

    def gpus(jobs, processes, n, **environ):
        found = environments(jobs, processes, environ, cores=8, gpus=n)
        assert all(list(environment) == ["CUDA_VISIBLE_DEVICES"] for environment in found)
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in found]

    assert gpus(2, 1, 8) == ["0", "1"]
    assert gpus(2, 4, 8) == ["0,1,2,3", "4,5,6,7"]
    assert gpus(1, 2, 8) == ["0,1"]
    assert gpus(2, 1, 2, CUDA_VISIBLE_DEVICES="5, 3") == ["5", "3"]
    assert gpus(2, 2, 5, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b,GPU-c,GPU-d,GPU-e") == [
        "GPU-a,GPU-b",
        "GPU-c,GPU-d",
    ]
    with pytest.raises(UserError, match="--jobs=3 --processes=2 needs 6 GPUs, but 5 are visible"):
        environments(3, 2, {}, 8, gpus=5)
    with pytest.raises(UserError, match="needs 1 GPUs, but 0 are visible"):
        environments(1, 1, {"CUDA_VISIBLE_DEVICES": ""}, 8, gpus=0)


SLEEP = "import time; print('ready', flush=True); time.sleep(100)"


def sleeping_job(tmp_path, run):
    job = study.Job(run, [sys.executable, "-c", SLEEP], {}, tmp_path / f"{run.name}.log")
    deadline = time.monotonic() + 30
    while "ready" not in job.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


def test_an_exception_leaves_no_run_behind(tmp_path, corpus, monkeypatch, restored_signals):
    folder, jobs = write_study(tmp_path / "x", data_dir=corpus), []

    def start(self, run, slot):
        if len(jobs) == 2:
            raise RuntimeError("a mistake in study.py")
        jobs.append(sleeping_job(tmp_path, run))
        return jobs[-1]

    monkeypatch.setattr(study.Training, "_start", start)
    with pytest.raises(RuntimeError, match="a mistake in study"):
        study.main(study.RunArgs(folder, out=tmp_path / "out", jobs=3))
    assert [job.process.returncode for job in jobs] == [-signal.SIGTERM] * 2
    assert [job.run.name for job in jobs] == ["baseline_seed1", "s4_seed1"]


def test_a_log_that_cannot_be_written_fails_only_its_run(
    tmp_path, corpus, capsys, monkeypatch, restored_signals
):
    folder, started = write_study(tmp_path / "x", data_dir=corpus), []
    (tmp_path / "elsewhere").write_text("not to be changed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s4_seed1.log").symlink_to(tmp_path / "elsewhere")
    command = [sys.executable, "-c", "print('error: no luck', 'and more', sep='\\n')"]
    real = study.Job

    def job(run, _, env, log):
        started.append(run.name)
        return real(run, command, env, log)

    monkeypatch.setattr(study, "Job", job)
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        study.main(study.RunArgs(folder, out=tmp_path / "out", only=("baseline", "s4"), jobs=2))
    said = capsys.readouterr().err
    assert "s4_seed1.log: Too many levels of symbolic links" in said
    assert "error: s4_seed2: train.py ended with status 0: no luck\n" in said
    assert started == ["baseline_seed1", "s4_seed1", "baseline_seed2", "s4_seed2"]
    assert (tmp_path / "elsewhere").read_text() == "not to be changed"


def processes_with(text) -> list[str]:
    """The commands of all running processes that contain a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(text).encode() in (command := path.read_bytes()):
                found.append(command.decode())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT", "minutes", "torchrun", "two SIGINT", "SIGKILL"],
)
def test_a_study_that_is_stopped_saves_and_continues(corpus, tmp_path, how):
    options = dict(data_dir=corpus, steps=4000, eval_interval=4000, log_interval=1)
    folder = write_study(tmp_path / "x", **options)
    outs = [tmp_path / "out" / f"baseline_seed{seed}" for seed in (1, 2)]
    command = [sys.executable, "study.py", "run", str(folder), "--out", str(tmp_path / "out")]
    command += ["--only", "baseline", "--jobs", "2"]
    command += {"minutes": ["--minutes", "0.3"], "torchrun": ["--processes", "2"]}.get(how, [])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    if how != "minutes":
        deadline = time.monotonic() + 100
        while not all((out / "metrics.jsonl").exists() and len(metrics(out)) > 2 for out in outs):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        if how == "two SIGINT":  # with a run that does not react to the first
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children.split()[0]), signal.SIGSTOP)
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        elif how == "SIGINT":  # as from a terminal: to the process group
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if how == "torchrun" else signal.Signals[how])
    said, _ = process.communicate(timeout=100)
    if how == "SIGKILL":  # the runs notice, and save
        deadline = time.monotonic() + 30
        while processes_with(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not processes_with(tmp_path)
    if how == "two SIGINT":
        assert process.returncode == 130
        return
    for out in outs:
        assert load_checkpoint(out)["step"] > 0
        log = out.with_name(out.name + ".log").read_text()
        assert log.count("stopped at step") == 1
        assert "Traceback" not in log or how == "torchrun"  # which prints one of its own
    if how == "SIGKILL":
        return
    assert process.returncode == 75
    assert "stopped with 2 of 2 runs unfinished; continue with the same command" in said
    assert not (folder / "baseline_seed1").exists()
    if how == "SIGTERM":  # continues where it stopped, for a while
        step = load_checkpoint(outs[0])["step"]
        refused = script(*command[1:], "--options", "tokens_per_step=2048", check=False)
        assert "was trained with tokens_per_step=1024, not tokens_per_step=2048" in refused.stderr
        assert refused.returncode == 1
        assert script(*command[1:], "--minutes=0.5", check=False).returncode == 75
        assert load_checkpoint(outs[0])["step"] > step


BRANCHES = """
title = "Branches"
options = {options}
[runs.baseline]
options = ["--lr_schedule=wsd", "--decay_fraction=0.25", "--warmup_steps=3"]
steps = [8, 14, 24]
seeds = [1, 2]
[runs.tuned]
options = ["--lr_schedule=wsd", "--decay_fraction=0.25"]
against = "tuned"
[runs.tuned.steps]
8 = ["--learning_rate=1e-3"]
14 = ["--learning_rate=1e-3"]
24 = ["--learning_rate=1e-3", "--weight_decay=0.2"]
[runs.cosine]
options = ["--lr_schedule=cosine"]
against = "cosine"
steps = [8, 14]
[runs.s2]
options = ["--stages=2", "--lr_schedule=wsd"]
steps = [8, 14]
"""


def test_runs_of_a_single_length_are_reported_by_study(
    corpus, tmp_path, monkeypatch, restored_signals, capsys
):
    """frontier.py needs several lengths of the baseline, not only a number in the label."""
    text = 'title = "One"\noptions = {options}\n[runs.baseline]\nsteps = [8]\n'
    folder = write_study(tmp_path / "one", text, data_dir=corpus, hellaswag_data="none")
    instead_of_training(monkeypatch, train_here)
    study.main(study.RunArgs(folder, out=tmp_path / "out"))
    said = capsys.readouterr().out
    assert f"to write the report: python study.py report {folder}" in said


def test_a_longer_run_continues_a_shorter_one_as_if_trained_from_the_start(
    corpus, tmp_path, monkeypatch, restored_signals, capsys
):
    """Only where both begin identically: not with a cosine, with stages or with other options."""
    options = dict(data_dir=corpus, hellaswag_data="none", log_interval=1)
    folder = write_study(tmp_path / "x", BRANCHES, **options)
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(re.sub(r'"--steps=\d+", ', "", text))
    first_steps = {}

    def train_one(command):
        run = Path(command[-2].removeprefix("--out_dir="))
        train_here(command)
        first_steps[run.name] = json.loads((run / "config.json").read_text())["starts"][0]["step"]
        return 0

    instead_of_training(monkeypatch, train_one)
    for only in (("baseline_8",), ("baseline_14",), ()):
        study.main(study.RunArgs(folder, only=only, out=tmp_path / "out"))
    longer = {name: step for name, step in first_steps.items() if step}
    expected = {f"baseline_{n}_seed{s}": k for n, k in ((14, 6), (24, 10)) for s in (1, 2)}
    assert longer == expected | {"tuned_14_seed1": 6}
    weight_decay = [
        json.loads((folder / f"tuned_{n}_seed1" / "config.json").read_text())["weight_decay"]
        for n in (14, 24)
    ]
    assert weight_decay == [0.1, 0.2]
    said = capsys.readouterr().out
    assert "baseline_24_seed2: continues baseline_14_seed2 from step 10" in said
    assert f"to write the report: python frontier.py {folder}" in said
    direct = tmp_path / "direct"
    shutil.copytree(folder, direct, ignore=shutil.ignore_patterns("*_seed*"))
    study.main(study.RunArgs(direct, only=("baseline_24_seed2",), out=tmp_path / "alone"))
    assert first_steps["baseline_24_seed2"] == 0
    rows = [without_clock(metrics(f / "baseline_24_seed2")) for f in (folder, direct)]
    assert rows[0] == rows[1] and len(rows[0]) == 25 and rows[0][-1]["val_loss"]


@pytest.mark.slow
def test_runs_that_train_at_the_same_time_give_the_same_results(tiny, corpus, tmp_path):
    """Also on a terminal: a bar over all runs."""
    folder = write_study(
        tmp_path / "x", data_dir=corpus, steps=16, eval_interval=4, hellaswag_limit=10
    )
    cores = len(os.sched_getaffinity(0))  # one run for each
    command = [sys.executable, "study.py", "run", str(folder), "--out", str(tmp_path / "out")]
    command += ["--jobs", str(max(2, cores)), "--only", *LABELS]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 160))
    process = subprocess.Popen(command, cwd=ROOT, stdout=end, stderr=end, env=env)
    os.close(end)
    said = b""
    with contextlib.suppress(OSError):  # the process has closed its end
        while part := os.read(terminal, 65536):
            said += part
    os.close(terminal)
    text = said.decode()
    assert process.wait() == 0, text
    for name in RUNS:
        rows = without_clock(metrics(folder / name))
        assert rows == without_clock(metrics(tiny / name)) and rows[-1]["val_loss"]
        assert json.loads((folder / name / "config.json").read_text())["threads"] == 1
        (line,) = re.findall(rf"{name}: finished.*", text)
        assert f"val loss {rows[-1]['val_loss']:.4f}, time 0:" in line
    assert re.search(r"0%\|.*\| 0 of 7 runs finished; running: baseline_seed1, s4_seed1", text)
    assert re.search(r"\d+%\|.*\| [1-6] of 7 runs finished; 0:\d\d:\d\d left; running: ", text)
    assert "all 7 runs have finished" in text


@pytest.mark.slow
def test_the_progress_of_a_study_without_a_terminal(
    corpus, tmp_path, capsys, monkeypatch, restored_signals
):
    """A line from time to time; a failed run, and what an earlier session did, do not count."""
    monkeypatch.setattr(study, "STATUS_SECONDS", 0.2)
    folder = write_study(tmp_path / "x", data_dir=corpus, steps=150, log_interval=5)
    lock = FolderLock(tmp_path / "out" / "s4_seed1")
    args = study.RunArgs(folder, out=tmp_path / "out", only=("baseline", "s4_seed1"), jobs=2)
    with pytest.raises(UserError, match=r"1 of 3 runs failed \(s4_seed1\)"):
        study.main(args)
    del lock
    captured = capsys.readouterr()
    assert "error: s4_seed1: train.py ended with status 1: " in captured.err
    assert "another run is using it" in captured.err
    lines = [x for x in captured.err.splitlines() if "runs finished" in x]
    shares = [int(re.search(r"(\d+)% of the FLOPs", line)[1]) for line in lines]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 50
    assert re.search(
        r"1 of 3 runs finished; \d+% of the FLOPs; 0:00:\d\d left; running: bas", lines[-1]
    )
    assert re.search(r"running: baseline_seed2 \(loss \d\.\d{3}\)", lines[-1])
    assert captured.out.count(": finished, val loss") == 2
    study.main(args)
    lines = [x for x in capsys.readouterr().err.splitlines() if "runs finished" in x]
    assert lines[0].startswith("2 of 3 runs finished; 0% of the FLOPs; running: s4_seed1")


@pytest.mark.slow
def test_a_study_runs_from_the_command_line(corpus, tmp_path):
    folder = write_study(tmp_path / "one", data_dir=corpus, steps=8)
    command = ["study.py", "run", folder, "--out", tmp_path / "out", "--only", "baseline"]
    first = script(*command, "--discard_checkpoints=True")
    assert "2 runs to train, 1 at a time" in first.stdout
    assert "baseline_seed2: finished, val loss " in first.stdout
    assert "all 2 runs have finished" in first.stdout
    assert "baseline_seed1: finished at step 8" in (tmp_path / "out/baseline_seed1.log").read_text()
    assert len(list(folder.glob("*/metrics.jsonl"))) == 2
    assert not list(tmp_path.rglob("checkpoints"))
    second = script("study.py", "report", folder)
    assert "README.md: 2 runs, 6 not finished yet" in second.stdout
    page = (folder / "README.md").read_text()
    assert "![training and validation loss](figure1_loss.png)" in page
    assert "## Cost of the stages" not in page  # baselines alone have none


# --------------------------------------------------------------------------------------------------
# report


def test_the_report_says_what_the_runs_measured(tiny):
    """Against the definitions, computed plainly from metrics.jsonl and schedule.json."""
    study.main(study.ReportArgs(tiny))
    page = (tiny / "README.md").read_text()
    assert "**Not finished yet:** later_seed1." in page and "Trained on 1 thread of" in page
    assert "A baseline has 16 steps of 1,024 tokens: 0.0M tokens of" in page
    header, *rows = tables(page, "## Compute-matched losses")
    assert header == [
        *("run", "seeds", "val loss at the end", "compute-matched, paper cost"),
        *("compute-matched, FLOPs", "compute-matched, seconds"),
        "compute to reach the baseline's final loss (fraction of its total)",
        "acc_norm at the end",
    ]
    losses = {row[0]: row[1:] for row in rows}
    assert list(losses) == list(LABELS)
    row = losses["s4"]
    baselines = [metrics(tiny / f"baseline_seed{seed}") for seed in (1, 2)]
    runs = [metrics(tiny / f"s4_seed{seed}") for seed in (1, 2)]
    assert numbers(row[0]) == [1, 2]
    ends = [r[-1]["val_loss"] for r in runs]
    assert numbers(row[1]) == pytest.approx([statistics.mean(ends), *ends], abs=6e-5)
    for cell, metric in ((row[2], "paper_cost"), (row[3], "flops")):
        differences = []
        for run, base in zip(runs, baselines):
            budget, at = base[-1][metric], [r for r in run if "val_loss" in r]
            after = next(i for i, r in enumerate(at) if r[metric] >= budget)
            a, b = at[after - 1], at[after]
            part = (budget - a[metric]) / (b[metric] - a[metric])
            loss = a["val_loss"] + part * (b["val_loss"] - a["val_loss"])
            differences.append(loss - base[-1]["val_loss"])
        assert numbers(cell) == pytest.approx(
            [statistics.mean(differences), *differences], abs=6e-5
        )
    assert losses["baseline"][2:5] == ["+0.0000 (+0.0000, +0.0000)"] * 3
    assert losses["baseline"][5] == "1.00, 1.00, 1.00"
    ends = [metrics(tiny / f"{name}_seed1")[-1]["val_loss"] for name in ("decays", "decays_s2")]
    assert numbers(losses["decays_s2"][3]) == pytest.approx([ends[1] - ends[0]], abs=6e-5)
    assert losses["decays_s2"][5] == "-, -, -"
    last = [r[-1] for r in runs]
    mean = 100 * statistics.mean(r["hellaswag_acc_norm"] for r in last)
    error = 100 * last[0]["hellaswag_acc_norm_stderr"]
    assert numbers(row[6]) == pytest.approx([mean, error], abs=0.06)


def test_the_report_says_what_the_stages_cost(tiny):
    study.main(study.ReportArgs(tiny))
    header, *rows = tables((tiny / "README.md").read_text(), "## Cost of the stages")
    assert header == ["run", "steps", "paper cost", "FLOPs", "seconds"]
    stages = {row[0]: row[1:] for row in rows}
    assert list(stages) == ["s4", "decays_s2", "ramp"]
    schedule = schedule_of(tiny / "s4_seed1")
    assert stages["s4"][0] == "16"
    for cell, metric in ((stages["s4"][1], "paper_cost"), (stages["s4"][2], "flops")):
        expected = schedule["phases"][-2]["cumulative"][metric]
        assert numbers(cell)[0] == pytest.approx(expected, abs=6e-4)
    ramp = schedule_of(tiny / "ramp_seed1")
    fraction = ramp["total"]["paper_cost"] / ramp["baseline"]["paper_cost"]
    assert numbers(stages["ramp"][1]) == pytest.approx([fraction], abs=6e-4)


def test_the_report_compares_the_loss_after_growth(copy):
    path = copy / "study.toml"
    path.write_text(f"loss_after_growth = true\n{path.read_text()}")
    study.main(study.ReportArgs(copy))
    page = (copy / "README.md").read_text()
    header, *rows = tables(page, "## The loss after growth")
    assert header[:4] == ["run", "seeds", "final difference", "seeds below 0.02"]
    assert [row[0] for row in rows] == ["s4", "decays_s2"]  # ramp has no suitable evaluation
    differences = []
    for seed in (1, 2):  # both read 16 steps; the grown run continues
        loss, reference = (
            next(r for r in metrics(copy / f"{name}_seed{seed}") if r["step"] == 16)["val_loss"]
            for name in ("s4", "baseline")
        )
        differences.append(loss - reference)
    assert rows[0][1] == "2" and numbers(rows[0][2]) == pytest.approx(
        [statistics.mean(differences)], abs=6e-5
    )
    within = sum(difference < 0.02 for difference in differences)
    assert rows[0][3] == f"{within} of 2"
    assert rows[0][4] == ("4,096" if within == 2 else "-")  # one evaluation, 4 steps after growth
    assert "Without a suitable evaluation: ramp_seed1." in page
    assert "](figure3_difference.png)" in page and (copy / "figure3_difference.png").exists()
    for name in ("s4_seed1", "s4_seed2", "decays_s2_seed1"):
        shutil.rmtree(copy / name)
    study.main(study.ReportArgs(copy))
    assert "Without a suitable evaluation: ramp_seed1." in (copy / "README.md").read_text()
    shutil.rmtree(copy / "ramp_seed1")
    study.main(study.ReportArgs(copy))
    assert "## The loss after growth" not in (copy / "README.md").read_text()


def test_the_report_lists_every_phase_at_its_own_cost(tiny):
    study.main(study.ReportArgs(tiny))
    header, *rows = tables((tiny / "README.md").read_text(), "## Phases")
    assert header == [
        *("run", "phase", "blocks that train", "context", "tokens/step", "tokens/s", "MFU"),
        *("peak memory", "time", "FLOPs", "time / FLOPs"),
    ]
    base = metrics(tiny / "baseline_seed1")
    base_speed = statistics.median(r["tokens_per_second"] for r in base[2:])
    for label in ("s4", "ramp"):
        schedule = schedule_of(tiny / f"{label}_seed1")
        mine = [dict(zip(header, row)) for row in rows if row[0] == label]
        assert [row["phase"] for row in mine] == [p["name"] for p in schedule["phases"]]
        measured = metrics(tiny / f"{label}_seed1")
        for row, p in zip(mine, schedule["phases"]):
            inside = [r for r in measured if p["start"] + 1 < r["step"] <= p["stop"]]
            speed = statistics.median(r["tokens_per_second"] for r in inside)
            assert row["blocks that train"] == f"{len(p['trained_blocks'])} of {p['n_blocks']}"
            assert row["context"] == str(p["context_length"])
            assert row["tokens/step"] == f"{p['tokens_per_step']:,}"
            assert row["tokens/s"] == f"{speed:,.0f}"
            totals = schedule["baseline"]
            flops = (p["flops"] / p["tokens"]) / (totals["flops"] / totals["tokens"])
            assert float(row["FLOPs"]) == pytest.approx(flops, abs=6e-4)
            assert float(row["time"]) == pytest.approx(base_speed / speed, abs=6e-4)
            ratio = base_speed / speed / flops
            assert float(row["time / FLOPs"]) == pytest.approx(ratio, abs=6e-3)
    ramp = {(r[3], r[4]) for r in rows if r[0] == "ramp"}
    assert ramp == {("32", "1,024"), ("32", "2,048"), ("64", "2,048")}


def test_seconds_leave_out_the_first_row_of_a_phase(copy):
    """It may include compilation: here, an hour."""
    for name in ("s4_seed1", "ramp_seed1"):
        before = result(copy, name)
        rows = metrics(copy / name)
        phases = schedule_of(copy / name)["phases"]
        for row in rows:
            if row["step"] in {p["start"] + 1 for p in phases}:
                row["tokens_per_second"] = 1024 / 3600
        write_rows(copy / name, rows)
        after = result(copy, name)
        seconds = after.run.relative_cost["seconds"]
        assert seconds.tolist() == before.run.relative_cost["seconds"].tolist()
        total = 0.0
        for p in phases:
            inside = [r for r in rows if p["start"] + 1 < r["step"] <= p["stop"]]
            speed = statistics.median(r["tokens_per_second"] for r in inside)
            total += (p["stop"] - p["start"]) * p["tokens_per_step"] / speed
        assert study.total_seconds(after.run) == pytest.approx(total) and total < 60
        base = metrics(copy / "baseline_seed1")[2:]
        base_total = 16 * 1024 / statistics.median(r["tokens_per_second"] for r in base)
        assert seconds[-1] == pytest.approx(total / base_total)


def test_cost_to_the_baselines_loss_is_where_the_loss_first_reaches_it(tiny):
    one, base = result(tiny, "s4_seed1"), result(tiny, "baseline_seed1")
    assert base.cost_to_baseline_loss("paper_cost") == pytest.approx(1)
    at = [r for r in metrics(tiny / "s4_seed1") if "val_loss" in r]
    target = metrics(tiny / "baseline_seed1")[-1]["val_loss"]
    found = one.cost_to_baseline_loss("flops")
    if min(r["val_loss"] for r in at) > target:
        assert found is None
        # Give it one to reach.
        target = one.baseline.columns["val_loss"][-1] = at[3]["val_loss"] + 1e-9
        found = one.cost_to_baseline_loss("flops")
    after = next(i for i, r in enumerate(at) if r["val_loss"] <= target)
    above, below = at[after - 1], at[after]
    part = (above["val_loss"] - target) / (above["val_loss"] - below["val_loss"])
    cost = above["flops"] + part * (below["flops"] - above["flops"])
    assert found == pytest.approx(cost / metrics(tiny / "baseline_seed1")[-1]["flops"])


def test_a_run_whose_rate_decays_is_compared_only_at_its_end(tiny):
    one = result(tiny, "decays_s2_seed1")
    end = metrics(tiny / "decays_s2_seed1")[-1]["val_loss"]
    assert one.compute_matched_loss("flops") == one.final_loss == end
    cost = one.run.relative_cost["flops"]
    cost /= cost[-1]
    for total, comparable in ((0.97, False), (0.985, True), (1.015, True), (1.03, False)):
        one.run.relative_cost["flops"] = total * cost
        assert (one.compute_matched_loss("flops") is not None) == comparable
    one.run.config = dataclasses.replace(one.run.config, lr_schedule="constant")
    assert one.compute_matched_loss("flops") is not None


def test_options_that_may_differ_exist():
    keys = {field.name for field in dataclasses.fields(plot.RunConfig)}
    assert keys > study.METHOD | study.RECIPE and not study.METHOD & study.RECIPE


@pytest.mark.parametrize(
    "run, key, other, refused",
    [
        ("s4_seed1", "tokens_per_step", 1, True),
        ("s4_seed1", "learning_rate", 1, True),
        ("s4_seed1", "eval_tokens", 1, True),
        ("s4_seed1", "init_weights", "gpt2", True),
        ("s4_seed1", "device_name", "another", True),
        ("baseline_seed2", "device_name", "another", True),
        ("decays_seed1", "n_embd", 1, True),
        ("decays_seed1", "hellaswag_limit", 3, True),
        ("s4_seed1", "phase1", "released_code", False),
        ("s4_seed1", "growth", "stack", False),
        ("s4_seed1", "date", "2020-01-01", False),
        ("s4_seed1", "min_lr", 1e-5, False),  # the learning rate is constant
        ("decays_s2_seed1", "min_lr", 1e-5, True),
        ("s4_seed1", "bias", None, False),  # missing: the default, which the others have
        ("s4_seed1", "n_layer", None, True),  # missing: not what the others have
        ("s4_seed1", "of_another_version", 1, False),
    ],
)
def test_runs_under_other_conditions_are_not_compared(copy, run, key, other, refused):
    edit(copy / run / "config.json", **{key: other})
    if refused:
        with pytest.raises(UserError, match=f"{key} is .* under the same conditions"):
            study.load_results(copy)
    else:
        assert len(study.load_results(copy)[1]) == 7


def test_an_unfinished_run_is_not_reported(copy):
    write_rows(copy / "s4_seed2", metrics(copy / "s4_seed2")[:-1])
    _, results, missing = study.load_results(copy)
    assert len(results) == 6 and [r.name for r in missing] == ["later_seed1", "s4_seed2"]
    shutil.rmtree(copy / "decays_seed1")  # a baseline
    _, results, missing = study.load_results(copy)
    names = ["decays_seed1", "decays_s2_seed1", "later_seed1", "s4_seed2"]
    assert len(results) == 4 and [r.name for r in missing] == names


LENGTHS = """
title = "Lengths"
options = {options}
[runs.baseline]
steps = [8, 16]
[runs.s2]
options = ["--stages=2"]
steps = [16]
"""


def test_runs_of_several_lengths_are_reported(
    corpus, tmp_path, monkeypatch, restored_signals, capsys
):
    folder = write_study(tmp_path / "x", LENGTHS, data_dir=corpus, hellaswag_data="none")
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace('"--steps=16", ', ""))
    instead_of_training(monkeypatch, train_here)
    study.main(study.RunArgs(folder, out=tmp_path / "out"))
    study.main(study.ReportArgs(folder))
    page = (folder / "README.md").read_text()
    assert "The longest baseline has 16 steps of 1,024 tokens" in page
    assert all(f"| {label} " in page for label in ("baseline_8", "baseline_16", "s2_16"))


def test_what_is_no_baseline_is_not_compared_with(copy):
    edit(copy / "baseline_seed1" / "schedule.json", is_baseline=False)
    with pytest.raises(
        UserError, match="^baseline: runs are compared with this run, so it must train"
    ):
        study.load_results(copy)
    totals = schedule_of(copy / "baseline_seed1")["baseline"]
    longer = totals | {"steps": 20, "flops": totals["flops"] + 1}
    edit(copy / "baseline_seed1" / "schedule.json", is_baseline=True, baseline=longer)
    with pytest.raises(
        UserError, match="^baseline: runs are compared with this run, so it must train"
    ):
        study.load_results(copy)


@pytest.mark.parametrize(
    "file, changes, named",
    [
        ("config.json", {"threads": None}, "config.json: .*missing required field `threads`"),
        ("schedule.json", {"steps": None}, "schedule.json: .*missing required field `steps`"),
        ("schedule.json", {"phases": {}}, "schedule.json: .*phases: expected `array`"),
    ],
)
def test_corrupted_runs_are_named(copy, file, changes, named):
    edit(copy / "s4_seed1" / file, **changes)
    with pytest.raises(UserError, match=named):
        study.main(study.ReportArgs(copy))


def test_a_phase_with_a_single_row_has_no_seconds(copy):
    rows = [r for r in metrics(copy / "baseline_seed1") if r["step"] in (0, 16)]
    write_rows(copy / "baseline_seed1", rows)
    _, results, _ = study.load_results(copy)
    table = study.phase_table(results)
    (line,) = [line for line in table.splitlines() if line.startswith("| baseline")]
    assert [cell.strip() for cell in line.split("|")][-6] == "-"  # tokens/s
    assert "nan" not in table + study.loss_table(results) + study.stages_table(results)


def test_a_diverged_run_is_not_reported_by_an_earlier_loss(copy):
    rows = metrics(copy / "s4_seed1")
    write_rows(copy / "s4_seed1", [*rows[:-1], rows[-1] | {"val_loss": None}])
    _, results, _ = study.load_results(copy)
    (line,) = [x for x in study.loss_table(results).splitlines() if x.startswith("| s4 ")]
    assert [cell.strip() for cell in line.split("|")][3].startswith("diverged")


def test_a_report_that_cannot_be_written_is_an_error(copy):
    (copy / "README.md").unlink(missing_ok=True)
    (copy / "README.md").mkdir()
    with pytest.raises(UserError, match="README.md: Is a directory"):
        study.main(study.ReportArgs(copy))


@pytest.mark.parametrize(
    "line, named",
    [
        ("seeds = [1, 1]", "runs.s4: seeds: a value is listed more than once"),
        ("steps = [8]\nmore_seeds = {8 = [2, 1]}", "runs.s4: seeds: a value is listed more than"),
        ("steps = [8]\nmore_seeds = {9 = [2]}", "runs.s4: more_seeds: 9 is not in steps"),
        ("more_seeds = {8 = [2]}", "runs.s4: more_seeds: 8 is not in steps"),
        ("seeds = [-1]", "runs.s4: .*expected `int` >= 0"),
        ('options = ["--seed=3"]', "runs.s4: options: the study sets --seed=3 itself"),
        ('options = ["--help"]', "runs.s4: options: the study sets --help itself"),
    ],
)
def test_studies_that_would_count_a_run_twice_or_not_train_it_are_errors(tmp_path, line, named):
    text = 'title = "x"\n[runs.baseline]\n[runs.s4]\n'
    (tmp_path / "study.toml").write_text(text + line + "\n")
    with pytest.raises(UserError, match=named):
        study.load_study(tmp_path)


def test_two_entries_with_a_run_of_the_same_label_are_an_error(tmp_path):
    text = 'title = "x"\n[runs.baseline]\nsteps = [8]\n[runs.baseline_8]\nseeds = [2]\n'
    (tmp_path / "study.toml").write_text(text + 'against = "baseline_8"\n')
    message = "runs.baseline and runs.baseline_8 both have a run baseline_8: rename"
    with pytest.raises(UserError, match=message):
        study.load_study(tmp_path)


def test_every_run_is_checked_with_its_own_seed(corpus, tmp_path):
    """The steps in which layer_dropout skips blocks depend on the seed."""
    text = 'title = "x"\noptions = {options}\n[runs.baseline]\nseeds = [1, 2]\n'
    text += '[runs.skips]\nseeds = [1, 2]\noptions = ["--skip_policy=layer_dropout"]\n'
    folder = write_study(tmp_path / "x", text, data_dir=corpus)
    runs = study.load_study(folder)[1]
    configs, flops = study.check_runs(runs, ())
    assert configs == {run.name: load_config([*run.options], Config()) for run in runs}
    assert flops["baseline_seed1"] == flops["baseline_seed2"]
    assert flops["skips_seed1"] != flops["skips_seed2"]


def test_some_numbers_of_steps_can_have_more_seeds(tmp_path):
    entry = "steps = {length}\nseeds = [1, 2]\nmore_seeds = {{8 = [4, 3]}}\n"
    for length in ("[16, 8]", '{16 = [], 8 = ["--stages=2"]}'):
        text = f'title = "x"\n[runs.baseline]\n{entry.format(length=length)}'
        (tmp_path / "study.toml").write_text(text)
        names = [run.name.removeprefix("baseline_") for run in study.load_study(tmp_path)[1]]
        assert names == ["8_seed1", "8_seed2", "8_seed4", "8_seed3", "16_seed1", "16_seed2"]


@pytest.mark.parametrize("given", [None, "mine"])
def test_the_runs_of_a_study_are_a_group_of_wandb(
    corpus, tmp_path, monkeypatch, restored_signals, given
):
    groups = []

    class Recorder(Ended):
        def __init__(self, run, command, env, log):
            groups.append(env["WANDB_RUN_GROUP"])
            super().__init__(lambda command: 1, run, command, env, log)

    monkeypatch.setattr(study, "Job", Recorder)
    if given:
        monkeypatch.setenv("WANDB_RUN_GROUP", given)
    else:
        monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    folder = write_study(tmp_path / "name", data_dir=corpus, wandb="project")
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        study.main(study.RunArgs(folder, only=("baseline",), out=tmp_path / "out"))
    assert groups == [given or "name"] * 2


def test_the_report_as_a_page(tiny, tmp_path):
    pytest.importorskip("plotly")
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    study.main(study.ReportArgs(folder, html=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text)[1])
    assert data["title"] == "Tiny" and sorted(run["name"] for run in data["runs"]) == RUNS
    assert (folder / "README.md").exists()


def test_step_times_are_measured_apart_from_the_training(copy, monkeypatch):
    """In rounds over the entries; once for those that differ only in the learning rate."""
    commands, machine = [], "a machine"

    def measure(command, **options):
        slower = (0, 5, 1)[len(commands) // 4]  # in the first round, the second, and the third
        commands.append(command)
        out = Path(command[-1].removeprefix("--out_dir="))
        names = ["all blocks", *(f"stage {s} phase {p}" for s in range(1, 5) for p in (1, 2))]
        rows = [{"phase": name, "step_seconds": 2.0 + i + slower} for i, name in enumerate(names)]
        rows.append({"phase": "continual", "step_seconds": 0.5 + slower})
        forecast = {"machine": machine, "torch_version": "2", "phases": rows}
        (out / "forecast.json").write_text(json.dumps(forecast))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(study.subprocess, "run", measure)
    study.main(study.TimeArgs(copy, rounds=1))
    assert [Path(command[1]).name for command in commands] == ["forecast.py"] * 4
    study.main(study.TimeArgs(copy))
    assert len(commands) == 3 * 4
    assert [c[:-1] for c in commands[:4]] == [c[:-1] for c in commands[4:8]]
    _, results, _ = study.load_results(copy)
    s4 = next(r for r in results if r.planned.name == "s4_seed1")
    assert study.total_seconds(s4.baseline) == pytest.approx(16 * 3.0)
    expected = sum(2 * (4.0 + i) for i in range(8)) + 16 * 1.5  # 8 phases of 2 steps
    assert study.total_seconds(s4.run) == pytest.approx(expected)
    times = study.load_times(copy)
    assert times.machine == "a machine with torch 2"
    assert times.entries["baseline"].seconds["all blocks"] == [2, 7, 3]
    assert times.entries["later"] == times.entries["decays"] == times.entries["baseline"]
    study.main(study.TimeArgs(copy))
    assert len(commands) == 3 * 4  # nothing is measured more often

    commands.clear()
    study.main(study.TimeArgs(copy, rounds=1, options=("batch_size=4",)))
    assert len(commands) == 4  # other options: everything is measured again
    times = study.load_times(copy)
    assert times.entries["s4"].seconds["continual"] == [0.5]
    del times.entries["later"]
    study.save_times(copy / study.TIMES, times)
    study.main(study.TimeArgs(copy, rounds=1, options=("batch_size=4",)))
    assert len(commands) == 4  # an entry that does the same work as another
    assert study.load_times(copy).entries["later"] == times.entries["baseline"]

    machine = "another machine"
    with pytest.raises(UserError, match="was measured on a machine.*but this machine is another"):
        study.main(study.TimeArgs(copy))
    with pytest.raises(UserError, match="--rounds=0 must be at least 1"):
        study.main(study.TimeArgs(copy, rounds=0))
    times = '{"entries": {"s4": {"work": "", "seconds": {"all blocks": [-1]}}}}'
    (copy / "step_seconds.json").write_text(times)
    with pytest.raises(UserError, match="step_seconds.json: .*expected `float` > 0"):
        study.load_results(copy)
