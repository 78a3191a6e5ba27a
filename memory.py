"""Estimate the memory of a training step per process from the sizes of its tensors.

    parameters       fp32 weights
    gradients        fp32 gradients of the trained parameters
    optimizer state  AdamW's two moments in fp32, of every parameter that has been trained
    activations      what autograd stores for one micro-batch, and the buffers of the loss

The first three are exact for DistributedDataParallel and a single process. Activations are those of
a step that is not compiled, with a fused attention kernel; a compiled step stores less. With
`sharding=zero1` or `fsdp`, the parameters, gradients and optimizer state are divided by the number
of processes, plus the tensors that FSDP2 gathers: with `zero1` all parameters; with `fsdp` the
embeddings, head and final norm, and the blocks in use. Not included: the CUDA context,
communication buffers and the allocator's fragmentation.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tabulate import tabulate

import growth
from cost import ParameterCounts
from schedule import Phase, Schedule

KINDS = {"ddp": "DDP", "zero1": "ZeRO-1", "fsdp": "FSDP"}  # values of --sharding
GATHERED_BLOCKS = 2  # FSDP2 gathers the next block during the computation of the current one


@dataclass(frozen=True)
class Memory:
    """Bytes per process."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def activation_bytes(phase: Phase, model_config, batch_size: int, bf16: bool) -> int:
    """Return the bytes that the forward pass of a micro-batch leaves for the backward pass.

    For N tokens and width d, a trained block stores these multiples of N d values (counted as in
    Korthikanti et al. 2022, arXiv:2205.05198, with fused attention, which does not store the
    attention matrix): inputs of both norms 2, outputs of both norms 2, queries, keys and values 3,
    attention output 1, input of GELU 4, output of GELU 4. In a frozen block that propagates the
    gradient, the products need no inputs: norms 2, attention 4, GELU 4. Other frozen blocks store
    nothing. With bf16 autocast, all but the inputs of the norms are bf16, and the products store
    bf16 copies of their weights. fp32 values per token: mean and rstd of each norm, and one of each
    attention head. The loss stores the gradient of its input and of the head's weight.

    Args:
        batch_size: sequences of block_size tokens in a micro-batch.
        bf16: whether matrix products use bf16 autocast.
    """
    c, d, V = model_config, model_config.n_embd, model_config.vocab_size
    N, low = batch_size * c.block_size, 2 if bf16 else 4
    gradient_passes = phase.train_embeddings
    stored = 8 * N if phase.train_embeddings else 0  # the token ids
    for i in range(phase.n_blocks):
        trained = i in phase.trained_blocks
        gradient_passes |= trained
        if gradient_passes:
            values = 4 * 2 + low * (14 if trained else 8)
            stored += N * d * values + 4 * N * (4 + c.n_head)
            stored += 2 * 12 * d * d if bf16 else 0
            masks = 3 if c.dropout else 0  # one byte per value of attention and MLP output
            stored += N * d * masks
    stored += 4 * N * d + 4 * 2 * N  # input and statistics of the final norm
    return stored + 4 * N * d + (4 * V * d if phase.train_head else 0)


def _loss_buffers(model_config, bf16, rows):
    """Return the bytes of a chunk of logits, its softmax and its gradient, and of the head in bf16.

    See `stagewise.loss`. In fp32, the gradient replaces the softmax. In bf16, logits and gradient
    have 2 bytes, and the softmax 4.
    """
    V = model_config.vocab_size
    return rows * V * 8 + (2 * V * model_config.n_embd if bf16 else 0)


def _with_state(schedule: Schedule) -> Iterator[tuple[Phase, set[str], list[bool]]]:
    """Yield each phase, and which parts and blocks have optimizer state during it."""
    parts: set[str] = set()
    blocks: list[bool] = []
    for phase in schedule.phases:
        if phase.optimizer_state == "reset":
            parts, blocks = set(), [False] * len(blocks)
        if not blocks:
            blocks = [False] * phase.n_blocks
        elif len(blocks) < phase.n_blocks:
            sources = growth.source_map(str(phase.growth), len(blocks), phase.n_blocks)
            copies = phase.optimizer_state == "copy"
            blocks = [
                (s.keep or copies) and bool(s.mix) and all(blocks[i] for i, _ in s.mix)
                for s in sources
            ]
        if phase.optimizer_state == "zero" and (parts or any(blocks)):
            parts, blocks = {"wte", "wpe", "ln_f"}, [True] * len(blocks)
        parts = parts | set(_trained_parts(phase))
        blocks = [has or i in phase.trained_blocks for i, has in enumerate(blocks)]
        yield phase, parts, blocks


