"""Tests of the training loop: against a reference loop, multiple processes, growth and resuming."""

import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TINY_RUN,
    arguments,
    metrics,
    needs_compiler,
    needs_gpu,
    script,
    set_trainable,
    torchrun,
    without_clock,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import growth
import stagewise.loss
import train
from benchmarks.variants import apply_variant
from cost import COST_METRICS, cumulative_cost
from hellaswag import Example
from model import GPT, GPTConfig
from schedule import learning_rate, make_schedule
from stagewise.checkpoint import SUMS, checkpoints, load_checkpoint
from stagewise.config import Config
from stagewise.data import Shards, TrainOrder, load_meta
from stagewise.device import autocast
from stagewise.distributed import Ranks
from stagewise.errors import UserError
from stagewise.fileio import sha256
from stagewise.metrics import MetricsWriter
from stagewise.trackers import Trackers

S4 = dict(stages=4, steps=16, continual_steps=4)
EVERY_STEP = dict(checkpoint_interval=1, keep_checkpoints=100)


def at(out, step):
    """Return the checkpoint of a step."""
    return load_checkpoint(out / "checkpoints" / f"step_{step:08d}", optimizer=True)


def model_of(out):
    checkpoint = load_checkpoint(out)
    return GPT.from_weights(checkpoint["model_config"], checkpoint["model"])


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- correctness of the loop


@pytest.mark.parametrize("phase1", ["paper", "released_code"])
def test_a_run_matches_a_reference_loop(run_train, corpus, phase1):
    """The reference is plain AdamW on full batches, as in the released code."""
    out = run_train(
        "run",
        **S4,
        phase1=phase1,
        grad_clip=1.0,
        lr_schedule="cosine",
        warmup_steps=3,
        batch_size=4,
    )
    schedule = make_schedule(4, 16, 4, 4, phase1=phase1)
    whole = GPT(GPTConfig(**TINY))
    optimizer = torch.optim.AdamW(
        whole.param_groups(0.1), betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )
    blocks = list(whole.transformer.h)
    data = Shards(corpus, "train", 64, load_meta(corpus))
    order = TrainOrder(len(data), 1337)
    config = Config(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=3)
    losses = []
    for step in range(20):
        phase = schedule.phase_at(step)
        whole.transformer.h = torch.nn.ModuleList(blocks[: phase.n_blocks])
        for p in whole.parameters():
            p.requires_grad_(True)
        whole._embeddings_train = whole._head_trains = True
        x, y = map(torch.from_numpy, data.read(order.windows(16 * step, 16 * step + 16)))
        loss = whole(x, y)
        loss.backward()
        frozen = [b for i, b in enumerate(blocks) if i not in phase.trained_blocks] + (
            [whole.transformer.wte, whole.transformer.wpe] if not phase.train_head else []
        )
        for part in frozen:  # gradients are computed and discarded
            for p in part.parameters():
                p.grad = None
        torch.nn.utils.clip_grad_norm_([p for p in whole.parameters() if p.grad is not None], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    measured = [row["loss"] for row in metrics(out) if "loss" in row]
    assert measured == pytest.approx(losses, rel=2e-5)
    trained = model_of(out)
    for p, q in zip(trained.parameters(), whole.parameters()):
        # AdamW divides rounding by rounding, so single elements can differ by a step.
        assert (p - q).norm() <= 1e-3 * q.norm()


@pytest.mark.slow
@pytest.mark.parametrize("phase1", ["paper", "released_code"])
def test_two_processes_match_one_in_every_phase(corpus, tmp_path, phase1):
    options = dict(**S4, data_dir=corpus, phase1=phase1, grad_clip=1.0)
    one, two = tmp_path / "one", tmp_path / "two"
    script("train.py", *arguments(one, **options, batch_size=8))
    torchrun(2, "train.py", *arguments(two, **options, batch_size=4))
    a, b = metrics(one), metrics(two)
    assert (
        len({(row["stage"], row["phase"]) for row in a}) == 9
    )  # 4 x 2 phases and the continual one
    for row, other in zip(a, b, strict=True):
        for key in ("loss", "val_loss", "val_bpb", "grad_norm"):
            assert (key in row) == (key in other)
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=2e-5), (row["step"], key)
        for key in (
            "step",
            "stage",
            "phase",
            "blocks",
            "tokens",
            "paper_cost",
            "flops",
            "lr",
            "hellaswag_acc",
            "hellaswag_acc_norm",
        ):
            assert row.get(key) == other.get(key), (row["step"], key)
    for p, q in zip(model_of(one).parameters(), model_of(two).parameters()):
        # AdamW divides rounding by rounding, so single elements can differ by a step.
        assert (p - q).norm() <= 1e-3 * q.norm()
    # one process resumes from a checkpoint written by two
    for out in (one, two):
        script("train.py", *arguments(out, **options | {"continual_steps": 8}, init_from="resume"))
    a, b = metrics(one), metrics(two)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(25))
    assert [row["loss"] for row in a[21:]] == pytest.approx(
        [row["loss"] for row in b[21:]], rel=1e-4
    )


