"""Train a GPT-2, with all blocks from the start or in stages (arXiv:2411.18700).

    python train.py [configs/A.py configs/B.py ...] [--key=value ...]          one process
    torchrun --standalone --nproc_per_node=8 train.py [...]                    eight GPUs
    python train.py configs/gpt2_124m.py configs/s4.py --dry_run               print the cost only

Options (stagewise/config.py) -> schedule (schedule.py) -> phases -> steps -> metrics.jsonl ->
figures (plot.py). The training loop has no method-specific branches: it follows the schedule. The
baseline is a schedule with a single phase.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import stagewise.console  # noqa: F401  (first: Ctrl-C during the other imports)

# isort: split

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import growth
import hellaswag
from cost import COST_METRICS, NAMES, cumulative_cost, make_schedules, summarize, summary_table
from memory import memory_table
from model import GPT, GPTConfig
from schedule import Phase, Schedule, begun, decay_start, learning_rate
from stagewise.checkpoint import (
    FOLDER,
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_state_from,
)
from stagewise.config import (
    Config,
    absolute_paths,
    grad_accum_steps,
    load_config,
    padded_vocab_size,
)
from stagewise.data import (
    Prefetch,
    Shards,
    TrainOrder,
    check_tokenizer,
    fingerprint,
    get_tokenizer,
    load_meta,
    verify_shards,
)
from stagewise.device import (
    autocast,
    check_memory,
    compile_seconds,
    device_name,
    matmul_dtype,
    peak_flops,
    peak_memory,
    pick_device,
    reset_peak_memory,
    use_deterministic_kernels,
)
from stagewise.distributed import (
    Ranks,
    any_rank,
    check_replicas,
    destroy_process_groups,
    full_tensor,
    fully_shard,
    init_process_group,
    make_mesh,
    mean_over_ranks,
    ranks_from_environment,
    set_gradient_sync,
    wait_while_any,
)
from stagewise.errors import UserError, report_user_errors
from stagewise.fileio import (
    convert,
)
from stagewise.hf import SIZES
from stagewise.loss import LOGITS_BYTES, chunk_size
from stagewise.metrics import MetricsWriter
from stagewise.monitor import EXIT_STOPPED, LossMonitor, StopSignals
from stagewise.run_folder import (
    copy_tokenizer,
    describe_run,
    describe_start,
    former_starts,
    lock_out_dir,
    write_json,
)
from stagewise.seeding import derived_seed
from stagewise.trackers import Trackers, check_trackers

BAR = "{desc:<16} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass
class Setup:
    """What the options determine before there is a model: schedule, data, device, processes."""

    schedule: Schedule
    summary: dict[str, Any]  # the contents of schedule.json
    model_config: GPTConfig
    meta: dict[str, Any]  # of the corpus
    train_data: Shards
    order: TrainOrder
    val_data: Shards
    val_windows: np.ndarray
    task: Path | None  # file in HellaSwag's format
    examples: list[hellaswag.Example]
    device: torch.device
    precision: torch.autocast
    gloo_group: dist.ProcessGroup | None
    mesh: Any  # None without sharding


def main() -> None:
    ranks = ranks_from_environment()
    config = load_config(sys.argv[1:], Config(), quiet=ranks.local_rank != 0)
    if config.dry_run:
        dry_run(config, ranks)
        return
    check_trackers(config)
    s = set_up(config, ranks)  # checks all inputs before any work starts
    schedule, model_config, device, gloo_group = s.schedule, s.model_config, s.device, s.gloo_group
    out_dir = Path(config.out_dir)
    if ranks.master:
        lock = lock_out_dir(out_dir, config.init_from)  # held until the process ends

    # --- model, optimizer state and position: new, or from a checkpoint
    newest = [
        newest_checkpoint(out_dir) if ranks.master and config.init_from != "scratch" else None
    ]
    if ranks.world_size > 1:
        dist.broadcast_object_list(newest, group=gloo_group)
    resumed = newest[0] is not None
    if newest[0]:
        checkpoint = load_checkpoint(newest[0], optimizer=True, verified=True)
        check_resumable(checkpoint, config, model_config, schedule, len(s.train_data), s.meta)
        model = GPT.from_weights(model_config, checkpoint["model"], device, s.mesh)
        params = dict(model.named_parameters())
        optimizer_state = optimizer_state_from(checkpoint["optimizer"], params)
        step, seconds, history = (checkpoint[key] for key in ("step", "seconds", "loss_history"))
        initial_cost = checkpoint["initial_cost"]
        del checkpoint
    else:
        model, initial_cost = initial_model(
            config, model_config, schedule.phases[0], s.meta["tokenizer"], device, s.mesh,
            verbose=ranks.master,
        )  # fmt: skip
        optimizer_state, step, seconds, history = {}, 0, 0.0, {}
    monitor = LossMonitor(history, quiet=not ranks.master)
    if config.compile != "none":
        model.compile_regions(whole=config.compile == "model")

    s.summary["initial_cost"] = initial_cost

    # --- outputs
    milestones = {p.stop for p in schedule.phases if p.milestone}
    if start := decay_start(schedule, config):
        milestones.add(start)
    if ranks.master:
        if step < schedule.n_steps:  # the files of a finished run describe what trained it
            write_records(config, s, ranks, step, resumed)
        metrics = MetricsWriter(out_dir / "metrics.jsonl", step if resumed else None)
        trackers = Trackers(config, out_dir)
        print(summary_table(s.summary))
        print(f"{out_dir}: {describe_work(config, s, ranks, step)}")
    if ranks.world_size > 1:
        dist.barrier()  # training starts only after rank 0 has created the output files
    writer = CheckpointWriter(out_dir, config.keep_checkpoints, milestones, ranks.master)
    run = run_state(config, model_config, schedule, len(s.train_data), s.meta)
    run["initial_cost"] = initial_cost
    total_flops = s.summary["total"]["flops"] + initial_cost.get("flops", 0)
    cost_at = functools.partial(cost_columns, schedule, model_config, initial_cost)
    evaluation = functools.partial(
        evaluate, data=s.val_data, windows=s.val_windows, examples=s.examples,
        precision=s.precision, batch_size=config.batch_size, ranks=ranks,
    )  # fmt: skip
    if ranks.master:  # the other ranks do not write metrics
        n = bytes_per_token(s.val_data, s.val_windows, s.meta["tokenizer"], config.data_dir)
        evaluation.keywords["bytes_per_token"] = n
    batches = Prefetch(train_batches(s.train_data, s.order, schedule, step, config, ranks, device))
    signals = StopSignals()
    peak = (peak_flops(device) or math.nan) * ranks.world_size
    refresh = 0.5 if sys.stderr.isatty() else 30  # seconds; keeps log files short
    bar = tqdm(
        total=schedule.n_steps,
        initial=step,
        disable=not ranks.master,
        bar_format=BAR,
        mininterval=refresh,
        desc="evaluation",
    )

    # --- training
    stopping = False
    for phase in schedule.phases:
        if stopping or phase.stop <= step:
            continue
        begins = step == phase.start
        optimizer = enter_phase(model, optimizer_state, phase, config, begins)
        optimizer_state = optimizer.state
        check_replicas(model, step, gloo_group)  # before DDP silently broadcasts rank 0's weights
        # DDP fixes the set of trainable parameters at construction. The previous wrapper must be
        # deleted first, together with the hooks that it registered on the parameters.
        wrapped = unwrapped = None
        wrapped = wrap(model, phase, config, device, ranks)
        unwrapped = unwrap(wrapped)
        if step == 0:
            row = evaluation(unwrapped)
            if ranks.master:
                log(metrics, trackers, cost_at(step) | {"seconds": round(seconds, 3)} | row, phase)
        accum_steps = grad_accum_steps(config, phase.tokens_per_step, ranks.world_size)
        bar.set_description(phase.name)
        reset_peak_memory(device)

        pending_losses: list[torch.Tensor] = []  # (loss, gradient norm) of steps, on the device
        interval_start, batches.waited = time.perf_counter(), 0.0
        compiled = compile_seconds()
        while step < phase.stop and not stopping:
            lr, now = learning_rate(step, schedule, config), schedule.at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * now.rate_scale(group["block"])
            if config.dropout:  # seeded per step, so that a resumed run uses the same masks
                torch.manual_seed(derived_seed("dropout", config.seed, step, ranks.rank))
            pending_losses.append(
                train_step(
                    wrapped, optimizer, batches, accum_steps, s.precision, config.grad_clip,
                    now.residual_scales, config.reduce_every_micro_batch,
                )
            )  # fmt: skip
            step += 1
            bar.update()

            logs = step % config.log_interval == 0
            evaluates = step % config.eval_interval == 0 or step == schedule.n_steps
            saves = step % config.checkpoint_interval == 0 or step in milestones
            stopping = any_rank(signals.caught is not None, gloo_group)
            if not (logs or evaluates or saves or stopping or step == phase.stop):
                continue

            if ranks.master:
                lock.check()
            # Reading the losses synchronizes with the device; train_step does not.
            losses = torch.stack(pending_losses).tolist()
            pending_losses.clear()
            elapsed = time.perf_counter() - interval_start
            seconds += elapsed
            first = step - len(losses)
            for at, (loss, grad_norm) in enumerate(losses, start=first + 1):
                zscore = monitor.update(at, loss, grad_norm)
                if monitor.history.skipped_in_a_row >= config.max_skipped_steps:
                    raise diverged(at, loss, grad_norm, config, schedule, s.train_data, s.order)
            if logs or evaluates:
                row = cost_at(step) | {"seconds": round(seconds, 3)}
                row |= loss_columns(loss, grad_norm, zscore, lr, monitor)
                row |= speed_columns(schedule, first, step, elapsed, model_config, peak)
                row["data_wait"] = round(batches.waited / elapsed, 5)
                row["compile_seconds"] = round(compile_seconds() - compiled, 3)
                row["peak_memory"] = peak_memory(device)
                bar.set_postfix_str(progress(row, total_flops))
                if evaluates:
                    check_replicas(model, step, gloo_group)
                    row |= evaluation(unwrapped)
                if ranks.master:
                    log(metrics, trackers, row, phase)
            if saves or stopping:
                if ranks.master:
                    metrics.sync()
                position = dict(step=step, n_blocks=model.n_blocks, seconds=seconds)
                position["loss_history"] = monitor.state()
                wait_while_any(writer.busy, gloo_group)  # for rank 0, and the former checkpoint
                writer.save(model, optimizer, run | position)
            interval_start, batches.waited = time.perf_counter(), 0.0
            compiled = compile_seconds()

    # --- end
    bar.close()
    wait_while_any(writer.busy, gloo_group)
    if ranks.master:
        writer.close()
        metrics.close()
        trackers.close()
        lock.check()
        if writer.failure:
            raise UserError(
                f"{writer.failure}: training since the previous checkpoint is lost; fix the cause, "
                "then use --init_from=resume"
            )
    if ranks.launched:
        if ranks.world_size > 1:
            # When a process exits with a nonzero status, such as EXIT_STOPPED, torchrun terminates
            # the others, even one that is still writing.
            dist.barrier(gloo_group)
        destroy_process_groups()
    signals.ignore()
    where = f"step {step:,} of {schedule.n_steps:,}"
    if stopping:
        if ranks.master:
            print(
                f"{out_dir}: stopped at {where}, checkpoint saved; continue with the same "
                "command and --init_from=auto"
            )
        sys.exit(EXIT_STOPPED)
    if ranks.master:
        print(f"{out_dir}: finished at {where}; to draw figures: python plot.py {out_dir}")


# --------------------------------------------------------------------------------------------------
# training loop


def enter_phase(
    model: GPT,
    optimizer_state: dict,
    phase: Phase,
    config: Config,
    begins: bool = True,
) -> torch.optim.AdamW:
    """Grow the model for a phase, set its trainable parameters, and return a new optimizer.

    Args:
        optimizer_state: state by parameter, from the previous phase or a checkpoint.
        begins: False if the run resumes in the middle of the phase.
    """
    if begins and phase.optimizer_state == "reset":
        optimizer_state = {}
    if model.n_blocks < phase.n_blocks:
        grow(model, optimizer_state, phase, config.seed)
    model.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)
    per_block = config.freezeout > 0 or config.rewarmup == "new_blocks"
    return make_optimizer(model, config, optimizer_state, per_block)


def grow(model: GPT, optimizer_state: dict, phase: Phase, seed: int) -> None:
    """Add the blocks that a phase has and the model does not."""
    assert phase.growth
    if (phase.shrink, phase.perturb) != (1, 0):
        model.shrink_and_perturb(phase.shrink, phase.perturb, seed)
    source_map = growth.source_map(phase.growth, model.n_blocks, phase.n_blocks)
    model.grow(source_map, seed, optimizer_state if phase.optimizer_state == "copy" else None)
    if phase.optimizer_state == "zero":
        add_zero_state(optimizer_state, model)


def add_zero_state(optimizer_state: dict, model: GPT) -> None:
    """Give parameters without AdamW state zero moments and the step count of the others."""
    steps = [state["step"] for state in optimizer_state.values()]
    for p in model.parameters() if steps else ():
        if p not in optimizer_state:
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer_state[p] = {"step": torch.stack(steps).amax(0)} | moments


def make_optimizer(
    model: GPT, config: Config, state: dict | None = None, per_block: bool = False
) -> torch.optim.AdamW:
    """Return AdamW over all current parameters, with their entries in `state`.

    Frozen parameters are included. They have no gradient, so AdamW neither updates nor decays them,
    and their state is kept until a later phase trains them again.

    Args:
        per_block: see `GPT.param_groups`.
    """
    optimizer = torch.optim.AdamW(
        model.param_groups(config.weight_decay, per_block),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=1e-8 * (config.base_depth / max(1, model.n_blocks) if config.base_depth else 1),
        fused=True,
    )
    if state:
        optimizer.state.update({p: state[p] for p in model.parameters() if p in state})
    return optimizer


def wrap(
    model: GPT, phase: Phase, config: Config, device: torch.device, ranks: Ranks
) -> torch.nn.Module:
    """Return a module with the model's parameters that synchronizes gradients in a phase."""
    if ranks.world_size == 1:
        return model
    if config.sharding == "ddp":
        return DDP(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=phase.skip is not None,  # skipped blocks get no gradients
        )
    template = GPT(model.config, model.n_blocks, device="meta")
    template.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)
    if config.compile != "none":
        template.compile_regions()
    keep_gathered = config.sharding == "zero1"
    return fully_shard(template, template.transformer.h, model, keep_gathered)


