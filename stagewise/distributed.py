"""Processes of torch.distributed: joining, agreeing to stop, and checking that replicas are
equal."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stagewise.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a run."""

    rank: int = 0
    local_rank: int = 0  # among those of this machine
    world_size: int = 1
    launched: bool = False  # by torchrun, or with the environment that it sets

    @property
    def master(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Return what torchrun's environment variables say; a single process without them."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR")):
        return Ranks()
    rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    return Ranks(rank, local_rank, world_size, launched=True)


def init_process_group(
    device: torch.device, ranks: Ranks, timeout: int
) -> dist.ProcessGroup | None:
    """Start torch.distributed.

    Returns:
        A gloo group, over which the processes communicate without their GPUs; None if there is only
        one process.
    """
    delta = datetime.timedelta(seconds=timeout)
    rendezvous: dict[str, Any] = {}
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if own_store and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun keeps one store for all restarts (torch 2.13). Without a prefix of its own, a
        # restarted rank finds the addresses of the ranks before it, and waits for them.
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
        # NCCL waits longer: when it gives up, it ends the process without a message of ours.
        dist.init_process_group("nccl", device_id=device, timeout=2 * delta, **rendezvous)
    else:
        dist.init_process_group("gloo", timeout=delta, **rendezvous)
    return dist.new_group(backend="gloo", timeout=delta) if ranks.world_size > 1 else None


def any_rank_stopping(stopping: bool, gloo_group: dist.ProcessGroup | None) -> bool:
    """Return whether any process of the group is to stop; all get the same answer."""
    if gloo_group is None:
        return stopping
    flag = torch.tensor(float(stopping))
    dist.all_reduce(flag, dist.ReduceOp.MAX, gloo_group)
    return bool(flag)


@torch.no_grad()
def check_replicas(model: torch.nn.Module, step: int, gloo_group: dist.ProcessGroup | None) -> None:
    """Compare a checksum of every parameter over all ranks.

    Raises:
        UserError: naming the first parameter that is not the same on all ranks.
    """
    if gloo_group is None:
        return
    names, params = zip(*model.named_parameters())
    sums = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in params]).cpu()
    all_sums = [torch.empty_like(sums) for _ in range(dist.get_world_size(gloo_group))]
    dist.all_gather(all_sums, sums, gloo_group)
    for rank, theirs in enumerate(all_sums):
        if not torch.equal(theirs, all_sums[0]):
            name = names[int((theirs != all_sums[0]).nonzero()[0])]
            raise UserError(
                f"step {step}: {name} on rank {rank} differs from rank 0: the run stops; the last "
                "checkpoint is good"
            )
