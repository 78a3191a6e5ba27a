"""Tests of each method in configs/methods/: dry run, resuming, two processes and compilation."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    arguments,
    copy_repository,
    metrics,
    needs_compiler,
    script,
    torchrun,
    without_clock,
)
from safetensors.torch import load_file, save_file

import growth
import train
from cost import cost_per_token
from model import GPTConfig
from policies import SKIP_POLICIES
from schedule import with_ramp
from stagewise.checkpoint import load_checkpoint
from stagewise.config import Config, load_config
from stagewise.data import Shards, TrainOrder, load_meta, write_shard
from stagewise.distributed import Ranks
from stagewise.fileio import sha256

# For every method: the options of a tiny run, and the step at which something changes.
METHODS = {
    "batch_ramp": (dict(steps=12, tokens_per_step=2048), 4),
    "context_growth": (dict(steps=8, block_size=1024, tokens_per_step=2048, batch_size=1), 4),
    "freezeout": (dict(steps=16), 9),
    "g_stack": (dict(steps=16, phase_fractions=(1, 3), warmup_steps=2), 4),
    "gradual_stacking": (dict(steps=16), 8),
    "interleaved": (dict(steps=10), 3),
    "interpolation": (dict(steps=10), 3),
    "layer_dropout": (dict(steps=16, skip_rate=0.9), 8),
    "lidas": (dict(steps=10), 3),
    "llama_pro": (dict(steps=12), 6),
    "midas": (dict(steps=10), 3),
    "msg": (dict(steps=12, fade_in_steps=4), 4),
    "one_layer": (dict(steps=10), 8),
    "one_shot_stacking": (dict(steps=20), 6),
    "progressive_layer_dropping": (dict(steps=16, skip_rate=0.9), 8),
    "progressive_stacking": (dict(steps=13, phase_fractions=(1, 1, 2)), 3),
    "raptr": (dict(steps=16, skip_rate=(0.5, 0.4, 0.3, 0.0)), 8),
    "shrink_and_perturb": (dict(steps=10), 3),
    "skyladder": (dict(steps=100, block_size=64), 29),
    "solar": (dict(steps=10, n_layer=6), 5),
    "staged_training": (dict(steps=20, rewarmup_steps=3), 6),
    "zero_layer": (dict(steps=10), 8),
}
STATES = [(name, s) for name in ("midas", "interpolation") for s in ("carry", "zero", "reset")]
EVERY_STEP = dict(checkpoint_interval=1, keep_checkpoints=100)
CPU = torch.device("cpu")


def config_file(name):
    return str(ROOT / "configs" / "methods" / f"{name}.py")


def test_every_method_is_tested_here():
    assert {p.stem for p in (ROOT / "configs" / "methods").glob("*.py")} == METHODS.keys()


def test_every_method_and_function_is_described():
    """In docs/methods.md, with a picture for each config; in docs/options.md for each function."""
    methods, options = ((ROOT / "docs" / f"{n}.md").read_text() for n in ("methods", "options"))
    for name in METHODS:
        assert re.search(rf"^### .*`{name}`", methods, re.MULTILINE), name
        assert f"(schedules/schedule_{name}.png)" in methods
        assert (ROOT / "docs" / "schedules" / f"schedule_{name}.png").exists()
    for name in (*growth.OPERATORS, *SKIP_POLICIES):
        assert f"`{name}`" in options, name


@pytest.mark.parametrize("name", METHODS)
def test_dry_run(name, run_train, capsys):
    options, change = METHODS[name]
    out = run_train("dry", config_file(name), **options, dry_run=True)
    summary = json.loads((out / "schedule.json").read_text())
    assert not summary["is_baseline"]
    boundaries = {p["start"] for p in summary["phases"]}
    skips = any(p["skip"] for p in summary["phases"])
    assert change in boundaries or skips
    assert all(p["name"] in capsys.readouterr().out for p in summary["phases"][:1])


@pytest.mark.parametrize("name, state", [*((name, None) for name in METHODS), *STATES])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_run(name, state, run_train, tmp_path):
    """Resume before the change, at the change, and after it."""
    options, change = METHODS[name]
    options = options | dict(grad_clip=1.0, dropout=0.1)
    if state:
        options["optimizer_state"] = state
    whole = run_train("whole", config_file(name), **options, **EVERY_STEP)
    end, rows = load_checkpoint(whole, optimizer=True), metrics(whole)
    for step in (change - 2, change, change + 2):
        part = tmp_path / f"from_{step}"
        checkpoint = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole / checkpoint, part / checkpoint)
        shutil.copy(whole / "metrics.jsonl", part)
        run_train(part.name, config_file(name), **options, init_from="resume")
        now = load_checkpoint(part, optimizer=True)
        for kind in ("model", "optimizer"):
            assert now[kind].keys() == end[kind].keys()
            assert all(torch.equal(t, now[kind][key]) for key, t in end[kind].items()), step
        assert without_clock(metrics(part)) == without_clock(rows), step


@pytest.mark.parametrize("name", METHODS)
def test_the_metrics_add_up_the_cost_of_every_step(name, run_train):
    options, _ = METHODS[name]
    out = run_train("run", config_file(name), **options)
    argv = [config_file(name), *arguments(out, **options)]
    config = load_config(argv, Config())
    model_config = train.make_model_config(config, TINY["vocab_size"])
    schedule, _ = train.make_schedules(config, model_config)
    rows = metrics(out)
    assert len(rows) == schedule.n_steps + 1
    costs = set()
    for before, row in zip(rows, rows[1:]):
        step = schedule.at(row["step"] - 1)
        tokens = step.phase.tokens_per_step
        assert row["tokens"] - before["tokens"] == tokens
        for metric in ("paper_cost", "flops"):
            cost = cost_per_token(step, metric, model_config)
            assert row[metric] - before[metric] == tokens * cost
        costs.add(row["flops"] - before["flops"])
    assert len(costs) > 1  # the cost per token is not constant


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_match_one(name, corpus, tmp_path):
    options, _ = METHODS[name]
    options = options | dict(data_dir=corpus, grad_clip=1.0)
    one, two = tmp_path / "one", tmp_path / "two"
    script("train.py", config_file(name), *arguments(one, **options))
    half = {"batch_size": options.get("batch_size", 8) // 2 or 1}
    torchrun(2, "train.py", config_file(name), *arguments(two, **options | half))
    for row, other in zip(metrics(one), metrics(two), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert (key in row) == (key in other)
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=5e-5), (row["step"], key)
        for key in ("step", "blocks", "tokens", "paper_cost", "flops", "lr"):
            assert row.get(key) == other.get(key), (row["step"], key)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", METHODS)
def test_compiled_blocks_match_eager_training_with_few_graphs(name, run_train):
    """Including across changes: skipped blocks do not need new graphs."""
    options, _ = METHODS[name]
    plain = metrics(run_train("plain", config_file(name), **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = metrics(run_train("compiled", config_file(name), **options, compile="blocks"))
    expected = pytest.approx([r["loss"] for r in compiled[1:]], rel=1e-4)
    assert [r["loss"] for r in plain[1:]] == expected
    # of the block (plain or scaled, and in every context length) and of the loss
    words = [config_file(name), *arguments(config_file(name), **options)]
    schedule, _ = train.make_schedules(load_config(words, Config()), GPTConfig())
    lengths = {p.context_length for p in schedule.phases}
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 + len(lengths)


def test_skip_policies_with_compile_model_raise_an_error(run_train):
    with pytest.raises(train.UserError, match="skip_policy=layer_dropout, .* --compile=blocks"):
        run_train("run", skip_policy="layer_dropout", compile="model")


def test_the_optimizer_uses_the_rates_of_the_blocks(run_train, monkeypatch):
    """FreezeOut and re-warm-up of new blocks, as in policies.py; and the CompleteP model."""
    seen = []
    original = train.train_step

    def spy(model, optimizer, *args):
        by_part = {g["block"]: g["lr"] for g in optimizer.param_groups if g["params"]}
        seen.append((by_part, {g["eps"] for g in optimizer.param_groups}, model.config.base_depth))
        return original(model, optimizer, *args)

    monkeypatch.setattr(train, "train_step", spy)
    run_train("freezeout", config_file("freezeout"), steps=8, learning_rate=1e-3)
    for step, (rates, _, _) in enumerate(seen):
        for i in range(5):
            ratio = (0.8 + 0.2 * i / 4) ** 3
            scale = 0.5 / ratio * (1 + np.cos(np.pi * min(1, step / (8 * ratio))))
            assert rates[i if i < 4 else None] == pytest.approx(1e-3 * scale, abs=1e-12)
    seen.clear()
    options = dict(steps=10, rewarmup_steps=3, rewarmup="new_blocks", base_depth=2)
    run_train("grown", config_file("interleaved"), **options, learning_rate=1e-3)
    assert seen[2] == ({None: 1e-3, 0: 1e-3, 1: 1e-3}, {1e-8}, 2)
    for step, factor in ((3, 0.25), (5, 0.75), (6, 1)):
        rates = {None: 1e-3, 0: 1e-3, 1: factor * 1e-3, 2: 1e-3, 3: factor * 1e-3}
        assert seen[step] == (pytest.approx(rates), {5e-9}, 2)


def test_shrink_and_perturb_happens_when_the_model_grows(run_train):
    out = run_train(
        "run", config_file("shrink_and_perturb"), **EVERY_STEP, steps=10, warmup_steps=5
    )
    before, after = (
        load_checkpoint(out / "checkpoints" / f"step_{s:08d}")["model"] for s in (3, 4)
    )
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"):
        noise = after[name] - 0.4 * before[name]  # and one small update
        assert noise.std().item() == pytest.approx(0.02, rel=0.15)


def test_skipped_blocks_do_not_change(run_train):
    """Neither weight decay nor momentum changes them; their optimizer state is kept."""
    options, _ = METHODS["layer_dropout"]
    options = options | EVERY_STEP | dict(weight_decay=0.5)
    out = run_train("run", config_file("layer_dropout"), **options)
    argv = [config_file("layer_dropout"), *arguments(out, **options)]
    schedule, _ = train.make_schedules(load_config(argv, Config()), GPTConfig(**TINY))
    at = [
        load_checkpoint(out / "checkpoints" / f"step_{s:08d}", optimizer=True) for s in range(1, 17)
    ]
    skipped = 0
    for step in range(1, 16):
        running = schedule.at(step).running_blocks
        for i in range(4):
            prefix = f"transformer.h.{i}."
            for kind in ("model", "optimizer"):
                before, after = at[step - 1][kind], at[step][kind]
                names = [n for n in after if n.startswith(prefix) and n in before]
                same = all(torch.equal(before[n], after[n]) for n in names)
                assert same == (i not in running) or not names
            skipped += i not in running
    assert skipped > 5


# --- ramps of context and batch: every token once, in the baseline's order


@pytest.fixture
def numbers(tmp_path):
    """Write a corpus in which each token encodes its position; an epoch is 240 windows of 64."""
    entries = []
    for split, n in (("val", 200), ("train", 40 * 64 + 5), ("train", 200 * 64 + 1)):
        path = tmp_path / f"n_{split}_{len(entries):06d}.bin"
        start = sum(e["tokens"] for e in entries)
        write_shard(path, np.arange(start, start + n, dtype=np.uint16))
        entries.append({"file": path.name, "split": split, "tokens": n})
    meta = {"tokenizer": "bytes", "vocab_size": 65536, "shards": entries}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def read_tokens(folder, step=0, world_size=1, **options):
    """Return inputs and targets from `step` on, in order, and the context lengths that occur."""
    words = arguments(folder / "out", **{"data_dir": folder, "steps": 15} | options)
    config = load_config(words, Config())
    model_config = train.make_model_config(config, 65536)
    schedule, _ = train.make_schedules(config, model_config)
    data = Shards(folder, "train", 64, load_meta(folder))
    order = TrainOrder(len(data), config.seed)
    per_rank = [
        list(
            train.train_batches(
                data, order, schedule, step, config, Ranks(rank, rank, world_size), CPU
            )
        )
        for rank in range(world_size)
    ]
    batches = [batch for together in zip(*per_rank, strict=True) for batch in together]
    x, y = (torch.cat([b[i].flatten() for b in batches]) for i in (0, 1))
    return x, y, {b[0].shape[1] for b in batches}, schedule


RAMPS = [
    {},
    {"context_ramp": "0:16 30%:32 70%:64"},
    {"tokens_per_step_ramp": "0:512 20%:1024 60%:2048"},
    {"context_ramp": "0:16 4K:64", "tokens_per_step_ramp": "0:1024 5K:512 8K:2048"},
    {"context_ramp": "0:32 50%:64", "stages": 4},
]


@pytest.mark.parametrize("ramps", RAMPS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_token_is_read_once_in_the_order_of_the_baseline(numbers, ramps, world_size):
    """Including across epochs, and from any step at which a run may resume."""
    base, _, _, _ = read_tokens(numbers, steps=30)  # steps of 16 windows at full context
    for name in ("context_ramp", "tokens_per_step_ramp"):
        ramps = ramps | {name: ramps.get(name, "")}
    x, y, contexts, schedule = read_tokens(numbers, world_size=world_size, batch_size=4, **ramps)
    n = schedule.tokens(schedule.n_steps)
    assert len(x) == n and n > 13_000  # most of an epoch
    assert torch.equal(x, base[:n])
    assert torch.equal(y, x + 1)
    epoch = 240 * 64
    assert len(x[:epoch].unique()) == len(x[:epoch])
    if ramps["context_ramp"]:
        assert contexts == {int(pair.split(":")[1]) for pair in ramps["context_ramp"].split()}
    for step in range(1, schedule.n_steps, 4):
        later, _, _, _ = read_tokens(numbers, step, world_size, batch_size=4, **ramps)
        assert torch.equal(later, x[schedule.tokens(step) :])


def test_the_corpus_is_read_to_its_end(numbers):
    """With all ramps combined, an epoch reads each token exactly once."""
    ramps = RAMPS[3]
    x, _, _, schedule = read_tokens(numbers, steps=30, **ramps)
    epoch = 240 * 64
    assert schedule.tokens(30) > epoch
    meta = load_meta(numbers)["shards"]
    first, second = 200, 200 + meta[1]["tokens"]  # where the shards begin; the rest is no window
    expected = [*range(first, first + 40 * 64), *range(second, second + 200 * 64)]
    assert sorted(x[:epoch].tolist()) == expected


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(context_ramp="0:48"), "context_ramp='0:48': 48 must divide block_size=64"),
        (dict(context_ramp="0:128"), "128 must divide block_size=64"),
        (dict(context_ramp="0:8"), "must end at block_size=64"),
        (dict(context_ramp="0:8 100B:64"), "must end at block_size=64"),
        (dict(context_ramp="512"), "must be START:VALUE"),
        (dict(tokens_per_step_ramp="0:500"), "tokens_per_step=500 must be a multiple"),
        (dict(tokens_per_step_ramp="0:64"), "batch_size=8 does not divide the 1 sequences"),
        (dict(growth="stak"), "growth='stak' is unknown: did you mean stack"),
        (dict(skip_policy="raptr"), "skip_policy='raptr' is unknown"),
        (dict(skip_policy="layer_dropout", skip_rate=1), "skip_rate=1.0 must be"),
    ],
)
def test_invalid_methods_raise_errors_before_anything_is_written(
    options, said, run_train, tmp_path
):
    with pytest.raises(train.UserError, match=re.escape(said)):
        run_train("run", **options)
    assert not (tmp_path / "run").exists()


def test_resuming_with_a_different_ramp_raises_an_error(run_train):
    options = dict(steps=16, context_ramp="0:32 50%:64")
    run_train("run", **options)
    with pytest.raises(train.UserError, match="differs in context_length"):
        run_train("run", **options | {"context_ramp": "0:16 50%:64"}, init_from="resume")
    with pytest.raises(train.UserError, match="differs in .*skip"):
        run_train("run", **options, skip_policy="layer_dropout", init_from="resume")
    run_train("run", **options, continual_steps=4, init_from="resume")  # may increase


def test_a_ramp_does_not_change_the_rest_of_the_schedule():
    config = load_config(["--stages=4", "--context_ramp=0:512 50%:1024"], Config())
    schedule, _ = train.make_schedules(config, GPTConfig())
    plain, _ = train.make_schedules(dataclasses.replace(config, context_ramp=""), GPTConfig())
    assert with_ramp(schedule, "context_length", "0:1024").phases == plain.phases


# --- warm starts


def test_a_run_starts_from_the_weights_of_another(run_train, corpus):
    """The growth operator enlarges a smaller model, here without changing its function."""
    small = run_train("small", n_layer=2)
    out = run_train("large", init_weights=small, growth="zero_output", steps=4)
    rows = metrics(out)
    assert rows[0]["val_loss"] == pytest.approx(metrics(small)[-1]["val_loss"], rel=1e-6)
    assert rows[0]["blocks"] == 4 and rows[0]["step"] == 0
    # What the small model has cost is charged to the large one, also in a chain of runs.
    for metric in ("tokens", "paper_cost", "flops"):
        assert rows[0][metric] == metrics(small)[-1][metric] > 0
    own = metrics(run_train("alone", steps=4))
    assert rows[-1]["flops"] - rows[0]["flops"] == own[-1]["flops"]
    third = run_train("third", init_weights=out, steps=4)
    assert metrics(third)[0]["flops"] == rows[-1]["flops"]
    weights = load_checkpoint(out)["model"]
    assert sum("h.3.attn.c_proj.weight" in name for name in weights) == 1
    with pytest.raises(train.UserError, match="cannot resume with initial weights yes -> no"):
        run_train("large", growth="zero_output", steps=4, init_from="auto")
    with pytest.raises(train.UserError, match="fade_in_steps would not apply to the growth of the"):
        options = dict(init_weights=small, stages=2, fade_in_steps=1)
        run_train("other", **options, freezing="none", stage_blocks=(3, 4))
    # resuming does not need the small run
    shutil.rmtree(small)
    options = dict(init_weights=small, growth="zero_output", init_from="auto")
    run_train("large", **options, steps=4)
    run_train("large", **options, steps=4, continual_steps=1)
    assert metrics(out)[-1]["flops"] > rows[-1]["flops"]


def test_pretrained_blocks_are_frozen_from_the_start(run_train):
    """LLaMA-Pro: function-preserving growth of another run, then only the new blocks train."""
    small = run_train("small", n_layer=2)
    options = dict(n_layer=3, init_weights=small, steps=4, phase_fractions=(0, 0, 1, 0))
    options |= dict(stage_blocks=(2, 3), weight_decay=0.5)
    out = run_train("large", config_file("llama_pro"), **options)
    rows = metrics(out)
    assert rows[0]["val_loss"] == pytest.approx(metrics(small)[-1]["val_loss"], abs=1e-4)
    (phase,) = json.loads((out / "schedule.json").read_text())["phases"]
    assert phase["trained_blocks"] == phase["new_blocks"] == [2] and not phase["train_embeddings"]
    before, after = load_checkpoint(small)["model"], load_checkpoint(out)["model"]
    for name, tensor in before.items():  # the copy of block 1 is block 2
        same = torch.equal(tensor, after[name])
        assert same or name.startswith("transformer.ln_f"), name
    new = [name for name in after if name.startswith("transformer.h.2.")]
    assert len(new) == 12 and all(name not in before for name in new)
    with pytest.raises(train.UserError, match="has 2 blocks, but the schedule starts by growing a"):
        run_train("other", config_file("llama_pro"), **options | dict(stage_blocks=(1, 3)))


@pytest.mark.parametrize("name", ["solar", "shrink_and_perturb", "msg"])
def test_initial_weights_are_grown_as_the_method_says(name, run_train):
    small = run_train("small", n_layer=2)
    options = dict(n_layer=3, init_weights=small, steps=6, phase_fractions=(0, 1), fade_in_steps=3)
    options |= dict(stage_blocks=(2, 3), learning_rate=0)
    out = run_train("large", config_file(name), **options)
    before, after = load_checkpoint(small)["model"], load_checkpoint(out)["model"]
    key = "transformer.h.0.mlp.c_fc.weight"
    if name == "shrink_and_perturb":  # once, before growth
        noise = after[key] - 0.4 * before[key]
        assert noise.std().item() == pytest.approx(0.02, rel=0.1)
    else:
        assert torch.equal(after[key], before[key])
    losses = [row["loss"] for row in metrics(out)[1:]]
    assert len(losses) == 6


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(n_embd=64), "has n_embd=32, but n_embd=64 was requested"),
        (dict(stages=4), "has 2 blocks, but the first phase has 1"),
        (dict(stage_blocks=(3, 4)), "has 2 blocks, but phase 1 of the first stage would train all"),
        (dict(init_weights="/nowhere"), "init_weights=/nowhere does not exist"),
    ],
)
def test_mismatched_weights_raise_an_error(options, said, run_train):
    """Before anything is written, and also in a dry run."""
    small = run_train("small", n_layer=2, steps=2)
    for dry_run in (False, True):
        with pytest.raises(train.UserError, match=said):
            run_train("large", **{"init_weights": small, "dry_run": dry_run} | options)
    assert not (small.parent / "large").exists()


def test_weights_for_a_different_tokenizer_raise_an_error(run_train, corpus, tmp_path):
    """A vocabulary without padding, such as GPT-2's, is padded."""
    small = run_train("small", steps=2)
    folder = small / "checkpoints/step_00000002"
    state = json.loads((folder / "state.json").read_text())
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:257].clone()
    save_file(weights, folder / "model.safetensors")

    def sign():
        files = ("model.safetensors", "optimizer.safetensors", "state.json")
        lines = [f"{sha256(folder / name)}  {name}\n" for name in files]
        (folder / "SHA256SUMS").write_text("".join(lines))

    sign()
    out = run_train("padded", init_weights=small, steps=2, learning_rate=0, weight_decay=0)
    wte = load_checkpoint(out)["model"]["transformer.wte.weight"]
    assert torch.equal(wte[:257], weights["transformer.wte.weight"]) and not wte[257:].any()
    (folder / "state.json").write_text(json.dumps(state | {"tokenizer": "gpt2"}))
    sign()
    with pytest.raises(train.UserError, match="was trained with tokenizer gpt2, but .* uses bytes"):
        run_train("other", init_weights=small, steps=2)


