"""Checkpoints: whole or not at all, the one before where one is damaged, and never code."""

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import CheckpointWriter, checkpoints, load_checkpoint, load_moments, model_from, newest_checkpoint
from errors import UserError
from files import sha256
from model import GPT, GPTConfig
from train import make_optimizer

from conftest import ROOT, TINY, metrics, script

OPTIONS = {"seed": 1, "tokens_per_step": 64, "hellaswag_data": "none", "data_dir": "data"}
STATE = {"model_args": TINY | {"dropout": 0.0, "bias": True}, "n_blocks": 4, "step": 0, "seconds": 0.0, "health": {}}
STATE |= {"config": OPTIONS, "phases": [], "n_windows": 9, "tokenizer": "bytes"}


@pytest.fixture
def trained():
    """A model and its optimizer after an update."""
    import config

    model = GPT(GPTConfig(**TINY))
    optimizer = make_optimizer(model, config.Config())
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    return model, optimizer


def write(run_dir, trained, *steps, keep=10, milestones=()):
    writer = CheckpointWriter(run_dir, keep, set(milestones))
    for step in steps:
        writer.save(*trained, STATE | {"step": step})
    writer.close()
    return writer


def resum(folder):
    """Make a checkpoint's checksums those of its files as they are now."""
    names = [p.name for p in sorted(folder.iterdir()) if p.name != checkpoint.SUMS]
    (folder / checkpoint.SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def test_what_is_read_is_what_was_written(tmp_path, trained):
    model, optimizer = trained
    write(tmp_path, trained, 7)
    loaded = load_checkpoint(tmp_path, optimizer=True)
    assert loaded["step"] == 7 and loaded["n_blocks"] == 4
    again = model_from(loaded)
    assert again.transformer.wte.weight is again.lm_head.weight
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    fresh = torch.optim.AdamW(again.param_groups(0.1), fused=True)
    load_moments(fresh, again, loaded["optimizer"])
    for p, q in zip(model.parameters(), again.parameters()):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key]) and fresh.state[q]["step"] == 1