def unwrap(model: torch.nn.Module) -> GPT:
    """Return the module for evaluations: without DDP, but with the hooks of FSDP2."""
    return model.module if isinstance(model, DDP) else model  # type: ignore[return-value]


def train_step(
    model,
    optimizer: torch.optim.Optimizer,
    batches: Iterator,
    grad_accum_steps: int,
    precision: torch.autocast,
    grad_clip: float = 0.0,
    residual_scales: Sequence[float] | None = None,
    reduce_every_micro_batch: bool = False,
) -> torch.Tensor:
    """Perform one optimizer step on the mean loss over `grad_accum_steps` micro-batches.

    If the loss or the gradient norm is not finite, the update is skipped. Does not synchronize with
    the device.

    Args:
        model: a GPT, possibly wrapped; see `wrap`.
        batches: yields (inputs, targets), each (B, T).
        grad_clip: maximum gradient norm; 0 disables clipping.
        residual_scales: see `GPT.hidden`.
        reduce_every_micro_batch: if False, the ranks reduce gradients on the last one only.

    Returns:
        A tensor (2,) on the model's device: loss and gradient norm over all ranks.
    """
    device = next(model.parameters()).device
    kwargs = {} if residual_scales is None else {"residual_scales": residual_scales}
    loss = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        x, y = (t.to(device, non_blocking=True) for t in next(batches))
        last = micro_step == grad_accum_steps - 1
        set_gradient_sync(model, reduce_every_micro_batch or last, last)
        with precision:
            micro_loss = model(x, y, **kwargs) / grad_accum_steps
        micro_loss.backward()
        loss += micro_loss.detach()
    loss = mean_over_ranks(loss)
    trained = [p for p in model.parameters() if p.grad is not None]
    if grad_clip:
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip)
    else:
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    result = torch.stack((loss, full_tensor(grad_norm)))
    # If this is 1, fused AdamW leaves parameters and state unchanged, as with a GradScaler.
    optimizer.found_inf = result.isfinite().all().logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def train_batches(
    data: Shards,
    order: TrainOrder,
    schedule: Schedule,
    step: int,
    config: Config,
    ranks: Ranks,
    device: torch.device,
) -> Iterator[list[torch.Tensor]]:
    """Yield this rank's (inputs, targets) for every micro-batch from `step` to the end.

    Each has shape (B, T), where T is the context length of the phase: a window of block_size tokens
    is split into block_size / T consecutive sequences. The tokens that a step reads depend only on
    the number of tokens read before it.
    """
    for s in range(step, schedule.n_steps):
        phase = schedule.phase_at(s)
        first = schedule.tokens(s) // config.block_size
        for micro_step in range(grad_accum_steps(config, phase.tokens_per_step, ranks.world_size)):
            start = first + (micro_step * ranks.world_size + ranks.rank) * config.batch_size
            windows = order.windows(start, start + config.batch_size)
            x, y = read_batch(data, windows, device)
            yield [x.view(-1, phase.context_length), y.view(-1, phase.context_length)]


