"""The estimated memory against the tensors of a real step."""

import dataclasses
import sys

import pytest
import torch
from conftest import TINY

import memory
import train
from memory import activation_bytes, phase_memory
from model import GPT, GPTConfig
from stagewise.config import Config, load_config
from stagewise.device import autocast
from stagewise.loss import LOGITS_BYTES, chunk_size

CPU = torch.device("cpu")
SCHEDULES = {
    "baseline": {},
    "paper": dict(stages=4, continual_steps=2),
    "released_code": dict(
        stages=2, continual_steps=2, phase1="released_code", continual_optimizer_state="reset"
    ),
    "midas": dict(stages=4, freezing="none", growth="copy_middle", optimizer_state="copy"),
    "zero": dict(stages=2, growth="interleave", optimizer_state="zero"),
    "freezeout": dict(freezeout=0.5),
}


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def make(options, **sizes):
    sizes = TINY | {"vocab_size": 320} | sizes
    config = Config(
        steps=16,
        batch_size=2,
        tokens_per_step=2 * sizes["block_size"],
        **{k: v for k, v in sizes.items() if k != "vocab_size"},
        **options,
    )
    model_config = GPTConfig(**sizes, bias=config.bias, dropout=config.dropout)
    return config, model_config, train.make_schedules(config, model_config)[0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_gradients_and_optimizer_state_are_exact(name, bias):
    config, model_config, schedule = make(SCHEDULES[name] | {"bias": bias})
    estimates = phase_memory(schedule, model_config, config.batch_size)
    model, state = GPT(model_config, schedule.phases[0].n_blocks), {}
    idx = torch.randint(0, 320, (2, 64))
    for phase, estimate in zip(schedule.phases, estimates, strict=True):
        optimizer = train.enter_phase(model, state, phase, config)
        model(idx, idx).backward()
        gradients = n_bytes(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state
        moments = [t for s in state.values() for key, t in s.items() if key != "step"]
        measured = n_bytes(model.parameters()), gradients, n_bytes(moments)
        assert dataclasses.astuple(estimate)[:3] == measured, phase.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["baseline", "paper", "released_code"])
def test_activations_are_the_tensors_that_autograd_stores(name, dtype):
    sizes = dict(n_embd=128, n_head=4, block_size=128, vocab_size=512)
    config, model_config, schedule = make(SCHEDULES[name], **sizes)
    idx = torch.randint(0, 512, (config.batch_size, 128))
    for phase in schedule.phases:
        model = GPT(model_config, phase.n_blocks)
        model.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored = {}

        def pack(t, stored=stored):
            stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, autocast(CPU, dtype, 128):
            loss = model(idx, idx)
        loss.backward()
        measured = sum(size for pointer, size in stored.items() if pointer not in parameters)
        estimate = activation_bytes(phase, model_config, config.batch_size, dtype == "bfloat16")
        assert estimate == pytest.approx(measured, rel=0.01), phase.name


def test_fsdp_divides_the_state_and_keeps_gathered_tensors():
    config, model_config, schedule = make({"stages": 2})
    for world_size in (2, 4):
        full = phase_memory(schedule, model_config, 2)
        sharded = phase_memory(schedule, model_config, 2, world_size, "fsdp")
        every = phase_memory(schedule, model_config, 2, world_size, "fsdp", True)
        for phase, a, b, c in zip(schedule.phases, full, sharded, every, strict=True):
            assert b.optimizer_state == pytest.approx(a.optimizer_state / world_size, abs=8)
            assert b.activations == a.activations
            block = memory.ParameterCounts.of(model_config).block
            gathered = b.parameters - a.parameters / world_size
            outside = a.parameters - 4 * phase.n_blocks * block
            assert gathered == pytest.approx(outside + 8 * block, abs=8)
            if phase.n_blocks > memory.GATHERED_BLOCKS and phase.kind == "all_blocks":
                assert c.gradients < b.gradients  # gradients are unsharded between micro-batches
        zero1 = phase_memory(schedule, model_config, 2, world_size, "zero1")
        for a, b, z in zip(full, sharded, zero1, strict=True):
            assert z == dataclasses.replace(b, parameters=z.parameters)
            assert z.parameters == pytest.approx(a.parameters * (1 + 1 / world_size), abs=8)
    alone = phase_memory(schedule, model_config, 2, 1, "fsdp")
    assert alone == phase_memory(schedule, model_config, 2, 1)


@pytest.mark.parametrize("name, sharding", [("gpt2_xl", "ddp"), ("gpt_7b", "fsdp")])
def test_a_large_model_is_planned_without_allocating_it(
    name, sharding, monkeypatch, capsys, tmp_path
):
    words = ("--dry_run", "--plan_processes=8", "--data_dir=/nowhere", f"--out_dir={tmp_path}")
    words += (f"--sharding={sharding}",)
    monkeypatch.setattr(sys, "argv", ["train.py", f"configs/{name}.py", *words])
    train.main()
    printed = capsys.readouterr().out
    assert "per process, for world size 8" in printed
    assert max(map(len, printed.splitlines())) <= 100
    rows = [line.split() for line in printed.splitlines() if line.startswith("all blocks")]
    *parts, ddp, zero1, fsdp = [float(x) for x in rows[-1][-7:]]
    config = load_config([f"configs/{name}.py"], Config())
    model = GPT(train.make_model_config(config, 50304), device="meta")
    gib = 4 * model.num_params() / 2**30
    assert sum(parts) == pytest.approx(ddp if sharding == "ddp" else fsdp, abs=0.03)
    if sharding == "ddp":
        assert parts[:3] == pytest.approx([gib, gib, 2 * gib], abs=0.01)
    else:
        assert parts[2] == pytest.approx(gib / 4, abs=0.01)
    assert fsdp < zero1 < ddp


def test_the_buffers_of_the_loss_are_those_of_a_chunk():
    """With 48 sequences, the number of chunks on a GPU is rounded up to a power of two."""
    config, model_config, schedule = make({}, block_size=1024, vocab_size=50304)
    (without,) = phase_memory(schedule, model_config, 48)
    rows = chunk_size(48 * 1024, 50304, LOGITS_BYTES["cuda"], "cuda")
    assert 4 * rows == 48 * 1024
    (memory,) = phase_memory(schedule, model_config, 48, loss_rows=rows)
    # logits and gradient in bf16, softmax in fp32
    assert memory.activations - without.activations == rows * 50304 * (2 + 2 + 4)
