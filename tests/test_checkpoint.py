"""Checkpoints: atomic, verified, the one before used if one is corrupted, and never code."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, metrics, script
from safetensors.torch import load_file, save_file

import train
from model import GPT, GPTConfig
from stagewise import checkpoint, fileio
from stagewise.checkpoint import (
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_state_from,
    verify,
)
from stagewise.config import Config
from stagewise.errors import UserError
from stagewise.fileio import sha256

STATE: dict = {
    "step": 0,
    "n_blocks": TINY["n_layer"],
    "model_config": TINY | {"dropout": 0.0, "bias": True},
    "seconds": 0.0,
    "loss_history": {},
    "config": {"seed": 1, "hellaswag_data": "none", "data_dir": "data"},
    "phases": [],
    "n_windows": 9,
    "tokenizer": "bytes",
}


@pytest.fixture
def trained():
    """A model and its optimizer after an update."""
    model = GPT(GPTConfig(**TINY))
    optimizer = train.make_optimizer(model, Config())
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    return model, optimizer


def write(run_dir, trained, *steps, keep=10, milestones=()):
    writer = CheckpointWriter(run_dir, keep, set(milestones))
    for step in steps:
        writer.save(*trained, STATE | {"step": step})
    writer.close()
    return writer


def write_sums(folder):
    """Make a checkpoint's checksums those of its files as they are now."""
    names = [p.name for p in sorted(folder.iterdir()) if p.name != checkpoint.SUMS]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    (folder / checkpoint.SUMS).write_text("".join(lines))


def model_of(loaded):
    return GPT.from_weights(loaded["model_config"], loaded["model"])


def names(run_dir):
    return [p.name for p in checkpoints(run_dir)]


# --- reading and writing


def test_what_is_read_is_what_was_written(tmp_path, trained):
    model, optimizer = trained
    write(tmp_path, trained, 7)
    loaded = load_checkpoint(tmp_path, optimizer=True)
    assert {key: loaded[key] for key in STATE} == STATE | {"step": 7}
    again = model_of(loaded)
    assert again.transformer.wte.weight is again.lm_head.weight
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    state = optimizer_state_from(loaded["optimizer"], dict(again.named_parameters()))
    new = train.make_optimizer(again, Config(), state)
    for p, q in zip(model.parameters(), again.parameters()):
        assert optimizer.state[p]["step"] == 1
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][key], new.state[q][key])


def test_buffers_are_as_large_as_the_tensors_and_reused(tmp_path, trained):
    model, optimizer = trained
    writer = CheckpointWriter(tmp_path, 10, set())
    for step in (1, 2):
        writer.save(model, optimizer, STATE | {"step": step})
    n_tensors = 4 * len(list(model.parameters()))  # weights, two moments and step counts
    needed = 3 * 4 * model.num_params()
    (memory,) = writer._memory
    assert needed < memory.nbytes <= needed + checkpoint.ALIGNMENT * n_tensors
    writer.close()
    assert writer._memory == [] and writer.failure is None


def test_other_tools_can_read_it(tmp_path, trained):
    """The weights with safetensors alone, the checksums with sha256sum."""
    write(tmp_path, trained, 7)
    (folder,) = checkpoints(tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["transformer.wpe.weight"], trained[0].transformer.wpe.weight)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_the_newest_and_the_milestones_are_kept(tmp_path, trained):
    write(tmp_path, trained, 1, 2, 3, 4, 5, 6, keep=2, milestones={2, 4})
    assert [name[-1] for name in names(tmp_path)] == ["2", "4", "5", "6"]
    unrelated = tmp_path / "checkpoints" / "step_00000006_mine"
    unrelated.mkdir()
    writer = write(tmp_path, trained, 5, keep=1, milestones={2})  # a run resumed from before
    assert writer.failure is None and [name[-1] for name in names(tmp_path)] == ["2", "5"]
    assert unrelated.exists()


