"""What changes between the steps of a phase: skipped blocks, and learning rates of blocks.

A policy is data, stored in the phase, plus a pure function of the step. Therefore, the training
loop, the cost accounting and the figures see the same steps, and a resumed run continues exactly.

To add a policy for skipping blocks, write a function at the end of this file, decorate it with
``@skip_policy``, and select it with ``--skip_policy=NAME``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from stagewise.seeding import derived_uniform


@dataclass(frozen=True)
class SkipPolicy:
    """Selects the blocks to skip in each step, as a pure function of the seed and the step."""

    name: str  # one of SKIP_POLICIES
    rate: float
    n_steps: int  # T; the policy changes over the first T steps and then stays constant
    seed: int

    def residual_scales(self, n_blocks: int, step: int) -> tuple[float, ...]:
        """Return the scale of every block's residual branches. A block with scale 0 is skipped."""
        uniform = derived_uniform(n_blocks, "skip", self.seed, step)
        progress = min(1, step / max(1, self.n_steps - 1))
        return SKIP_POLICIES[self.name](uniform, progress, self.rate)


MIN_T_0 = 0.3  # below, the first block would start with more than 37 times the learning rate


@dataclass(frozen=True)
class FreezeOut:
    """Anneals the learning rate of each block to zero, from bottom to top, and then freezes it.

    Block i of L is annealed with a cosine until step t_i T, where t_i = (t_0 + (1 - t_0) i / L)^3,
    and starts with 1/t_i times the learning rate, so that all blocks move as far in total. The
    other parameters are annealed over all T steps, as the authors' last layer. This is the variant
    that the authors recommend: cubic and scaled (Brock et al. 2017, arXiv:1706.04983).
    """

    t_0: float
    n_steps: int  # T

    def end(self, i: int, n_blocks: int) -> float:
        """Return t_i T, the number of steps after which block `i` is frozen."""
        return self._fraction(i, n_blocks) * self.n_steps

    def _fraction(self, i, n_blocks):
        return (self.t_0 + (1 - self.t_0) * i / n_blocks) ** 3

    def rate_scales(self, n_blocks: int, step: int) -> tuple[float, ...]:
        """Return the factors on the learning rates of the blocks and, last, of the others."""
        scales = []
        for i in range(n_blocks + 1):
            annealed = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.end(i, n_blocks))))
            scales.append(annealed / self._fraction(i, n_blocks))
        return tuple(scales)


# --------------------------------------------------------------------------------------------------
# policies for skipping blocks: functions (uniform, progress, rate) -> residual scales. `uniform`
# contains a random number in [0, 1) for every block. `progress` increases from 0 to 1 over the
# stages.


SKIP_POLICIES: dict[str, Callable[[list[float], float, float], tuple[float, ...]]] = {}


def skip_policy(function):
    """Register a policy under its function name."""
    SKIP_POLICIES[function.__name__] = function
    return function


@skip_policy
def layer_dropout(uniform, progress, rate):
    """Skip deep blocks more often than shallow ones, and more in early steps (arXiv:2609.05275).

    Block l of L is skipped in step t of T with probability p = rate * l/(L-1) * (1 - t/(T-1)). The
    residual branches of a block that runs are scaled by 1/(1-p).
    """
    last = max(1, len(uniform) - 1)
    p = [rate * i / last * (1 - progress) for i in range(len(uniform))]
    return tuple(0.0 if u < q else 1 / (1 - q) for u, q in zip(uniform, p))


@skip_policy
def progressive_layer_dropping(uniform, progress, rate):
    """Skip deep blocks more often than shallow ones, and more in late steps (Zhang & He 2020).

    In step t of T, block l of L (counted from 0) runs with probability 1 - l/L (1 - theta), where
    theta = (1 - rate) + rate exp(-100 t/T). The residual branches of a block that runs are scaled
    by the inverse of that probability (progressive layer dropping, arXiv:2010.13369).
    """
    dropped = rate * (1 - math.exp(-100 * progress))  # 1 - theta
    p = [i / len(uniform) * dropped for i in range(len(uniform))]
    return tuple(0.0 if u < q else 1 / (1 - q) for u, q in zip(uniform, p))


@skip_policy
def subnetwork(uniform, progress, rate):
    """Run the first and the last block, and each of the others with the same probability.

    That probability is chosen so that a fraction of `rate` of all blocks is skipped on average
    (RAPTR, Panigrahi et al. 2024, arXiv:2402.05913, definition 2). The paper also scales the
    outputs of blocks. Its factors could not be found, so blocks are not scaled.
    """
    n = len(uniform)
    p = min(1.0, rate * n / max(1, n - 2))  # of skipping an inner block
    return tuple(0.0 if 0 < i < n - 1 and u < p else 1.0 for i, u in enumerate(uniform))