def read_batch(data: Shards, windows: np.ndarray, device: torch.device) -> list[torch.Tensor]:
    """Return inputs and targets, each (B, T), in pinned memory if the device is a GPU."""
    tensors = map(torch.from_numpy, data.read(windows))
    return [t.pin_memory() if device.type == "cuda" else t for t in tensors]


def evaluate(
    model: GPT,
    data: Shards,
    windows: np.ndarray,
    examples: list[hellaswag.Example],
    precision: torch.autocast,
    batch_size: int,
    ranks: Ranks,
    bytes_per_token: float = math.nan,
) -> dict[str, Any]:
    """Return the validation loss, and the HellaSwag scores if there are examples.

    Uses the full context length and all blocks. Every rank evaluates its share of the data.

    Args:
        bytes_per_token: mean over the targets. If given, the loss is also returned in bits per
            byte, as val_bpb.
    """
    result = {}
    device, start = model.lm_head.weight.device, time.perf_counter()

    def own_batches():
        for i in range(0, len(windows), ranks.world_size * batch_size):
            own = windows[i + ranks.rank * batch_size :][:batch_size]
            # With sharded parameters, every rank must run the same number of forward passes.
            yield len(own), *read_batch(data, own if len(own) else windows[:1], device)

    batches = Prefetch(own_batches())
    # On a GPU, full micro-batches of validation data run in compiled blocks, which need one more
    # shape. Compiling HellaSwag's shapes, or the whole model in every phase, would take longer
    # than it saves.
    compiles = device.type == "cuda" and model.blocks_compiled
    model.eval()
    with torch.no_grad(), precision:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for n, x, y in batches:
            full = len(x) == batch_size
            with torch.compiler.set_stance("default" if compiles and full else "force_eager"):
                x, y = (t.to(device, non_blocking=True) for t in (x, y))
                total += model(x, y).double() * n
        if ranks.world_size > 1:
            dist.all_reduce(total)
        val_loss = total.item() / len(windows)
        result["val_loss"] = finite(val_loss)
        if bytes_per_token > 0:  # not NaN
            result["val_bpb"] = finite(val_loss / math.log(2) / bytes_per_token)
        if examples:
            with torch.compiler.set_stance("force_eager"):
                scores = hellaswag.evaluate(
                    model, examples, rank=ranks.rank, world_size=ranks.world_size
                )
            result |= {f"hellaswag_{name}": finite(value) for name, value in scores.items()}
    model.train()
    result["eval_seconds"] = round(time.perf_counter() - start, 3)
    return result


