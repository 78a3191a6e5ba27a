"""Guards of a run that lasts: signals to stop, numbers that go wrong, replicas that drift apart, processes that are lost."""

import math
import os
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError
from model import GPT

EXIT_STOPPED = 75  # stopped by a signal, all saved: the same command goes on with --init_from=auto. EX_TEMPFAIL of sysexits.h
WINDOW = 128  # losses that a spike is measured against, as in llm.c
SPIKE = 6.0  # standard deviations


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1, Slurm's warning, for the loop to see. A second SIGINT ends the process at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.caught = None  # name of the first signal
        self._interrupted = None  # when SIGINT came
        self._former = {number: signal.signal(number, self._note) for number in self.NUMBERS}

    def restore(self) -> None:
        """The former handlers again."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            # A launcher may pass on the Ctrl-C that the terminal has sent to all: two at once are one.
            if self._interrupted is not None and now - self._interrupted > 0.5:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            self._interrupted = self._interrupted or now
        self.caught = self.caught or signal.Signals(number).name

    def agreed(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any process was told to stop: all get the same answer. `group`'s processes meet on their hosts, not on GPUs."""
        if group is None:
            return self.caught is not None
        flag = torch.tensor(float(self.caught is not None))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
        return bool(flag)


class Health:
    """Follows loss and gradient norm of every step. Its `state` belongs in checkpoints: a resumed run goes on counting.

    Raises UserError where `state`, from a checkpoint, is none of its own.
    """

    def __init__(self, state: dict | None = None, quiet: bool = False):
        self.say = (lambda line: None) if quiet else tqdm.write
        self.state = {"bad_steps": 0, "bad_in_a_row": 0, "spikes": 0, "losses": []}
        if state is not None:
            losses = state.get("losses")
            good = state.keys() == self.state.keys() and isinstance(losses, list) and all(isinstance(x, float) for x in losses)
            if not good or not all(isinstance(state[name], int) for name in state.keys() - {"losses"}):
                raise UserError("the checkpoint's count of bad steps is damaged: use an earlier one")
            self.state = state

    def see(self, step: int, loss: float, grad_norm: float) -> float | None:
        """Take in a step; returns by how many standard deviations its loss is above the mean of the WINDOW before.

        None where the loss or the gradient was no number, so that the update was skipped, or where fewer losses came before.
        """
        s = self.state
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            s["bad_steps"] += 1
            s["bad_in_a_row"] += 1
            self.say(f"warning: step {step}: loss {loss}, gradient norm {grad_norm}: the update was skipped")
            return None
        s["bad_in_a_row"] = 0
        z = None
        if len(s["losses"]) == WINDOW:
            z = (loss - float(np.mean(s["losses"]))) / max(float(np.std(s["losses"])), 1e-12)
            if z > SPIKE:
                s["spikes"] += 1
                self.say(f"step {step}: the loss, {loss:.4f}, is {z:.1f} standard deviations above the last {WINDOW}")
        s["losses"] = [*s["losses"], loss][-WINDOW:]
        return z


@torch.no_grad()
def check_replicas(model: GPT, step: int, group: dist.ProcessGroup | None) -> None:
    """Compare a checksum of every parameter over the processes of `group`.

    Raises UserError naming the first parameter whose checksum is not the same on all ranks.
    """
    if group is None:
        return
    names, params = zip(*model.named_parameters())
    sums = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in params]).cpu()
    all_sums = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_sums, sums, group)
    for rank, theirs in enumerate(all_sums):
        if not torch.equal(theirs, all_sums[0]):
            name = names[int((theirs != all_sums[0]).nonzero()[0])]
            raise UserError(f"step {step}: {name} on rank {rank} is not what it is on rank 0: the run stops, the last checkpoint is good")
