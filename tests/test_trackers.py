"""Weights & Biases and TensorBoard: the same rows as metrics.jsonl, each once, read back."""

import json
import sys

import pytest
from conftest import ROOT, arguments, metrics, script, torchrun

from stagewise.config import Config
from stagewise.errors import UserError
from stagewise.trackers import Trackers, check_trackers

RUN = dict(steps=16, checkpoint_interval=5, eval_interval=8, keep_checkpoints=9, init_from="auto")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("wandb")


def wandb_records(file):
    """Yield the records of a .wandb file, which has the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = (
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_run(folder):
    """Return the run's record and the rows in the newest file of a run folder."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    records = list(wandb_records(files[-1]))
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            assert record.history.step.num == row["step"]
            rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return next(r.run for r in records if r.WhichOneof("record_type") == "run"), rows


def tensorboard_rows(folder):
    """Return the points that TensorBoard shows, as rows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [
        (tag, p.step, p.value) for tag in events.Tags()["scalars"] for p in events.Scalars(tag)
    ]
    rows = {step: {} for _, step, _ in points}
    for tag, step, value in points:
        assert tag not in rows[step], (tag, step)
        rows[step][tag] = value
    return [rows[step] for step in sorted(rows)]


def numbers(rows):
    return [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in rows]


def approximately(rows):
    """TensorBoard stores single precision."""
    return [pytest.approx(row, rel=1e-6) for row in numbers(rows)]


def lose_checkpoints_after(out, step):
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            folder.rename(out / f"lost_{folder.name}")


def test_a_resumed_run_continues_in_the_same_wandb_run(offline, corpus, tmp_path):
    out = tmp_path / "s2"
    command = ("train.py", *arguments(out, data_dir=corpus, stages=2, wandb="project", **RUN))
    script(*command)
    run, rows = wandb_run(out)
    assert (run.project, run.display_name) == ("project", "s2")
    assert rows == numbers(metrics(out)) and len(rows) == 17
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["stages"] == 2 and config["train_tokens"] > 0

    lose_checkpoints_after(out, 8)
    script(*command, WANDB_RUN_GROUP="group")
    again, rows = wandb_run(out)
    assert again.run_id == run.run_id and again.run_group == "group"
    assert rows == numbers(metrics(out)) and len(rows) == 17
    assert not again.resumed  # so that the whole file replaces an earlier one


def test_a_resumed_run_continues_in_the_same_tensorboard_curves(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN), "--tensorboard")
    script(*command)
    assert tensorboard_rows(out) == approximately(metrics(out)) and len(metrics(out)) == 17

    before = metrics(out)
    lose_checkpoints_after(out, 10)
    script(*command, "--learning_rate=0.1")
    after = metrics(out)
    assert before[:11] == after[:11] and before[12]["loss"] != after[12]["loss"]
    assert tensorboard_rows(out) == approximately(after)
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_a_tracker_that_is_added_later_receives_the_earlier_rows(offline, corpus, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    command = ("train.py", *arguments(out, data_dir=corpus, **RUN))
    script(*command)
    lose_checkpoints_after(out, 10)
    script(*command, "--tensorboard", "--wandb=project")
    assert tensorboard_rows(out) == approximately(metrics(out))
    assert wandb_run(out)[1] == numbers(metrics(out))


@pytest.mark.slow
def test_only_rank_0_tracks(offline, corpus, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    words = arguments(out, data_dir=corpus, wandb="project", **RUN | dict(steps=4))
    torchrun(2, "train.py", *words, "--tensorboard")
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert len(list(out.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_is_not_installed_is_named(monkeypatch, tmp_path, package):
    config = Config(wandb="project") if package == "wandb" else Config(tensorboard=True)
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "PathFinder" in repr(f)])
    for folder in (None, tmp_path / package):  # wandb creates such a folder, which is no package
        if folder:
            folder.mkdir()
        with pytest.raises(UserError, match=f"{package} is not installed: pip install"):
            check_trackers(config)
    check_trackers(Config())


def write_run(folder, *steps):
    (folder / "config.json").write_text("{}")
    text = "".join(json.dumps({"step": s, "seconds": s / 2}) + "\n" for s in steps)
    (folder / "metrics.jsonl").write_text(text)


TRACK = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
from stagewise.config import Config
from stagewise.trackers import Trackers
trackers = Trackers(Config(wandb="project"), Path(sys.argv[2]))
trackers.log({"step": 9, "flops": 10**22, "loss": None, "phase": "continual"})
trackers.close()
"""


@pytest.mark.parametrize("key", ["", "a" * 40])
def test_no_connection_does_not_end_a_run(tmp_path, offline, key):
    """Without an API key, or with a server that refuses connections."""
    write_run(tmp_path, 3)
    url = "http://127.0.0.1:9"
    environment = dict(WANDB_MODE="online", WANDB_BASE_URL=url, WANDB_API_KEY=key)
    environment |= dict(WANDB_INIT_TIMEOUT="3", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    error = script("-c", TRACK, ROOT, tmp_path, **environment).stderr
    assert error.count("warning: wandb failed and is no longer used") == 1
    assert "metrics.jsonl is complete" in error and "Traceback" not in error


def test_a_tracker_that_fails_later_does_not_end_a_run(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    write_run(tmp_path)
    trackers = Trackers(Config(tensorboard=True), tmp_path)
    trackers.log({"step": 0, "loss": 3.0, "mfu": None, "phase": "continual", "flops": 10**22})
    trackers.log({"loss": 10**400, "step": 1})
    trackers.log({"step": 2, "loss": 2.0})
    trackers.close()
    error = capfd.readouterr().err
    assert error.count("warning: tensorboard failed") == 1 and "metrics.jsonl is complete" in error
    assert tensorboard_rows(tmp_path) == [pytest.approx({"step": 0, "loss": 3, "flops": 1e22})]


def test_numbers_are_tracked_even_costs_above_64_bits(tmp_path, offline):
    write_run(tmp_path, 3, 7)
    script("-c", TRACK, ROOT, tmp_path)
    rows = wandb_run(tmp_path)[1]
    assert rows[:2] == [{"step": 3, "seconds": 1.5}, {"step": 7, "seconds": 3.5}]
    assert rows[2:] == [{"step": 9, "flops": pytest.approx(1e22)}]


def test_a_resumed_run_sends_only_rows_that_the_server_does_not_have(tmp_path, offline):
    """The server's answer is replaced; the run that it is given to is real."""
    write_run(tmp_path, 3, 7)
    resumed = """
import wandb
init = wandb.init
def resume(**options):
    run = init(**options)
    run._starting_step = 7  # the server has the rows up to step 6
    return run
wandb.init = resume
"""
    script("-c", resumed + TRACK, ROOT, tmp_path)
    assert [row["step"] for row in wandb_run(tmp_path)[1]] == [7, 9]


def test_tensorboard_hides_what_a_resumed_run_trains_again(tmp_path):
    """Also if the process was killed, and if it resumes before its first row."""
    pytest.importorskip("tensorboard")
    for start, loss in ((0, 3.0), (4, 2.0), (0, 1.0)):
        write_run(tmp_path, *range(start))
        trackers = Trackers(Config(tensorboard=True), tmp_path)  # not closed, as after SIGKILL
        for step in range(start, 8):
            trackers.log({"step": step, "loss": loss})
        expected = [3.0 if step < start else loss for step in range(8)]
        assert [row["loss"] for row in tensorboard_rows(tmp_path)] == expected
