"""Training and scoring on a GPU: numerics, synchronization, memory, kernels and graphs."""

import contextlib
import itertools
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, arguments, metrics, needs_gpu, script, without_clock
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import stagewise.loss as losses
import train
from benchmarks import step as benchmark
from benchmarks import variants
from benchmarks.scoring import one_by_one
from cost import make_schedules
from hellaswag import Example, ending_losses
from model import GPT, GPTConfig
from schedule import make_schedule
from stagewise.checkpoint import CheckpointWriter, load_checkpoint
from stagewise.config import Config
from stagewise.data import Prefetch, Shards, TrainOrder, load_meta
from stagewise.device import autocast
from stagewise.distributed import Ranks

pytestmark = [pytest.mark.gpu, needs_gpu]
CUDA = torch.device("cuda", 0)
SMALL = GPTConfig(block_size=128, vocab_size=1024, n_layer=4, n_head=2, n_embd=128)
BF16 = autocast(CUDA, "bfloat16", 128)


def random_batches(config, batch_size=4):
    """Return an endless iterator over two pinned micro-batches."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.block_size)
    tokens = [
        torch.randint(config.vocab_size, shape, generator=generator).pin_memory() for _ in range(3)
    ]
    return itertools.cycle(itertools.pairwise(tokens))


def step(model, optimizer, batches, residual_scales=None):
    return train.train_step(model, optimizer, batches, 2, BF16, 1.0, residual_scales)


def operations(function, *args):
    """Return the names of the operators and kernels that a call runs."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        function(*args)
        torch.cuda.synchronize()
    return {event.key for event in profiled.key_averages()}


