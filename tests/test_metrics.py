"""metrics.jsonl: every row once, whatever happened to the file."""

import contextlib
import json
import os
import resource

import pytest

from stagewise.errors import UserError
from stagewise.metrics import MetricsWriter, last_row, read_metrics


def rows(*steps):
    return [{"step": s, "loss": s / 7} for s in steps]


def lines(*steps):
    return "".join(json.dumps(row) + "\n" for row in rows(*steps))


@contextlib.contextmanager
def largest_file(size):
    """No file can grow beyond `size` bytes: what a full disk does, without one."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_rows_after_the_step_and_a_truncated_last_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(0, 1, 2, 3) + '{"step": 4, "lo')
    assert read_metrics(path) == rows(0, 1, 2, 3)
    metrics = MetricsWriter(path, 2)
    metrics.write(rows(3)[0])
    metrics.close()
    assert path.read_text() == lines(0, 1, 2, 3)


def test_zeros_at_the_end_are_no_rows(tmp_path):
    """A power failure may leave them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(0, 1).encode() + b"\0\0\0\n\0\0")
    assert read_metrics(path) == rows(0, 1)


def test_the_rows_of_a_run_without_a_checkpoint_are_moved_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(0, 1))
    MetricsWriter(path, None).close()
    assert path.read_text() == ""
    assert read_metrics(tmp_path / "metrics.jsonl.former") == rows(0, 1)


def test_rows_are_retried_after_the_disk_was_full(tmp_path, capsys):
    """Written in part at first; then completely, each once and in order."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsWriter(path, None)
    metrics.write(rows(0)[0])
    with largest_file(path.stat().st_size + 10):
        metrics.write(rows(1)[0])
        metrics.write(rows(2)[0])
    assert capsys.readouterr().err.count("cannot be written") == 2
    assert read_metrics(path) == rows(0)
    metrics.write(rows(3)[0])
    assert read_metrics(path) == rows(0, 1, 2, 3)
    metrics.close()


@pytest.mark.parametrize("method", ["sync", "close"])
def test_pending_rows_are_written_when_the_file_is_synced_or_closed(tmp_path, capsys, method):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsWriter(path, None)
    with largest_file(5):
        metrics.write(rows(0)[0])
    assert "cannot be written" in capsys.readouterr().err
    getattr(metrics, method)()
    assert read_metrics(path) == rows(0)
    if method == "sync":
        metrics.close()


@pytest.mark.parametrize(
    "line", ["", "nonsense", "[1]", "3", '{"loss": 1}', '{"step": "x"}', '{"step": null}']
)
def test_a_line_that_is_not_a_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: not a valid row"):
        MetricsWriter(path, 5)
    assert path.read_text() == f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        MetricsWriter(tmp_path / "no folder" / "metrics.jsonl", None)


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_rows_after_a_lost_file_are_written(tmp_path, capsys, how):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, None)
    for row in rows(0, 1):
        writer.write(row)
    path.unlink() if how == "deleted" else path.write_text("")
    for row in rows(2, 3):
        writer.write(row)
    writer.close()
    assert read_metrics(path) == rows(2, 3)
    assert capsys.readouterr().err.count("rows were deleted by another process") == 1


def test_the_last_complete_row_is_read_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    for text, expected in (
        ("", None),
        ('{"step": 1', None),
        ('{"step": 1}\n', {"step": 1}),
        ('{"step": 1}\n{"step"', {"step": 1}),
        ('{"step": 1}\n' * 10**5 + '{"step": 2}\n', {"step": 2}),
        ('{"step": 1}\n3\n', None),
        ('{"step": 1}\n\xff\n', None),
    ):
        path.write_text(text)
        assert last_row(path) == expected
    path.unlink()
    os.mkfifo(path)
    assert last_row(path) is None
