"""Atomic writes, the lock of a run folder, and JSON with a schema."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from stagewise.errors import UserError
from stagewise.fileio import FolderLock, atomic_write, convert, decode_json, read_bytes, sha256

LOCK = (
    "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
    "from stagewise.fileio import FolderLock; lock = FolderLock(Path(sys.argv[2]))"
)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_atomic_write_leaves_the_old_file_or_all_of_the_new_one(tmp_path, monkeypatch, failing):
    path = tmp_path / "schedule.json"
    atomic_write(path, "first")

    def fail(*args):
        raise OSError("no")

    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(os, failing, fail)
        m.setattr(type(path), "replace", fail if failing == "replace" else type(path).replace)
        atomic_write(path, "second")
    assert path.read_text() == "first"
    atomic_write(path, "third")
    assert path.read_text() == "third" and [p.name for p in tmp_path.iterdir()] == ["schedule.json"]


def test_a_second_run_in_the_same_folder_is_an_error(tmp_path):
    command = [sys.executable, "-c", LOCK, str(ROOT), str(tmp_path)]
    lock = FolderLock(tmp_path)
    second = subprocess.run(command, capture_output=True, text=True)
    assert "UserError" in second.stderr and "another run is using it" in second.stderr
    with pytest.raises(UserError, match="another run is using it"):
        FolderLock(tmp_path)
    del lock
    assert subprocess.run(command).returncode == 0


def test_the_lock_ends_with_its_process(tmp_path):
    """Also if it is killed, and so cannot release the lock itself."""
    program = LOCK + "; print('locked', flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-c", program, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is using it"):
        FolderLock(tmp_path)
    process.kill()
    process.wait()
    FolderLock(tmp_path)


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out_dir"):
        FolderLock(tmp_path / "file")


@dataclass
class Inner:
    count: int


@dataclass
class Outer:
    name: str
    inner: list[Inner]


def test_json_is_decoded_to_its_schema():
    text = '{"name": "x", "inner": [{"count": 3}], "unknown": 1}'
    assert decode_json(text, Outer) == Outer("x", [Inner(3)])


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "truncated"),
        ("{", "truncated"),
        (b"\xff", "malformed"),
        ("[]", "expected `object`"),
        ('{"inner": []}', "name"),
        ('{"name": 3, "inner": []}', "name: expected `str`, got `int`"),
        ('{"name": "x", "inner": [{"count": 1}, {"count": "1"}]}', r"inner\[1\]\.count: expected"),
        ('{"name": "x", "inner": [{"count": NaN}]}', "malformed"),
    ],
)
def test_json_of_another_schema_is_a_value_error_that_names_the_field(text, named):
    with pytest.raises(ValueError, match=f"(?i){named}"):
        decode_json(text, Outer)


def test_json_that_is_nested_too_deeply_is_a_value_error():
    with pytest.raises(ValueError, match="recursion"):
        decode_json("[" * 100_000, Any)


def test_converted_values_have_the_same_errors():
    assert convert({"name": "x", "inner": [{"count": 3}]}, Outer) == Outer("x", [Inner(3)])
    with pytest.raises(ValueError, match=r"inner\[0\].count: expected `int`, got `float`"):
        convert({"name": "x", "inner": [{"count": 0.5}]}, Outer)


# --- links, and folders that move


def test_links_planted_in_a_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", ".lock"):
        (folder / name).symlink_to(outside)
    atomic_write(folder / "config.json", "new")
    assert (folder / "config.json").read_text() == "new"
    with pytest.raises(UserError, match="run: "):
        FolderLock(folder)
    assert outside.read_text() == "precious"
    assert {p.name for p in folder.iterdir()} == {"config.json", ".lock"}


def test_a_folder_that_moved_or_disappeared_is_an_error(tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.check()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"run: was renamed to .*moved .*--out_dir=.*moved"):
        lock.check()
    FolderLock(tmp_path / "run")  # another run in its place
    with pytest.raises(UserError, match="was renamed"):
        lock.check()
    (tmp_path / "moved" / ".lock").unlink()
    (tmp_path / "moved").rmdir()
    with pytest.raises(UserError, match="run: was deleted while the run was writing to it"):
        lock.check()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_never_end_are_not_read(tmp_path, kind):
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    for read in (read_bytes, sha256):
        with pytest.raises(OSError, match="Not a regular file"):
            read(path)