def bytes_per_token(data: Shards, windows: np.ndarray, tokenizer: str, folder: str) -> float:
    """Return `Shards.bytes_per_token`, or NaN with a warning if the tokenizer is not available."""
    try:
        encoding = get_tokenizer(tokenizer, [folder])
    except UserError as error:
        print(f"warning: val_bpb is not computed: {error}", file=sys.stderr)
        return math.nan
    return data.bytes_per_token(windows, encoding)


def cost_columns(
    schedule: Schedule, model_config: GPTConfig, initial_cost: dict[str, int], step: int
) -> dict[str, Any]:
    """Return the first columns of metrics.jsonl: position and cumulative cost.

    Args:
        initial_cost: the cost of the initial weights, by metric.
    """
    phase = schedule.phase_at(max(0, step - 1))
    row = {"step": step, "stage": phase.stage, "phase": phase.kind, "blocks": phase.n_blocks}
    costs = {m: cumulative_cost(schedule, step, m, model_config) for m in COST_METRICS}
    return row | {m: cost + initial_cost.get(m, 0) for m, cost in costs.items()}


def log(metrics: MetricsWriter, trackers: Trackers, row: dict, phase: Phase) -> None:
    """Append a row to metrics.jsonl, track it, and print it if it contains an evaluation."""
    metrics.write(row)
    trackers.log(row)
    if "val_loss" in row:
        names = {"val_loss": "val loss"} | {k: k for k in ("hellaswag_acc", "hellaswag_acc_norm")}
        values = {name: row[k] for k, name in names.items() if k in row}
        scores = (f"{k} {'not finite' if x is None else f'{x:.4f}'}" for k, x in values.items())
        tqdm.write(f"step {row['step']:>6}  {phase.name:<16} {', '.join(scores)}")