@contextlib.contextmanager
def synchronizing_is(mode):
    """Make synchronization with the GPU raise an error or warn."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- loss


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_loss_and_its_gradients_match_fp64(monkeypatch, chunks, frozen, compiled):
    N, C, V = 1024, 256, 5056
    monkeypatch.setitem(losses.LOGITS_BYTES, "cuda", 4 * N * V // chunks)
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        # exact in bf16, so that only products and sums are rounded
        (scale * torch.randn(n, C, device=CUDA, generator=generator)).bfloat16().float()
        for n, scale in ((N, 1.0), (V, 0.05))
    )
    targets = torch.randint(V, (N,), device=CUDA, generator=generator)
    softmax_loss, rows = losses.SoftmaxLoss(), []
    gradients = []
    if compiled:
        torch._dynamo.reset()
        softmax_loss.compile()

    def record(logits, targets):
        rows.append(len(logits))
        loss, gradient = softmax_loss(logits, targets)
        gradients.append(gradient.double())
        return loss, gradient

    x.requires_grad_(), weight.requires_grad_(not frozen)
    with BF16:
        loss = losses.ChunkedCrossEntropy.apply(x, weight, targets, record)
    (3 * loss).backward()
    assert rows == [N // chunks] * chunks and loss.dtype == x.grad.dtype == torch.float32

    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.cross_entropy(exact_x @ exact_weight.T, targets)
    (3 * exact).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert relative(x.grad, exact_x.grad) < 1e-2
    if frozen:
        assert weight.grad is None
    else:
        assert relative(weight.grad, exact_weight.grad) < 1e-2
        # Of the gradients of the logits in bf16, the products are summed in fp32.
        summed = torch.cat(gradients).T @ x.detach().double() * (3 / N)
        assert relative(weight.grad, summed) < 1e-5
        assert weight.grad.dtype == torch.float32


def test_evaluated_losses_match_fp64():
    N, C, V, K = 3000, 256, 50304, 2
    x = torch.randn(N, C, device=CUDA).bfloat16()
    weight = (0.05 * torch.randn(V, C, device=CUDA)).bfloat16().float()
    targets = torch.randint(V, (N, K), device=CUDA)
    with BF16:
        result = losses.token_losses(x.float(), weight, targets)
    exact = -torch.log_softmax(x.double() @ weight.double().T, -1).gather(1, targets)
    assert result.dtype == torch.float32 and (result - exact).abs().max() < 1e-3


# --- steps


def test_a_step_whose_loss_is_nan_changes_nothing():
    model = GPT(SMALL, device=CUDA)
    optimizer, batches = train.make_optimizer(model, Config()), random_batches(SMALL)
    step(model, optimizer, batches)

    def state():
        tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            tensors |= {f"{name}/{k}": t.clone() for k, t in optimizer.state[p].items()}
        return tensors

    before = state()
    loss, grad_norm = step(model, optimizer, batches, [math.nan] * 4).tolist()
    assert math.isnan(loss) and math.isnan(grad_norm)
    after = state()
    assert before.keys() == after.keys() and len(before) == 4 * len(list(model.parameters()))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    loss, grad_norm = step(model, optimizer, batches).tolist()
    after = state()
    assert math.isfinite(loss) and math.isfinite(grad_norm)
    assert all(after[name].item() == 2 for name in after if name.endswith("/step"))
    name = "transformer.wpe.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_synchronizes_in_any_phase(compiled):
    torch._dynamo.reset()
    schedule = make_schedule(4, 64, stages=4, continual_steps=8, phase1="released_code")
    paper = make_schedule(4, 64, stages=4)
    for phases in (schedule.phases, paper.phases):
        model = GPT(SMALL, phases[0].n_blocks, device=CUDA)
        if compiled:
            model.compile_regions()
        batches, state = random_batches(SMALL), {}
        for phase in phases:
            optimizer = train.enter_phase(model, state, phase, Config())
            state = optimizer.state
            scales = [0.5] * phase.n_blocks
            scales[0] = 0.0  # a skipped and other scaled blocks
            for residual_scales in (None, scales):
                step(model, optimizer, batches, residual_scales)  # compiles
                with synchronizing_is("error"):
                    for _ in range(2):
                        step(model, optimizer, batches, residual_scales)


def test_batches_arrive_on_the_device_as_they_were_read(corpus):
    """1,000 micro-batches, while the GPU lags behind and pinned memory is reused."""
    config = Config(tokens_per_step=1024, batch_size=4, block_size=64)
    data = Shards(corpus, "train", 64, load_meta(corpus))
    schedule = make_schedule(1, 250, tokens_per_step=1024, context_length=64)

    def batches(device):
        order = TrainOrder(len(data), 1)
        return train.train_batches(data, order, schedule, 0, config, Ranks(), device)

    factors = torch.arange(1, 2 * 4 * 64 + 1)

    def checksum(x, y, factors):
        return (torch.cat((x.flatten(), y.flatten())) * factors).sum()

    sums, device_factors = [], factors.to(CUDA)
    for batch in Prefetch(batches(CUDA)):
        assert all(t.is_pinned() for t in batch)
        if len(sums) % 20 == 0:
            torch.cuda._sleep(20_000_000)  # cycles
        x, y = (t.to(CUDA, non_blocking=True) for t in batch)
        sums.append(checksum(x, y, device_factors))
    expected = [checksum(*batch, factors) for batch in batches(torch.device("cpu"))]
    assert len(sums) == 1000 and torch.equal(torch.stack(sums).cpu(), torch.stack(expected))


def test_a_compiled_run_needs_few_graphs(run_train):
    """12 stages, validation and HellaSwag."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(n_layer=12, stages=12, steps=24, eval_interval=12, device="cuda")
    run_train("run", **options, compile="blocks")
    # Of blocks: with and without gradients of the input or the weights, and in validation of
    # trained and frozen weights. Of the loss: one.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@torch._functorch.config.patch(enable_autograd_cache=False)
def test_distributed_training_needs_no_more_graphs():
    """The blocks are larger than the first of the buckets in which gradients are reduced."""
    config = GPTConfig(block_size=64, vocab_size=1024, n_layer=12, n_head=4, n_embd=256)
    graphs = []
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    try:
        for distributed in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = GPT(config, n_blocks=1, device=CUDA)
            model.compile_regions()
            batches, state = random_batches(config), {}
            for phase in make_schedule(12, 48, stages=12).phases:
                optimizer = train.enter_phase(model, state, phase, Config())
                state, wrapped = optimizer.state, None
                wrapped = DDP(model, device_ids=[CUDA]) if distributed else model
                for _ in range(2):
                    step(wrapped, optimizer, batches)
            # Dynamo itself counts a graph that is cut only once.
            graphs.append(torch._dynamo.utils.counters["aot_autograd"]["total"])
    finally:
        dist.destroy_process_group()
    assert graphs[0] == graphs[1] <= 4