def test_training_continues_while_a_checkpoint_is_written(tmp_path, trained, monkeypatch):
    """What is written is the model as it was when `save` was called."""
    model, optimizer = trained
    begun, may_continue = threading.Event(), threading.Event()

    def slow(tensors, path):
        begun.set()
        assert may_continue.wait(10)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state_before = optimizer.state[model.lm_head.weight]["exp_avg"].clone()
    writer = CheckpointWriter(tmp_path, 2, set())
    writer.save(model, optimizer, STATE)
    assert begun.wait(10) and not checkpoints(tmp_path)
    for p in model.parameters():
        p.data.add_(1)
        optimizer.state[p]["exp_avg"].add_(1)
    may_continue.set()
    writer.close()
    loaded = load_checkpoint(tmp_path, optimizer=True)
    assert all(torch.equal(loaded["model"][name], p) for name, p in before.items())
    assert torch.equal(loaded["optimizer"]["transformer.wte.weight/exp_avg"], state_before)


def test_saving_waits_for_less_than_a_step(tmp_path):
    """Of a model with 11M parameters; one with 124M takes eleven times as long for either."""
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=1024))
    optimizer = train.make_optimizer(model, Config())
    x = torch.zeros(2, 256, dtype=torch.long)
    writer, steps, waits = CheckpointWriter(tmp_path, 1, set()), [], []
    for i in range(3):
        start = time.perf_counter()
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
        writer.wait()  # for the one before: real intervals are longer than a write
        start = time.perf_counter()
        writer.save(model, optimizer, STATE | {"step": i})
        waits.append(time.perf_counter() - start)
    writer.close()
    assert sorted(waits)[1] < sorted(steps)[1]


# --- corruption


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("how", ["truncated", "bit flipped", "deleted", "empty"])
def test_a_corrupted_checkpoint_is_passed_over_with_a_warning(tmp_path, trained, capsys, file, how):
    write(tmp_path, trained, 3, 8)
    older, newer = checkpoints(tmp_path)
    path = newer / file
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "bit flipped":
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
    assert verify(older) is None and verify(newer) is not None
    assert load_checkpoint(tmp_path, optimizer=True)["step"] == 3
    assert "step_00000008 is corrupted" in capsys.readouterr().err
    with pytest.raises(UserError, match="step_00000008(:| is corrupted .* use another checkpoint)"):
        load_checkpoint(newer, optimizer=True)
    shutil.rmtree(older)
    with pytest.raises(UserError, match="all 1 checkpoints are corrupted"):
        newest_checkpoint(tmp_path)


def test_a_run_without_a_checkpoint_is_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for path in (tmp_path, tmp_path / "no such folder"):
        with pytest.raises(UserError, match="has no checkpoint: name a run folder"):
            load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, trained):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    for name in ("model.safetensors", "optimizer.safetensors"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps({"model": Code()}))
        write_sums(folder)
        with pytest.raises(UserError, match="is not a valid checkpoint"):
            load_checkpoint(tmp_path, optimizer=True)
        (folder / name).write_bytes(good)
    torch.save({"model": Code()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="cannot be loaded without executing code"):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "executed").exists()


