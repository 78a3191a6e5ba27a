"""Train a GPT-2, whole or stage by stage (arXiv:2411.18700).

    python train.py [configs/A.py configs/B.py ...] [--key=value ...]             one process
    torchrun --standalone --nproc_per_node=8 train.py [...]                       eight GPUs of one machine
    python train.py configs/gpt2_124m.py configs/s4.py --dry_run                  what would that cost?

Configuration (config.py) -> plan (schedule.py) -> phases -> steps -> metrics.jsonl -> figures (plot.py). The loop below only
follows the plan; the baseline is the plan with one phase.
"""

import copy
import dataclasses
import datetime
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import config as cfg
import hellaswag
import schedule
from checkpoint import FOLDER as CHECKPOINTS
from checkpoint import CheckpointWriter, checkpoints, load_checkpoint, load_moments, model_from, newest_checkpoint
from data import Prefetch, Shards, TrainOrder, get_tokenizer, verify_shards
from device import autocast, cpu_name, device_name, peak_flops, peak_memory, pick_device, reset_peak_memory, use_deterministic_kernels
from errors import UserError, report_user_errors
from files import Metrics, lock_folder, write_whole
from guard import EXIT_STOPPED, Health, StopSignals, check_replicas
from model import GPT, derived_seed


def main() -> None:
    # --- what to do, checked before anything starts
    launched = all(name in os.environ for name in (*TORCHRUN, "MASTER_ADDR"))  # by torchrun, or by hand as it does
    rank, local_rank, world_size = (int(os.environ[k]) if launched else v for k, v in TORCHRUN.items())
    master = rank == 0
    config = cfg.load_config(sys.argv[1:], quiet=local_rank != 0)
    meta = cfg.read_meta(config)
    shape = config.model(cfg.vocab_size(config, meta))
    plan, baseline = cfg.make_plans(config, shape)
    summary = schedule.plan_summary(plan, baseline, shape, config.tokens_per_step)
    add_parameter_counts(summary, plan, shape)
    out_dir = Path(config.out_dir)
    used = next((out_dir / name for name in ("metrics.jsonl", CHECKPOINTS) if (out_dir / name).exists()), None)
    micro_steps = cfg.micro_steps(config, world_size)
    if config.dry_run:
        if master:
            print(schedule.plan_table(summary))
        if master and not meta:
            print(f"(no corpus in {config.data_dir} yet: a vocabulary of {shape.vocab_size:,} is assumed)")
        if master and not used:  # a run's own plan is not replaced
            write_plan(out_dir, summary)
        return
    if config.init_from == "scratch" and used:
        hint = "go on with --init_from=resume" if checkpoints(out_dir) else "that run has no checkpoint yet: remove the folder"
        raise UserError(f"{used} exists: {hint}, or name another --out_dir")
    if config.init_from == "resume" and not checkpoints(out_dir):
        raise UserError(f"{out_dir}: no checkpoint there: --init_from=auto begins the run, or name another --out_dir")

    # --- data
    if config.verify_data and local_rank == 0:
        verify_shards(config.data_dir, meta)
    train_data = Shards(config.data_dir, "train", config.block_size, meta)
    val_data = Shards(config.data_dir, "val", config.block_size, meta)
    order = TrainOrder(len(train_data), config.seed, config.tokens_per_step // config.block_size)
    val_windows = np.arange(min(len(val_data), -(-config.eval_tokens // config.block_size)))

    # --- devices and processes
    device = pick_device(config.device, local_rank, world_size)
    on_gpu = device.type == "cuda"
    if config.deterministic:
        use_deterministic_kernels()
    precision = autocast(device, config.dtype)
    if config.compile != "none" and not on_gpu and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        raise UserError(f"compile={config.compile} needs a C++ compiler on the CPU (g++ or clang++): install one, or use --compile=none")
    task = hellaswag.task_file(config.hellaswag_data, config.data_dir)
    if task == hellaswag.DEFAULT_PATH and local_rank == 0:
        hellaswag.download()
    # All ranks meet here: the download is there, and none looks into out_dir (above) after rank 0 wrote to it (below).
    hosts = join_processes(device, rank, world_size, config.timeout) if launched else None
    examples = []
    if task:
        encoding = get_tokenizer(meta["tokenizer"])
        examples = hellaswag.load_examples(task, encoding, config.block_size, config.hellaswag_limit)

    # --- model, optimizer and position: new, or as the checkpoint left them
    if master:
        lock = lock_folder(out_dir)  # noqa: F841  (held until the process ends)
    newest = [newest_checkpoint(out_dir) if master and config.init_from != "scratch" else None]
    if world_size > 1:
        dist.broadcast_object_list(newest, group=hosts)
    if newest[0]:
        checkpoint = load_checkpoint(newest[0], optimizer=True)
        check_resumable(checkpoint, config, shape, plan, len(train_data))
        model = model_from(checkpoint, device)
        optimizer = make_optimizer(model, config)
        load_moments(optimizer, model, checkpoint["optimizer"])
        step, seconds, health = checkpoint["step"], checkpoint["seconds"], Health(checkpoint["health"], quiet=not master)
        del checkpoint
    else:
        model = GPT(shape, n_blocks=plan.phases[0].n_blocks, seed=config.seed, device=device)
        optimizer, step, seconds, health = None, 0, 0.0, Health(quiet=not master)
    if config.compile != "none":
        model.compile_regions(whole=config.compile == "model")

    # --- outputs
    milestones = {p.stop for p in plan.phases if p.phase != 1}  # the ends of stages, and of the run
    if master:
        write_plan(out_dir, summary)
        write_config(out_dir, config, shape, task, len(train_data) * config.block_size, world_size, device)
        metrics = Metrics(out_dir / "metrics.jsonl", step if newest[0] else None)
        writer = CheckpointWriter(out_dir, config.keep_checkpoints, milestones)
        print(schedule.plan_table(summary))
        n_epochs = plan.n_steps * config.tokens_per_step / (len(train_data) * config.block_size)
        print(
            f"{out_dir}: on {world_size} x {device_name(device)}; a step is {world_size} x {micro_steps} x {config.batch_size} "
            f"sequences (processes, micro-steps, batch_size); {n_epochs:.2f} epochs over the data"
            + (f"; from step {step}" if step else "")
        )
    if world_size > 1:
        dist.barrier()  # no rank trains before the outputs are known to be writable

    def evaluate() -> dict:
        """Validation loss, and HellaSwag where there is one: every rank's share, summed."""
        result = {}
        model.eval()
        # Eager: the varying shapes of HellaSwag would each compile the blocks anew.
        with torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):
            total = torch.zeros((), dtype=torch.float64, device=device)
            for start in range(rank * config.batch_size, len(val_windows), world_size * config.batch_size):
                batch = read_batch(val_data, val_windows[start : start + config.batch_size])
                x, y = (t.to(device, non_blocking=True) for t in batch)
                total += model(x, y).double() * len(x)
            if world_size > 1:
                dist.all_reduce(total)
            result["val_loss"] = total.item() / len(val_windows)
            if examples:
                scores = hellaswag.evaluate(model, examples, rank=rank, world_size=world_size)
                result |= {f"hellaswag_{name}": value for name, value in scores.items()}
        model.train()
        return result

    def record(phase: schedule.Phase, row: dict) -> None:
        """Append a row to metrics.jsonl: where the run stands, what it has spent, and what was measured."""
        costs = {c: schedule.spent(plan, step, c, shape, config.tokens_per_step) for c in schedule.CURRENCIES}
        where = {"step": step, "stage": phase.stage, "phase": phase.phase, "blocks": phase.n_blocks}
        metrics.write(where | costs | {"seconds": round(seconds, 3)} | row)
        if "val_loss" in row:
            scores = "".join(f", {k} {row[k]:.4f}" for k in ("hellaswag_acc", "hellaswag_acc_norm") if k in row)
            tqdm.write(f"step {step:>6}  {phase.name:<16} val loss {row['val_loss']:.4f}{scores}")

    def save() -> None:
        state = {
            "model_args": dataclasses.asdict(shape),
            "n_blocks": len(model.transformer.h),
            "step": step,
            "seconds": seconds,
            "health": copy.deepcopy(health.state),
            "config": dataclasses.asdict(config),
            "phases": [dataclasses.asdict(p) for p in plan.phases],
            "n_windows": len(train_data),
            "tokenizer": meta["tokenizer"],
        }
        metrics.sync()
        writer.save(model, optimizer, state)

    def read_batch(data: Shards, windows: np.ndarray) -> list[torch.Tensor]:
        """Inputs and targets, each (B, T), in pinned memory, from where they travel to a GPU beside what it is doing."""
        tensors = map(torch.from_numpy, data.read(windows))
        return [t.pin_memory() if on_gpu else t for t in tensors]

    def train_batches():
        """This rank's sequences of every micro-step from here to the end of the plan."""
        for s in range(step, plan.n_steps):
            for micro_step in range(micro_steps):
                first = (micro_step * world_size + rank) * config.batch_size
                yield read_batch(train_data, order.windows(s, first, first + config.batch_size))

    # --- the run
    batches = Prefetch(train_batches())
    signals = StopSignals()
    peak, total_flops = peak_flops(device), summary["total"]["flops"]
    refresh = 0.5 if sys.stderr.isatty() else 30  # seconds: a log file need not hold every step
    bar = tqdm(total=plan.n_steps, initial=step, disable=not master, bar_format=BAR, mininterval=refresh, desc="evaluation")
    if step == 0:
        row = evaluate()
        if master:
            record(plan.phases[0], row)

    stops = False
    for phase in plan.phases:
        if phase.stop <= step or stops:
            continue

        # A phase: the blocks that it has, the parts of them that train, the optimizer, gradients in step over the ranks.
        model.grow(phase.n_blocks, config.seed)
        model.set_phase(phase)
        optimizer = make_optimizer(model, config, None if phase.reset_optimizer and step == phase.start else optimizer)
        check_replicas(model, step, hosts)  # now: DistributedDataParallel would silently make them equal
        # DistributedDataParallel fixes the set of trained parameters when it is made, so it is made anew; the former
        # one must be gone by then, with the hooks that it left on the parameters.
        parallel = None
        if world_size > 1:
            parallel = DDP(model, device_ids=[device] if on_gpu else None, gradient_as_bucket_view=True)
        flops_per_step = model.flops_per_token() * config.tokens_per_step
        bar.set_description(phase.name)
        reset_peak_memory(device)

        unread = []  # loss and gradient norm of the steps since the host last waited for the device
        interval_start, batches.waited = time.perf_counter(), 0.0
        while step < phase.stop and not stops:
            lr = schedule.learning_rate(step, plan, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if config.dropout:
                torch.manual_seed(derived_seed("dropout", config.seed, step, rank))  # so that a resumed run drops the same

            unread.append(update(parallel or model, optimizer, batches, micro_steps, precision, config.grad_clip))
            step += 1
            bar.update()

            logs = step % config.log_interval == 0
            evaluates = step % config.eval_interval == 0 or step == plan.n_steps
            saves = step % config.checkpoint_interval == 0 or step in milestones
            stops = signals.agreed(hosts)
            if not (logs or evaluates or saves or stops or step == phase.stop):
                continue

            # The only place where the host waits for the device.
            read = torch.stack(unread).tolist()
            unread.clear()
            elapsed = time.perf_counter() - interval_start
            seconds += elapsed
            for s, (loss, grad_norm) in enumerate(read, start=step - len(read) + 1):
                z = health.see(s, loss, grad_norm)
                if health.state["bad_in_a_row"] >= config.max_bad_steps:
                    files = ", ".join(train_data.files(order.windows(s - 1, 0, order.windows_per_step)))
                    raise UserError(
                        f"step {s}, which read {files}: loss {loss}, gradient norm {grad_norm}; the last {config.max_bad_steps} "
                        "updates were skipped. The last checkpoint is good: lower learning_rate, or look at the data"
                    )
            if logs or evaluates:
                row = {"loss": loss if math.isfinite(loss) else None, "loss_z": z, "lr": lr}
                row["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
                row |= {name: health.state[name] for name in ("bad_steps", "spikes")}
                row["tokens_per_second"] = round(len(read) * config.tokens_per_step / elapsed, 1)
                flops_per_second = len(read) * flops_per_step / elapsed
                row["mfu"] = flops_per_second / (peak * world_size) if peak else None
                row["data_wait"] = round(batches.waited / elapsed, 5)
                row["peak_memory"] = peak_memory(device)
                done = schedule.spent(plan, step, "flops", shape, config.tokens_per_step)
                eta = tqdm.format_interval((total_flops - done) / flops_per_second)
                bar.set_postfix_str(f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tok/s, ETA {eta}")
                if evaluates:
                    check_replicas(model, step, hosts)
                    row |= evaluate()
                if master:
                    record(phase, row)
            if master and (saves or stops):
                save()
            interval_start, batches.waited = time.perf_counter(), 0.0
        del parallel

    bar.close()
    if master:
        writer.close()
        metrics.close()
        if writer.failure:
            raise UserError(f"{writer.failure}: what was trained since the one before is lost; mend that, then --init_from=resume")
    if launched:
        if world_size > 1:
            dist.barrier(hosts)  # a process that ends makes torchrun end the others, the one that writes too
        dist.destroy_process_group()
    signals.restore()  # not before all is on the disk: a scheduler may signal more than once
    if stops:
        if master:
            print(f"{out_dir}: stopped at step {step:,} of {plan.n_steps:,}, all saved; the same command with --init_from=auto goes on")
        sys.exit(EXIT_STOPPED)
    if master:
        print(f"{out_dir}: finished at step {step:,} of {plan.n_steps:,}; python plot.py {out_dir} draws it")


# ---------------------------------------------------------------------------------------------------------------------
# set-up


TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}  # what torchrun sets, and what a single process is
BAR = "{desc:<16} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def update(model, optimizer, batches, micro_steps: int, precision: torch.autocast, grad_clip: float = 0.0):
    """One optimizer update: the gradient of the mean loss over `micro_steps` batches, clipped, then AdamW.

    model: a GPT, or one in DistributedDataParallel, which exchanges gradients on the last micro-step only. batches gives
    (inputs, targets), each (B, T). An update whose loss or gradient is not finite changes nothing. Returns loss and
    norm of the gradient, over all ranks, in a tensor (2,) on the model's device: nothing here waits for it.
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = (t.to(device, non_blocking=True) for t in next(batches))
        if isinstance(model, DDP):
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with precision:
            micro_loss = model(x, y) / micro_steps
        micro_loss.backward()
        loss += micro_loss.detach()
    if isinstance(model, DDP):
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    trained = [p for p in model.parameters() if p.grad is not None]
    if grad_clip:
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip)
    else:
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    read = torch.stack((loss, grad_norm))
    # AdamW's fused kernel leaves moments and parameters alone where this is 1, as it does for a GradScaler.
    optimizer.found_inf = read.isfinite().all().logical_not().float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return read


def join_processes(device: torch.device, rank: int, world_size: int, seconds: int) -> dist.ProcessGroup | None:
    """Start torch.distributed. Returns a group in which the processes meet on their hosts, not on their GPUs; None for one alone."""
    timeout, where = datetime.timedelta(seconds=seconds), {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun keeps one store for all restarts (torch 2.13): without a part of its own, a restarted rank finds the addresses
        # of those before it there, and waits for them.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout)
        own_part = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        where = dict(store=own_part, rank=rank, world_size=world_size)
    if device.type == "cuda":  # NCCL waits longer: when it gives up it ends the process without a word of ours
        dist.init_process_group("nccl", device_id=device, timeout=2 * timeout, **where)
    else:
        dist.init_process_group("gloo", timeout=timeout, **where)
    return dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None


def make_optimizer(model: GPT, config: cfg.Config, former: torch.optim.Optimizer | None = None) -> torch.optim.AdamW:
    """AdamW over all present parameters; `former`'s moments are carried over.

    Frozen parameters are in it too: they have no gradient, so AdamW neither moves nor decays them, and their moments wait
    for the phase that trains them again.
    """
    groups = model.param_groups(config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)
    if former is not None:
        optimizer.state.update(former.state)
    return optimizer


def check_resumable(checkpoint: dict, config: cfg.Config, shape, plan: schedule.Plan, n_windows: int) -> None:
    """Raise UserError where the run in the checkpoint is not the beginning of the run asked for.

    The model, the seed, the batch and the data must be the same, and so must the phases up to the checkpoint's step. All
    else may change: processes, micro-batch, rates, intervals, and how long the run still goes on.
    """
    step = checkpoint["step"]

    def identity(model_args, options, n_windows):
        fixed = {k: options[k] for k in ("seed", "tokens_per_step")} | {"windows of data": n_windows}
        return {k: v for k, v in model_args.items() if k != "dropout"} | fixed

    before = identity(checkpoint["model_args"], checkpoint["config"], checkpoint["n_windows"])
    now = identity(dataclasses.asdict(shape), dataclasses.asdict(config), n_windows)
    changed = [f"{k} {before[k]} -> {now[k]}" for k in now if before[k] != now[k]]
    if changed:
        raise UserError(f"{config.out_dir}: cannot resume with {', '.join(changed)}: use the former values, or another out_dir")

    def begun(phases):
        return [dataclasses.replace(p, stop=min(p.stop, step)) for p in phases if p.start < step]

    try:
        former = begun(schedule.Phase(**p) for p in checkpoint["phases"])
    except TypeError:
        raise UserError(f"{config.out_dir}: the newest checkpoint's plan is damaged: use an earlier one") from None
    if former != begun(plan.phases):
        raise UserError(
            f"{config.out_dir}: the schedule up to step {step} is not the one asked for: keep the run's own steps, stages and "
            "phases (continual_steps may grow)"
        )


def add_parameter_counts(summary: dict, plan: schedule.Plan, shape) -> None:
    """Add the number of parameters that train to every phase of a plan's summary."""
    model = GPT(shape, n_blocks=0, device="meta")
    for phase, row in zip(plan.phases, summary["phases"]):
        model.grow(phase.n_blocks, seed=0)
        model.set_phase(phase)
        row["trained_parameters"] = model.num_params(trainable_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# outputs


def write_plan(out_dir: Path, summary: dict) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_whole(out_dir / "plan.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be written ({error.strerror}): name another --out_dir") from None


def write_config(out_dir: Path, config: cfg.Config, shape, task: Path | None, train_tokens: int, world_size: int, device) -> None:
    """config.json: all options, what they came to, and what the run ran on, by what command, at its last start."""
    derived = {"vocab_size": shape.vocab_size, "hellaswag_file": str(task) if task else None, "train_tokens": train_tokens}
    machine = {"world_size": world_size, "device_name": device_name(device), "torch_version": torch.__version__}
    machine |= {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    start = {"command": shlex.join(["train.py", *sys.argv[1:]]), "date": datetime.date.today().isoformat()}
    try:
        write_whole(out_dir / "config.json", json.dumps(dataclasses.asdict(config) | derived | machine | start, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be written ({error.strerror}): make room, or name another --out_dir") from None


if __name__ == "__main__":
    with report_user_errors():
        main()
