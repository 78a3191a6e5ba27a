"""Processes of torch.distributed: ranks, agreeing to stop, replicas, sharded training."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arguments, metrics, needs_compiler, script, torchrun, without_clock

from stagewise.checkpoint import load_checkpoint
from stagewise.distributed import (
    Ranks,
    any_rank,
    check_replicas,
    ranks_from_environment,
)
from stagewise.errors import UserError

PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_ranks_are_read_from_the_environment_of_torchrun(monkeypatch):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == Ranks(0, 0, 1, launched=False)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as some schedulers do
    assert not ranks_from_environment().launched
    values = dict(zip(PLACES, ("3", "1", "4", "localhost", "29500")))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    ranks = ranks_from_environment()
    assert ranks == Ranks(3, 1, 4, launched=True) and not ranks.master
    for name in PLACES:
        if name != "WORLD_SIZE":  # without it, this is a single process
            monkeypatch.delenv(name)
            with pytest.raises(UserError, match=f"set in the environment, but not {name}:"):
                ranks_from_environment()
            monkeypatch.setenv(name, values[name])
        for wrong in ("abc", "-1", "", "9999999", "4" if "RANK" in name else "1e3"):
            if name != "MASTER_ADDR":
                monkeypatch.setenv(name, wrong)
                with pytest.raises(UserError, match="in the environment|is not a number"):
                    ranks_from_environment()
        monkeypatch.setenv(name, values[name])


def test_a_single_process_agrees_with_itself():
    assert any_rank(True, None) and not any_rank(False, None)
    check_replicas(torch.nn.Linear(2, 2), 0, None)


# Of two ranks each: whether one that is stopping stops both, and which parameter differs.
AGREE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from stagewise.distributed import any_rank, check_replicas, init_process_group
from stagewise.distributed import ranks_from_environment
from stagewise.errors import UserError
ranks = ranks_from_environment()
group = init_process_group(torch.device("cpu"), ranks, timeout=60)
answers = [any_rank(ranks.rank == r, group) for r in (0, 1, 2)]
assert answers == [True, True, False], answers
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
check_replicas(model, 6, group)
if ranks.rank == 1:
    model[1].bias.data.view(torch.int32)[2] ^= 1  # the least that a number can differ by
try:
    check_replicas(model, 7, group)
    sys.exit("not detected")
except UserError as error:
    print(f"rank {ranks.rank}: {error}", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_agree_to_stop_and_detect_replicas_that_differ(tmp_path):
    program = tmp_path / "agree.py"
    program.write_text(AGREE)
    result = torchrun(2, program, ROOT)
    for rank in (0, 1):
        assert f"rank {rank}: step 7: 1.bias on rank 1 differs from rank 0" in result.stdout


FLIP = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train
from stagewise.errors import report_user_errors
train_step, step = train.train_step, 0
def flip(model, *args):
    global step
    result = train_step(model, *args)
    step += 1
    if step == 3 and os.environ["RANK"] == "1":
        weight = model.module.transformer.h[0].mlp.c_fc.weight
        weight.data.view(torch.int32)[7, 9] ^= 1
    return result
train.train_step = flip
with report_user_errors():
    train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["phase", "evaluation"])
def test_replicas_that_differ_end_the_run_at_the_next_phase_or_evaluation(corpus, tmp_path, when):
    """The last bit of one value on one rank."""
    program = tmp_path / "flip.py"
    program.write_text(FLIP)
    options = dict(stages=2) if when == "phase" else dict(eval_interval=4)
    options |= dict(steps=16, data_dir=corpus)
    result = torchrun(2, program, *arguments(tmp_path / "run", **options), check=False)
    assert result.returncode != 0
    assert (
        "error: step 4: transformer.h.0.mlp.c_fc.weight on rank 1 differs from rank 0"
        in result.stderr
    )


# --------------------------------------------------------------------------------------------------
# --sharding=fsdp

# On three ranks, so that tensors are sharded unevenly. After every growth operator, a sharded model
# and its optimizer state are bit-identical to the full ones, and each rank holds its share only.
GROW = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import growth, memory, schedule, train
from model import GPT, GPTConfig
from stagewise.checkpoint import optimizer_state_from
from stagewise.config import Config
from stagewise.distributed import full_tensor, init_process_group, is_sharded, make_mesh
from stagewise.distributed import ranks_from_environment, shard
ranks, cpu = ranks_from_environment(), torch.device("cpu")
init_process_group(cpu, ranks, timeout=60)
mesh = make_mesh(cpu, ranks)
for n in (1, 2, 3, 4, 7):
    t = torch.arange(2.0 * n).view(n, 2)
    assert torch.equal(full_tensor(shard(t, mesh)), t)
config = GPTConfig(n_layer=6, n_head=2, n_embd=16, block_size=8, vocab_size=65)
def same(full, sharded):
    assert not is_sharded(full) and is_sharded(sharded) == (full.dim() > 0)
    assert torch.equal(full, full_tensor(sharded))
for name in growth.OPERATORS:
    old = 4
    sources = growth.source_map(name, old, 6)
    weights = GPT(config, old, seed=3).state_dict()
    models, states = [], []
    for m in (None, mesh):
        model = GPT.from_weights(config, weights, cpu, m)
        moments = {}
        generator = torch.Generator().manual_seed(1)
        for key, p in model.named_parameters():
            exp_avg = torch.randn(p.shape, generator=generator)
            moments |= {f"{key}/exp_avg": exp_avg, f"{key}/exp_avg_sq": exp_avg**2}
            moments[f"{key}/step"] = torch.tensor(5.0)
        state = optimizer_state_from(moments, dict(model.named_parameters()))
        model.shrink_and_perturb(0.5, 0.1, seed=4)
        model.grow(sources, seed=3, optimizer_state=state)
        train.add_zero_state(state, model)
        models.append(model)
        states.append(state)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        same(p, q)
        assert states[0][p].keys() == states[1][q].keys()
        for key in states[0][p]:
            same(states[0][p][key], states[1][q][key])
# The estimate divides evenly; here, 65 rows are 22 + 22 + 21, and 16 rows are 6 + 6 + 4.
schedule = schedule.make_schedule(6, 8, context_length=8, tokens_per_step=24)
(estimate,) = memory.phase_memory(schedule, config, batch_size=1, world_size=3, sharding="fsdp")
moments = [t.to_local() for s in states[1].values() for k, t in s.items() if k != "step"]
local = 4 * sum(t.numel() for t in moments)
assert 0.8 < local / estimate.optimizer_state < 1.2, (local, estimate)
print(f"rank {ranks.rank}: done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_grows_like_a_full_one(tmp_path):
    program = tmp_path / "grow.py"
    program.write_text(GROW)
    result = torchrun(3, program, ROOT)
    assert all(f"rank {rank}: done" in result.stdout for rank in range(3))


METHODS = ROOT / "configs" / "methods"
MIDAS = (METHODS / "midas.py", dict(steps=10))
FSDP_RUNS = {
    "baseline": ((), dict(steps=8)),
    "paper": ((), dict(stages=4, steps=16, continual_steps=4, eval_interval=5)),
    "released_code": ((), dict(stages=2, steps=8, phase1="released_code", dropout=0.1)),
    "midas": (MIDAS[:1], MIDAS[1]),
    "interpolation": ((METHODS / "interpolation.py",), dict(steps=10, optimizer_state="zero")),
    "layer_dropout": ((METHODS / "layer_dropout.py",), dict(steps=16, skip_rate=0.9)),
    "freezeout": ((METHODS / "freezeout.py",), dict(steps=16)),
    "ramps": (
        (),
        dict(steps=8, context_ramp="0:32 50%:64", tokens_per_step_ramp="0:512 50%:1024"),
    ),
    "bfloat16": ((), dict(stages=2, steps=8, dtype="bfloat16")),
    "zero1_paper": ((), dict(stages=4, steps=16, eval_interval=5, sharding="zero1")),
    "zero1_layer_dropout": (
        (METHODS / "layer_dropout.py",),
        dict(steps=16, skip_rate=0.9, eval_interval=1, sharding="zero1"),
    ),
}
FSDP = dict(sharding="fsdp", batch_size=2)  # 4 micro-batches per step


def assert_rows_match(out, expected, rel=2e-5):
    for row, other in zip(metrics(out), metrics(expected), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert (key in row) == (key in other)
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=rel), (row["step"], key)
        for key in ("step", "blocks", "tokens", "flops", "lr", "skipped_steps", "hellaswag_n"):
            assert row.get(key) == other.get(key), (row["step"], key)


def assert_checkpoints_match(out, expected, rel=0.0):
    """Compare weights and optimizer states by the norm of the difference of each tensor.

    AdamW divides rounding by rounding, so single elements can differ by a step.
    """
    a, b = (load_checkpoint(run, optimizer=True) for run in (out, expected))
    for kind in ("model", "optimizer"):
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            other = b[kind][name]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            tensor, other = tensor.double(), other.double()
            difference = (tensor - other).norm()
            assert difference <= rel * other.norm(), (name, difference, other.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", FSDP_RUNS)
def test_fsdp_matches_ddp(name, corpus, tmp_path):
    files, options = FSDP_RUNS[name]
    options = dict(data_dir=corpus, grad_clip=1.0) | FSDP | options
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    torchrun(2, "train.py", *files, *arguments(ddp, **options | {"sharding": "ddp"}))
    torchrun(2, "train.py", *files, *arguments(fsdp, **options))
    bf16 = name == "bfloat16"  # magnifies rounding of the weights
    assert_rows_match(fsdp, ddp, rel=1e-3 if bf16 else 2e-5)
    if not bf16:
        assert_checkpoints_match(fsdp, ddp, rel=1e-3)


def test_fsdp_with_one_process_shards_nothing(run_train):
    plain, sharded = (run_train(kind, steps=2, sharding=kind) for kind in ("ddp", "fsdp"))
    assert without_clock(metrics(plain)) == without_clock(metrics(sharded))
    assert_checkpoints_match(sharded, plain)


@pytest.mark.slow
def test_sharded_runs_resume_bit_identically_and_with_other_processes(corpus, tmp_path):
    """From before a growth step and after it: 2 -> 2 processes, then 2 -> 1 -> 2."""
    file, options = MIDAS
    options = dict(data_dir=corpus, grad_clip=1.0, checkpoint_interval=1) | FSDP | options
    options["keep_checkpoints"] = 100
    whole = tmp_path / "whole"
    torchrun(2, "train.py", file, *arguments(whole, **options))
    options["init_from"] = "resume"
    folder = "checkpoints/step_{:08d}"

    def part(name, source, step):
        out = tmp_path / name
        shutil.copytree(source / folder.format(step), out / folder.format(step))
        shutil.copy(source / "metrics.jsonl", out)
        return out

    for step in (2, 4):  # the model grows at step 3
        again = part(f"from_{step}", whole, step)
        torchrun(2, "train.py", file, *arguments(again, **options))
        assert_checkpoints_match(again, whole)
        assert without_clock(metrics(again)) == without_clock(metrics(whole))
    one = part("one", whole, 2)
    script("train.py", file, *arguments(one, **options | {"sharding": "ddp"}))
    two = part("two", one, 5)
    torchrun(2, "train.py", file, *arguments(two, **options))
    assert_rows_match(two, whole)
    assert_checkpoints_match(two, whole, rel=1e-3)


SPY = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp2
import train
rank, counts, gathers = os.environ["RANK"], [], []
reduce, train_step, forward = fsdp2.foreach_reduce, train.train_step, train.GPT.forward
gather = fsdp2.foreach_all_gather
def counted(*args, **kwargs):
    counts[-1] += 1
    return reduce(*args, **kwargs)
def gathered(*args, **kwargs):
    if gathers:
        gathers[-1] += 1
    return gather(*args, **kwargs)
def step(*args):
    counts.append(0)
    gathers.append(0)
    return train_step(*args)
def poisoned(self, *args, **kwargs):  # the loss of rank 1 is not finite in step 3
    out = forward(self, *args, **kwargs)
    return out * float("nan") if len(counts) == 3 and self.training and rank == "1" else out
fsdp2.foreach_reduce, train.train_step, train.GPT.forward = counted, step, poisoned
fsdp2.foreach_all_gather = gathered
train.main()
stats = torch._dynamo.utils.counters["stats"]["unique_graphs"]
breaks = len(torch._dynamo.utils.counters["graph_break"])
out_dir = next(word for word in sys.argv if word.startswith("--out_dir=")).partition("=")[2]
with open(out_dir + "/spy" + rank, "w") as f:
    json.dump([counts, stats, breaks, gathers], f)
"""


