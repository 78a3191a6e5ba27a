"""torch.distributed: initialization, a collective stop flag, and checks for equal replicas."""

import datetime
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stagewise.errors import UserError


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


def any_rank_stopping(stopping: bool, gloo_group: dist.ProcessGroup | None) -> bool:
    """Return on all ranks whether `stopping` is True on any rank of the group."""
    if gloo_group is None:
        return stopping
    flag = torch.tensor(float(stopping))
    dist.all_reduce(flag, dist.ReduceOp.MAX, gloo_group)
    return bool(flag)


@torch.no_grad()
def check_replicas(model: torch.nn.Module, step: int, gloo_group: dist.ProcessGroup | None) -> None:
    """Compare a checksum of every parameter across all ranks.

    Raises:
        UserError: if the checksums differ. The message names the first such parameter.
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
                f"step {step}: {name} on rank {rank} differs from rank 0; stopping. Resume from "
                "the last checkpoint"
            )
