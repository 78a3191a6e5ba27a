"""metrics.jsonl: every row once, whatever happened to the file."""

import json
import os
import resource

import pytest

from errors import UserError
from files import Metrics, read_metrics, write_whole


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


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", "3", '{"loss": 1}', '{"step": "x"}', '{"step": null}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: is damaged"):
        Metrics(path, 5)


def test_rows_wait_for_room_on_a_full_disk(tmp_path, capsys):
    """Written in part at first; then whole, each once and in order."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, -1)
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