# --- memory


def peak(config, batch_size, frozen=False):
    """Return the peak memory of a step in bytes, without parameters and optimizer state."""
    model = GPT(config, device=CUDA)
    optimizer, batches = train.make_optimizer(model, Config()), random_batches(config, batch_size)
    if frozen:
        model.freeze(range(config.n_layer - 1), embeddings=True, head=True)
    step(model, optimizer, batches)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, batches)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_with_the_micro_batch_but_not_by_its_logits(monkeypatch):
    config = GPTConfig(block_size=256, vocab_size=50304, n_layer=12, n_head=2, n_embd=128)
    rows = 8 * 256
    monkeypatch.setitem(losses.LOGITS_BYTES, "cuda", 4 * rows * config.vocab_size)
    few, some, many = (peak(config, 8 * n) for n in (1, 2, 4))
    assert many - some == pytest.approx(2 * (some - few), rel=0.1)
    assert many - few < 2 * (4 - 1) * rows * config.vocab_size  # the logits in bf16


def test_frozen_blocks_need_no_memory_for_activations():
    config = GPTConfig(block_size=256, vocab_size=1024, n_layer=12, n_head=2, n_embd=128)
    assert peak(config, 32, frozen=True) < 0.3 * peak(config, 32)


# --- checkpoints


def test_a_checkpoint_is_not_changed_by_the_steps_after_it(tmp_path):
    """Copies to pinned memory wait for the steps before, and the steps after for the copies."""
    config = GPTConfig(block_size=128, vocab_size=50304, n_layer=4, n_head=2, n_embd=128)
    model = GPT(config, device=CUDA)
    optimizer, batches = train.make_optimizer(model, Config()), random_batches(config)
    schedule = make_schedule(4, 10)
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": []}
    state = train.run_state(Config(), config, schedule, 9, meta)
    state |= {"n_blocks": 4, "seconds": 0.0, "loss_history": {}}
    writer = CheckpointWriter(tmp_path, keep=10, milestones=set())
    expected = []
    for number in range(3):
        torch.cuda._sleep(500_000_000)  # cycles, so that the GPU lags behind
        step(model, optimizer, batches)
        expected.append(
            {n: p.detach().clone() for n, p in model.named_parameters()}
            | {
                f"{n}/{key}": t.clone()
                for n, p in model.named_parameters()
                for key, t in optimizer.state[p].items()
            }
        )
        writer.save(model, optimizer, state | {"step": number})
        for _ in range(3):
            step(model, optimizer, batches)
    buffers, needed = list(writer._host.values()), sum(m.nbytes for m in writer._memory)
    assert all(buffer.is_pinned() for buffer in buffers)
    assert needed < 1.01 * 4 * 3 * model.num_params()
    writer.close()
    assert writer.failure is None
    for number, tensors in enumerate(expected):
        folder = tmp_path / f"checkpoints/step_{number:08d}"
        saved = load_checkpoint(folder, optimizer=True)
        for name, tensor in tensors.items():
            stored = saved["optimizer" if "/" in name else "model"]
            assert torch.equal(stored[name], tensor.cpu()), (number, name)