# --- CONTRIBUTING.md


def test_the_worked_example_adds_a_method(tmp_path, corpus):
    """Apply the example to a copy of the repository without `stack`; only two files change."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    operator, config = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    dry, run = (shlex.split(c) for c in re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    assert operator.strip() == inspect.getsource(growth.stack).strip()
    assert len(operator.strip().splitlines()) <= 15
    copy = copy_repository(tmp_path / "copy")
    without = (ROOT / "growth.py").read_text().replace(operator, "")
    (copy / "growth.py").write_text(without)
    method = copy / "configs/methods/one_shot_stacking.py"
    method.unlink()
    tiny = ["--steps=10", "--eval_interval=100", f"--data_dir={corpus}", "--hellaswag_limit=4"]

    def execute(command):
        assert command[0] == "python"
        command = [str(copy / command[1]), *command[2:], *tiny, f"--out_dir={tmp_path / 'out'}"]
        return script(*command, cwd=copy, check=False)

    method.write_text(config)
    assert "growth='stack' is unknown" in execute(dry).stderr
    (copy / "growth.py").write_text(without + "\n\n" + operator)
    assert "2 of 2" in execute(dry).stdout
    assert execute(run).returncode == 0
    summary = json.loads((tmp_path / "out/schedule.json").read_text())
    assert [p["n_blocks"] for p in summary["phases"]] == [2, 4]
    rows = metrics(tmp_path / "out")
    assert rows[-1]["step"] == 10 and rows[-1]["blocks"] == 4
