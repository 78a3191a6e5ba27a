"""Standard streams that fail, Ctrl-C at any time, odd environments: none of them ends a run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, arguments, metrics, without_clock

SCRIPTS = ("train.py", "fineweb.py", "hellaswag.py", "plot.py", "sample.py", "study.py")


def shell(command, cwd=ROOT, **environment):
    """Run a shell command in which $PYTHON is this interpreter; return its exit status and output.

    The shell's output is a file, so that redirections inside the command stay as they are.
    """
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        errors="replace",
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def expected(run_train):
    return without_clock(metrics(run_train("expected")))


@pytest.mark.parametrize(
    "redirection",
    [">/dev/full 2>&1", ">&- 2>&-", "2>&-", "2>&1 | head -1", ">/dev/full 2>/dev/full </dev/null"],
)
def test_streams_that_fail_do_not_end_a_run(corpus, tmp_path, expected, redirection):
    words = arguments(tmp_path / "run", data_dir=corpus)
    status, _ = shell(f"$PYTHON train.py {' '.join(words)} {redirection}")
    assert status == 0
    assert without_clock(metrics(tmp_path / "run")) == expected
    # Text for a closed stream must not end up in the run's files.
    assert not [p for p in (tmp_path / "run").glob("*.json*") if b"val loss" in p.read_bytes()]


def test_an_error_keeps_its_status_if_it_cannot_be_printed():
    assert shell("$PYTHON train.py --stages=13 --dry_run >/dev/full 2>/dev/full")[0] == 1
    assert shell("$PYTHON train.py --stages=13 --dry_run >&- 2>&-")[0] == 1


def test_a_locale_without_unicode(corpus, tmp_path):
    words = " ".join(arguments(tmp_path / "rün", data_dir=corpus, steps=2))
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    status, text = shell(f"$PYTHON train.py {words}", **ascii_only)
    assert status == 0, text
    status, text = shell(f"$PYTHON plot.py {tmp_path}/r* --out {tmp_path}/plots", **ascii_only)
    assert status == 0 and "val loss" in text, text


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_work_from_any_directory_and_with_a_safe_path(tmp_path, name):
    status, text = shell(f"$PYTHON {ROOT}/{name} --help", cwd=tmp_path, PYTHONSAFEPATH="1")
    assert status == 0 and "usage" in text, text


def test_built_in_configs_and_data_are_found_from_any_directory(tmp_path):
    command = f"$PYTHON {ROOT}/train.py configs/demo.py configs/s4.py --dry_run"
    status, text = shell(command, cwd=tmp_path)
    assert status == 0 and "stage 4" in text, text
    status, text = shell(f"$PYTHON {ROOT}/train.py configs/dem.py --dry_run", cwd=tmp_path)
    assert status == 1 and "configs/dem.py: not found; did you mean configs/demo.py?" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interrupt_at_any_moment_of_the_start_has_no_traceback(tmp_path, name):
    options = {
        "train.py": ["--dry_run"],
        "fineweb.py": ["--source=stdlib", "--out=x"],
        "study.py": ["report", "none"],
    }.get(name, ["none"])
    for delay in (0.1, 0.3, 0.7, 1.2, 2):
        process = subprocess.Popen(
            [sys.executable, ROOT / name, *options],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
        assert process.returncode in (0, 1, 130, -signal.SIGINT)
        # An interrupt while Python itself starts, before the first line of the script, is not ours.
        assert f'File "{ROOT / name}"' not in text, text


@pytest.mark.slow
def test_a_burst_of_signals_ends_with_everything_saved(corpus, tmp_path):
    words = arguments(tmp_path / "run", data_dir=corpus, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(1)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert process.returncode == 75
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
