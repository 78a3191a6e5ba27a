"""The benchmarks, run as a user runs them, at a size of no interest."""

import dataclasses
import functools
import json
import re
import shutil
import sys
import tarfile

import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, script
from torch.nn.attention import SDPBackend

import stagewise.loss
from benchmarks import gpu, losses, variants
from benchmarks import step as benchmark
from cost import cost_per_token, flops_per_token, make_schedules
from model import GPT, GPTConfig
from schedule import SkipPolicy, Step, make_schedule
from stagewise.config import load_config
from stagewise.errors import UserError

SMALL = ["--n_layer=4", "--n_embd=32", "--n_head=2", "--block_size=32", "--tokens_per_step=256"]
SMALL += ["--batch_size=4", "--n_vocab=257"]
QUICK = [*SMALL, "--device=cpu", "--compile=none", "--rounds=3", "--min_seconds=0"]
MODEL_CONFIG = GPTConfig(block_size=32, vocab_size=320, n_layer=4, n_head=2, n_embd=32)
COMPILER = shutil.which("g++") or shutil.which("clang++")

# A model with the interface of nanoGPT's.
NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = True
    dropout: float = 0.0

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.attn.c_proj = nn.Linear(c.n_embd, c.n_embd)
        self.mlp.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.mlp.c_proj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x):
        q, k, v = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(
            torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf
        )
        x = x + self.attn.c_proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd),
        ))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        decayed = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