def loss_columns(
    loss: float, grad_norm: float, zscore: float | None, lr: float, monitor: LossMonitor
) -> dict[str, Any]:
    """Return the columns of metrics.jsonl that describe the last step."""
    return {
        "loss": finite(loss),
        "loss_zscore": zscore,
        "lr": lr,
        "grad_norm": finite(grad_norm),
        "skipped_steps": monitor.history.skipped_steps,
        "spikes": monitor.history.spikes,
    }


def speed_columns(
    schedule: Schedule, first: int, step: int, elapsed: float, model_config: GPTConfig, peak: float
) -> dict[str, Any]:
    """Return the throughput columns of metrics.jsonl for steps `first` to `step`.

    Args:
        elapsed: duration of these steps in seconds.
        peak: combined peak FLOP/s of all devices; NaN if unknown.
    """
    tokens = schedule.tokens(step) - schedule.tokens(first)
    before, after = (cumulative_cost(schedule, s, "flops", model_config) for s in (first, step))
    flops_per_second = (after - before) / elapsed
    return {
        "tokens_per_second": round(tokens / elapsed, 1),
        "flops_per_second": flops_per_second,
        "mfu": finite(flops_per_second / peak),
    }


def progress(row: dict[str, Any], total_flops: int) -> str:
    """Return the text of the progress bar. The ETA is estimated from the remaining FLOPs."""
    loss = math.nan if row["loss"] is None else row["loss"]
    eta = tqdm.format_interval((total_flops - row["flops"]) / row["flops_per_second"])
    return f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tok/s, ETA {eta}"


def finite(x: float) -> float | None:
    """Return x, or None if it is NaN or infinite, which JSON cannot represent."""
    return x if math.isfinite(x) else None


