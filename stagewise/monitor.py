"""Monitoring of a long run: non-finite losses, loss spikes, and signals to stop."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated

import numpy as np
from msgspec import Meta
from tqdm import tqdm

from stagewise.errors import UserError
from stagewise.fileio import convert

# Stopped by a signal, with everything saved. EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
WINDOW = 128  # number of previous losses for the z-score, as in llm.c
SPIKE = 6.0  # standard deviations


Loss = Annotated[float, Meta(ge=-4e38, le=4e38)]  # float32


@dataclass
class LossHistory:
    """State of a `LossMonitor`, saved in checkpoints so that a resumed run continues the counts."""

    skipped_steps: int = 0  # updates skipped because the loss or gradient was not finite
    skipped_in_a_row: int = 0
    spikes: int = 0
    losses: list[Loss] = field(default_factory=list)  # the last WINDOW finite ones


class LossMonitor:
    """Monitors the loss and the gradient norm of every step.

    Args:
        history: the result of `state()` from a checkpoint.
        quiet: if True, print no messages.

    Raises:
        UserError: if `history` is corrupted.
    """

    def __init__(self, history: dict | None = None, quiet: bool = False):
        self._print: Callable[[str], object] = (lambda line: None) if quiet else tqdm.write
        try:
            self.history = convert(history or {}, LossHistory)
        except ValueError as error:
            raise UserError(
                f"the checkpoint's loss history is corrupted ({error}): use an earlier checkpoint"
            ) from None

    def state(self) -> dict:
        return asdict(self.history)

    def update(self, step: int, loss: float, grad_norm: float) -> float | None:
        """Record a step and return the z-score of its loss.

        The z-score is the number of standard deviations by which the loss exceeds the mean of the
        previous WINDOW losses. It is None if the loss or the gradient norm is not finite, in which
        case the update was skipped, or if there are fewer than WINDOW previous losses.
        """
        h = self.history
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            h.skipped_steps += 1
            h.skipped_in_a_row += 1
            self._print(
                f"warning: step {step}: loss {loss}, gradient norm {grad_norm}: update skipped"
            )
            return None
        h.skipped_in_a_row = 0
        zscore = None
        if len(h.losses) == WINDOW:
            zscore = (loss - float(np.mean(h.losses))) / max(float(np.std(h.losses)), 1e-12)
            if zscore > SPIKE:
                h.spikes += 1
                self._print(
                    f"step {step}: loss {loss:.4f} is {zscore:.1f} standard deviations above the "
                    f"mean of the last {WINDOW}"
                )
        h.losses = [*h.losses, loss][-WINDOW:]
        return zscore


class StopSignals:
    """Records SIGTERM, SIGINT and SIGUSR1 for the training loop to check.

    Slurm can send SIGUSR1 before a time limit. A second SIGINT terminates the process immediately.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.caught: str | None = None  # name of the first signal
        self._interrupted: float | None = None  # when SIGINT came
        for number in self.NUMBERS:
            signal.signal(number, self._record)

    def ignore(self) -> None:
        """Ignore these signals from now on. Call it when everything is on disk.

        A scheduler may repeat its signal until the process has ended, which takes a moment.
        """
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def _record(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            # The terminal sends Ctrl-C to all processes, and a launcher may forward it. Two SIGINTs
            # within 0.5 seconds count as one.
            if self._interrupted is not None and now - self._interrupted > 0.5:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            self._interrupted = self._interrupted or now
        self.caught = self.caught or signal.Signals(number).name