def _trained_parts(phase):
    parts = ["ln_f"] + ["wpe"] * phase.train_embeddings
    return parts + ["wte"] * (phase.train_embeddings or phase.train_head)


def phase_memory(
    schedule: Schedule,
    model_config,
    batch_size: int,
    world_size: int = 1,
    sharding: str = "ddp",
    reduce_every_micro_batch: bool = False,
    bf16: bool = True,
    loss_rows: int = 0,
) -> list[Memory]:
    """Return the memory of each process in each phase of a schedule.

    If a step has several micro-batches, FSDP2 keeps the gradients of all parameters unsharded
    until the last one, unless `reduce_every_micro_batch` is set.

    Args:
        sharding: "ddp", "zero1" or "fsdp".
        loss_rows: rows of logits in memory at the same time: see `stagewise.loss.chunk_size`.
    """
    size = ParameterCounts.of(model_config)
    result = []
    for phase, parts, blocks in _with_state(schedule):
        outside = size.wte + size.wpe + size.ln_f
        n = outside + phase.n_blocks * size.block
        trained_outside = sum(getattr(size, part) for part in _trained_parts(phase))
        trained = trained_outside + len(phase.trained_blocks) * size.block
        state = sum(getattr(size, part) for part in parts) + sum(blocks) * size.block
        gathered = gathered_gradients = 0
        if sharding != "ddp" and world_size > 1:
            gathered = outside + min(GATHERED_BLOCKS, phase.n_blocks) * size.block
            if sharding == "zero1":
                gathered = n
            n, state = -(-n // world_size), -(-state // world_size)
            gathered_gradients = trained_outside
            gathered_gradients += min(GATHERED_BLOCKS, len(phase.trained_blocks)) * size.block
            one = phase.tokens_per_step == world_size * batch_size * model_config.block_size
            if not (one or reduce_every_micro_batch):
                gathered_gradients = trained
            trained = -(-trained // world_size)
        activations = activation_bytes(phase, model_config, batch_size, bf16)
        activations += _loss_buffers(model_config, bf16, loss_rows)
        result.append(
            Memory(4 * (n + gathered), 4 * (trained + gathered_gradients), 8 * state, activations)
        )
    return result


def memory_table(
    schedule: Schedule, model_config, batch_size: int, world_size: int, sharding: str, **options
) -> str:
    """Return a table of `phase_memory`: the parts for `sharding`, and the totals for all kinds.

    See `phase_memory` for the options.
    """
    memory = {
        kind: phase_memory(schedule, model_config, batch_size, world_size, kind, **options)
        for kind in KINDS
    }
    small = max(m.total for m in memory["ddp"]) < 2**30
    name, unit = ("MiB", 2**20) if small else ("GiB", 2**30)
    rows = []
    for i, phase in enumerate(schedule.phases):
        cells = [
            *dataclasses.astuple(memory[sharding][i]),
            *(memory[kind][i].total for kind in KINDS),
        ]
        rows.append([phase.name, *(f"{cell / unit:.2f}" for cell in cells)])
    header = [name, "params", "grads", "optim", "activ.", *(f"{x}\ntotal" for x in KINDS.values())]
    align = ("left", *("right",) * (len(header) - 1))
    return "\n".join(
        [
            tabulate(rows, header, "simple", colalign=align, disable_numparse=True),
            f"Estimated memory per process, for world size {world_size}. params to activ.: with "
            f"{KINDS[sharding]}.",
            "total: the sum, with each kind of --sharding, without the CUDA context.",
        ]
    )