@pytest.mark.slow
@needs_compiler
def test_compiled_sharded_blocks_reduce_on_the_last_micro_batch_and_skip_bad_steps(
    corpus, tmp_path
):
    """All blocks share a graph, without graph breaks. A step with NaN on one rank is skipped."""
    program = tmp_path / "spy.py"
    program.write_text(SPY)
    options = dict(data_dir=corpus, steps=4, hellaswag_data="none", compile="blocks", batch_size=2)
    kinds: dict = {name: dict(sharding=name) for name in ("ddp", "zero1", "fsdp")}
    kinds["every"] = dict(sharding="fsdp", reduce_every_micro_batch=True)
    kinds["zero1_every"] = dict(sharding="zero1", reduce_every_micro_batch=True)
    spied, rows = {}, {}
    for name, kind in kinds.items():
        torchrun(2, program, *arguments(tmp_path / name, **options, **kind))
        spied[name] = json.loads((tmp_path / name / "spy1").read_text())
        rows[name] = metrics(tmp_path / name)[1:]
    units = 5  # 4 blocks, and the embeddings with the final norm
    for name in ("zero1", "fsdp"):
        assert spied[name][0] == [units] * 4
    for name in ("every", "zero1_every"):
        assert spied[name][0] == [4 * units] * 4
    # zero1 gathers once per step, fsdp in every forward and backward pass. Step 1 finds what the
    # evaluation before it has gathered; the evaluation after step 4 gathers again.
    for name in ("zero1", "zero1_every"):
        assert spied[name][3] == [0, units, units, 2 * units]
    assert min(spied["fsdp"][3]) > 4 * units
    for name in ("zero1", "fsdp", "every", "zero1_every"):
        assert spied[name][1] == spied["ddp"][1] and spied[name][2] == 0
        assert [row["skipped_steps"] for row in rows[name]] == [0, 0, 1, 1]
        for row, other in zip(rows[name], rows["ddp"], strict=True):
            assert (row["step"] == 3) == (row["loss"] is None) == (other["loss"] is None)
            if row["loss"] is not None:
                assert row["loss"] == pytest.approx(other["loss"], rel=2e-5)