def test_a_run_resumed_in_a_new_process_is_bit_identical(corpus, tmp_path):
    options = dict(stages=4, steps=16, continual_steps=4, device="cuda", compile="blocks")
    options |= dict(deterministic=True, data_dir=corpus, grad_clip=1.0, dropout=0.1)
    every_step = dict(checkpoint_interval=1, keep_checkpoints=100)
    whole = tmp_path / "whole"
    script("train.py", *arguments(whole, **options, **every_step))
    end = load_checkpoint(whole, optimizer=True)
    for at in (5, 13):  # in phases 1
        part = tmp_path / f"from_{at}"
        name = f"checkpoints/step_{at:08d}"
        shutil.copytree(whole / name, part / name)
        shutil.copy(whole / "metrics.jsonl", part)
        # with nothing that the first process compiled or measured
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache_{at}")}
        script("train.py", *arguments(part, **options, init_from="resume"), **cache)
        resumed = load_checkpoint(part, optimizer=True)
        for kind in ("model", "optimizer"):
            assert resumed[kind].keys() == end[kind].keys()
            assert all(torch.equal(t, end[kind][n]) for n, t in resumed[kind].items()), (at, kind)
        assert without_clock(metrics(part)) == without_clock(metrics(whole))


# --- HellaSwag and sampling


@pytest.fixture
def examples():
    random = np.random.RandomState(0)

    def tokens(n):
        return random.randint(320, size=n).tolist()

    return [
        Example(tokens(random.randint(1, 60)), [tokens(random.randint(1, 20)) for _ in range(4)], 0)
        for _ in range(60)
    ]


@pytest.fixture
def scored():
    """A model with random weights, large enough that endings differ clearly."""
    model = GPT(GPTConfig(**TINY | {"n_embd": 128}), device=CUDA).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, device=CUDA, generator=generator)
        p.data.add_(noise, alpha=0.1 if p.dim() < 2 else 0.05)
    return model


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_batched_scores_equal_those_of_one_example_at_a_time(scored, examples, dtype, tolerance):
    with autocast(CUDA, "float32", 128):
        expected = [one_by_one(scored, e)[0].cpu().numpy() for e in examples]
    with autocast(CUDA, dtype, 128):
        for batch_tokens in (None, 1000):
            sums, _ = ending_losses(scored, examples, batch_tokens)
            np.testing.assert_allclose(sums, np.stack(expected), rtol=tolerance)


def test_scoring_and_sampling_use_no_cudnn_attention(scored, examples):
    """It would build a plan for every shape."""
    idx = torch.zeros(2, 5, dtype=torch.long, device=CUDA)
    with BF16:
        scoring = operations(ending_losses, scored, examples)
        sampling = operations(scored.generate, idx, 8)
    assert any("efficient_attention" in name for name in scoring)
    assert any("flash_attention" in name for name in sampling)
    assert [name for name in scoring | sampling if "cudnn" in name.lower()] == []


def test_scoring_synchronizes_only_for_the_result(scored, examples):
    def synchronizations(batch_tokens):
        with warnings.catch_warnings(record=True) as caught, synchronizing_is("warn"), BF16:
            warnings.simplefilter("always")
            ending_losses(scored, examples, batch_tokens)
        return sum("synchronizing" in str(w.message) for w in caught)

    synchronizations(256)
    assert synchronizations(256) == synchronizations(10**6) <= 1


# --- benchmarks


@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_a_variant_of_the_benchmark_runs_its_own_attention(tmp_path, compile):
    torch._dynamo.reset()
    sizes = {k: v for k, v in TINY.items() if k != "vocab_size"} | {"n_embd": 128}
    config = benchmark.BenchmarkConfig(
        **sizes, tokens_per_step=256, batch_size=2, n_vocab=257, device="cuda", compile=compile
    )
    model_config = train.make_model_config(config, 320)
    data = benchmark.random_data(tmp_path, config)
    bench = benchmark.Benchmark(config, model_config, CUDA, data)
    phase = make_schedules(config, model_config)[1].phases[0]
    candidates = {"baseline": benchmark.phase_candidates(bench, {"": phase})[""]}
    candidates |= {name: benchmark.variant(bench, name, phase) for name in variants.BACKENDS}
    names = {}
    for _ in range(2):  # compiled in the first round
        for name, candidate in candidates.items():
            names[name] = operations(candidate.enter(), 0.0)
    for name in variants.BACKENDS:
        ran = {b for b in variants.BACKENDS if any(f"{b}_attention" in n for n in names[name])}
        assert ran == {name}
