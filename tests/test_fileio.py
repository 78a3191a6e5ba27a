"""metrics.jsonl: every row once, whatever happened to the file."""

import json
import os
import resource
import subprocess
import sys

import pytest

from errors import UserError
from files import Metrics, lock_folder, read_metrics, write_whole

from conftest import ROOT


def rows(*steps):
    return [{"step": s, "loss": s / 7} for s in steps]


def test_rows_beyond_the_step_and_a_torn_last_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(0, 1, 2, 3)) + '{"step": 4, "lo')
    assert read_metrics(path) == rows(0, 1, 2, 3)
    metrics = Metrics(path, 2)
    metrics.write({"step": 3, "loss": 3 / 7})
    metrics.close()
    assert read_metrics(path) == rows(0, 1, 2, 3) and path.read_text().endswith("}\n")
    path.write_bytes(path.read_bytes() + b"\0\0\0\n\0\0")  # what a power failure may leave
    assert read_metrics(path) == rows(0, 1, 2, 3)


def test_what_a_run_without_a_checkpoint_has_measured_is_put_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(0, 1)))
    Metrics(path, None).close()
    assert path.read_text() == "" and read_metrics(tmp_path / "metrics.jsonl.former") == rows(0, 1)


def test_rows_that_wait_are_written_at_the_latest_when_it_closes(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, None)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        metrics.write(rows(0)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot be written" in capsys.readouterr().err
    metrics.close()
    assert read_metrics(path) == rows(0)


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    held = lock_folder(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import files; files.lock_folder(files.Path({str(tmp_path)!r}))"
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "another run writes there" in second.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", "3", '{"loss": 1}', '{"step": "x"}', '{"step": null}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: is damaged"):
        Metrics(path, 5)


def test_rows_wait_for_room_on_a_full_disk(tmp_path, capsys):
    """Written in part at first; then whole, each once and in order."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, None)
    metrics.write(rows(0)[0])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        metrics.write(rows(1)[0])
        metrics.write(rows(2)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert capsys.readouterr().err.count("cannot be written") == 2 and read_metrics(path) == rows(0)
    metrics.write(rows(3)[0])
    assert read_metrics(path) == rows(0, 1, 2, 3)
    metrics.close()


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_whole(path, "first")
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no")))
        write_whole(path, "second")
    assert path.read_text() == "first"
    write_whole(path, "third")
    assert path.read_text() == "third" and [p.name for p in tmp_path.iterdir()] == ["plan.json"]