"""
PEER = f"""
from a_module_that_does_not_exist import something
{NANOGPT}
raise SystemExit("a peer's script must not run")
"""


def run_step(tmp_path, *options):
    """Return the report of benchmarks/step.py, its rows by name, and what it printed."""
    path = tmp_path / "report.json"
    result = script("benchmarks/step.py", *QUICK, *options, f"--json={path}")
    report = json.loads(path.read_text())
    return report, {row["name"]: row for row in report["rows"]}, result.stdout


def test_every_phase_and_peer_is_timed_and_compared_with_its_flops(tmp_path):
    (tmp_path / "train_gpt2.py").write_text(PEER)
    peers = ["--peer", f"build_nanogpt={tmp_path}", "--peer", "hf", "--variant", "erf"]
    peers += ["--profile=True"]
    report, rows, output = run_step(tmp_path, "--stages=2", *peers)
    phases = [f"stage {s} phase {p}" for s in (1, 2) for p in (1, 2)]
    assert list(rows) == ["baseline", *phases, "erf", "build_nanogpt", "hf"]
    assert all(name in output for name in rows)
    assert [rows[p]["trained_blocks"] for p in phases] == [2, 2, 2, 4]
    assert [rows[p]["blocks"] for p in phases] == [2, 2, 4, 4]
    base = rows["baseline"]
    assert base["time_ratio"] == base["flops_ratio"] == rows["stage 2 phase 2"]["time_ratio"] == 1
    assert base["flops_per_token"] == flops_per_token(MODEL_CONFIG, 32, range(4), range(4))
    assert rows["stage 1 phase 1"]["flops_ratio"] < rows["stage 2 phase 1"]["flops_ratio"] < 1
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"])
        assert 0 <= row["data_wait"] < 1
    assert all(rows[p]["peak_memory"] > 2**20 and rows[p]["graphs"] == 0 for p in phases)
    assert report["machine"]["torch"] in output and report["matmul_flops_per_second"] > 1e9
    longest = report["profile"][0]
    assert longest["name"] in output and longest["calls"] >= 1 and longest["seconds"] > 0
    assert any("mm" in row["name"] for row in report["profile"])


def test_phases_that_differ_in_context_or_tokens_per_step_are_timed_apart(tmp_path):
    ramps = ["--context_ramp=0:16 75%:32", "--tokens_per_step_ramp=0:128 50%:256"]
    _, rows, output = run_step(tmp_path, *ramps, "--stages=1", "--steps=8")
    parts = list(rows.values())
    assert [(r["context_length"], r["tokens_per_step"]) for r in parts] == [
        (32, 256),
        (16, 128),
        (16, 256),
        (32, 256),
    ]
    whole, small, short, same = parts
    flops = flops_per_token(MODEL_CONFIG, 16, range(4), range(4))
    assert small["flops_per_token"] == short["flops_per_token"] == flops < whole["flops_per_token"]
    assert same["seconds"] == whole["seconds"] != small["seconds"] != short["seconds"]
    assert small["tokens_per_second"] == pytest.approx(128 / small["seconds"])
    assert short["tokens_per_second"] == pytest.approx(256 / short["seconds"])
    assert "context" in output and "tokens" in output


def test_only_phases_with_the_same_work_share_a_candidate():
    skip = SkipPolicy("layer_dropout", 0.5, 20, seed=1)
    (phase,) = make_schedule(4, 20, context_length=32, tokens_per_step=256).phases
    different = [
        dict(n_blocks=3, trained_blocks=(0, 1, 2)),
        dict(trained_blocks=(2, 3)),
        dict(trained_blocks=(1, 3)),
        dict(train_embeddings=False),
        dict(train_head=False),
        dict(context_length=16),
        dict(tokens_per_step=128),
        dict(skip=skip),
        dict(skip=dataclasses.replace(skip, rate=0.4)),
        dict(skip=skip, start=10),
    ]
    keys = {dataclasses.replace(phase, **change).work() for change in different}
    assert len(keys | {phase.work()}) == len(different) + 1
    same = dict(name="x", stage=2, kind="continual", start=3, growth="stack", rewarmup_steps=2)
    same |= dict(optimizer_state="reset", milestone=False, new_blocks=(3,), rewarmup="new_blocks")
    same |= dict(lr_setback=1.0, fade_in_steps=2, shrink=0.5, perturb=0.1, freezeout=None)
    assert dataclasses.replace(phase, **same).work() == phase.work()
    assert set(same).union(*different) | {"stop"} == {f.name for f in dataclasses.fields(phase)}


def tiny_benchmark(tmp_path, **options):
    config = benchmark.BenchmarkConfig(
        **{k: v for k, v in TINY.items() if k != "vocab_size"},
        tokens_per_step=256,
        batch_size=2,
        steps=40,
        n_vocab=257,
        device="cpu",
        **options,
    )
    data = benchmark.random_data(tmp_path, config)
    bench = benchmark.Benchmark(config, GPTConfig(**TINY), torch.device("cpu"), data)
    return bench, *make_schedules(config, bench.model_config)


def test_the_steps_of_a_skipping_phase_run_and_cost_what_its_policy_says(tmp_path, monkeypatch):
    options = dict(skip_policy="layer_dropout", skip_rate=0.9, compile="none")
    bench, schedule, _ = tiny_benchmark(tmp_path, **options)
    (phase,) = schedule.phases
    scales_seen = []
    train_step = benchmark.train.train_step

    def record(*args):
        scales_seen.append(args[-1])
        return train_step(*args)

    monkeypatch.setattr(benchmark.train, "train_step", record)
    candidate = benchmark.phase_candidates(bench, {"skipping": phase})["skipping"]
    benchmark.time_candidates([candidate], 2, 0.0, torch.device("cpu"))
    n = candidate.n_steps
    steps = [schedule.at(i * 40 // n) for i in range(n)]
    assert n == benchmark.MIN_SKIPPING_STEPS and len({s.residual_scales for s in steps}) > 4
    trials = 2 * [s.residual_scales for s in [steps[0], *steps]]
    assert scales_seen[-len(trials) :] == trials and len(candidate.seconds) == 2
    costs = [cost_per_token(s, "flops", bench.model_config) for s in steps]
    assert candidate.mean_flops == pytest.approx(sum(costs) / n)
    all_run = cost_per_token(Step(phase, None), "flops", bench.model_config)
    assert candidate.mean_flops < all_run


def test_batches_have_the_context_and_the_tokens_of_the_phase(tmp_path):
    ramps = dict(context_ramp="0:16 50%:64", tokens_per_step_ramp="0:128 75%:256")
    bench, schedule, _ = tiny_benchmark(tmp_path, **ramps)
    assert len(schedule.phases) == 3
    for phase in schedule.phases:
        x, y = next(bench.batches(phase))
        assert x.shape == y.shape == (128 // phase.context_length, phase.context_length)
        assert x.max() < 257


def test_candidates_enter_their_phase_before_every_trial(tmp_path, monkeypatch):
    """The model has the phase's blocks and trains what the phase trains, in any order of phases."""
    bench, schedule, _ = tiny_benchmark(tmp_path, stages=2, compile="none")
    phases = {p.name: p for p in schedule.phases}
    candidates = benchmark.phase_candidates(bench, phases)
    seen = []
    train_step = benchmark.train.train_step

    def record(model, optimizer, *args):
        result = train_step(model, optimizer, *args)
        trains = model.trainable()
        seen.append((trains["blocks"], trains["embeddings"], trains["head"]))
        return result

    monkeypatch.setattr(benchmark.train, "train_step", record)
    for name in [*phases, *reversed(phases)]:
        phase = phases[name]
        candidates[name].enter()(0.0)
        blocks = [i in phase.trained_blocks for i in range(phase.n_blocks)]
        assert seen[-1] == (blocks, phase.train_embeddings, phase.train_head)
    assert len(seen) == 8


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on the CPU")
def test_graphs_and_compile_seconds_are_counted(tmp_path):
    _, rows, _ = run_step(tmp_path, "--stages=2", "--compile=blocks")
    rows = [row for row in rows.values() if "graphs" in row]
    assert rows[0]["graphs"] >= 2 and rows[0]["compile_seconds"] > 0
    assert 3 <= sum(row["graphs"] for row in rows) <= 4