MODEL_CONFIG = STATE["model_config"]


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"format_version": 999},
            "checkpoint format 999, but this version of the code reads format 1",
        ),
        (
            {"format_version": None},
            "checkpoint format 0, but this version of the code reads format 1",
        ),
        ({"step": "3"}, "step: expected `int`"),
        ({"step": -1}, "step: "),
        ({"n_blocks": 2.5}, "n_blocks: expected `int`"),
        ({"n_blocks": 3}, "n_blocks is 3, but there are 4 blocks"),
        ({"model_config": None}, "required field `model_config`"),
        ({"phases": {}}, "phases: expected `array`"),
        ({"model_config": MODEL_CONFIG | {"n_embd": 16}}, "do not fit the model's sizes"),
        ({"model_config": MODEL_CONFIG | {"n_head": 0}}, "do not fit the model's sizes"),
        ({"model_config": MODEL_CONFIG | {"n_layer": 3}}, "do not fit the model's sizes"),
        ({"model_config": MODEL_CONFIG | {"bias": "no"}}, "do not fit the model's sizes"),
    ],
)
def test_a_checkpoint_of_something_else_is_an_error(tmp_path, trained, change, named):
    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    state = json.loads((folder / "state.json").read_text()) | change
    state = {key: value for key, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(state))
    write_sums(folder)
    with pytest.raises(UserError, match=named):
        model_of(load_checkpoint(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_an_error(tmp_path, trained):
    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name in ("transformer.h.1.ln_1.weight", "transformer.wte.weight"):
        save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")
        write_sums(folder)
        with pytest.raises(
            UserError, match="is not a valid checkpoint|do not fit the model's sizes"
        ):
            model_of(load_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "tensors",
    [
        {"transformer.wpe.weight/exp_avg": (3, 3)},  # another shape
        {"transformer.wpe.weight/exp_avg": (64, 32)},  # not all of the state
        {"transformer.h.9.x/step": ()},
        {"nonsense": (2,)},
    ],
)
def test_optimizer_state_of_other_parameters_is_an_error(trained, tensors):
    wrong = {name: torch.zeros(shape) for name, shape in tensors.items()}
    with pytest.raises(UserError, match="optimizer state does not match the model"):
        optimizer_state_from(wrong, dict(trained[0].named_parameters()))


def test_sampling_from_a_corrupted_run_uses_the_checkpoint_before(run_train):
    out = run_train("run", steps=4, checkpoint_interval=2)
    path = checkpoints(out)[-1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = script("sample.py", out, "--max_new_tokens=5", "--num_samples=1", "--device=cpu")
    assert "step_00000004 is corrupted" in result.stderr and "--- sample 1" in result.stdout


# --- writes that fail


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, trained, capsys, value):
    write(tmp_path, trained, 1)
    trained[0].transformer.h[2].mlp.c_fc.weight.data[3, 4] = value
    writer = write(tmp_path, trained, 2)
    assert names(tmp_path) == ["step_00000001"]
    assert "h.2.mlp.c_fc.weight is not finite" in writer.failure
    assert "earlier checkpoints remain" in capsys.readouterr().err


def limit_file_size(size):
    """No file can grow beyond `size` bytes: what a full disk does, without one."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture
def unlimited():
    yield
    limit_file_size(None)


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, trained, unlimited, capsys):
    write(tmp_path, trained, 1)
    writer = CheckpointWriter(tmp_path, 1, set())
    limit_file_size(40_000)
    writer.save(*trained, STATE | {"step": 2})
    writer.wait()
    assert "step 2: checkpoint not written" in writer.failure
    assert "earlier checkpoints remain" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    limit_file_size(None)
    writer.save(*trained, STATE | {"step": 3})
    writer.close()
    assert writer.failure is None and load_checkpoint(tmp_path)["step"] == 3


def test_a_run_continues_on_a_full_disk(run_train, unlimited, capsys, monkeypatch):
    """Checkpoints and metrics fail from step 4 to 14. The run ends as if they had not."""
    uninterrupted = run_train("uninterrupted", steps=16, checkpoint_interval=4)
    train_step, step = train.train_step, 0

    def limited(*args):
        nonlocal step
        step += 1
        if step in (4, 15):
            limit_file_size(1000 if step == 4 else None)
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", limited)
    out = run_train("run", steps=16, checkpoint_interval=4)
    warnings = capsys.readouterr().err
    assert warnings.count("checkpoint not written") >= 2
    assert "metrics.jsonl: cannot be written" in warnings
    assert [r["loss"] for r in metrics(out)[1:]] == [r["loss"] for r in metrics(uninterrupted)[1:]]
    assert not {"step_00000004", "step_00000008"} & set(names(out))
    weights = load_checkpoint(uninterrupted)["model"]
    for name, tensor in load_checkpoint(out)["model"].items():
        assert torch.equal(tensor, weights[name])


def test_a_run_whose_last_checkpoint_fails_is_an_error(run_train, unlimited):
    limit_file_size(20_000)
    with pytest.raises(UserError, match="step 2: checkpoint not written .* fix the cause"):
        run_train("run", steps=2)


KILLED = """
import sys, time
sys.path[:0] = sys.argv[1:3]
import train
from model import GPT, GPTConfig
from stagewise import checkpoint
from stagewise.config import Config
from test_checkpoint import STATE, TINY
save_file = checkpoint.save_file
def slow(tensors, path):
    save_file(tensors, path)
    print("written", flush=True)
    time.sleep(30)
checkpoint.save_file = slow
model = GPT(GPTConfig(**TINY))
writer = checkpoint.CheckpointWriter(sys.argv[3], 1, set())
writer.save(model, train.make_optimizer(model, Config()), STATE | {"step": 9})
writer.close()
"""


@pytest.mark.slow
def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path, trained):
    """SIGKILL while files are being written; the next write removes what is left."""
    command = [sys.executable, "-c", KILLED, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "checkpoints" / ".partial" / "model.safetensors").exists()
    assert not checkpoints(tmp_path)
    write(tmp_path, trained, 10)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]


# --- permissions and links


def test_files_have_the_permissions_of_the_umask(tmp_path, trained):
    former = os.umask(0o027)
    try:
        write(tmp_path, trained, 1)
    finally:
        os.umask(former)
    (folder,) = checkpoints(tmp_path)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("failing", ["model.safetensors", "SHA256SUMS", "checkpoints"])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_corrupted_one(
    tmp_path, trained, monkeypatch, failing
):
    """As when a colleague resumes a run: no older checkpoint is used, and no new run started."""
    write(tmp_path, trained, 3, 8)

    def denied(original):
        def read(path):
            if path.name == failing and "step_00000003" not in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path)

        return read

    monkeypatch.setattr(fileio, "open_file", denied(fileio.open_file))
    monkeypatch.setattr(Path, "iterdir", denied(Path.iterdir))
    with pytest.raises(UserError, match=f"{failing}: cannot be read .Permission denied.*readable"):
        newest_checkpoint(tmp_path)


def test_links_in_place_of_partial_folders_are_not_followed(tmp_path, trained):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("precious")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".partial", ".former"):
        (run / "checkpoints" / name).symlink_to(outside)
    write(run, trained, 1)
    write(run, trained, 1)
    assert names(run) == ["step_00000001"]
    assert [p.name for p in outside.iterdir()] == ["thesis.txt"]


def test_optimizer_state_of_another_type_is_an_error(tmp_path, trained):
    write(tmp_path, trained, 1)
    model = trained[0]
    state = load_checkpoint(tmp_path, optimizer=True)["optimizer"]
    for key, value in (
        ("exp_avg", state["transformer.wpe.weight/exp_avg"].double()),
        ("step", torch.tensor(-1.0)),
        ("step", torch.tensor(float("nan"))),
        ("step", torch.tensor(1)),
    ):
        changed = state | {f"transformer.wpe.weight/{key}": value}
        with pytest.raises(UserError, match="transformer.wpe.weight: the optimizer state does not"):
            optimizer_state_from(changed, dict(model.named_parameters()))


@pytest.mark.parametrize("step", [-1, True, 10**30, 1.5, "1"])
def test_a_step_that_is_no_count_is_an_error(tmp_path, trained, step):
    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    text = (folder / "state.json").read_text().replace('"step": 1,', f'"step": {json.dumps(step)},')
    (folder / "state.json").write_text(text)
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    sums = [s for s in sums if "state.json" not in s]
    sums.append(f"{sha256(folder / 'state.json')}  state.json")
    (folder / "SHA256SUMS").write_text("\n".join(sums))
    with pytest.raises(UserError, match="is not a valid checkpoint .step: "):
        load_checkpoint(folder)