def diverged(step, loss, grad_norm, config, schedule, data, order) -> UserError:
    """Return the error for too many skipped steps in a row. It names the shards of the last one."""
    start, stop = (schedule.tokens(s) // config.block_size for s in (step - 1, step))
    files = ", ".join(data.files(order.windows(start, stop)))
    saved = checkpoints(Path(config.out_dir))
    return UserError(
        f"step {step}, which read {files}: loss {loss}, gradient norm {grad_norm}; the last "
        f"{config.max_skipped_steps} updates were skipped: "
        f"{f'resume from {saved[-1]}' if saved else 'start over'} with a lower learning_rate, or "
        "check the data"
    )


# --------------------------------------------------------------------------------------------------
# setup


def plan(
    config: Config, meta: dict[str, Any] | None, world_size: int
) -> tuple[GPTConfig, Schedule, dict[str, Any]]:
    """Return the final model's configuration, the schedule and its summary (`cost.summarize`).

    Args:
        meta: of the corpus, or None if it does not exist yet.

    Raises:
        UserError: if the options do not describe a valid schedule for `world_size` processes.
    """
    model_config = make_model_config(config, padded_vocab_size(meta))
    schedule, baseline = make_schedules(config, model_config)
    for phase in schedule.phases:
        grad_accum_steps(config, phase.tokens_per_step, world_size)
    summary = summarize(schedule, baseline, model_config)
    summary["is_baseline"] &= not config.init_weights
    return model_config, schedule, summary


def make_model_config(config: Config, vocab_size: int) -> GPTConfig:
    """Return the configuration of the final model."""
    c = config
    sizes = (c.block_size, vocab_size, c.n_layer, c.n_head, c.n_embd)
    return GPTConfig(*sizes, c.dropout, c.bias, c.base_depth)


def set_up(config: Config, ranks: Ranks) -> Setup:
    """Check all inputs, and start the device and the process group.

    Raises:
        UserError: if an input is missing, corrupted, or does not match the others.
    """
    meta = load_meta(config.data_dir)
    model_config, schedule, summary = plan(config, meta, ranks.world_size)
    check_initial_weights(config, model_config, schedule.phases[0], meta["tokenizer"])
    if config.verify_data and ranks.local_rank == 0:
        verify_shards(config.data_dir, meta)
    train_data, val_data = (
        Shards(config.data_dir, split, config.block_size, meta) for split in ("train", "val")
    )
    n_windows = min(len(val_data), -(-config.eval_tokens // config.block_size))
    device = pick_device(config.device, ranks.local_rank, ranks.world_size)
    if config.deterministic:
        use_deterministic_kernels()
    if config.compile != "none" and device.type == "cpu":
        check_compiler(config.compile)
    task = hellaswag.task_file(config.hellaswag_data, config.data_dir)
    if task == hellaswag.DEFAULT_PATH and ranks.local_rank == 0:
        hellaswag.download()
    # All ranks synchronize here: the download is complete.
    gloo_group = init_process_group(device, ranks, config.timeout) if ranks.launched else None
    mesh = make_mesh(device, ranks) if config.sharding != "ddp" else None
    examples = []
    if task:
        encoding = get_tokenizer(meta["tokenizer"], [config.data_dir])
        check_tokenizer(encoding, meta["vocab_size"], f"{config.data_dir}/meta.json")
        limit = config.hellaswag_limit
        examples = hellaswag.load_examples(task, encoding, config.block_size, limit)
    gathered = bool(mesh) and config.sharding == "zero1"
    check_memory(summary["parameters"], device, mesh.size() if mesh else 1, gathered)
    return Setup(
        schedule=schedule,
        summary=summary,
        model_config=model_config,
        meta=meta,
        train_data=train_data,
        order=TrainOrder(len(train_data), config.seed),
        val_data=val_data,
        val_windows=np.arange(n_windows),
        task=task,
        examples=examples,
        device=device,
        precision=autocast(device, config.dtype, config.n_embd),
        gloo_group=gloo_group,
        mesh=mesh,
    )


def dry_run(config: Config, ranks: Ranks) -> None:
    """Print the schedule, its cost and its memory. Write schedule.json, except into a run's folder.

    Raises:
        UserError: if the run would reject its options, its corpus or its initial weights.
    """
    out_dir, data_dir = Path(config.out_dir), Path(config.data_dir)
    meta = load_meta(config.data_dir) if os.path.exists(data_dir / "meta.json") else None
    world_size = config.plan_processes or ranks.world_size
    model_config, schedule, summary = plan(config, meta, world_size)
    tokenizer = meta["tokenizer"] if meta else None
    check_initial_weights(config, model_config, schedule.phases[0], tokenizer)
    if not ranks.master:
        return
    print(summary_table(summary))
    if meta is None:
        print(
            f"(no corpus in {data_dir} yet; assuming a vocabulary of {model_config.vocab_size:,})"
        )
    if not any((out_dir / name).exists() for name in ("metrics.jsonl", FOLDER)):
        write_json(out_dir, "schedule.json", summary)
    print_memory(schedule, model_config, config, world_size)
    if config.init_weights:
        print("The cost of the initial weights is not included here, but in metrics.jsonl.")


def check_compiler(option: str) -> None:
    """Raise UserError if no C++ compiler is installed, which torch.compile needs on a CPU."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        raise UserError(
            f"compile={option} needs a C++ compiler on the CPU (g++ or clang++): install one, or "
            "use --compile=none"
        )


def check_initial_weights(
    config: Config, model_config: GPTConfig, phase: Phase, tokenizer: str | None
) -> None:
    """Check that a new run can start with the weights of `init_weights`, without reading them.

    A run that has checkpoints does not need them. The weights of other projects are checked when
    they are read.

    Raises:
        UserError: if the weights do not exist, or do not match the model of the first phase.
    """
    resumes = config.init_from != "scratch" and checkpoints(Path(config.out_dir))
    if not config.init_weights or config.init_weights in SIZES or resumes:
        return
    path = Path(config.init_weights)
    if not path.exists():
        raise UserError(
            f"init_weights={path} does not exist: name a run, a checkpoint, a ckpt.pt of nanoGPT, "
            f"or one of {', '.join(SIZES)}"
        )
    if path.is_dir():
        state = load_checkpoint(path, weights=False)
        check_match(state, config, model_config, phase, tokenizer or state["tokenizer"])


def check_match(
    checkpoint: dict[str, Any],
    config: Config,
    model_config: GPTConfig,
    phase: Phase,
    tokenizer: str,
) -> None:
    """Raise UserError unless the model of a checkpoint can be trained or grown in a first phase."""
    where = f"init_weights={config.init_weights}"
    theirs, ours = {"base_depth": 0} | checkpoint["model_config"], dataclasses.asdict(model_config)
    for key in ("n_embd", "n_head", "block_size", "bias", "base_depth"):
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{where}: has {key}={theirs.get(key)}, but {key}={ours[key]} was requested"
            )
    if checkpoint["tokenizer"] != tokenizer:
        raise UserError(
            f"{where}: the model was trained with tokenizer {checkpoint['tokenizer']}, but "
            f"{config.data_dir} uses {tokenizer}"
        )
    if checkpoint["n_blocks"] > phase.n_blocks:
        raise UserError(
            f"{where}: the model has {checkpoint['n_blocks']} blocks, but the first phase has "
            f"{phase.n_blocks}: use a schedule that starts with more blocks, for example "
            f"--stages=1 --stage_blocks {checkpoint['n_blocks']} {model_config.n_layer}"
        )
    n, existing = checkpoint["n_blocks"], phase.n_blocks - len(phase.new_blocks)
    at_growth = dict(shrink=1.0, perturb=0.0, fade_in_steps=0, rewarmup="all")
    ignored = [name for name, default in at_growth.items() if getattr(config, name) != default]
    if n < phase.n_blocks and not phase.new_blocks and ignored:
        raise UserError(
            f"{where}: {', '.join(ignored)} would not apply to the growth of the initial weights: "
            f"use --stages=1 --stage_blocks {n} {phase.n_blocks} --phase_fractions 0 1"
        )
    if phase.new_blocks and n != existing:
        raise UserError(
            f"{where}: the model has {n} blocks, but the schedule starts by growing a model with "
            f"{existing}: change stage_blocks, for example to {n} {phase.n_blocks}"
        )
    if n < phase.n_blocks and phase.kind == "new_blocks" and not phase.new_blocks:
        raise UserError(
            f"{where}: has {n} blocks, but phase 1 of the first stage would train all "
            f"{phase.n_blocks}: use --stage_blocks {n} {model_config.n_layer} --phase_fractions "
            "0 0 1 1 to train only the new blocks first, or --freezing=none"
        )


def initial_model(
    config: Config,
    model_config: GPTConfig,
    phase: Phase,
    tokenizer: str,
    device: torch.device,
    mesh,
    verbose: bool,
) -> tuple[GPT, dict[str, int]]:
    """Return the model of a new run, newly initialized or with the weights of `init_weights`.

    Also return the cost of these weights by metric, if it is known. With `verbose`, print it.

    Raises:
        UserError: if the weights of `init_weights` do not match this model.
    """
    if not config.init_weights:
        return GPT(model_config, phase.n_blocks, config.seed, device, mesh), {}
    checkpoint = load_checkpoint(Path(config.init_weights))
    check_match(checkpoint, config, model_config, phase, tokenizer)
    checkpoint["model_config"].setdefault("base_depth", 0)
    for name in ("lm_head.weight", "transformer.wte.weight"):  # OpenAI's are not padded
        w = checkpoint["model"][name]
        rows = max(0, model_config.vocab_size - len(w))
        checkpoint["model"][name] = torch.nn.functional.pad(w, (0, 0, 0, rows))
    model = GPT.from_weights(model_config, checkpoint["model"], device, mesh)
    if model.n_blocks < phase.n_blocks:
        grow(model, {}, phase, config.seed)
    try:
        cost = cost_of_checkpoint(checkpoint)
    except ValueError as error:
        raise UserError(
            f"init_weights={config.init_weights}: the schedule of the run is corrupted ({error})"
        ) from None
    if verbose:
        n = checkpoint["n_blocks"]
        grown = f", grown to {phase.n_blocks} by {phase.growth}" if n < phase.n_blocks else ""
        costs = ", ".join(f"{NAMES[m]} {cost[m]:.4g}" for m in cost) or "unknown"
        print(f"initial weights: {config.init_weights}, {n} blocks{grown}; their cost: {costs}")
    return model, cost


def cost_of_checkpoint(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Return the cumulative cost of a run at a checkpoint; empty if the weights are not from a run.

    Raises:
        ValueError: if the checkpoint contains an invalid schedule.
    """
    if not checkpoint["phases"]:
        return {}
    schedule = Schedule(tuple(convert(checkpoint["phases"], list[Phase])))
    model_config = convert(checkpoint["model_config"], GPTConfig)
    costs = cost_columns(schedule, model_config, checkpoint["initial_cost"], checkpoint["step"])
    return {m: costs[m] for m in COST_METRICS}


def check_resumable(
    checkpoint: dict,
    config: Config,
    model_config: GPTConfig,
    schedule: Schedule,
    n_windows: int,
    meta: dict,
) -> None:
    """Raise UserError unless the requested run can continue from the checkpoint.

    The model, the seed, the data and the phases up to the checkpoint's step must be the same.
    Everything else may change, for example the number of processes, the micro-batch size, the
    learning rate, the intervals and the number of continual steps.
    """
    step, out_dir = checkpoint["step"], config.out_dir
    before = (
        {"base_depth": 0}
        | checkpoint["model_config"]
        | {
            "seed": checkpoint["config"].get("seed"),
            "windows of data": checkpoint["n_windows"],
        }
    )
    now = dataclasses.asdict(model_config) | {"seed": config.seed, "windows of data": n_windows}
    before["initial weights"] = "yes" if checkpoint["config"].get("init_weights") else "no"
    now["initial weights"] = "yes" if config.init_weights else "no"
    if checkpoint["corpus"]:
        before["corpus"], now["corpus"] = checkpoint["corpus"][:12], fingerprint(meta)[:12]
    names = [k for k in now if k != "dropout"]
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in names if before.get(k) != now[k]]
    if changed:
        raise UserError(
            f"{out_dir}: cannot resume with {', '.join(changed)}: use the original values, or "
            "another out_dir"
        )
    if step and not checkpoint["optimizer"]:
        raise UserError(
            f"{out_dir}: the newest checkpoint has no optimizer state: use an earlier one"
        )
    try:
        former = begun(convert(checkpoint["phases"], list[Phase]), step)
    except ValueError as error:
        raise UserError(
            f"{out_dir}: the schedule in the newest checkpoint is corrupted ({error}): use an "
            "earlier one"
        ) from None
    asked = begun(schedule.phases, step)
    if former != asked:
        pairs = zip(former, asked)
        fields = {f.name for p, q in pairs for f in dataclasses.fields(p) if _differ(p, q, f.name)}
        raise UserError(
            f"{out_dir}: the schedule up to step {step} does not match the checkpoint (it differs "
            f"in {', '.join(sorted(fields)) or 'its phases'}): use the original options "
            "(continual_steps may be increased)"
        )
    expected = schedule.phase_at(max(0, step - 1)).n_blocks
    if checkpoint["n_blocks"] != expected:
        raise UserError(
            f"{out_dir}: the newest checkpoint has {checkpoint['n_blocks']} blocks, but the "
            f"schedule has {expected} after step {step}: use an earlier one"
        )


def _differ(p, q, name):
    return getattr(p, name) != getattr(q, name)


# --------------------------------------------------------------------------------------------------
# outputs


def write_records(config: Config, s: Setup, ranks: Ranks, step: int, resumed: bool) -> None:
    """Write schedule.json, the tokenizer if it was trained, and config.json to the run's folder."""
    out_dir, vocab_size = Path(config.out_dir), s.model_config.vocab_size
    write_json(out_dir, "schedule.json", s.summary)
    copy_tokenizer(config.data_dir, out_dir)
    train_tokens = len(s.train_data) * config.block_size
    described = describe_run(config, vocab_size, s.task, s.meta, train_tokens, ranks, s.device)
    described["starts"] = former_starts(out_dir) if resumed else []
    described["starts"].append(describe_start(step, ranks, s.device))
    write_json(out_dir, "config.json", described)


def describe_work(config: Config, s: Setup, ranks: Ranks, step: int) -> str:
    """Return a line about the devices, the epochs and the micro-batches of the steps."""
    schedule, n = s.schedule, ranks.world_size
    epochs = schedule.tokens(schedule.n_steps) / (len(s.train_data) * config.block_size)
    tokens_per_step = schedule.phase_at(min(step, schedule.n_steps - 1)).tokens_per_step
    micro_batches = grad_accum_steps(config, tokens_per_step, n)
    return (
        f"{n} x {device_name(s.device)}; {epochs:.2f} epochs; per step {n} processes x "
        f"{micro_batches} micro-batches x {config.batch_size} sequences"
        + (f"; resuming at step {step}" if step else "")
    )


def print_memory(
    schedule: Schedule, model_config: GPTConfig, config: Config, world_size: int
) -> None:
    """Print the estimated memory per process in every phase. Without device=cpu, plan for GPUs."""
    kind = "cpu" if config.device == "cpu" else "cuda"
    bf16 = config.dtype != "float32"
    if kind == "cpu":
        bf16 = matmul_dtype(torch.device("cpu"), config.dtype, config.n_embd) == "bfloat16"
    rows, V = config.batch_size * config.block_size, model_config.vocab_size
    print(
        memory_table(
            schedule, model_config, config.batch_size, world_size, config.sharding,
            reduce_every_micro_batch=config.reduce_every_micro_batch,
            bf16=bf16, loss_rows=chunk_size(rows, V, LOGITS_BYTES[kind], kind),
        )
    )  # fmt: skip


def run_state(
    config: Config, model_config: GPTConfig, schedule: Schedule, n_windows: int, meta: dict
) -> dict[str, Any]:
    """Return the fields of `checkpoint.State` that are constant during a run."""
    return {
        "model_config": dataclasses.asdict(model_config),
        "config": dataclasses.asdict(config) | absolute_paths(config),
        "phases": [dataclasses.asdict(p) for p in schedule.phases],
        "n_windows": n_windows,
        "tokenizer": meta["tokenizer"],
        "corpus": fingerprint(meta),
    }


if __name__ == "__main__":
    with report_user_errors():
        main()
