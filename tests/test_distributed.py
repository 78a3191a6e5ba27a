"""Processes of torch.distributed: who they are, agreeing to stop, replicas that differ."""

import pytest
import torch
from conftest import ROOT, arguments, torchrun

from stagewise.distributed import (
    Ranks,
    any_rank_stopping,
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
    assert any_rank_stopping(True, None) and not any_rank_stopping(False, None)
    check_replicas(torch.nn.Linear(2, 2), 0, None)


# Of two ranks each: whether one that is stopping stops both, and which parameter differs.
AGREE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from stagewise.distributed import any_rank_stopping, check_replicas, init_process_group
from stagewise.distributed import ranks_from_environment
from stagewise.errors import UserError
ranks = ranks_from_environment()
group = init_process_group(torch.device("cpu"), ranks, timeout=60)
answers = [any_rank_stopping(ranks.rank == r, group) for r in (0, 1, 2)]
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
