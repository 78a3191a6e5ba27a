"""torch.distributed: initialization, sharded parameters, and checks that ranks agree.

With --sharding=zero1 and fsdp, every parameter and its optimizer state is a DTensor: each rank
holds a chunk of its rows (`Shard(0)`). Growth, freezing and the optimizer work on these as on plain
tensors. Only a training step or an evaluation needs full parameters; FSDP2 gathers them block by
block, and frees them after each use (fsdp) or after the step (zero1).
"""

import datetime
import gc
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from stagewise.errors import UserError

if TYPE_CHECKING:  # importing it takes seconds, so this module does so only where it is needed
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among all processes of a run."""

    rank: int = 0
    local_rank: int = 0  # on this node
    world_size: int = 1
    launched: bool = False  # by torchrun, or with the environment that it sets

    @property
    def master(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Return the ranks from torchrun's environment variables, or a single process without them.

    Raises:
        UserError: if only some of the variables are set, or one is invalid.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    # Schedulers and containers set some of these for a single process too.
    if len(given) < len(names) and given.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    hint = "start the processes with torchrun, or unset RANK and WORLD_SIZE for a single process"
    missing = ", ".join(name for name in names if name not in given)
    if missing:
        raise UserError(f"{', '.join(given)} set in the environment, but not {missing}: {hint}")
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,6}", given[name]):
            raise UserError(f"environment variable {name}={given[name]!r} is not a number: {hint}")
        numbers[name] = int(given[name])
    rank, local_rank, world_size, port = numbers.values()
    if not (rank < world_size and local_rank < world_size and 0 < port < 2**16):
        raise UserError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size}, MASTER_PORT={port} in "
            f"the environment: ranks must be below WORLD_SIZE, and the port below 65,536: {hint}"
        )
    return Ranks(rank, local_rank, world_size, launched=True)


def init_process_group(
    device: torch.device, ranks: Ranks, timeout: int
) -> dist.ProcessGroup | None:
    """Initialize torch.distributed.

    Returns:
        A gloo group, for collectives on CPU tensors, or None if there is only one process.
    """
    delta = datetime.timedelta(seconds=timeout)
    rendezvous: dict[str, Any] = {}
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if own_store and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun uses one store for all restarts (torch 2.13). Without a separate prefix, a
        # restarted rank would find the addresses of the previous ranks and wait for them.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            ranks.world_size,
            is_master=False,
            timeout=delta,
        )
        prefix = f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        rendezvous = dict(
            store=dist.PrefixStore(prefix, store), rank=ranks.rank, world_size=ranks.world_size
        )
    if device.type == "cuda":
        # A longer timeout for NCCL, which aborts the process without our error message.
        dist.init_process_group("nccl", device_id=device, timeout=2 * delta, **rendezvous)
    else:
        dist.init_process_group("gloo", timeout=delta, **rendezvous)
    return dist.new_group(backend="gloo", timeout=delta) if ranks.world_size > 1 else None


def destroy_process_groups() -> None:
    """Destroy all process groups, after their last collective."""
    # A thread of a gloo group may still have to destroy the last collective, for which it needs the
    # GIL. The destructor of the group holds the GIL while it waits for this thread (torch 2.13),
    # which would be a deadlock. Sleeping releases the GIL.
    time.sleep(0.1)
    dist.destroy_process_group()


def any_rank(flag: bool, gloo_group: dist.ProcessGroup | None) -> bool:
    """Return on all ranks whether `flag` is True on any rank of the group."""
    if gloo_group is None:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, gloo_group)
    return bool(flags)


def wait_while_any(busy: Callable[[], bool], gloo_group: dist.ProcessGroup | None) -> None:
    """Wait until `busy` returns False on all ranks, however long that takes.

    A rank that waits in a single collective operation ends after the timeout of the group.
    """
    while any_rank(busy(), gloo_group):
        time.sleep(0.1)


@torch.no_grad()
def check_replicas(model: torch.nn.Module, step: int, gloo_group: dist.ProcessGroup | None) -> None:
    """Compare a checksum of every parameter across all ranks, except sharded parameters.

    Raises:
        UserError: if the checksums differ. The message names the first such parameter.
    """
    replicated = {n: p for n, p in model.named_parameters() if not is_sharded(p)}
    if gloo_group is None or not replicated:
        return
    names, params = list(replicated), list(replicated.values())
    sums = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in params]).cpu()
    all_sums = [torch.empty_like(sums) for _ in range(dist.get_world_size(gloo_group))]
    dist.all_gather(all_sums, sums, gloo_group)
    for rank, theirs in enumerate(all_sums):
        if not torch.equal(theirs, all_sums[0]):
            name = names[int((theirs != all_sums[0]).nonzero()[0])]
            raise UserError(
                f"step {step}: {name} on rank {rank} differs from rank 0; stopping. Resume from "
                "the last checkpoint"
            )


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Replace `x` with its mean over all ranks, and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def set_gradient_sync(model: nn.Module, flag: bool, last: bool) -> None:
    """Select whether the next backward pass of a wrapped model reduces gradients over all ranks.

    Args:
        last: whether the optimizer changes the parameters after it, so that a copy that was
            gathered with `keep_gathered` must be freed.
    """
    if isinstance(model, DDP):
        model.require_backward_grad_sync = flag
    elif hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule
        model.set_requires_gradient_sync(flag)  # type: ignore[operator]
        model.set_reshard_after_backward(last or not model.keep_gathered)  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------
# sharded parameters


def make_mesh(device: torch.device, ranks: Ranks) -> "DeviceMesh | None":
    """Return a one-dimensional mesh of all ranks, or None if there is only one process."""
    if ranks.world_size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (ranks.world_size,))


def mesh_of(tensor: torch.Tensor) -> "DeviceMesh | None":
    """Return the mesh over which a tensor is sharded, or None if it is a plain tensor."""
    return getattr(tensor, "device_mesh", None)


def is_sharded(tensor: torch.Tensor) -> bool:
    return mesh_of(tensor) is not None


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor as a plain one, and a plain tensor itself.

    Collective if the tensor is sharded: all ranks must call it.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore


def shard(tensor: torch.Tensor, mesh: "DeviceMesh | None") -> torch.Tensor:
    """Return this rank's rows of a tensor that all ranks have, as a DTensor on the mesh's device.

    No communication is needed. Only these rows are read and copied to the device, so the tensor may
    be a file that is mapped into memory, as safetensors returns. Tensors without dimensions and,
    without a mesh, all tensors are returned as they are.
    """
    if mesh is None or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    chunk = -(-len(tensor) // mesh.size())  # as torch.chunk; the last ranks may have fewer rows
    rows = tensor[mesh.get_local_rank() * chunk :][:chunk].to(mesh.device_type, copy=True)
    return DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of `other` and, if `other` is sharded, sharded like it."""
    return shard(tensor, mesh_of(other)).to(other.device)