# On a CPU there are two backends, and inductor would replace the one by the other.
@torch._inductor.config.patch(pattern_matcher=False)
@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_variant_runs_its_own_graph(tmp_path, monkeypatch):
    """Not the baseline's, which is compiled first, and the baseline not the variant's."""
    monkeypatch.setitem(variants.BACKENDS, "math", SDPBackend.MATH)
    torch._dynamo.reset()
    bench, _, baseline = tiny_benchmark(tmp_path, compile="blocks")
    (phase,) = baseline.phases
    candidates = {
        "baseline": benchmark.phase_candidates(bench, {"": phase})[""],
        "math": benchmark.variant(bench, "math", phase),
        "erf": benchmark.variant(bench, "erf", phase),
    }
    graphs = benchmark.counters["stats"]

    def kernels(name):
        step = candidates[name].enter()
        step(0.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(0.0)
        return {event.key for event in profile.key_averages()}

    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for name in ("baseline", "math", "erf", "math", "baseline"):
        before = graphs["unique_graphs"]
        assert (flash in kernels(name)) == (name != "math")
        candidates[name].seconds.append(graphs["unique_graphs"] - before)
    # The block and the loss, then the block of each variant.
    new = {name: c.seconds for name, c in candidates.items()}
    assert new == {"baseline": [2, 0], "math": [1, 0], "erf": [1]}


@pytest.mark.parametrize(
    "options, named",
    [
        (["--peer", "nanogpt"], "--peer=nanogpt: model.py is not in 'DIR': name a checkout"),
        (["--peer", "llmc=x"], "--peer=llmc=x is unknown: use one of nanogpt, build_nanogpt, hf"),
        (["--variant", "fast"], "--variant=fast is unknown: "),
        (["--variant", "cudnn"], "--variant=cudnn needs a CUDA GPU"),
        (["--peer_batch_size", "3"], "batch_size=3 does not divide"),
        (["--peer_batch_size", "0"], "--peer_batch_size=0 must be at least 1"),
        (["--rounds=0"], "rounds=0 must be"),
        (["--n_vocab=70000"], "n_vocab=70000 must be"),
    ],
)
def test_bad_options_are_named(monkeypatch, options, named):
    monkeypatch.setattr(sys, "argv", ["step.py", *QUICK, *options])
    with pytest.raises(UserError, match=re.escape(named)):
        benchmark.main()


def test_a_series_continues_after_an_interruption(tmp_path, monkeypatch, capsys):
    commands = {
        "good": gpu.Step(["-c", "import os; print(os.environ['X'])"], 30, {"X": "said"}),
        "slow": gpu.Step(["-c", "import time; time.sleep(60)"], 2),
        "bad": gpu.Step(["-c", "raise SystemExit(3)"], 30),
    }
    monkeypatch.setattr(gpu, "steps", lambda args: commands)
    args = gpu.Args(rehearsal=True, out=tmp_path / "gpu", archive=tmp_path / "all.tar.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(args, "minutes", 0.2)  # too little for any step
        gpu.main(args)
    assert "no time for: good, slow, bad; use the same command" in capsys.readouterr().out
    with pytest.raises(UserError, match="failed: slow, bad: use the same command to run"):
        gpu.main(args)
    output = capsys.readouterr().out
    assert "slow: failed: stopped after 2 s" in output
    assert "bad: failed: exit 3" in output
    assert [path.name for path in (tmp_path / "gpu").glob("*.json")] == ["good.json"]
    done = json.loads((tmp_path / "gpu/good.json").read_text())
    assert done["machine"]["command"].startswith("python -c 'import os") and done["machine"]["date"]
    assert (tmp_path / "gpu/good.log").read_text() == "said\n"
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"gpu/good.json", "gpu/bad.log"} <= set(archive.getnames())
    commands["slow"] = commands["bad"] = commands["good"]
    gpu.main(args)
    assert "good.json exists" in capsys.readouterr().out
    assert len(list((tmp_path / "gpu").glob("*.json"))) == 3
    with pytest.raises(UserError, match="--only=x is unknown: use good, slow, bad"):
        gpu.main(dataclasses.replace(args, only=("x",)))


@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_options_of_the_series_are_valid(tmp_path, rehearsal):
    (tmp_path / "model.py").touch()
    commands = gpu.steps(gpu.Args(nanogpt=tmp_path, rehearsal=rehearsal))
    checked = 0
    for command in (s.command for s in commands.values()):
        assert command[0] == "-m" or (gpu.ROOT / command[0]).exists()
        if command[0] == "benchmarks/step.py":
            config = load_config(command[1:], benchmark.defaults(on_gpu=not rehearsal))
            # On a GPU that this machine does not have.
            device = torch.device("cpu" if rehearsal else "cuda")
            benchmark.check_options(config, device)
            checked += 1
    assert checked >= 6
    command = commands["losses"].command
    losses.check_options(load_config(command[1:], losses.LossConfig()), torch.device("cpu"))
    assert any(word.startswith("--peer=nanogpt=") for word in commands["micro_32"].command)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_fp8_needs_a_gpu_with_fp8_products(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load_config([], benchmark.defaults(on_gpu=True))
    check = functools.partial(variants.check_variants, ["fp8_head"], config, torch.device("cuda"))
    if capability >= (8, 9):
        check()
    else:
        with pytest.raises(UserError, match="fp8_head needs a GPU with fp8 matrix products"):
            check()


# --- losses


def test_the_loss_with_products_in_fp8_is_close_to_the_exact_one(monkeypatch):
    monkeypatch.setitem(stagewise.loss.LOGITS_BYTES, "cpu", 16 * 4 * 320)  # chunks of 16 rows
    torch.manual_seed(0)
    exact, rounded = (GPT(GPTConfig(**TINY), seed=1) for _ in range(2))
    variants.apply_variant(rounded, "fp8_head")
    x, y = torch.randint(320, (2, 4, 16))
    gradients = []
    for model in (exact, rounded):
        loss = model(x, y)
        (3 * loss).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert 0 < abs(rounded(x, y) / exact(x, y) - 1) < 1e-3
    for name, g in gradients[0].items():
        other = gradients[1][name]
        assert 0 < (g - other).norm() / g.norm() < 0.1, name


def test_losses_are_compared_with_a_reference(corpus, tmp_path):
    path = tmp_path / "losses.json"
    options = TINY_RUN | dict(data_dir=corpus, steps=20, learning_rate=1e-3, dtype="float32")
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--variant=erf", "--variant=fp8_head", f"--nanogpt={tmp_path}", f"--json={path}"]
    (tmp_path / "model.py").write_text(NANOGPT)
    output = script("benchmarks/losses.py", *words).stdout
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["reference", "train.py", "erf", "fp8_head", "nanoGPT"]
    assert {len(row["losses"]) for row in rows.values()} == {20}
    assert rows["reference"]["losses"][0] - rows["reference"]["losses"][-1] > 0.05
    of = {name: row["largest_difference_reference"] for name, row in rows.items()}
    assert of["reference"] == 0 and of["train.py"] < 1e-6 < of["fp8_head"] < 1e-2
    # At this size, the two kinds of GELU differ little.
    assert rows["erf"]["losses"] != rows["train.py"]["losses"]
    assert rows["erf"]["largest_difference_nanoGPT"] < 1e-6
    assert f"{of['erf']:.1e}" in output


@pytest.mark.slow
def test_a_study_is_timed_with_one_and_with_two_jobs(corpus, tmp_path):
    path = tmp_path / "jobs.json"
    options = ["--runs=2", "--steps=2", "--rounds=1", f"--data_dir={corpus}", f"--json={path}"]
    result = script("benchmarks/jobs.py", *options)
    assert result.stdout.count("finished, val loss") == 4
    report = json.loads(path.read_text())
    (row,) = report["rounds"]
    assert row["ratio"] == row["one_at_a_time"] / row["several"] == report["ratio"] > 0
    result = script("benchmarks/jobs.py", *options, "--jobs=1", check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: --rounds")


@pytest.mark.slow
def test_a_forecast_is_compared_with_its_run(corpus, tmp_path):
    options = TINY_RUN | dict(data_dir=corpus, stages=2, steps=40)
    words = [f"--{name}={value}" for name, value in options.items()]
    script(ROOT / "benchmarks/forecast.py", *words, cwd=tmp_path)
    path = tmp_path / "out/bench/forecast.json"
    *phases, total = json.loads(path.read_text())["rows"]
    names = [f"stage {stage} phase {phase}" for stage in (1, 2) for phase in (1, 2)]
    assert [row["phase"] for row in phases] == names
    for row in (*phases, total):
        assert row["ratio"] == row["forecast"] / row["run"] > 0
    assert total["run"] > sum(row["run"] for row in phases)


def test_bad_options_end_in_one_line():
    result = script("benchmarks/step.py", *QUICK, "--rounds=0", check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: rounds=0")
    assert len(result.stderr.splitlines()) == 1