def test_bits_per_byte(run_train, corpus, capsys):
    """The total loss of the validation tokens in bits, divided by the bytes of their text."""
    out = run_train("run", steps=1, eval_tokens=100_000)
    meta = json.loads((corpus / "meta.json").read_text())
    targets = Shards(corpus, "val", 64, meta).read(np.arange(-(-100_000 // 64)))[1]
    n_bytes = int((targets < 256).sum())  # 256 is <|endoftext|>
    assert n_bytes < targets.size
    for row in metrics(out):
        bits = row["val_loss"] * targets.size / math.log(2)
        assert row["val_bpb"] == pytest.approx(bits / n_bytes, rel=1e-12)
    capsys.readouterr()

    # A corpus with a tokenizer that is not available can still be trained on.
    other = out.parent / "other"
    shutil.copytree(corpus, other)
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer": "mine"}))
    out = run_train("other_run", steps=1, data_dir=other, hellaswag_data="none")
    assert "val_bpb is not computed: tokenizer 'mine' is unknown" in capsys.readouterr().err
    assert all("val_loss" in row and "val_bpb" not in row for row in metrics(out))


def test_the_micro_batch_size_does_not_change_the_result(run_train):
    losses = [
        [r["loss"] for r in metrics(run_train(f"b{b}", **S4, batch_size=b)) if "loss" in r]
        for b in (1, 16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("phase1", ["paper", "released_code"])
def test_phase_1_keeps_frozen_tensors_bit_identical_and_changes_all_others(run_train, phase1):
    """Weight decay or carried momentum would change a tensor that is not properly frozen."""
    out = run_train("run", **S4, **EVERY_STEP, phase1=phase1, weight_decay=0.1)
    schedule = make_schedule(4, 16, 4, 4, phase1=phase1)
    frozen_seen = set()
    for phase in schedule.phases:
        model = GPT(GPTConfig(**TINY), n_blocks=phase.n_blocks)
        set_trainable(model, phase)
        trains = {
            name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)
        }
        before, after = at(out, phase.stop - 1)["model"], at(out, phase.stop)["model"]
        for name, flag in trains.items():
            assert torch.equal(before[name], after[name]) != flag, (phase.name, name)
            if not flag:
                frozen_seen.add(name.removeprefix("transformer."))
                if phase.start:
                    assert torch.equal(at(out, phase.start)["model"][name], after[name])
    assert {"h.0.ln_1.weight", "h.2.mlp.c_proj.bias"} < frozen_seen
    assert ({"wte.weight", "wpe.weight", "lm_head.weight"} < frozen_seen) == (phase1 == "paper")


def test_new_blocks_start_as_the_growth_operator_specifies(run_train):
    out = run_train("run", **S4, **EVERY_STEP, learning_rate=0.0, weight_decay=0.0)
    assert same_weights(at(out, 20)["model"], GPT(GPTConfig(**TINY), seed=1337).state_dict())
    assert [at(out, s)["n_blocks"] for s in (1, 4, 5, 8, 9, 12, 13, 20)] == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "at_phase, at_continual", [("carry", "carry"), ("reset", "carry"), ("carry", "reset")]
)
def test_optimizer_state_is_carried_or_reset(run_train, at_phase, at_continual):
    """AdamW counts each tensor's updates: wpe trains in every step but phase 1 of later stages."""
    out = run_train(
        "run", **S4, **EVERY_STEP, optimizer_state=at_phase, continual_optimizer_state=at_continual
    )

    def updates(step):
        return at(out, step)["optimizer"]["transformer.wpe.weight/step"].item()

    assert updates(4) == (2 if at_phase == "reset" else 4)  # stage 1 has phases of 2 steps
    assert updates(8) == (2 if at_phase == "reset" else 6)  # unchanged in phase 1 of stage 2
    assert updates(16) == (2 if at_phase == "reset" else 10)
    assert updates(20) == {"carry": updates(16) + 4, "reset": 4}[at_continual]


# --- resuming


OTHER = {"dropout": 0.1, "phase1": "released_code", "optimizer_state": "reset"}
ON_GPU = {"device": "cuda", "compile": "blocks", "deterministic": True}
ON_A_GPU = [pytest.mark.gpu, needs_gpu]


@pytest.mark.parametrize(
    "options",
    [
        {},
        OTHER,
        {"dtype": "bfloat16"},
        pytest.param(
            {"dropout": 0.1, "compile": "blocks", "deterministic": True},
            marks=[pytest.mark.slow, needs_compiler],
        ),
        pytest.param(ON_GPU, marks=ON_A_GPU),
        pytest.param(ON_GPU | OTHER, marks=ON_A_GPU),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_run(run_train, tmp_path, options):
    options = S4 | options | {"grad_clip": 1.0, "lr_schedule": "wsd", "rewarmup_steps": 1}
    whole = run_train("whole", **options, **EVERY_STEP)
    end, rows = at(whole, 20), metrics(whole)
    # in phase 1 of two stages, in phase 2, at a boundary, in the continual phase
    for step in (5, 13) if "compile" in options else (5, 13, 3, 6, 17):
        part = tmp_path / f"from_{step}"
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole / name, part / name)
        # rows written after the checkpoint are replaced, not duplicated
        (part / "metrics.jsonl").write_text(
            (whole / "metrics.jsonl").read_text() + '{"step": 21, "sta'
        )
        torch._dynamo.reset()  # a new process has compiled nothing
        run_train(part.name, **options, init_from="resume")
        for tensors in ("model", "optimizer"):
            assert same_weights(load_checkpoint(part, optimizer=True)[tensors], end[tensors]), step
        assert without_clock(metrics(part)) == without_clock(rows), step
    assert (
        dataclasses.asdict(GPTConfig(**TINY | {"dropout": options.get("dropout", 0.0)}))
        == end["model_config"]
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels_are_used_if_requested(run_train, monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, update = [], train.train_step

    def spy(*args):
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return update(*args)

    monkeypatch.setattr(train, "train_step", spy)
    run_train("run", steps=2, deterministic=deterministic)
    assert seen == [(True, ":4096:8") if deterministic else (False, None)] * 2


def test_every_step_uses_different_dropout_masks(run_train, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    run_train("run", **S4, dropout=0.1)
    assert len(seeds) == len(set(seeds)) == 20


def test_resuming_may_extend_a_run_but_not_change_it(run_train, corpus):
    out = run_train("run", **S4)
    run_train("run", **S4 | {"continual_steps": 6}, init_from="resume", batch_size=4)
    assert [row["step"] for row in metrics(out)] == list(range(23))
    assert run_train("longer", **S4 | {"continual_steps": 6}) and without_clock(metrics(out))[-1][
        "loss"
    ] == pytest.approx(metrics(out.parent / "longer")[-1]["loss"], rel=1e-4)
    for change, named in [
        (dict(seed=1), "seed 1337 -> 1"),
        (dict(n_embd=64), "n_embd 32 -> 64"),
        (dict(tokens_per_step=2048), "schedule up to step 22 .*differs in tokens_per_step"),
        (dict(stages=2), "schedule up to step 22"),
        (dict(phase1="released_code"), "differs in train_embeddings, train_head"),
    ]:
        with pytest.raises(UserError, match=named):
            run_train("run", **S4 | {"continual_steps": 6, "init_from": "resume"} | change)


# --- outputs of a run


def test_a_run_folder_documents_the_run(run_train, corpus):
    out = run_train("run", **S4, checkpoint_interval=7)
    model_config = GPTConfig(**TINY)
    schedule = make_schedule(4, 16, 4, 4, context_length=64, tokens_per_step=1024)
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(21))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 8, 16, 20]
    for row in rows:
        for metric in COST_METRICS:
            assert row[metric] == cumulative_cost(schedule, row["step"], metric, model_config)
        if row["step"]:
            phase = schedule.phase_at(row["step"] - 1)
            assert (row["stage"], row["phase"], row["blocks"]) == (
                phase.stage,
                phase.kind,
                phase.n_blocks,
            )
            assert (
                row["lr"] == 1e-3
                and row["grad_norm"] > 0
                and row["skipped_steps"] == 0
                and row["tokens_per_second"] > 0
                and row["peak_memory"] > 0
            )
            assert row["mfu"] is None  # the peak of a CPU is unknown
        assert {
            "hellaswag_acc",
            "hellaswag_acc_norm",
            "hellaswag_acc_stderr",
        } <= row.keys() or "val_loss" not in row
    assert all(a["seconds"] < b["seconds"] for a, b in zip(rows, rows[1:]))
    assert (
        rows[0]["val_loss"] == pytest.approx(np.log(320), abs=0.1)
        and rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    )
    summary, config = (
        json.loads((out / name).read_text()) for name in ("schedule.json", "config.json")
    )
    assert summary["total"] == {m: rows[-1][m] for m in COST_METRICS}
    assert [p["trained_parameters"] for p in summary["phases"]][3:5] == [37760, 12768]
    assert (
        config["stages"] == 4
        and config["vocab_size"] == 320
        and config["torch_version"] == torch.__version__
    )
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "schedule.json",
    ]


def test_validation_loss_is_the_mean_over_the_fixed_tokens(run_train, corpus):
    """Including a last micro-batch that is not full: 35 windows in batches of 8."""
    out = run_train("run", eval_tokens=35 * 64 - 1, hellaswag_data="none")
    val = Shards(corpus, "val", 64, load_meta(corpus))
    model = model_of(out).eval()
    x, y = map(torch.from_numpy, val.read(np.arange(35)))
    with torch.no_grad():
        assert metrics(out)[-1]["val_loss"] == pytest.approx(model(x, y).item(), rel=1e-6)
    assert "hellaswag_acc" not in metrics(out)[-1]


def test_baseline_and_stagewise_run_read_the_same_data(run_train, monkeypatch):
    def read(name, **options):
        seen, windows = [], TrainOrder.windows

        def spy(self, start, stop):
            seen.extend(windows(self, start, stop))
            return windows(self, start, stop)

        with monkeypatch.context() as m:
            m.setattr(TrainOrder, "windows", spy)
            run_train(name, **options)
        return seen

    assert read("a", steps=8) == read("b", steps=8, stages=4, batch_size=2)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("phase1", ["paper", "released_code"])
def test_compiled_regions_match_eager_training_with_few_graphs(run_train, phase1):
    """12 stages, evaluations and HellaSwag, then another context length."""
    options = dict(
        n_layer=12,
        stages=12,
        steps=24,
        continual_steps=2,
        batch_size=16,
        hellaswag_limit=3,
        eval_interval=12,
        phase1=phase1,
    )
    plain = metrics(run_train("plain", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = metrics(run_train("compiled", **options, compile="blocks"))
    assert [r["loss"] for r in plain[1:]] == pytest.approx(
        [r["loss"] for r in compiled[1:]], rel=1e-4
    )
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    run_train("short", **options, compile="blocks", block_size=32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_distributed_training_compiles_whole_blocks(monkeypatch):
    """A block is larger than the first bucket of gradients, 1 MiB, at which Dynamo cuts graphs."""
    compile_with = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    config = GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=4, n_embd=192)
    tokens, cpu = torch.zeros(2, 16, dtype=torch.long), torch.device("cpu")
    graphs = []
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for distributed in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = GPT(config)
            model.compile_regions()
            phase = make_schedule(1, 1).phases[0]
            optimizer = train.enter_phase(model, {}, phase, Config())
            wrapped = DDP(model, gradient_as_bucket_view=True) if distributed else model
            precision = autocast(cpu, "float32", 192)
            train.train_step(wrapped, optimizer, iter([(tokens, tokens)]), 1, precision)
            # Dynamo itself counts a graph that is cut only once.
            graphs.append(torch._dynamo.utils.counters["aot_autograd"]["total"])
    finally:
        torch.distributed.destroy_process_group()
    assert graphs == [2, 2]  # of the block and of the loss


@pytest.mark.slow
@needs_compiler
@torch._dynamo.config.patch(recompile_limit=1)
def test_the_compiled_model_matches_eager_training(run_train):
    """Even beyond the recompile limit (here 1), after which torch falls back to eager execution."""
    options = dict(n_layer=2, stages=2, steps=8, batch_size=16, hellaswag_limit=3)
    plain = metrics(run_train("plain", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = metrics(run_train("compiled", **options, compile="model"))
    assert [r["loss"] for r in plain[1:]] == pytest.approx(
        [r["loss"] for r in compiled[1:]], rel=1e-4
    )
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    )  # 3 of the model, 1 of the loss


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "device, dtype, tolerance, bf16_residual",
    [
        ("cpu", "float32", 1e-5, False),
        ("cpu", "bfloat16", 2e-3, False),
        ("cpu", "bfloat16", 4e-3, True),  # a variant of benchmarks/step.py
        pytest.param("cuda", "bfloat16", 5e-3, False, marks=ON_A_GPU),
        pytest.param("cuda", "bfloat16", 5e-3, True, marks=ON_A_GPU),
    ],
)
def test_the_fast_path_matches_the_reference_over_200_steps(
    corpus, monkeypatch, device, dtype, tolerance, bf16_residual
):
    """The fast path uses compiled regions, chunked cross-entropy, micro-batches and fused AdamW."""
    torch._dynamo.reset()
    # A micro-batch has 256 rows, so this gives three chunks, or four on a GPU.
    monkeypatch.setitem(stagewise.loss.LOGITS_BYTES, device, 100 * 4 * TINY["vocab_size"])
    data = Shards(corpus, "train", 64, load_meta(corpus))
    order = TrainOrder(len(data), 1337)
    schedule = make_schedule(4, 160, stages=2, continual_steps=40)
    plain, fast = (GPT(GPTConfig(**TINY), n_blocks=2, device=device) for _ in range(2))
    if bf16_residual:
        apply_variant(fast, "bf16_residual")
    fast.compile_regions()
    config = Config(learning_rate=1e-3)
    batches = (
        map(torch.from_numpy, data.read(order.windows(8 * s + m, 8 * s + m + 4)))
        for s in range(200)
        for m in (0, 4)
    )
    optimizer, losses = None, []
    plain_optimizer = None
    for phase in schedule.phases:
        for model in (plain, fast):
            model.grow(growth.source_map("random", model.n_blocks, phase.n_blocks), 1337)
            set_trainable(model, phase)
        optimizer = train.make_optimizer(fast, config, optimizer and optimizer.state)
        former = plain_optimizer.state if plain_optimizer else {}
        plain_optimizer = torch.optim.AdamW(
            plain.param_groups(0.1), lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False
        )
        plain_optimizer.state.update(former)
        for step in range(phase.start, phase.stop):
            loss, _ = train.train_step(
                fast, optimizer, batches, 2, autocast(torch.device(device), dtype, 1), grad_clip=1.0
            )
            tokens = data.read(order.windows(8 * step, 8 * step + 8))
            x, y = (torch.from_numpy(t).to(device) for t in tokens)
            expected = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
            expected.backward()
            torch.nn.utils.clip_grad_norm_(
                [p for p in plain.parameters() if p.grad is not None], 1.0
            )
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            losses.append((loss.item(), expected.item()))
    assert len(losses) == 200 and losses[0][1] > 5.6 and losses[-1][1] < 3.5
    assert max(abs(a / b - 1) for a, b in losses) < tolerance


def test_bf16_changes_the_loss_slightly(run_train):
    exact, rounded = (
        metrics(run_train(dtype, **S4, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    losses, others = (
        [row[key] for row in rows for key in ("loss", "val_loss") if key in row]
        for rows in (exact, rounded)
    )
    assert losses == pytest.approx(others, rel=5e-3)
    # A pair can be equal by chance.
    different = sum(a != b for a, b in zip(losses, others))
    assert different >= len(losses) - 1


def test_throughput_and_mfu_are_tokens_and_flops_over_time(run_train, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e12)
    out = run_train("run", **S4, log_interval=2, hellaswag_data="none")
    rows = metrics(out)
    for before, row in zip(rows, rows[1:]):
        seconds = row["seconds"] - before["seconds"]
        assert row["tokens_per_second"] == pytest.approx(
            (row["tokens"] - before["tokens"]) / seconds, rel=0.2
        )
        assert row["mfu"] == pytest.approx(
            (row["flops"] - before["flops"]) / seconds / 1e12, rel=0.2
        )


@pytest.mark.slow
def test_gradients_are_reduced_only_on_the_last_micro_batch(corpus, tmp_path):
    """DistributedDataParallel records whether a forward pass prepares a gradient reduction."""
    program = tmp_path / "spy.py"
    program.write_text(
        f"""import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
exchanged = []
class Spy(train.DDP):
    def forward(self, *args):
        exchanged.append(self.require_backward_grad_sync)
        return super().forward(*args)
train.DDP = Spy
train.main()
open({str(tmp_path)!r} + "/exchanged" + os.environ["RANK"], "w").write(json.dumps(exchanged))
"""
    )
    torchrun(2, program, *arguments(tmp_path / "run", data_dir=corpus, **S4, batch_size=2))
    for rank in (0, 1):
        assert (
            json.loads((tmp_path / f"exchanged{rank}").read_text())
            == [False, False, False, True] * 20
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("phase1", ["paper", "released_code"])
def test_gpu_training_matches_cpu_training(run_train, phase1):
    """Compiled bf16 training on the GPU against fp32, over a complete schedule."""
    cpu = metrics(run_train("cpu", **S4, phase1=phase1))
    gpu = metrics(run_train("gpu", **S4, phase1=phase1, device="cuda", compile="blocks"))
    assert [r["loss"] for r in gpu[1:]] == pytest.approx([r["loss"] for r in cpu[1:]], rel=5e-3)
    assert gpu[-1]["hellaswag_n"] == 10 and gpu[-1]["peak_memory"] > 0


# --- invalid input


def test_dry_run_needs_no_data_and_prints_the_schedule(tmp_path):
    out = tmp_path / "dry"
    files = ("configs/gpt2_124m.py", "configs/paper_recipe.py", "configs/s4.py")
    result = script("train.py", *files, "--dry_run", "--data_dir=/nowhere", f"--out_dir={out}")
    assert (
        "stage 4 phase 1   3 of 12     21.3M    1,250      655M    7.8%     6.8%" in result.stdout
    )
    assert "10,000 in tokens, 14,688 in paper cost, 13,983 in FLOPs" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100
    summary = json.loads((out / "schedule.json").read_text())
    assert (
        summary["steps"] == 20_000
        and summary["phases"][-1]["name"] == "continual"
        and summary["phases"][-1]["optimizer_state"] == "reset"
    )
    assert sorted(p.name for p in out.iterdir()) == ["schedule.json"]


@pytest.mark.parametrize("goal, total", [("match_paper_cost", 14_688), ("match_flops", 13_983)])
def test_continual_steps_until_compute_matched(monkeypatch, capsys, tmp_path, goal, total):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--dry_run",
            "--stages=4",
            f"--continual_steps={goal}",
            f"--out_dir={tmp_path}",
        ],
    )
    train.main()
    assert json.loads((tmp_path / "schedule.json").read_text())["steps"] == total
    assert "100.0%" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("continual")
    )


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(stages=5), "stages=5 .* n_layer=4"),
        (dict(tokens_per_step=500), "tokens_per_step=500 .* multiple of block_size=64"),
        (dict(batch_size=3), "batch_size=3 .* use batch_size=1, 2, 4"),
        (dict(n_head=3), "n_embd=32 .* n_head=3"),
        (dict(data_dir="/nowhere"), "/nowhere/meta.json: not found: .* fineweb.py"),
        (dict(hellaswag_data="/nowhere.jsonl"), "/nowhere.jsonl: No such file"),
        (dict(block_size=2_000_000, tokens_per_step=2_000_000, batch_size=1), "lower block_size"),
        (dict(n_embd=2**70), "n_embd=1180591620717411303424 must be int <= 4194304"),
        (dict(init_from="resume"), "no checkpoint to resume from"),
        (dict(device="tpu"), "device='tpu'"),
        (dict(learning_rate="nan"), "learning_rate=nan"),
        (dict(eval_interval=0), "eval_interval=0 must be int >= 1"),
        (dict(seed=-1), "seed=-1 must be int >= 0"),
        (dict(dropout=1.0), "dropout=1.0 must be float < 1.0"),
    ],
)
def test_invalid_options_raise_errors_before_anything_is_written(
    run_train, tmp_path, options, named
):
    with pytest.raises(UserError, match=named):
        run_train("run", **options)
    assert not list(tmp_path.glob("run/*"))


def test_a_used_folder_is_not_overwritten(run_train):
    out = run_train("run", steps=2)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="metrics.jsonl exists: resume it with --init_from=resume"):
        run_train("run", steps=2)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_run_without_a_checkpoint_suggests_init_from_auto(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(
        UserError, match="the run has no checkpoint yet; start it again with --init_from=auto"
    ):
        run_train("run", steps=2)


def test_compiling_without_a_compiler_raises_an_error_before_the_run(
    run_train, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="C\\+\\+ compiler .* --compile=none"):
        run_train("run", compile="blocks")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_does_not_overwrite_a_runs_schedule(run_train):
    out = run_train("run", steps=2)
    before = (out / "schedule.json").read_text()
    run_train("run", steps=5, dry_run=True)
    assert (out / "schedule.json").read_text() == before


def test_a_user_error_is_one_line_without_a_traceback(tmp_path):
    result = script("train.py", *arguments(tmp_path / "x", data_dir="/nowhere"), check=False)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: /nowhere/meta.json: not found")


# --------------------------------------------------------------------------------------------------
# the run folder while and after training


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_run_whose_folder_is_lost_ends_with_an_error(run_train, tmp_path, monkeypatch, how):
    steps = iter(range(100))

    def train_step(*args):
        if next(steps) == 4:
            out = tmp_path / "run"
            if how == "renamed":
                out.rename(tmp_path / "moved")
            while out.exists():  # a checkpoint may be written at the same time
                shutil.rmtree(out, ignore_errors=True)
        return original(*args)

    original = train.train_step
    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(UserError, match=f"run: was {how}"):
        run_train("run", checkpoint_interval=2)
    assert not (tmp_path / "run").exists()
    if how == "renamed":
        monkeypatch.setattr(train, "train_step", original)
        run_train("moved", init_from="resume")
        rows = metrics(run_train("whole"))
        assert without_clock(metrics(tmp_path / "moved")) == without_clock(rows)


def test_config_json_records_what_trained_and_every_start(run_train):
    out = run_train("run", steps=8)
    first = (out / "config.json").read_bytes()
    run_train("run", steps=8, init_from="auto", learning_rate=1.0)  # nothing is left to train
    assert (out / "config.json").read_bytes() == first
    run_train("run", steps=8, continual_steps=4, init_from="resume", learning_rate=0.5)
    config = json.loads((out / "config.json").read_text())
    assert config["learning_rate"] == 0.5
    assert [start["step"] for start in config["starts"]] == [0, 8]
    assert "--learning_rate=0.001" in config["starts"][0]["command"]
    assert config["command"] == config["starts"][1]["command"]
    for name in ("out_dir", "data_dir", "hellaswag_file"):
        assert os.path.isabs(config[name])


def other_corpus(corpus, folder):
    """A corpus of the same size, with one token changed."""
    shutil.copytree(corpus, folder)
    meta = json.loads((folder / "meta.json").read_text())
    path = folder / meta["shards"][1]["file"]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    meta["shards"][1]["sha256"] = sha256(path)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_run_does_not_resume_with_another_corpus_of_the_same_size(run_train, corpus, tmp_path):
    run_train("run", steps=8)
    shutil.copytree(corpus, tmp_path / "copy")
    run_train("run", steps=8, continual_steps=2, init_from="resume", data_dir=tmp_path / "copy")
    other = other_corpus(corpus, tmp_path / "other")
    with pytest.raises(UserError, match="run: cannot resume with corpus [0-9a-f]{12} -> "):
        run_train("run", steps=8, continual_steps=4, init_from="resume", data_dir=other)


def test_a_checkpoint_whose_step_does_not_fit_its_blocks_is_an_error(run_train):
    out = run_train("run", **S4)
    *_, folder = checkpoints(out)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"step": 2}))
    sums = "".join(f"{sha256(folder / f)}  {f}\n" for f in os.listdir(folder) if f != SUMS)
    (folder / SUMS).write_text(sums)
    with pytest.raises(UserError, match="has 4 blocks, but the schedule has 1 after step 2"):
        run_train("run", **S4 | {"init_from": "resume"})


def test_resuming_without_the_metrics_so_far_is_reported(run_train, capsys):
    out = run_train("run", steps=8)
    (out / "metrics.jsonl").unlink()
    run_train("run", steps=8, continual_steps=2, init_from="resume")
    assert "metrics.jsonl: has no rows before step 8" in capsys.readouterr().err
    assert [row["step"] for row in metrics(out)] == [9, 10]


def test_a_model_that_does_not_fit_into_memory_is_an_error(run_train, tmp_path):
    with pytest.raises(UserError, match=r"parameters needs [\d,.]+ GiB .* but cpu has [\d,.]+ GiB"):
        run_train("run", n_embd=2_000_000, n_head=1)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_not_finite_is_null(corpus, tmp_path, capsys):
    data = Shards(corpus, "val", 64, load_meta(corpus))
    model = GPT(GPTConfig(**TINY))
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    examples = [Example([5, 6], [[1, 2], [3]], 0)]
    precision = autocast(torch.device("cpu"), "float32", 1)
    row = train.evaluate(model, data, np.arange(4), examples, precision, 2, Ranks())
    assert row["eval_seconds"] > 0
    values = {k: v for k, v in row.items() if k not in ("hellaswag_n", "eval_seconds")}
    assert row["hellaswag_n"] == 1 and set(values.values()) == {None} and len(values) == 5
    writer = MetricsWriter(tmp_path / "metrics.jsonl", None)
    phase = make_schedule(4, 1, tokens_per_step=64, context_length=64).phases[0]
    train.log(writer, Trackers(Config(), tmp_path), {"step": 0} | row, phase)
    assert "val loss not finite, hellaswag_acc not finite" in capsys.readouterr().out
    assert metrics(tmp_path) == [{"step": 0} | row]


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(n_layer=200_000), "n_layer=200000 must be"),
        (dict(tokens_per_step=2**40, batch_size=3, block_size=1024), "use batch_size=1, 2, 4"),
        (dict(timeout=10**12), "timeout=1000000000000 must be"),
        (dict(data_dir="a\0b"), "data_dir='a.x00b' must not contain a NUL character"),
    ],
)
def test_extreme_options_are_errors_at_once(run_train, options, named):
    began = time.monotonic()
    with pytest.raises(UserError, match=named):
        run_train("run", **options)
    assert time.monotonic() - began < 10


def test_parameters_are_counted_without_building_the_model(run_train):
    out = run_train("run", stages=2, dry_run=True)
    summary = json.loads((out / "schedule.json").read_text())
    c = Config(**TINY_RUN)
    model = GPT(train.make_model_config(c, 320), n_blocks=0)
    for phase in summary["phases"]:
        model.grow((growth.FRESH,) * phase["n_blocks"], seed=1)
        model.set_trainable(phase["trained_blocks"], phase["train_embeddings"], phase["train_head"])
        assert phase["trained_parameters"] == model.num_params(trainable_only=True)
    assert summary["parameters"] == model.num_params()