def allocate(module: nn.Module, device: torch.device | str, mesh: "DeviceMesh | None") -> None:
    """Allocate uninitialized parameters, sharded over `mesh`, for a module on the meta device.

    Like `torch.nn.Module.to_empty`, this unties tied parameters.
    """
    if mesh is None:
        module.to_empty(device=device)
        return
    from torch.distributed.tensor import Shard, empty

    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            sharded = empty(p.shape, dtype=p.dtype, device_mesh=mesh, placements=[Shard(0)])
            setattr(part, name, nn.Parameter(sharded))


def fully_shard(
    template: nn.Module, units: Iterable[nn.Module], model: nn.Module, keep_gathered: bool = False
) -> nn.Module:
    """Apply FSDP2 to `template`, and give it the sharded parameters of `model`.

    FSDP2 changes a module permanently, so that it cannot be grown afterwards. `model` is therefore
    not changed, and every phase gets a new template, which shares its parameters with `model`. No
    data is copied or communicated.

    Args:
        template: the same model on the meta device, with the same parameters frozen.
        units: the submodules that are gathered one at a time. All other parameters form a last
            unit, which is gathered for the whole forward and backward pass.
        keep_gathered: gather each unit once per step, and keep it until the last backward pass of
            the step; see `set_gradient_sync`. Otherwise it is freed after each use.
    """
    from torch.distributed.fsdp import fully_shard as fsdp2

    gc.collect()  # FSDP modules form reference cycles; the previous template holds gathered tensors
    mesh = mesh_of(next(model.parameters()))
    for unit in units:
        fsdp2(unit, mesh=mesh, reshard_after_forward=not keep_gathered)
    fsdp2(template, mesh=mesh, reshard_after_forward=False)
    template.keep_gathered = keep_gathered  # type: ignore[assignment]
    template.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return template