def test_other_tools_can_read_it(tmp_path, trained):
    """The weights with safetensors alone, the checksums with sha256sum."""
    write(tmp_path, trained, 7)
    (folder,) = checkpoints(tmp_path)
    assert torch.equal(load_file(folder / "model.safetensors")["transformer.wpe.weight"], trained[0].transformer.wpe.weight)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_the_newest_and_the_milestones_are_kept(tmp_path, trained):
    write(tmp_path, trained, 1, 2, 3, 4, 5, 6, keep=2, milestones={2, 4})
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "4", "5", "6"]
    (tmp_path / "checkpoints" / "step_00000006_mine").mkdir()  # left alone
    writer = write(tmp_path, trained, 5, keep=1, milestones={2})  # a run taken up again from before
    assert writer.failure is None and [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "5"]
    assert (tmp_path / "checkpoints" / "step_00000006_mine").exists()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, trained, monkeypatch):
    """What is written is the model as it was when the checkpoint began."""
    model, optimizer = trained
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(tensors, path):
        begun.set()
        assert may_go_on.wait(10)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    writer = CheckpointWriter(tmp_path, 2, set())
    writer.save(model, optimizer, STATE)
    assert begun.wait(10) and not checkpoints(tmp_path)
    for p in model.parameters():
        p.data.add_(1)
    may_go_on.set()
    writer.close()
    assert all(torch.equal(t, before[name]) for name, t in load_checkpoint(tmp_path)["model"].items() if name in before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, trained, capsys, file, how):
    write(tmp_path, trained, 3, 8)
    path = checkpoints(tmp_path)[1] / file
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    assert load_checkpoint(tmp_path, optimizer=True)["step"] == 3
    assert "step_00000008 is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="step_00000008 is damaged .* name another checkpoint|no checkpoint there"):
        load_checkpoint(checkpoints(tmp_path)[1], optimizer=True)
    shutil.rmtree(checkpoints(tmp_path)[0])
    with pytest.raises(UserError, match="all its 1 checkpoints are damaged"):
        newest_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path, trained):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"model": Code()}))
    resum(folder)
    with pytest.raises(UserError, match="is no readable checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"model": Code()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="no checkpoint there"):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path, trained):
    write(tmp_path, trained, 1)
    (folder,) = checkpoints(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    for change, named in [
        ({"model_args": None}, "lacks model_args"),
        ({"model_args": TINY}, "lacks dropout, bias"),
        ({"step": "3"}, "lacks step"),
        ({"model_args": STATE["model_args"] | {"n_embd": 16}}, "do not fit its own model_args"),
        ({"model_args": STATE["model_args"] | {"n_head": 0}}, "do not fit its own model_args"),
        ({"n_blocks": 9}, "do not fit its own model_args"),
    ]:
        wrong = {k: v for k, v in (state | change).items() if v is not None}
        (folder / "state.json").write_text(json.dumps(wrong))
        resum(folder)
        with pytest.raises(UserError, match=named):
            model_from(load_checkpoint(tmp_path))


def test_moments_of_other_parameters_are_refused(trained):
    model, optimizer = trained
    moments = {"transformer.wpe.weight/exp_avg": torch.zeros(3, 3)}
    for wrong in (moments, {"transformer.h.9.x/step": torch.zeros(())}, {"nonsense": torch.zeros(2)}):
        with pytest.raises(UserError, match="does not fit the model"):
            load_moments(optimizer, model, wrong)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path, trained, capsys):
    write(tmp_path, trained, 1)
    trained[0].transformer.h[2].mlp.c_fc.weight.data[3, 4] = float("inf")
    writer = write(tmp_path, trained, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000001"]
    assert "h.2.mlp.c_fc.weight is not finite" in writer.failure and "earlier ones stay" in capsys.readouterr().err


@pytest.fixture
def small_files():
    """No file can grow beyond 40,000 bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, trained, small_files, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    write(tmp_path, trained, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer = CheckpointWriter(tmp_path, 1, set())
    writer.save(*trained, STATE | {"step": 2})
    writer.wait()
    assert "step 2: no checkpoint could be written" in writer.failure and "earlier ones stay" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # room again
    writer.save(*trained, STATE | {"step": 3})
    writer.close()
    assert writer.failure is None and load_checkpoint(tmp_path)["step"] == 3


def test_a_run_on_a_full_disk_goes_on(run_train, capsys, monkeypatch):
    """Checkpoints and metrics fail from step 4 to 14; the run ends as if they had not, and lacks old checkpoints only."""
    import train

    whole = run_train("whole", steps=16, checkpoint_interval=4)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    update, step = train.update, 0

    def limited(*args):
        nonlocal step
        step += 1
        if step in (4, 15):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step == 4 else hard, hard))
        return update(*args)

    monkeypatch.setattr(train, "update", limited)
    try:
        out = run_train("run", steps=16, checkpoint_interval=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = capsys.readouterr().err
    assert said.count("no checkpoint could be written") >= 2 and "metrics.jsonl: cannot be written" in said
    assert [r["loss"] for r in metrics(out)[1:]] == [r["loss"] for r in metrics(whole)[1:]]
    assert not {"step_00000004", "step_00000008"} & {p.name for p in checkpoints(out)}
    weights = load_checkpoint(whole)["model"]
    assert all(torch.equal(t, weights[name]) for name, t in load_checkpoint(out)["model"].items())


def test_a_run_whose_last_checkpoint_fails_says_so(run_train):
    with pytest.raises(UserError, match="step 2: no checkpoint could be written .* is lost; mend that"):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            run_train("run", steps=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path, trained):
    """SIGKILL while files are being written; the next write clears up."""
    program = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import checkpoint, config, torch
from test_checkpoint import STATE, TINY
from model import GPT, GPTConfig
from train import make_optimizer
save_file = checkpoint.save_file
def slow(tensors, path):
    save_file(tensors, path)
    print("written", flush=True)
    time.sleep(30)
checkpoint.save_file = slow
model = GPT(GPTConfig(**TINY))
writer = checkpoint.CheckpointWriter({str(tmp_path)!r}, 1, set())
writer.save(model, make_optimizer(model, config.Config()), STATE | {{"step": 9}})
writer.close()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "checkpoints" / ".partial" / "model.safetensors").exists() and not checkpoints(tmp_path)
    write(tmp_path, trained, 10)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_checkpoint_stalls_training_for_less_than_a_step(tmp_path):
    """Of a model of 11M parameters; one of 124M takes eleven times as long for either."""
    import config

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=1024))
    optimizer = make_optimizer(model, config.Config())
    x = torch.zeros(8, 256, dtype=torch.long)
    writer, steps, stalls = CheckpointWriter(tmp_path, 1, set()), [], []
    for i in range(3):
        start = time.perf_counter()
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
        writer.wait()  # of the one before: real intervals are longer than a write
        start = time.perf_counter()
        writer.save(model, optimizer, STATE | {"step": i})
        stalls.append(time.perf_counter() - start)
    writer.close()
    assert sorted(stalls)[1] < sorted(steps)[1]


def test_sampling_from_a_damaged_run_uses_the_checkpoint_before(run_train):
    out = run_train("run", steps=4, checkpoint_interval=2)
    path = checkpoints(out)[-1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = script("sample.py", out, "--max_new_tokens=5", "--num_samples=1", "--device=cpu")
    assert "step_00000004 is damaged" in result.stderr and "--- sample 1" in result.stdout