# Like train.py, but each file of a checkpoint takes two seconds to reach the disk.
SLOW_DISK = """
import sys; sys.path.insert(0, {root!r})
import time
import stagewise.checkpoint as checkpoint
original = checkpoint.fsync
checkpoint.fsync = lambda path: (time.sleep(2), original(path))
import train
with train.report_user_errors():
    train.main()
"""


@pytest.mark.slow
def test_a_checkpoint_may_take_longer_to_write_than_the_timeout(corpus, tmp_path):
    """The other rank waits for rank 0, in the middle and at the end."""
    program = tmp_path / "slow_disk.py"
    program.write_text(SLOW_DISK.format(root=str(ROOT)))
    options = dict(data_dir=corpus, steps=4, checkpoint_interval=2, timeout=6)
    result = torchrun(2, program, *arguments(tmp_path / "run", **options), check=False)
    assert result.returncode == 0, result.stderr
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


def test_destroying_the_process_groups_does_not_wait_for_itself():
    """Without the pause, this hangs after some of these repetitions (torch 2.13)."""
    code = """
import faulthandler, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from stagewise.distributed import destroy_process_groups

faulthandler.dump_traceback_later(90, exit=True)
for _ in range(40):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    destroy_process_groups()
    del model  # the last reference to the group
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
